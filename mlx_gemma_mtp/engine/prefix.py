"""Prefixes in memory: the K/V of beginnings that come again, under a budget of bytes. Arrays are only carried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from ..cache.saved import Saved

MOST = 256  # prefixes: each is compared with every prompt
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
    """A prefix that is kept. tokens: int32 [n], what `saved` holds K/V of. size: its bytes. least: the fewest tokens
    that may be used by themselves: with fewer, sliding layers would miss some of the window. prefilled: so many of the
    first ones were; the others were decoded.
    """

    tokens: np.ndarray
    saved: Saved
    size: int
    salt: str | None
    kind: Kind
    least: int
    prefilled: int

    def exact(self, common: int) -> bool:
        """Whether a text that has so many tokens of these may go on behind the last of them, wherever the grid is: they
        are all, or it was decoded.
        """
        return common > self.prefilled or common == len(self.tokens)


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

    limit: bytes that all may take. bytes: of all. grid: tokens that a prompt which is only begun with is rounded down
    to, so that what follows it is computed in the pieces of a prompt that is read from its first token. windows: for
    each layer that owns K/V how many positions before it a token sees, None for all. on_keep: called with a prefix that
    is kept anew.
    """

    def __init__(self, limit: int, grid: int, windows: Sequence[int | None], on_keep: OnKeep | None = None):
        self.limit, self.grid, self.windows, self.on_keep = limit, grid, tuple(windows), on_keep
        self.counts = Counts()
        self._room = limit  # bytes that all may take now
        self._entries: tuple[Entry, ...] = ()  # the first to go first; `known` reads it as it is
        self.bytes = 0

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

        size: bytes.
        """
        begins = self._beginnings(_array(tokens), salt)
        if any(len(entry.tokens) == len(tokens) for entry in begins):
            return False
        prompts = [entry for entry in begins if entry.kind is not Kind.REPLY]
        own = max(prompts, key=lambda entry: len(entry.tokens), default=None) if kind is Kind.REPLY else None
        if size + (own.size if own else 0) > self._room:
            return False
        self._evict(self._room - size, MOST - 1, own)
        return True

    def keep(
        self,
        tokens: Sequence[int],
        saved: Saved,
        salt: str | None = None,
        kind: Kind = Kind.BORDER,
        told: bool = True,
        prefilled: int | None = None,
    ) -> bool:
        """Keeps a prefix, where `makes_room` says so. Returns whether it does.

        saved: contiguous arrays of its own, evaluated or on their way, of exactly these tokens. told: whether `on_keep`
        is to know. prefilled: how many of the tokens were; None for all.
        """
        assert len(tokens) == saved.tokens, f"K/V of {saved.tokens} tokens for {len(tokens)}"
        if not self.makes_room(tokens, salt, saved.bytes, kind):
            return False
        prefilled = len(tokens) if prefilled is None else prefilled
        new = Entry(_array(tokens), saved, saved.bytes, salt, kind, self._least(saved), prefilled)
        first: list[Entry] = []
        if kind is Kind.PROMPT:  # the conversation goes on from here
            first = [entry for entry, common in self._common(new.tokens, salt) if self._outgrown(entry, common)]
        self._order([*first, *(entry for entry in self._entries if entry not in first), new])
        self.counts.kept += 1
        if told and self.on_keep is not None:
            self.on_keep(tokens, saved, salt)
        return True

    def resize(self, room: int) -> None:
        """Says how many bytes all may take from now on, the limit at most. The first to go give theirs back."""
        self._room = max(0, min(self.limit, room))
        self._evict(self._room)

    def clear(self) -> None:
        """Gives all bytes back."""
        self._order([])

    def _evict(self, room: int, most: int = MOST, own: Entry | None = None) -> None:
        """Drops prefixes until the others are at most so many, of at most `room` bytes. own: this one stays."""
        held, gone = self.bytes, []
        for entry in self._entries:
            if held <= room and len(self._entries) - len(gone) <= most:
                break
            if entry is not own:
                gone.append(entry)
                held -= entry.size
        if gone:
            self.counts.evicted += len(gone)
            self._order([entry for entry in self._entries if entry not in gone])

    def _order(self, entries: Sequence[Entry]) -> None:
        self._entries, self.bytes = tuple(entries), sum(entry.size for entry in entries)

    def _beginnings(self, tokens: np.ndarray, salt: str | None) -> list[Entry]:
        """Returns the prefixes that tokens begin with, or are."""
        return [entry for entry, each in self._common(tokens, salt) if each == len(entry.tokens)]

    def _outgrown(self, entry: Entry, common: int) -> bool:
        """Whether a conversation that has so many of a prefix's tokens has gone on from it."""
        return entry.kind is not Kind.BORDER and entry.exact(common) and self._usable(entry, common) > 0

    def _alike(self, tokens: Sequence[int], salt: str | None) -> list[tuple[Entry, int]]:
        """Returns with how many tokens of each prefix a prompt begins, but for its last token."""
        return self._common(_array(tokens)[:-1], salt)

    def _common(self, tokens: np.ndarray, salt: str | None) -> list[tuple[Entry, int]]:
        return [(entry, _common(entry.tokens, tokens)) for entry in self._entries if entry.salt == salt]

    def _usable(self, entry: Entry, common: int) -> int:
        """Returns how many tokens of a prefix may be used where so many are those of a prompt: what was prefilled up to
        the grid, what was decoded up to any token.
        """
        whole = common if entry.exact(common) else common // self.grid * self.grid
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
