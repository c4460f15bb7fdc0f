"""Constraints on what a row may say, for every draft position; they compose, and they advance by emitted tokens alone.

A constraint is walked along the drafts on a copy: drafts that it refuses are cut before the verify, and the target's
logits are masked at each position that is left. So constrained text is the same with and without drafts. Whatever a
row's constraint raises is that row's failure, and the other rows go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import in_a_line

ALL = np.uint32(0xFFFFFFFF)


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
        walked, failures = [], {}
        for row, (constraint, tokens) in enumerate(zip(self.constraints, drafts, strict=True)):
            try:
                walked.append(_walk(constraint, tokens, self.vocab))
            except BaseException as error:  # whatever it is, a library's panic too, it is this row's alone
                failures[row] = in_a_line(error)
                walked.append([only([], self.vocab)])
        counts = [len(each) - 1 for each in walked] if cut else [len(each) for each in drafts]
        bits = np.full((len(walked), max(counts, default=0) + 1, -(-self.vocab // 32)), ALL, np.uint32)
        for row, masks in enumerate(walked):
            for i, mask in enumerate(masks):
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


def _walk(constraint: Constraint | None, drafts: Sequence[int], vocab: int) -> list[np.ndarray | None]:
    """Returns the masks of the next token and of the one after each draft, up to the first draft that is refused.

    Raises what the constraint itself raises. What its copy raises along the drafts fails nobody, since these may never
    be emitted; if they are, nothing is allowed after them.
    """
    if constraint is None:
        return [None] * (len(drafts) + 1)
    masks = [constraint.mask()]
    ahead = constraint.copy() if drafts else constraint
    for draft in drafts:
        if not allows(masks[-1], draft):
            break
        try:
            ahead.advance(draft)
            masks.append(ahead.mask())
        except BaseException:
            masks.append(only([], vocab))
            break
    return masks
