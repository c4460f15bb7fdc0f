"""Constraints on what a row may say, for every draft position; they compose, and they advance by emitted tokens alone.

A constraint is walked along the drafts on a copy: drafts that it refuses are cut before the verify, and the target's
logits are masked at each position that is left. So constrained text is the same with and without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

ALL = np.uint32(0xFFFFFFFF)


class Constraint(Protocol):
    """What one row may say next. Masks are uint32 [words], bit t % 32 of word t // 32 set where token t is allowed."""

    def copy(self) -> Constraint: ...

    def mask(self) -> np.ndarray | None:
        """None allows everything."""

    def advance(self, token: int) -> None:
        """After a token that the mask allowed."""


class Guide:
    """The constraints of a batch's rows; None for a row that is free."""

    def __init__(self, constraints: Sequence[Constraint | None], vocab: int):
        self.constraints, self.vocab = list(constraints), vocab

    def look(self, drafts: Sequence[Sequence[int]], cut: bool = True) -> tuple[int, mx.array]:
        """drafts: K for every row -> (how many to verify, float32 mask [B, that + 1, V]: 0 or -inf). cut: only those
        that are worth it; without it all, and what comes after a refused one is free.
        """
        walked = [_walk(each, row) for each, row in zip(self.constraints, drafts, strict=True)]
        width = max(map(len, walked)) - 1 if cut else len(drafts[0])
        bits = np.full((len(walked), width + 1, -(-self.vocab // 32)), ALL, np.uint32)
        for row, masks in enumerate(walked):
            for i, mask in enumerate(masks):
                if mask is not None:
                    bits[row, i] = mask
        return width, expand(mx.array(bits), self.vocab)

    def advance(self, emitted: Sequence[Sequence[int]]) -> None:
        """Each row's emitted tokens; nothing else moves a constraint."""
        for constraint, tokens in zip(self.constraints, emitted, strict=True):
            for token in tokens if constraint is not None else ():
                constraint.advance(token)

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


def _walk(constraint: Constraint | None, drafts: Sequence[int]) -> list[np.ndarray | None]:
    """The masks at the first position and after each draft that is allowed."""
    if constraint is None:
        return [None] * (len(drafts) + 1)
    ahead, masks = constraint.copy(), [constraint.mask()]
    for draft in drafts:
        if not allows(masks[-1], draft):
            break
        ahead.advance(draft)
        masks.append(ahead.mask())
    return masks
