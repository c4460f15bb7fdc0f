"""Drafts that stand in the text already: what followed the longest earlier occurrence of a row's last tokens.

The host searches: it knows the tokens once a round is read, and a search takes a hundredth of a millisecond. A verify
that was built before is dropped where copies change its drafts, and kept where there are none. The same search on the
device takes twenty times as long in every round (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST, MOST = 2, 16  # tokens of a match
NOWHERE = -1  # no token: between the texts of a row
PATIENCE = 8  # tokens after a copy was left, for which its place is remembered


class Copy(NamedTuple):
    """What followed an earlier occurrence of a row's last tokens.

    tokens: the continuation. length: how many of the last tokens are equal, MOST at most; 0 where none are, and the
    continuation is that of a copy that was left. start: the place of its first token in the row's text.
    """

    tokens: list[int]
    length: int
    start: int


class RowText:
    """All tokens of one row: a prediction of its reply, where the request has one, its prompt, and its reply so far."""

    def __init__(self, tokens: Sequence[int] = (), prediction: Sequence[int] = ()):
        """tokens: the prompt and the reply so far. prediction: what the reply is expected to be like."""
        lead = [*prediction, NOWHERE] if len(prediction) else []
        self._tokens = np.array([*lead, *tokens], np.int32)
        self._count = len(self._tokens)
        self._next = 0 if lead else None  # where the last copy would go on
        self._away = 0  # tokens since that was right

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, int32 [count], NOWHERE behind a prediction."""
        return self._tokens[: self._count]

    def add(self, tokens: Sequence[int], copy: Copy | None = None) -> None:
        """Takes in what the row emitted. copy: what was found before it, whose place is followed."""
        end = self._count + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.concatenate([self.tokens, np.zeros(max(end, 1024), np.int32)])
        self._tokens[self._count : end] = tokens
        self._count = end
        if copy is not None and tokens and tokens[0] == copy.tokens[0]:
            equal = agreeing(copy.tokens, tokens)
            self._next, self._away = copy.start + len(tokens), len(tokens) - equal
        elif self._next is not None:
            self._next, self._away = self._next + len(tokens), self._away + len(tokens)
            if self._away > PATIENCE:
                self._next = None

    def find(self, most: int, behind: Sequence[int] = ()) -> Copy | None:
        """Returns the continuation of the longest match, of `most` tokens; None where nothing matches.

        Of equal matches it is the one nearest to where the last copy goes on, or the latest where there was none.
        behind: tokens that are expected after the text, and are taken for a part of it.
        """
        text, count = self.tokens, self._count
        if most < 1 or count + len(behind) <= LEAST:
            return None
        last = [*text[max(count - MOST, 0) :].tolist(), *behind][-MOST:]
        stop = count - (not len(behind))
        ends = np.flatnonzero((text[1:stop] == last[-1]) & (text[: stop - 1] == last[-2])) + 1  # in most rounds none
        if not len(ends) or last[-1] == NOWHERE:
            return self._resumed(most) if not len(behind) else None
        length = LEAST
        while length < len(last):
            found = ends[ends >= length]
            found = found[text[found - length] == last[-length - 1]]
            if not len(found):
                break
            ends, length = found, length + 1
        start = int(ends[-1]) + 1
        if self._next is not None:
            start = int(ends[np.argmin(np.abs(ends + 1 - self._next))]) + 1
        return self._from(start, most, length, behind)

    def _resumed(self, most: int) -> Copy | None:
        """The continuation of a copy that was left, as if each token since then stood for one of its own."""
        if self._next is None or not 0 <= self._next < self._count - 1:
            return None
        return self._from(self._next, most, 0)

    def _from(self, start: int, most: int, length: int, behind: Sequence[int] = ()) -> Copy | None:
        """The tokens from a place on; where they come to the end of the text, the text repeats itself."""
        tokens = self.tokens[start : start + most].tolist()
        if len(tokens) < most:
            tokens += list(behind)[: most - len(tokens)]
        period = len(tokens)
        if NOWHERE in tokens:
            tokens = tokens[: tokens.index(NOWHERE)]
        elif period:
            tokens += [tokens[i % period] for i in range(period, most)]
        return Copy(tokens[:most], length, start) if tokens else None


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns with how many equal tokens both begin."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
