"""A thinking budget as a constraint: so many tokens in the thinking channel, then it is closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..speculative.guide import Constraint, only

OPEN, CLOSE = "<|channel>", "<channel|>"


@dataclass
class Thinking:
    """A Constraint for a reply that may begin with a thought.

    budget: the most tokens of the thought; the next token closes it; None is no limit. reply: constrains what follows
    the thought; None leaves it free. open, close: ids of the tokens around a thought. The token that closes a thought
    is the border: drafts after it are already the reply. A text whose reply is constrained cannot end within the
    thought.
    """

    open: int
    close: int
    vocab: int
    budget: int | None
    reply: Constraint | None
    end_tokens: Sequence[int]
    spent: int | None = None  # tokens of the thought so far; None outside of one
    begun: bool = False  # whether anything was said

    def copy(self) -> Thinking:
        """Returns an independent copy of the state."""
        return replace(self, reply=self.reply and self.reply.copy())

    def mask(self) -> np.ndarray | None:
        """Returns the tokens that may come next, as uint32 [words], or None for all."""
        if self.spent is not None:
            if self.budget is not None and self.spent >= self.budget:
                return only([self.close], self.vocab)
            return ~only(self.end_tokens, self.vocab) if self.reply is not None else None
        mask = self.reply.mask() if self.reply is not None else None
        if self.begun or mask is None:
            return mask
        return mask | only([self.open], self.vocab)

    def advance(self, token: int) -> None:
        """Takes in an emitted token."""
        if self.spent is not None:
            self.spent = None if token == self.close else self.spent + 1
        elif not self.begun and token == self.open:
            self.spent = 0
        elif self.reply is not None:
            self.reply.advance(token)
        self.begun = True
