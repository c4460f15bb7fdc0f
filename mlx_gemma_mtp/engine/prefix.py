"""Prefixes in memory: the K/V of beginnings that come again, under a budget of bytes. Arrays are only carried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from ..cache.saved import Saved

OnKeep = Callable[[Sequence[int], Saved, str | None], None]


class Kind(Enum):
    """What a prefix is the beginning of.

    BORDER: of several prompts, such as a system message; it goes by its last use alone. PROMPT: of a conversation's
    next turn; one that goes on from it makes it the first to go. REPLY: a prompt and its reply, up to an exact token.
    """

    BORDER = auto()
    PROMPT = auto()
    REPLY = auto()


@dataclass(eq=False)
class Entry:
    """A prefix that is kept. tokens: int32 [n], what `saved` holds K/V of. least: the fewest of them that may be used
    by themselves: with fewer, sliding layers would miss some of the window.
    """

    tokens: np.ndarray
    saved: Saved
    salt: str | None
    kind: Kind
    least: int


@dataclass
class Counts:
    """What prefixes were worth. hits, misses: of `find`. tokens: that hits spared. kept, evicted: prefixes."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0
    kept: int = 0
    evicted: int = 0


class Prefixes:
    """Prefixes by their tokens. Those of one salt are nothing to another; the least recently used goes first.

    Everything but `known` is the worker's thread's. What was found may be used after it has gone from here.

    limit: bytes that all may take. grid: tokens that a prefix which is only begun with is rounded down to, so that what
    follows it is computed in the pieces of a prompt that is read from its first token. windows: for each layer that
    owns K/V how many positions before it a token sees, None for all. on_keep: called with a prefix that is kept anew.
    """

    def __init__(self, limit: int, grid: int, windows: Sequence[int | None], on_keep: OnKeep | None = None):
        self.limit, self.grid, self.windows, self.on_keep = limit, grid, tuple(windows), on_keep
        self.counts = Counts()
        self._room = limit  # bytes that all may take now
        self._entries: tuple[Entry, ...] = ()  # the first to go first; `known` reads it as it is

    @property
    def bytes(self) -> int:
        return sum(entry.saved.bytes for entry in self._entries)

    @property
    def room(self) -> int:
        """The bytes that all may take now."""
        return self._room

    def known(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Returns how many of a prompt's tokens `find` would find. Any thread may ask."""
        return max((self._usable(entry, each) for entry, each in self._alike(tokens, salt)), default=0)

    def find(self, tokens: Sequence[int], salt: str | None = None) -> Saved | None:
        """Returns the K/V of the longest prefix of a prompt, as views; None where nothing of it is kept. At least one
        token of the prompt is left to be computed.
        """
        found = [(self._usable(entry, each), entry) for entry, each in self._alike(tokens, salt)]
        usable, entry = max(found, key=lambda each: each[0], default=(0, None))
        if not usable:
            self.counts.misses += 1
            return None
        self._order([each for each in self._entries if each is not entry] + [entry])
        self.counts.hits += 1
        self.counts.tokens += usable
        return entry.saved if usable == entry.saved.tokens else entry.saved.first(usable)

    def common(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Returns how many tokens, rounded down to the grid, a prompt has in common with a prompt that was kept: where
        they part there may be more to come, be it kept or not.
        """
        alike = [each for entry, each in self._alike(tokens, salt) if entry.kind is not Kind.REPLY]
        return max(alike, default=0) // self.grid * self.grid

    def makes_room(self, tokens: Sequence[int], salt: str | None, size: int, kind: Kind = Kind.BORDER) -> bool:
        """Returns whether a prefix is to be kept: there is none like it, and its bytes fit, for which others go.

        A reply does not drive out its own prompt: the next turn may leave the reply's thoughts out.
        """
        new = _array(tokens)
        if any(len(entry.tokens) == len(new) == each for entry, each in self._common(new, salt)):
            return False
        own = [entry for entry, each in self._common(new, salt) if kind is Kind.REPLY and each == len(entry.tokens)]
        mine = sum(entry.saved.bytes for entry in own)
        if size + mine > self._room:
            return False
        self._evict(self._room - size, own)
        return True

    def keep(self, tokens: Sequence[int], saved: Saved, salt: str | None = None, kind: Kind = Kind.BORDER) -> bool:
        """Keeps a prefix, where `makes_room` says so. Returns whether it does.

        saved: contiguous arrays of its own, evaluated, of exactly these tokens.
        """
        assert len(tokens) == saved.tokens, f"K/V of {saved.tokens} tokens for {len(tokens)}"
        if not self.makes_room(tokens, salt, saved.bytes, kind):
            return False
        new = Entry(_array(tokens), saved, salt, kind, self._least(saved))
        first: list[Entry] = []
        if kind is Kind.PROMPT:  # the conversation goes on from here
            alike = self._common(new.tokens, salt)
            first = [entry for entry, each in alike if each == len(entry.tokens) and entry.kind is not Kind.BORDER]
        self._order([*first, *(entry for entry in self._entries if entry not in first), new])
        self.counts.kept += 1
        if self.on_keep is not None:
            self.on_keep(tokens, saved, salt)
        return True

    def resize(self, room: int) -> None:
        """Says how many bytes all may take from now on, the limit at most. The first to go give theirs back."""
        self._room = max(0, min(self.limit, room))
        self._evict(self._room)

    def clear(self) -> None:
        """Gives all bytes back."""
        self._order([])

    def _evict(self, room: int, own: Sequence[Entry] = ()) -> None:
        """Drops prefixes until the others take at most `room` bytes. own: these stay."""
        held, entries = self.bytes, list(self._entries)
        for entry in self._entries:
            if held <= room:
                break
            if entry not in own:
                entries.remove(entry)
                held -= entry.saved.bytes
                self.counts.evicted += 1
        self._order(entries)

    def _order(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)

    def _alike(self, tokens: Sequence[int], salt: str | None) -> list[tuple[Entry, int]]:
        """Returns with how many tokens of each prefix a prompt begins, but for its last token."""
        return self._common(_array(tokens)[:-1], salt)

    def _common(self, tokens: np.ndarray, salt: str | None) -> list[tuple[Entry, int]]:
        return [(entry, _common(entry.tokens, tokens)) for entry in self._entries if entry.salt == salt]

    def _usable(self, entry: Entry, common: int) -> int:
        """Returns how many tokens of a prefix may be used where so many are those of a prompt."""
        if common == len(entry.tokens):
            return common
        whole = common // self.grid * self.grid
        return whole if whole >= entry.least else 0

    def _least(self, saved: Saved) -> int:
        """Returns the fewest tokens of a prefix that its sliding layers hold a window of."""
        least = 0
        for arrays, window in zip(saved.layers, self.windows, strict=True):
            first = saved.tokens - arrays[0].shape[2]  # the first position that the layer holds
            if first:
                least = max(least, first + window)
        return least


def _array(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Returns with how many equal tokens two sequences begin."""
    count = min(len(one), len(other))
    different = one[:count] != other[:count]
    return int(different.argmax()) if different.any() else count
