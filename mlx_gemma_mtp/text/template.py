"""The chat template: messages in, token ids out, and text in messages stays text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import UserError, in_a_line, shown
from ..files.safetensors import read_object
from .control import CLOSE, OPEN
from .messages import THOUGHT, Message
from .spelt import Spelt
from .tokenizer import TokenizerWrapper
from .tokenizer_files import OLD_TEMPLATE

WORDS = re.compile(r"\w+")
# Letters without case that no template trims, and that Python shows as they are where a template prints a list.
RARE = (range(0x12000, 0x1239A), range(0x20000, 0x2A6E0))


class Template:
    """A folder's chat template and the control tokens of its vocabulary.

    Text is data: a control string in a message, a name, a schema or a result is spelt out in ordinary tokens; control
    tokens are those that the template itself writes. So before it renders, a mark that occurs nowhere is put after
    each character with which control strings begin, wherever a caller's text has one. No control string begins in that
    text then, whatever the template trims, joins or writes in capitals. What was rendered is split at the control
    strings that are left, the marks are taken out, and each piece of text is encoded as a whole. Where no control
    string could come of the texts, they are rendered as they are: a template may look for such as `</think>` in them.
    """

    def __init__(self, tokenizer: TokenizerWrapper, folder: Path):
        """folder: its chat_template.json is the template where the tokenizer's own files have none."""
        self.tokenizer = tokenizer
        self.lock = Lock()  # the tokenizer keeps whether it spells control strings out
        self._known = Spelt()
        fast = tokenizer._tokenizer
        fast.chat_template = fast.chat_template or None  # no text, or an empty list, is no template
        if fast.chat_template is None and (folder / OLD_TEMPLATE).exists():
            fast.chat_template = read_object(folder / OLD_TEMPLATE).get("chat_template") or None
        self.exists = fast.chat_template is not None
        source = str(fast.chat_template)
        self._folds = "tool_responses" in source and "tool_call_id" not in source
        # Some conversions call Gemma's control tokens ordinary ones; then they could not be spelt out.
        added = {each.content: each.special for each in fast.added_tokens_decoder.values()}
        fast.add_tokens([name for name, special in added.items() if not special and _is_control(name)], True)
        self.control = {each.content: id for id, each in fast.added_tokens_decoder.items() if each.special}
        # The longest first, as the tokenizer finds them.
        self._names = sorted(filter(None, self.control), key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, self._names)) or "(?!)") + ")")
        firsts = sorted({name[0] for name in self._names if not name[0].isalnum()})
        self._firsts = re.compile("|".join(map(re.escape, firsts)) or "(?!)")
        self._never = frozenset(self.control.values()) - {fast.unk_token_id}  # what no text is encoded as

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
        allow_special: bool,
        continued: bool,
    ) -> list[int]:
        """Returns the token ids of normalised messages and tools.

        allow_special: lets control strings in them become control tokens. continued: ends within the last message, the
        assistant's. Raises UserError where the template raises anything.
        """
        mark, place = _rare(f"{messages!r}{tools!r}")
        given = [*messages[:-1], {"role": "assistant", "content": place}] if continued else messages
        given = _folded(given) if self._folds else given
        render = partial(self._guarded, given, tools, thinking, not continued)
        rendered = render("" if allow_special else mark)
        if not allow_special:  # else the template takes thoughts out of the assistant's text
            _check_complete(rendered.replace(mark, ""), messages[:-1] if continued else messages, tools)
            if mark in rendered and not self._spells_control([*map(dict, given), *(tools or ())]):
                rendered = self._as_meant(rendered, render(""), mark)
        if continued:
            head, found, _ = rendered.rpartition(place)
            if not found:
                raise UserError("the chat template leaves out the assistant's last message; expected one that goes on")
            rendered = head + _begun(self._with_marks(_without(messages[-1], "role"), "" if allow_special else mark))
        return self._tokens(rendered, mark)

    def _with_marks(self, value: Any, mark: str) -> Any:
        return mapped(lambda text: self._firsts.sub(rf"\g<0>{mark}", text), value) if mark else value

    def _guarded(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
        reply: bool,
        mark: str,
    ) -> str:
        """What the template renders of messages and tools in whose texts the mark stands, but not in the roles."""
        marked = [{"role": each["role"]} | self._with_marks(_without(each, "role"), mark) for each in messages]
        return self._render(marked, self._with_marks(tools, mark), thinking, reply)

    def _spells_control(self, leaves: Any) -> bool:
        """Whether something in these texts can become a control string, put together or not."""
        texts: list[str] = []
        mapped(lambda text: texts.append(text) or text, leaves)
        squeezed = "".join("".join(texts).casefold().split())
        return any(name.casefold() in squeezed for name in self._names)

    def _as_meant(self, rendered: str, plain: str, mark: str) -> str:
        """Returns what the template renders without marks, `plain`, where it looks for such as `</think>` in the texts
        and the marks hide that from it, unless other control strings stand there; else `rendered`.
        """
        if plain == rendered.replace(mark, "") or self._control.findall(plain) != self._control.findall(rendered):
            return rendered
        return plain

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool, reply: bool
    ) -> str:
        known = self.tokenizer._tokenizer.chat_template
        if isinstance(known, dict) and "default" not in known and not (tools and "tool_use" in known):
            raise UserError(
                f"this folder's chat templates are {', '.join(known)}, expected one that is 'default': put that into "
                "the folder as chat_template.jinja"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=reply, enable_thinking=thinking
            )
        except Exception as error:  # jinja's, or whatever the template's own code raises
            raise UserError(f"the chat template cannot render the messages ({in_a_line(error)}); mend them") from None

    def _tokens(self, rendered: str, mark: str) -> list[int]:
        pieces = self._control.split(rendered)  # text, control string, text, ...
        texts = [text.replace(mark, "") for text in pieces[::2]]
        with self.lock:
            encoded = self._known.of(texts, self._encoded)
        ids = encoded[0]
        for control, text in zip(pieces[1::2], encoded[1:], strict=True):
            ids += [self.control[control], *text]
        return ids

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of texts, no control token among them."""
        fast = self.tokenizer._tokenizer
        encoded = fast(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        encoded = [self._spelt(text, ids) for text, ids in zip(texts, encoded, strict=True)]
        fast.backend_tokenizer.encode_special_tokens = False
        return encoded

    def _spelt(self, text: str, ids: list[int]) -> list[int]:
        """Returns the ids of a text, which are `ids` unless the vocabulary has a control string among its pieces."""
        if self._never.isdisjoint(ids):
            return ids
        parts = self._control.sub(lambda found: f"{found[0][0]}\0{found[0][1:]}", text).split("\0")
        encode = self.tokenizer._tokenizer
        return [
            id
            for each in encode(parts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for id in each
        ]


def _is_control(token: str) -> bool:
    """Returns whether an added token looks like one of Gemma's control tokens. Tags of HTML do not."""
    return token.startswith("<|") or token.endswith("|>")


