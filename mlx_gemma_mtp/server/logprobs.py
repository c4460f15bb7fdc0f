"""Log-probabilities as OpenAI writes them, for the tokens of a reply's text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..engine.request import Chunk, Result
from .channels import TEXT, Channels

if TYPE_CHECKING:
    from ..speculative.readback import TokenLogprob
    from ..text.encode import Text

LEAST = -9999.0  # for what no JSON says: minus infinity
Spell = Callable[[int], bytes]


def speller(text: Text) -> Spell:
    """Returns a function that tells the bytes of a token."""
    tokenizer = text.fast_tokenizer

    @lru_cache(maxsize=1 << 16)
    def spell(token: int) -> bytes:
        piece = tokenizer.convert_ids_to_tokens(token) or ""
        if len(piece) == 6 and piece.startswith("<0x"):  # a byte of a character
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    return spell


@dataclass(frozen=True)
class Entry:
    """A token of the text, its log-probability, and the likeliest tokens at its place with theirs."""

    spelled: bytes
    logprob: float
    top: list[tuple[bytes, float]]

    def as_chat(self) -> dict[str, Any]:
        """Returns the entry of a chat's logprobs."""
        top = [_named(spelled, logprob) for spelled, logprob in self.top]
        return _named(self.spelled, self.logprob) | {"top_logprobs": top}


def _named(spelled: bytes, logprob: float) -> dict[str, Any]:
    return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}


class Report:
    """The log-probabilities of one reply, as its text is given away.

    An entry comes with the text of its token, so the entries of a text joined are the text: tokens of thoughts, calls
    and stop strings have none. White space that is dropped beside a thought or a call has none either.
    """

    def __init__(self, spell: Spell, channels: Channels):
        self._spell, self._channels = spell, channels
        self._tokens: deque[TokenLogprob] = deque()
        self._text = b""  # that was given away and has no entry yet

    def take(self, chunk: Chunk) -> list[Entry]:
        """Returns the entries of a chunk's text."""
        for each in chunk.logprobs or ():
            if self._channels.of(each.token) == TEXT:
                self._tokens.append(each)
        self._text += chunk.text.encode()
        found = []
        while self._tokens and self._text:
            spelled = self._spell(self._tokens[0].token)
            if self._text.startswith(spelled):
                found.append(self._entry(self._tokens.popleft(), spelled))
                self._text = self._text[len(spelled) :]
            elif spelled.startswith(self._text) and chunk.result is None:
                break  # the rest of the token is held back
            else:
                self._tokens.popleft()
        return found

    def whole(self, result: Result) -> list[Entry]:
        """Returns the entries of a whole text."""
        return self.take(Chunk(0, result.text, result.tokens, result, result.logprobs))

    def _entry(self, each: TokenLogprob, spelled: bytes) -> Entry:
        top = [(self._spell(token), max(logprob, LEAST)) for token, logprob in each.top]
        return Entry(spelled, max(each.logprob, LEAST), top)


def chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    """Returns the logprobs of a chat's choice."""
    return {"content": [entry.as_chat() for entry in entries], "refusal": None}


def completion_logprobs(entries: Sequence[Entry], offset: int) -> dict[str, Any]:
    """Returns the logprobs of a text completion's choice. offset: characters before the first entry."""
    tokens = [entry.spelled.decode(errors="replace") for entry in entries]
    offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]
    tops = [{spelled.decode(errors="replace"): each for spelled, each in entry.top} for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
