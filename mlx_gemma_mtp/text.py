"""Text on both sides of the tokens: the chat template, streaming detokenisation, stop strings.

The tokenizer, its template and the streaming detokenizer are mlx-lm's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from .errors import UserError
from .weights import check_text_files

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]


class Text:
    """A model folder's tokenizer and chat template."""

    def __init__(self, folder: Path, media_token_ids: Sequence[int]):
        check_text_files(folder)
        self.tokenizer: TokenizerWrapper = _tokenizer(folder)
        self.media_token_ids = frozenset(media_token_ids)

    @property
    def fast_tokenizer(self) -> Any:
        """The transformers tokenizer below mlx-lm's wrapper."""
        return self.tokenizer._tokenizer

    def token_id(self, token: str) -> int:
        """The id of a special token. Raises UserError where the vocabulary has none of that name."""
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise UserError(
                f"the tokenizer has no token {token!r}, which a thinking budget needs; leave out the budget"
            )
        return found

    def encode(
        self,
        prompt: Prompt,
        system_prompt: str | None = None,
        chat_template: bool = True,
        thinking: bool = False,
    ) -> list[int]:
        """Token ids of a prompt: text (one user turn, or raw without the template), chat messages, or ids as they are.

        thinking: the template's switch. Raises UserError for an empty prompt and for image, audio or video parts.
        """
        if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
            tokens = [int(token) for token in prompt]
        elif isinstance(prompt, str) and not (chat_template and self.tokenizer.has_chat_template):
            tokens = self._raw(_whole(prompt), system_prompt)
        else:
            tokens = self._chat(prompt, system_prompt, thinking)
        self._check(prompt, tokens)
        return tokens

    def _raw(self, prompt: str, system_prompt: str | None) -> list[int]:
        if system_prompt:
            raise UserError(
                "a system prompt needs the chat template; put it into the prompt, or do not ignore the template"
            )
        return self.tokenizer.encode(prompt) if prompt else []

    def _chat(self, prompt: str | Sequence[Message], system_prompt: str | None, thinking: bool) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not any(_words(message) for message in messages):
            return []
        if system_prompt:
            messages = [{"role": "system", "content": system_prompt}, *messages]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=thinking)

    def _check(self, prompt: Prompt, tokens: list[int]) -> None:
        if not tokens:
            raise UserError(f"the prompt {prompt!r} is empty; expected some text")
        vocabulary = len(self.tokenizer)
        strange = [token for token in tokens if not 0 <= token < vocabulary]
        if strange:
            raise UserError(f"the prompt has token id {strange[0]}; expected 0 to {vocabulary - 1}")
        if self.media_token_ids.intersection(tokens):
            raise UserError("the prompt has an image, audio or video token; this package takes text alone")

    def stream(self, stop: Sequence[str]) -> TextStream:
        return TextStream(self.tokenizer.detokenizer, stop)


def _tokenizer(folder: Path) -> TokenizerWrapper:
    try:
        # The context is checked against the model's config, not against what the tokenizer's file says of it.
        return load_tokenizer(folder, {"model_max_length": sys.maxsize})
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder / 'tokenizer.json'} cannot be used ({reason}); download it again") from None


def _words(message: Message) -> str:
    """The text of a chat message. Raises UserError for parts that are not text."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return _whole(content)
    other = [part.get("type") for part in content if part.get("type") != "text"]
    if other:
        raise UserError(f"a message has a part of type {other[0]!r}; this package takes text alone")
    return "".join(_whole(part["text"]) for part in content)


def _whole(text: str) -> str:
    """The text, if it is valid Unicode (bytes of an argument that are not UTF-8 arrive as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt has {text[error.start]!r} at {error.start}, which is no character; give UTF-8"
        ) from None
    return text


class TextStream:
    """Tokens of one request in, text out: whole characters, and nothing that may turn out to be a stop string."""

    def __init__(self, detokenizer: StreamingDetokenizer, stop: Sequence[str]):
        self._detokenizer, self._stop = detokenizer, tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` releases. Sets `stopped` when a stop string is complete; the text ends before it."""
        self._detokenizer.add_token(token)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        text = self._detokenizer.text
        # A stop string that is only now complete starts after what was given.
        found = [at for at in (text.find(stop, self._given) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(text) if final else len(text) - self._held(text)
        piece, self._given = text[self._given : end], max(self._given, end)
        return piece

    def _held(self, text: str) -> int:
        """How many characters at the end could begin a stop string."""
        for size in range(min(self._longest_stop - 1, len(text) - self._given), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
