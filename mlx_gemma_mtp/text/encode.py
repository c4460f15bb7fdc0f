"""Text on both sides of the tokens: the chat template, streaming detokenisation, stop strings.

The tokenizer, its template and the streaming detokenizer are mlx-lm's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError, in_a_line, shown
from ..sampling.params import check_unicode, whole
from .stream import TextStream
from .thinking import CLOSE, OPEN
from .tokenizer import TokenizerWrapper, load
from .tokenizer_files import check_tokenizer

Message = Mapping[str, Any]
Ids = Sequence[int] | np.ndarray | mx.array
Prompt = str | Message | Sequence[Message] | Ids


class Text:
    """The tokenizer and the chat template of a model folder.

    vocab_size: the model's; the tokenizer may have more tokens or fewer. media_token_ids: image, audio and video
    placeholders, which prompts may not hold.
    """

    def __init__(self, folder: Path, vocab_size: int, media_token_ids: Sequence[int] = ()):
        check_tokenizer(folder)
        self.tokenizer: TokenizerWrapper = load(folder)
        self.known, self.vocab_size = len(self.tokenizer), vocab_size
        last = max(self.tokenizer.get_vocab().values(), default=-1)
        if last >= self.known:
            raise UserError(
                f"the tokenizer in {folder} has {self.known} tokens and the id {last}; expected ids without gaps: "
                "download or convert the folder again"
            )
        self.media_token_ids = frozenset(media_token_ids)

    @property
    def fast_tokenizer(self) -> Any:
        """The transformers tokenizer below mlx-lm's wrapper."""
        return self.tokenizer._tokenizer

    def token_id(self, token: str) -> int:
        """Returns the id of a special token. Raises UserError where the vocabulary has no such token."""
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise UserError(
                f"the tokenizer has no token {token!r}, which a thinking budget needs; leave out the budget"
            )
        if found >= self.vocab_size:
            raise self._beyond(found, "a thinking budget")
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
        """Returns the token ids of a prompt.

        prompt: text, chat messages, or ids, which are only checked. chat_template: renders text as a user turn; False
        takes it raw. thinking: the template's switch. tools: OpenAI's objects of type function, for the template.
        allow_special: lets control strings inside messages become control tokens. continue_final_message: goes on with
        the last message, which is the assistant's. Raises UserError for an empty prompt, for image, audio or video
        parts, and for ids that the model or the tokenizer does not have.
        """
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise UserError(f"system_prompt is {shown(system_prompt)}, expected text")
        system_prompt = system_prompt and check_unicode("the system prompt", system_prompt)
        prompt = _plain(prompt)
        if isinstance(prompt, str) and not (chat_template and self.tokenizer.has_chat_template):
            tokens = self._raw(check_unicode("the prompt", prompt), system_prompt)
        elif isinstance(prompt, str) or any(isinstance(part, Mapping) for part in prompt):
            tokens = self._chat(prompt, system_prompt, thinking, tools)
        else:
            tokens = self._as_they_are(prompt, system_prompt)
        self._check(prompt, tokens)
        return tokens

    def _as_they_are(self, prompt: Sequence[Any], system_prompt: str | None) -> list[int]:
        if system_prompt:
            raise UserError("a system prompt comes with token ids, expected text or messages; put its ids before them")
        return [whole("a token id of the prompt", each, lambda _: True, "a whole number") for each in prompt]

    def _raw(self, prompt: str, system_prompt: str | None) -> list[int]:
        if system_prompt:
            raise UserError(
                "a system prompt needs the chat template; put it into the prompt, or do not ignore the template"
            )
        return self.tokenizer.encode(prompt) if prompt else []

    def opens_thought(self, ids: Sequence[int]) -> bool:
        """Returns whether a prompt ends within an open thought: the reply goes on with it."""
        vocabulary = self.tokenizer.get_vocab()
        opening, closing = vocabulary.get(OPEN), vocabulary.get(CLOSE)
        marks = [token for token in ids if token in (opening, closing)]
        return bool(marks) and marks[-1] == opening

    def _chat(
        self,
        prompt: str | Sequence[Message],
        system_prompt: str | None,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not any([_words(message) for message in messages]):  # each is checked
            return []
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
            )
        except Exception as error:  # jinja's, whatever the template's own code raises, or transformers' without one
            raise UserError(f"the chat template cannot render the messages ({in_a_line(error)}); mend them") from None

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

    def stream(self, stop: Sequence[str]) -> TextStream:
        """Returns a new TextStream. stop: strings that end the text."""
        return TextStream(self.tokenizer.detokenizer, stop, self.known)


def _plain(prompt: Any) -> str | list[Any]:
    """Text, or a list of messages, of ids or of prompts, whatever kind of sequence it comes in."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return [prompt]
    if isinstance(prompt, (np.ndarray, mx.array)) and prompt.ndim:
        return prompt.tolist()
    if isinstance(prompt, (Sequence, Iterator)) and not isinstance(prompt, (bytes, bytearray, memoryview)):
        return list(prompt)
    raise UserError(f"a prompt is {shown(prompt)}, expected text, chat messages or token ids")


def _words(message: Any) -> str:
    """The text of a chat message. Raises UserError for what is no message and for parts that are not text."""
    if not isinstance(message, Mapping):
        raise UserError(f"a message is {shown(message)}, expected an object with role and content")
    if not isinstance(message.get("role"), str):
        raise UserError(f"a message has the role {shown(message.get('role'))}, expected text such as 'user'")
    content = message.get("content") or ""
    if isinstance(content, str):
        return check_unicode("the prompt", content)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise UserError(f"a message's content is {shown(content)}, expected text or a list of text parts")
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = shown(part.get("type") if isinstance(part, Mapping) else part)
        raise UserError(f"a message has a part of type {kind}, expected text, which alone this package takes")
    if not isinstance(part.get("text"), str):
        raise UserError(f"a text part of a message has the text {shown(part.get('text'))}, expected a string")
    return check_unicode("the prompt", part["text"])
