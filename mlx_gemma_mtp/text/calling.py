"""Which calls of tools a reply may hold, as a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..speculative.guide import Constraint, only


class Free:
    """A Constraint that allows everything."""

    def copy(self) -> Free:
        """Returns itself: there is no state."""
        return self

    def mask(self) -> None:
        """Returns None: every token is allowed."""
        return None

    def advance(self, token: int) -> None:
        """Takes in an emitted token."""


@dataclass
class Calling:
    """A Constraint on the calls of a reply, and on the text beside them.

    open, close: ids of the tokens around a call. end_tokens: what may end the text. call: constrains one call, both
    tokens included; None allows no call. forced: the reply is one call or more, and nothing else. several: whether a
    call may follow another. text: constrains a reply that makes no call; None leaves it free. Where text is
    constrained, calls come in its place.
    """

    open: int
    close: int
    vocab: int
    end_tokens: Sequence[int]
    call: Constraint | None
    forced: bool = False
    several: bool = True
    text: Constraint | None = None
    within: Constraint | None = None  # the call that is being written
    calls: int = 0  # those that are complete
    begun: bool = False  # whether the text has begun

    def copy(self) -> Calling:
        """Returns an independent copy of the state. `call` stays the same: it never moves."""
        return replace(self, text=self.text and self.text.copy(), within=self.within and self.within.copy())

    def mask(self) -> np.ndarray | None:
        """Returns the tokens that may come next, as uint32 [words], or None for all."""
        if self.within is not None:
            return self.within.mask()
        opening = [self.open] if self._may_call() else []
        if self.calls and (self.forced or self.text is not None or not opening):
            return only([*opening, *self.end_tokens], self.vocab)
        if self.forced:
            return only(opening, self.vocab)
        if self.text is not None:
            mask = self.text.mask()
            return mask | only(opening, self.vocab) if opening and not self.begun and mask is not None else mask
        return None if opening else ~only([self.open], self.vocab)

    def advance(self, token: int) -> None:
        """Takes in an emitted token."""
        if self.within is not None:
            self.within.advance(token)
            if token == self.close:
                self.within, self.calls = None, self.calls + 1
        elif token == self.open and self.call is not None:
            self.within = self.call.copy()
            self.within.advance(token)
        elif self.text is not None and not self.calls:
            self.begun = True
            self.text.advance(token)

    def _may_call(self) -> bool:
        return self.call is not None and (self.several or not self.calls)
