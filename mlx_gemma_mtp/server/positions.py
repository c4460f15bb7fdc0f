"""Which draft each piece of a streamed text comes from."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from .channels import TEXT, Channels

if TYPE_CHECKING:
    from ..engine.request import Chunk
    from .logprobs import Spell

OWN = 0  # the position of a token that is the target's own; drafts count from 1


class Positions:
    """The draft positions of one reply, as its text is given away.

    The pieces of an event joined are the text that came with it. A character that several tokens spell belongs to the
    last of them. Thoughts and calls have no pieces; their tokens and drafts count all the same.
    """

    def __init__(self, spell: Spell, channels: Channels):
        self._spell, self._channels = spell, channels
        self._tokens: deque[tuple[bytes, int]] = deque()  # spelled, not given away yet; with their positions

    def take(self, chunk: Chunk) -> dict[str, Any] | None:
        """Returns what a round gave, None for a chunk that has nothing of one.

        As in usage, what ends a reply is never a draft.
        """
        for place, token in enumerate(chunk.tokens, 1):
            if self._channels.of(token) == TEXT:
                self._tokens.append((self._spell(token), place if place <= chunk.accepted else OWN))
        if not chunk.tokens and not chunk.text and not chunk.drafted:
            return None
        counts = {"tokens": len(chunk.tokens), "drafted": chunk.drafted, "accepted": chunk.accepted}
        return counts | {"pieces": self._pieces(chunk.text.encode())}

    def _pieces(self, text: bytes) -> list[list[Any]]:
        """The text in pieces with their positions; null for what no token spells."""
        found: list[list[Any]] = []
        held = b""  # the beginning of a character
        while text and self._tokens:
            spelled, place = self._tokens.popleft()
            same = min(len(spelled), len(text))
            if text[:same] != spelled[:same]:
                continue  # it is no part of the text: white space that was dropped, or a stop string
            held, text = held + text[:same], text[same:]
            if same < len(spelled):
                self._tokens.appendleft((spelled[same:], place))  # the rest is held back
            try:
                found.append([held.decode(), place])
                held = b""
            except UnicodeDecodeError:
                continue
        if held or text:
            found.append([(held + text).decode(), None])
        return found
