"""A thinking budget as a constraint: so many tokens in the thinking channel, then it is closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..speculative.guide import Constraint, only


@dataclass
class Thinking:
    """A Constraint for a text whose reply may come after thoughts.

    open, close: ids of the tokens around a thought. budget: the most tokens within all thoughts of the text together,
    without those two; once they are spent, an open thought is closed and no other is opened; None is no limit. reply:
    constrains what is no thought; None leaves it free. Where it does not leave everything free, thoughts may come until
    it begins. barred: tokens that no thought may hold.

    The token that closes a thought is the border: drafts after it are already the reply. inside: whether the text is
    within a thought; so it is from the start where the prompt ends in one.
    """

    open: int
    close: int
    vocab: int
    budget: int | None
    reply: Constraint | None
    barred: Sequence[int] = ()
    inside: bool = False
    spent: int = 0  # tokens within thoughts so far
    begun: bool = False  # whether the reply has begun

    def copy(self) -> Thinking:
        """Returns an independent copy of the state."""
        return replace(self, reply=self.reply and self.reply.copy())

    def mask(self) -> np.ndarray | None:
        """Returns the tokens that may come next, as uint32 [words], or None for all."""
        left = self.budget is None or self.spent < self.budget
        if self.inside:
            if not left:
                return only([self.close], self.vocab)
            return ~only(self.barred, self.vocab) if self.barred else None
        mask = self.reply.mask() if self.reply is not None else None
        if not left:
            closed = ~only([self.open], self.vocab)
            return closed if mask is None else mask & closed
        return mask if mask is None or self.begun else mask | only([self.open], self.vocab)

    def advance(self, token: int) -> None:
        """Takes in an emitted token."""
        if self.inside:
            self.inside = token != self.close
            self.spent += self.inside
        elif token == self.open:
            self.inside = True
        else:
            self.begun = True
            if self.reply is not None:
                self.reply.advance(token)
