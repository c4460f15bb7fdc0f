"""Constraints on what a row may say, for every draft position; they compose, and they advance by emitted tokens alone.

A constraint is walked along the drafts on a copy: drafts that it refuses are cut before the verify, and the target's
logits are masked at each position that is left. Where it leaves one token alone, that token is the draft, whoever else
has drafted. So constrained text is the same with and without drafts. Whatever a
row's constraint raises is that row's failure, and the other rows go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import in_a_line
from .drafting import FORCED

ALL = np.uint32(0xFFFFFFFF)
Draft = tuple[int, str, float]  # a token, its source, the chance that it is kept
More = Callable[[list[Draft]], Sequence[Draft]]  # what may follow drafts, for a row whose own have come to an end


class Constraint(Protocol):
    """What one row may say next. Masks are uint32 [words], bit t % 32 of word t // 32 set where token t is allowed."""

    def copy(self) -> Constraint:
        """Returns one of the same state, which advances by itself."""

    def mask(self) -> np.ndarray | None:
        """Returns the mask of the next token, None where every token is allowed."""

    def advance(self, token: int) -> None:
        """Moves on by a token that the mask allowed."""


class Failure(NamedTuple):
    """Why a row cannot go on. tokens: how many of the emitted tokens count, those before the one that failed."""

    tokens: int
    reason: str


class Look(NamedTuple):
    """What the constraints say of a round's drafts.

    counts: how many drafts of each row to verify. mask: uint32 [B, max(counts) + 1, words], see Constraint. failures:
    the reason of each row whose constraint raised; such a row may say nothing.
    """

    counts: list[int]
    mask: mx.array
    failures: dict[int, str]


class Walk(NamedTuple):
    """A row's drafts as its constraint has them.

    drafts: those that it allows, forced ones among them. masks: of the next token and of the one after each draft.
    refused: how many drafts were left out. forced: the places of the drafts that are all that it allows, whoever else
    has drafted them.
    """

    drafts: list[Draft]
    masks: list[np.ndarray | None]
    refused: int = 0
    forced: frozenset[int] = frozenset()