def mapped(change: Callable[[str], str], value: Any) -> Any:
    """Returns a copy of a JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(change, each) for key, each in value.items()}
    if isinstance(value, list):
        return [mapped(change, each) for each in value]
    return value


def _without(message: Message, key: str) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != key}


def _folded(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Puts what tools answer into the message that calls them, where Google's first template for Gemma 4 reads it: it
    makes a turn of its own, which no model was trained on, of a tool's message.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            answer = {"name": message["name"], "response": message["content"]}
            found[-1] = found[-1] | {"tool_responses": [*found[-1].get("tool_responses", []), answer]}
        else:
            found.append(dict(message))
    return found


def _begun(message: Message) -> str:
    """The assistant's last message as far as it goes: a thought without an answer is still open."""
    reasoning, content = message.get("reasoning"), message["content"].lstrip()
    if not reasoning:
        return content
    return f"{OPEN}{THOUGHT}\n{reasoning}" + (f"\n{CLOSE}{content}" if content else "")


def _check_complete(rendered: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Raises UserError where a template leaves out what a message says, a call or a tool: its longest word is nowhere.

    Templates for other purposes do, without a word. What they trim, quote or write in capitals is still there.
    """
    said = [(f"the {each['role']} message", each["content"]) for each in messages]
    called = [call["function"]["name"] for each in messages for call in each.get("tool_calls", ())]
    declared = [tool["function"]["name"] for tool in tools or ()]
    said += [("the tool call", name) for name in called] + [("the tool", name) for name in declared]
    rendered = rendered.casefold()
    for what, text in said:
        word = max(WORDS.findall(text), key=len, default="")
        if word.casefold() not in rendered:
            raise UserError(
                f"the chat template leaves out {what} {shown(text)}; leave it out, or give the model's folder a "
                "chat_template.jinja that renders it"
            )


def _rare(text: str) -> list[str]:
    """Returns two letters that do not occur in a text."""
    free = list(islice((letter for letter in map(chr, chain(*RARE)) if letter not in text), 2))
    if len(free) < 2:
        raise UserError("the messages have all of 43,000 rare letters; expected two that they do without: shorten them")
    return free
