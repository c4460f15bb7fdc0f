"""Text on both sides of the tokens: the chat template, streaming detokenisation, stop strings.

The tokenizer, its template and the streaming detokenizer are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError, shown
from ..sampling.params import check_unicode, flag, whole
from .control import CLOSE, OPEN
from .messages import Message, are_messages, checked_tools, is_empty, normalised
from .reply import Controls, Reply
from .template import Template
from .tokenizer import TokenizerWrapper, load
from .tokenizer_files import check_tokenizer, turn_closers
from .tools import Tools

BOS, TURN = "<bos>", "<|turn>"
Ids = Sequence[int] | np.ndarray | mx.array
Prompt = str | Message | Sequence[Message] | Ids


class Text:
    """The tokenizer and the chat template of a model folder.

    vocab_size: the model's; the tokenizer may have more tokens or fewer. media_token_ids: image, audio and video
    placeholders, which prompts may not hold. notice: told, once, that there is no template. end_token_ids: the
    tokenizer's own end of text, and what closes a turn. bos: the id that begins every text, or None.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        media_token_ids: Sequence[int] = (),
        notice: Callable[[str], None] = lambda message: None,
    ):
        check_tokenizer(folder)
        self.tokenizer: TokenizerWrapper = load(folder)
        self.known, self.vocab_size = len(self.tokenizer), vocab_size
        self.media_token_ids = frozenset(media_token_ids)
        self.template = Template(self.tokenizer, folder)
        control, eos = self.template.control, self.fast_tokenizer.eos_token_id
        self._controls = Controls.of(control)
        begins = self.fast_tokenizer.bos_token_id
        self.bos: int | None = control.get(BOS) if begins is None else begins
        closers = [control.get(token) for token in turn_closers(folder)]
        self.end_token_ids = frozenset(id for id in (eos, *closers) if id is not None and id < vocab_size)
        self._turn = control.get(TURN)  # None where the vocabulary has none
        self.notice, self._told = notice, False

    @property
    def fast_tokenizer(self) -> Any:
        """The transformers tokenizer below mlx-lm's wrapper."""
        return self.tokenizer._tokenizer

    def token_id(self, token: str, what: str) -> int:
        """Returns the id of a special token. what: needs it, in messages. Raises UserError where the vocabulary has no
        such token.
        """
        found = self.fast_tokenizer.backend_tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}, which {what} needs; leave that out")
        if found >= self.vocab_size:
            raise self._beyond(found, what)
        return found

    def check_grammar_fits(self) -> None:
        """Raises UserError where the tokenizer has more tokens than the model: a grammar allows any of them."""
        if self.known > self.vocab_size:
            raise UserError(
                f"the tokenizer has {self.known} tokens and the model {self.vocab_size}; expected no more than that "
                "for constrained decoding: take the tokenizer that came with the model"
            )

    def _beyond(self, token: int, what: str) -> UserError:
        name = self.tokenizer.convert_ids_to_tokens([token])[0]
        return UserError(
            f"{what} has {name!r}, token {token} of the tokenizer; expected 0 to {self.vocab_size - 1}, the model's "
            "vocabulary: take the tokenizer that came with the model"
        )

    @staticmethod
    def prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
        """Returns the prompts as a list, and whether a single one was given.

        prompt: text, a chat message, a list of messages, token ids, or a list of these. Raises UserError for anything
        else.
        """
        prompt = _plain(prompt)
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], (Mapping, Number))):
            return [prompt], True
        if message := next((each for each in prompt if isinstance(each, Mapping)), None):
            raise UserError(
                f"a list begins with {shown(prompt[0])} and has the message {shown(dict(message))}, expected messages "
                "alone, or a list of prompts: put the messages of each into a list of their own"
            )
        return [_plain(each) for each in prompt], False

    def encode(
        self,
        prompt: Prompt,
        system_prompt: str | None = None,
        chat_template: bool = True,
        thinking: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_special: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the token ids of a prompt. Text begins with one <bos>, whether it was written there or not.

        prompt: text, chat messages, or ids, which are only checked. chat_template: renders text as a user turn; False
        takes it raw, with the control tokens that it spells, and so does a folder without a template. thinking: the
        template's switch. tools: OpenAI's objects of type function, for the template. allow_special: takes control
        strings in messages and tools for control tokens, too; otherwise they are text. continue_final_message: the
        reply goes on with the last message, which is the assistant's. Raises UserError for an empty prompt, for
        messages that the template cannot render or that hold anything but text, and for ids that the model or the
        tokenizer does not have.
        """
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise UserError(f"system_prompt is {shown(system_prompt)}, expected text")
        system_prompt = system_prompt and check_unicode("the system prompt", system_prompt)
        flag("allow_special", allow_special)
        flag("continue_final_message", continue_final_message)
        prompt = _plain(prompt)
        if are_messages(prompt) or (isinstance(prompt, str) and chat_template and self.template.exists):
            tokens = self._chat(prompt, system_prompt, thinking, tools, allow_special, continue_final_message)
        else:
            for name, given in (("tools", tools), ("continue_final_message", continue_final_message)):
                if given:
                    raise UserError(f"{name} is given without messages; expected them, and a chat template")
            raw = isinstance(prompt, str)
            tokens = self._raw(prompt, system_prompt, chat_template) if raw else _ids(prompt, system_prompt)
        self._check(prompt, tokens)
        return tokens

    def _chat(
        self,
        prompt: str | Sequence[Any],
        system_prompt: str | None,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        allow_special: bool,
        continued: bool,
    ) -> list[int]:
        if not self.template.exists:
            raise UserError(
                "this model's folder has no chat template, which messages need; give text, or put the template of its "
                "model into the folder as chat_template.jinja"
            )
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages, tools = normalised(given, thoughts=not allow_special), checked_tools(tools)
        if continued:
            _check_continues(messages)
        if is_empty(messages):
            return []
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        tokens = self.template.encode(messages, tools, thinking, allow_special, continued)
        return tokens if self.bos in tokens and not allow_special else self._begun(tokens)  # it wrote one, anywhere

    def _raw(self, prompt: str, system_prompt: str | None, chat_template: bool) -> list[int]:
        if system_prompt:
            fix = "do not ignore it" if self.template.exists else "add the folder's, which has none"
            raise UserError(f"a system prompt needs the chat template; put it into the prompt, or {fix}")
        with self.template.lock:
            tell, self._told = chat_template and not self._told, self._told or chat_template
        if tell:
            self.notice("this model's folder has no chat template: prompts go to the model as they are")
        check_unicode("the prompt", prompt)
        if not prompt:
            return []
        return self._begun(self.spelled(prompt, add_special_tokens=self.bos is None))

    def spelled(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of text as it stands, the control tokens that it spells among them.

        add_special_tokens: adds those that the tokenizer begins and ends a text with. Every thread may call this: the
        tokenizer's own encode would, meanwhile, make control tokens of another thread's chat messages.
        """
        with self.template.lock:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _begun(self, tokens: list[int]) -> list[int]:
        """Tokens of text, behind one <bos>: Google's tokenizer adds none, and most templates write one."""
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    def borders(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Returns where turns begin in a prompt, rising."""
        return tuple(i for i, token in enumerate(ids) if token == self._turn)

    def opens_thought(self, ids: Sequence[int]) -> bool:
        """Returns whether a prompt ends within an open thought: the reply goes on with it."""
        opening = self.template.control.get(OPEN)
        marks = {opening, *self.end_token_ids, *map(self.template.control.get, (CLOSE, TURN))}
        return next((token == opening for token in reversed(ids) if token in marks), False)

    def _check(self, prompt: Prompt, tokens: list[int]) -> None:
        if not tokens:
            raise UserError(f"the prompt {shown(prompt)} is empty; expected some text")
        vocabulary = min(self.known, self.vocab_size)
        strange = [token for token in tokens if not 0 <= token < vocabulary]
        if strange and 0 <= strange[0] < self.known:
            raise self._beyond(strange[0], "the prompt")
        if strange:
            raise UserError(f"the prompt has token id {shown(strange[0])}; expected 0 to {vocabulary - 1}")
        if self.media_token_ids.intersection(tokens):
            raise UserError("the prompt has an image, audio or video token; this package takes text alone")

    def stream(self, stop: Sequence[str], tools: Tools | None = None, in_thought: bool = False) -> Reply:
        """Returns a new Reply. stop: strings that end the text. tools: the caller's; without any, calls stay text.
        in_thought: whether the prompt opened a thought.
        """
        return Reply(lambda: self.tokenizer.detokenizer, stop, self.known, self._controls, tools, in_thought)


def _plain(prompt: Any) -> str | list[Any]:
    """Text, or a list of messages, of ids or of prompts, whatever kind of sequence it comes in."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return [prompt]
    if isinstance(prompt, (np.ndarray, mx.array)) and prompt.ndim:
        return prompt.tolist()
    if isinstance(prompt, (list, tuple)) and _are_ints(prompt):
        return list(prompt)
    if isinstance(prompt, (Sequence, Iterator)) and not isinstance(prompt, (bytes, bytearray, memoryview)):
        return [each.item() if isinstance(each, (np.ndarray, mx.array)) and not each.ndim else each for each in prompt]
    raise UserError(f"a prompt is {shown(prompt)}, expected text, chat messages or token ids")


def _are_ints(some: Sequence[Any]) -> bool:
    """Returns whether these are Python's whole numbers and nothing else, in a step of the interpreter for each: a
    prompt of an agent has tens of thousands of ids.
    """
    return set(map(type, some)) == {int}


def _check_continues(messages: Sequence[Message]) -> None:
    """Raises UserError where a reply cannot go on with the last message."""
    last = messages[-1] if messages else {"role": None}
    if last["role"] != "assistant":
        raise UserError(
            f"continue_final_message is given and the last message has the role {shown(last['role'])}, expected "
            "'assistant', whose message the reply goes on with"
        )
    if "tool_calls" in last:
        raise UserError(
            "continue_final_message is given and the last message has tool_calls, expected text alone: calls are whole"
        )


def _ids(prompt: Sequence[Any], system_prompt: str | None) -> list[int]:
    if system_prompt:
        raise UserError("a system prompt comes with token ids, expected text or messages; put its ids before them")
    if _are_ints(prompt):
        return list(prompt)
    return [whole("a token id of the prompt", each, lambda _: True, "a whole number") for each in prompt]
