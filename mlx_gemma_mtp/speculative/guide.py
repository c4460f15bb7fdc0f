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

    def copy(self) -> Constraint: ...

    def mask(self) -> np.ndarray | None:
        """None allows everything."""

    def advance(self, token: int) -> None:
        """After a token that the mask allowed."""


class Failure(NamedTuple):
    """Why a row cannot go on. tokens: how many of those that it was told of count."""

    tokens: int
    reason: str


class Look(NamedTuple):
    """width: how many drafts to verify; mask: float32 [B, width + 1, V], 0 or -inf; failures: by row, of those whose
    constraint raised.
    """

    width: int
    mask: mx.array
    failures: dict[int, str]


class Guide:
    """The constraints of a batch's rows; None for a row that is free."""

    def __init__(self, constraints: Sequence[Constraint | None], vocab: int):
        self.constraints, self.vocab = list(constraints), vocab

    def look(self, drafts: Sequence[Sequence[int]], cut: bool = True) -> Look:
        """Masks for the next token and after each draft. drafts: K for every row. cut: verify only drafts that some row
        allows; without it all are verified, and what comes after a refused one is free.
        """
        walked, failures = [], {}
        for row, (constraint, tokens) in enumerate(zip(self.constraints, drafts, strict=True)):
            try:
                walked.append(_walk(constraint, tokens, self.vocab))
            except Exception as error:  # whatever it is, it is this row's alone
                failures[row] = in_a_line(error)
                walked.append([only([], self.vocab)])
        width = max(map(len, walked)) - 1 if cut else len(drafts[0])
        bits = np.full((len(walked), width + 1, -(-self.vocab // 32)), ALL, np.uint32)
        for row, masks in enumerate(walked):
            for i, mask in enumerate(masks):
                if mask is not None:
                    bits[row, i] = mask
        return Look(width, expand(mx.array(bits), self.vocab), failures)

    def advance(self, emitted: Sequence[Sequence[int]]) -> dict[int, Failure]:
        """Each row's emitted tokens; nothing else moves a constraint. Returns the rows whose constraint raised."""
        failures = {}
        for row, (constraint, tokens) in enumerate(zip(self.constraints, emitted, strict=True)):
            for i, token in enumerate(tokens if constraint is not None else ()):
                try:
                    constraint.advance(token)
                except Exception as error:  # whatever it is, it is this row's alone
                    failures[row] = Failure(i, in_a_line(error))
                    break
        return failures

    def of_rows(self, rows: Sequence[int]) -> Guide | None:
        """The same for these rows alone; None where all of them are free."""
        return guide([self.constraints[row] for row in rows], self.vocab)


def guide(constraints: Sequence[Constraint | None], vocab: int) -> Guide | None:
    """None where every row is free."""
    return Guide(constraints, vocab) if any(each is not None for each in constraints) else None


def expand(bits: mx.array, vocab: int) -> mx.array:
    """uint32 [..., words] -> float32 [..., vocab], 0 where the bit is set and -inf elsewhere."""
    each = (bits[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return mx.where(each.reshape(*bits.shape[:-1], -1)[..., :vocab] == 1, 0.0, -mx.inf)


def allows(mask: np.ndarray | None, token: int) -> bool:
    return mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def only(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """The mask that allows these tokens alone."""
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def _walk(constraint: Constraint | None, drafts: Sequence[int], vocab: int) -> list[np.ndarray | None]:
    """The masks at the first position and after each draft that is allowed. Raises what the constraint itself raises.

    What its copy raises along the drafts fails nobody: these may never be emitted. If they are, nothing is allowed
    after them.
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
        except Exception:
            masks.append(only([], vocab))
            break
    return masks
