"""What the runner holds of one request."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from ..cache.cache import Cache
from ..cache.saved import Saved
from .request import Request
from .stats import Totals


@dataclass
class Held:
    """What the runner holds of a request.

    found: K/V of its first tokens, which were kept from others, until its first piece comes. kept: how many of its
    tokens are kept for others. ends: those of them that nobody but its own conversation may come back to. staged: its
    K/V while its prompt is prefilled, a cache of one row. saved: its K/V while it waits for a row. hidden: [H], the
    target's hidden state at its prompt's last token, until its first token is drawn. submitted, began, prefilled: when
    it came, and when its prefill began and ended. since: what all rows had done when it became one of them, None while
    it is none; shared: what they did while it was one before.
    """

    request: Request
    submitted: float
    found: Saved | None = None
    kept: int = 0
    ends: set[int] = field(default_factory=set)
    staged: Cache | None = None
    saved: Saved | None = None
    hidden: mx.array | None = None
    began: float | None = None
    prefilled: float = 0.0
    since: Totals | None = None
    shared: Totals = field(default_factory=Totals)

    @property
    def tokens(self) -> list[int]:
        """What is prefilled: the prompt, and of a request that lost its K/V its text but for the newest token."""
        return self.request.prompt + self.request.tokens[:-1]

    @property
    def context(self) -> int:
        return len(self.request.prompt) + len(self.request.tokens)

    @property
    def computed(self) -> int:
        """How many tokens of the prompt were computed for it."""
        return len(self.request.prompt) - self.request.stats.cached_tokens

    def becomes_row(self, totals: Totals) -> None:
        """Counts from now on what all rows do. totals: what they did so far."""
        if self.since is None:
            self.since = totals

    def leaves_row(self, totals: Totals) -> None:
        """Ends what `becomes_row` began, and tells the request's stats."""
        self.shared, self.since = self.as_row(totals), None
        self.request.stats.share(self.shared)

    def seconds(self, totals: Totals) -> float:
        """Returns the seconds of `as_row`, which are asked for in every round."""
        return self.shared.seconds + (0.0 if self.since is None else totals.seconds - self.since.seconds)

    def as_row(self, totals: Totals) -> Totals:
        """Returns what all rows did while it was one. totals: what they did in all."""
        return self.shared if self.since is None else self.shared + (totals - self.since)