class Guide:
    """The constraints of a batch's rows; None for a row that is free."""

    def __init__(self, constraints: Sequence[Constraint | None], vocab: int):
        self.constraints, self.vocab = list(constraints), vocab

    def look(self, drafts: Sequence[Sequence[int]], cut: bool = True) -> Look:
        """Returns how many drafts to verify, and the masks of the next token and of the one after each draft.

        drafts: of each row, pads left out. cut: verify those alone that the row's constraint allows. Without it all are
        verified. Whatever comes after a row's first refused draft, or after its last one, is not masked: it cannot be
        emitted.
        """
        walks, failures = self._walks([[(token, "", 1.0) for token in row] for row in drafts])
        counts = [len(each.drafts) for each in walks] if cut else [len(each) for each in drafts]
        return self._look(walks, counts, failures)

    def lead(
        self, drafts: Sequence[Sequence[Draft]], reach: Sequence[int] | None, more: Callable[[int], More]
    ) -> tuple[list[Walk], Look]:
        """Returns each row's drafts with those that its constraint forces, and without those that it refuses.

        drafts: of each row, pads left out. reach: how many drafts a row may have; None forces nothing. more: of a row,
        what may follow a forced draft that is not what the row's own said.
        """
        walks, failures = self._walks(drafts, reach, more)
        return walks, self._look(walks, [len(each.drafts) for each in walks], failures)

    def _walks(
        self,
        drafts: Sequence[Sequence[Draft]],
        reach: Sequence[int] | None = None,
        more: Callable[[int], More] | None = None,
    ) -> tuple[list[Walk], dict[int, str]]:
        """Each row's walk, and the reasons of those whose constraint raised. reach: None forces nothing."""
        walks, failures = [], {}
        for row, (constraint, own) in enumerate(zip(self.constraints, drafts, strict=True)):
            try:
                steps = None if reach is None else reach[row]
                walks.append(_walk(constraint, own, self.vocab, steps, None if steps is None else more(row)))
            except BaseException as error:  # whatever it is, a library's panic too, it is this row's alone
                failures[row] = in_a_line(error)
                walks.append(Walk([], [only([], self.vocab)]))
        return walks, failures

    def _look(self, walks: Sequence[Walk], counts: list[int], failures: dict[int, str]) -> Look:
        bits = np.full((len(walks), max(counts, default=0) + 1, -(-self.vocab // 32)), ALL, np.uint32)
        for row, walk in enumerate(walks):
            for i, mask in enumerate(walk.masks):
                if mask is not None:
                    bits[row, i] = mask
        return Look(counts, mx.array(bits), failures)

    def advance(self, emitted: Sequence[Sequence[int]]) -> dict[int, Failure]:
        """Moves each row's constraint on by its emitted tokens; nothing else moves one. Returns the failures of the
        rows whose constraint raised.
        """
        failures = {}
        for row, (constraint, tokens) in enumerate(zip(self.constraints, emitted, strict=True)):
            for i, token in enumerate(tokens if constraint is not None else ()):
                try:
                    constraint.advance(token)
                except BaseException as error:  # whatever it is, a library's panic too, it is this row's alone
                    failures[row] = Failure(i, in_a_line(error))
                    break
        return failures

    def of_rows(self, rows: Sequence[int]) -> Guide | None:
        """Returns the guide of these rows alone, None where all of them are free."""
        return guide([self.constraints[row] for row in rows], self.vocab)


def guide(constraints: Sequence[Constraint | None], vocab: int) -> Guide | None:
    """Returns the guide of these rows' constraints, None where every row is free."""
    return Guide(constraints, vocab) if any(each is not None for each in constraints) else None


def allows(mask: np.ndarray | None, token: int) -> bool:
    """Returns whether a mask allows a token."""
    return mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def only(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """Returns the mask that allows these tokens alone."""
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def sole(mask: np.ndarray | None) -> int | None:
    """Returns the only token that a mask allows; None where it allows several, or none."""
    if mask is None:
        return None
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    bits = int(mask[words[0]])
    return None if bits & (bits - 1) else 32 * int(words[0]) + bits.bit_length() - 1


def _walk(
    constraint: Constraint | None,
    drafts: Sequence[Draft],
    vocab: int,
    reach: int | None = None,
    more: More | None = None,
) -> Walk:
    """Returns the drafts up to the first that is refused, with what is forced in their place and behind them.

    reach: how many drafts there may be; None forces nothing. Raises what the constraint itself raises. What its copy
    raises along the drafts fails nobody, since these may never be emitted; if they are, nothing is allowed after them.
    """
    if constraint is None:
        return Walk(list(drafts), [None] * (len(drafts) + 1))
    walk, left, asked = Walk([], [constraint.mask()]), list(drafts), more is None
    ahead, refused, places = None, 0, set()
    while reach is None or len(walk.drafts) < reach:
        mask = walk.masks[-1]
        forced = None if reach is None or _idle(walk) else sole(mask)
        if not left and forced is None and not asked and walk.drafts and walk.drafts[-1][1] == FORCED:
            left, asked = list(more(walk.drafts)), True
        if forced is not None:
            if left and left[0][0] != forced:
                refused, left = refused + len(left), []
            places.add(len(walk.drafts))
            draft = (forced, left.pop(0)[1] if left else FORCED, 1.0)
        elif left and allows(mask, left[0][0]):
            draft = left.pop(0)
        else:
            refused += len(left)
            break
        walk.drafts.append(draft)
        ahead = constraint.copy() if ahead is None else ahead
        try:
            ahead.advance(draft[0])
            walk.masks.append(ahead.mask())
        except BaseException:
            walk.masks.append(only([], vocab))
            break
    return walk._replace(refused=refused, forced=frozenset(places))


def _idle(walk: Walk) -> bool:
    """Whether the last draft moved nothing: behind an end of the text it is the only token again and again."""
    if len(walk.drafts) < 2 or walk.drafts[-1][0] != walk.drafts[-2][0]:
        return False
    return np.array_equal(walk.masks[-1], walk.masks[-2])
