"""Drafts that stand in the text already: what followed the longest earlier occurrence of a row's last tokens.

The host searches: it knows the tokens once a round is read, while the device waits. So nothing is scanned then: the
places of every two tokens are listed as these come. A verify that was built before is dropped where copies change its
drafts, and kept where there are none. A search on the device takes longer in every round (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

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
    """All tokens of one row: a prediction of its reply, where the request has one, its prompt, and its reply so far.

    tokens: NOWHERE stands behind a prediction.
    """

    def __init__(self, tokens: Sequence[int] = (), prediction: Sequence[int] = ()):
        """tokens: the prompt and the reply so far. prediction: what the reply is expected to be like."""
        lead = [*prediction, NOWHERE] if len(prediction) else []
        self.tokens = [*lead, *tokens]
        self._ends: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # of two tokens, the places of the last
        for end, pair in enumerate(pairwise(self.tokens), 1):
            self._ends[pair].append(end)
        self._next = 0 if lead else None  # where the last copy would go on
        self._away = 0  # tokens since that was right

    def add(self, tokens: Sequence[int], copy: Copy | None = None) -> None:
        """Takes in what the row emitted. copy: what was found before it, whose place is followed."""
        text = self.tokens
        for token in tokens:
            if text:
                self._ends[text[-1], token].append(len(text))
            text.append(token)
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
        text, count = self.tokens, len(self.tokens)
        if most < 1 or count + len(behind) <= LEAST:
            return None
        last = [*text[-MOST:], *behind][-MOST:]
        ends = self._ends.get((last[-2], last[-1]), [])
        if not behind:
            ends = ends[:-1]  # the last one is the text's own end
        if not ends:
            return None if behind else self._resumed(most)
        near = self._next
        if near is not None and MOST <= near <= ends[-1] + 1 and text[near - MOST : near] == last:
            return self._from(near, most, MOST, behind)  # no other match is longer, or as near
        length = LEAST
        while length < len(last):
            said = last[-length - 1]
            longer = [end for end in ends if end >= length and text[end - length] == said]
            if not longer:
                break
            ends, length = longer, length + 1
        end = ends[-1] if near is None else min(ends, key=lambda end: abs(end + 1 - near))
        return self._from(end + 1, most, length, behind)

    def _resumed(self, most: int) -> Copy | None:
        """The continuation of a copy that was left, as if each token since then stood for one of its own."""
        if self._next is None or not 0 <= self._next < len(self.tokens) - 1:
            return None
        return self._from(self._next, most, 0)

    def _from(self, start: int, most: int, length: int, behind: Sequence[int] = ()) -> Copy | None:
        """The tokens from a place on; where they come to the end of the text, the text repeats itself."""
        tokens = self.tokens[start : start + most]
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
