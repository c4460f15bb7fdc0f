"""What is counted for each request."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..speculative.choice import REASONS


class Totals(NamedTuple):
    """What all rows did in some time.

    seconds: of decoding. tokens: that all rows emitted. rounds: with rows in them. rows: of all these rounds together.
    host_syncs: readbacks.
    """

    seconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    rows: int = 0
    host_syncs: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*map(operator.add, self, other))

    def __sub__(self, earlier: Totals) -> Totals:
        return Totals(*map(operator.sub, self, earlier))


@dataclass
class Stats:
    """Figures of one request. Times are in seconds, rates in tokens a second over the request's own time as a row.

    cached_tokens: tokens of the prompt that were not computed, since their K/V were kept. kept_tokens: those whose K/V
    were kept anew, for prompts to come. prompt_tps: of those that were computed. rounds: verify passes; the first token
    comes from the prefill. drafted, accepted: draft tokens that were verified, and that were kept.
    acceptance_by_position[i]: the share of the rounds with at least i + 1 drafts that kept at least i + 1. offered[i],
    kept[i]: rounds that verified at least i + 1 drafts, and that kept at least i + 1.
    depths[K]: rounds that verified K drafts, counted by the reason (choice.REASONS). batch_generation_tps: tokens of
    all rows while this request was decoded, over that time. rows: how many shared a round with it, itself included, in
    the mean. sources: drafted and accepted tokens by source. refused: drafts that a grammar refused before they were
    verified. host_syncs: readbacks while it was a row. preemptions: how often it left its row, to go on later, because
    memory was short or its reader did not read. accept: the rule by which sampled drafts were kept.
    target_step_bytes, draft_step_bytes: bytes of weights read for one token of the target, and for one draft.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    kept_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tokens: int = 0
    generation_tps: float = 0.0
    batch_generation_tps: float = 0.0
    ttft_s: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    host_syncs: int = 0
    rows: float = 0.0
    preemptions: int = 0
    peak_memory_gb: float = 0.0
    mtp: bool = False
    mtp_reason: str | None = None
    blas: str = ""
    seed: int | None = None
    accept: str = ""
    target_step_bytes: int = 0
    draft_step_bytes: int = 0
    depths: dict[int, dict[str, int]] = field(default_factory=dict)
    offered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: int = 0

    def count_round(
        self, drafted: int, accepted: int, reason: str = "", sources: Sequence[str] = (), refused: int = 0
    ) -> None:
        """Adds one verify pass of this request. reason: why it verified so many drafts. sources: the name of each
        draft's source. refused: how many more its grammar refused.
        """
        self.refused += refused
        for i, name in enumerate(sources):
            of_source = self.sources.setdefault(name, {"drafted": 0, "accepted": 0})
            of_source["drafted"] += 1
            of_source["accepted"] += i < accepted
        by_reason = self.depths.setdefault(drafted, {})
        by_reason[reason] = by_reason.get(reason, 0) + 1
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        while len(self.offered) < drafted:
            self.offered.append(0)
            self.kept.append(0)
        for i in range(drafted):
            self.offered[i] += 1
            self.kept[i] += i < accepted

    def share(self, total: Totals) -> None:
        """Sets the figures of all rows. total: what they did while this request was one of them."""
        self.batch_generation_tps = total.tokens / max(total.seconds, 1e-9)
        self.rows = total.rows / total.rounds if total.rounds else 0.0
        self.host_syncs = total.host_syncs

    def say_why_off(self) -> None:
        """Sets mtp to False with the commonest reason, where there is a drafter but no round verified a draft."""
        if self.mtp and self.rounds and not self.drafted:
            reasons = self.depths[0]
            self.mtp, self.mtp_reason = False, REASONS[max(reasons, key=reasons.__getitem__)]

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted a round: accepted drafts and the target's own token."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each draft position, the share of the rounds reaching it that kept it."""
        return [kept / offered for kept, offered in zip(self.kept, self.offered, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures as a dictionary that JSON can hold."""
        rates = {"tokens_per_round": self.tokens_per_round, "acceptance_by_position": self.acceptance_by_position}
        return asdict(self) | rates
