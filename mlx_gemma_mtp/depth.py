"""How many tokens to draft: a pure function of a frozen table of costs and of what was kept so far.

Expected tokens of a round over its cost, for K = 0..MAX_DRAFTS; the best ratio wins. Prior art: Cascade (arXiv
2506.20675), EVICT (arXiv 2605.00342). The emitted text never depends on any of this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .costs import MAX_DRAFTS, CostTable

AUTO = "auto"  # what the user says for all of this
FIXED, BEST, PROBE, OFF, LIMIT = "fixed", "best", "probe", "off", "limit"
CONFIDENCE, GRAMMAR = "confidence", "grammar"
REASONS = {
    FIXED: "the length that was asked for",
    BEST: "the most tokens a second by measured cost and acceptance",
    PROBE: "drafts do not pay at present; a look whether they would",
    OFF: "drafts do not pay at present",
    LIMIT: "no row has room for drafts before its end",
    GRAMMAR: "drafts that the grammar refuses were cut before the verify",
    CONFIDENCE: "drafts that the drafter itself doubts were cut before the verify",
}
FIRST = 0.75  # acceptance that is assumed before anything is known
WEIGHT = 3.0  # of what is assumed, in rounds
RECENT, LASTING = 0.9, 0.98  # what a round keeps of the past: of a request's own, of everybody's
PROBE_FROM, PROBE_TO = 8, 24  # rounds without drafts before a probe; doubled after each failure
PROBE_SHARE = 0.015  # of the time may go into probes
BINS = 10
CONTEXT_STEP = 64


@dataclass(frozen=True)
class History:
    """Decayed counts by position: drafts whose predecessors were all kept, and those of them that were kept."""

    tried: tuple[float, ...] = (0.0,) * MAX_DRAFTS
    kept: tuple[float, ...] = (0.0,) * MAX_DRAFTS

    def after(self, verified: int, accepted: int, keep: float, cut: Sequence[float] = ()) -> History:
        """With one more round of one row. keep: what it leaves of the past; cut: for the drafts that were made and not
        verified the chance that they would have been kept, or else only sure drafts would count.
        """
        tried, kept, reach = [t * keep for t in self.tried], [k * keep for k in self.kept], 1.0
        for i, rate in enumerate([float(i < accepted) for i in range(verified)] + list(cut)):
            tried[i], kept[i], reach = tried[i] + reach, kept[i] + reach * rate, reach * rate
        return History(tuple(tried), tuple(kept))

    def rates(self, assumed: Sequence[float] | None = None) -> list[float]:
        """Chance that the draft at each position is kept if those before it are. assumed: the rates that count as
        WEIGHT rounds of evidence; where they are None, a position is assumed to be like the one before it.
        """
        rates: list[float] = []
        for i, (tried, kept) in enumerate(zip(self.tried, self.kept, strict=True)):
            if assumed is None:
                prior = rates[-1] if rates else FIRST
            else:  # as everybody's, as far as this row is like everybody
                prior = min(assumed[i] * (rates[-1] / max(assumed[i - 1], 1e-3) if rates else 1.0), 0.98)
            rates.append((kept + WEIGHT * prior) / (tried + WEIGHT))
        return rates


@dataclass(frozen=True)
class Choice:
    """How many drafts, and the code of the reason. rate: expected tokens a second of all rows."""

    drafts: int
    reason: str
    rate: float


@dataclass(frozen=True)
class Pause:
    """Since when drafts are off. rounds: without drafts; every: a probe after so many, at the earliest."""

    rounds: int = 0
    every: int = PROBE_FROM

    def chosen(self, reason: str) -> Pause:
        """After a choice."""
        if reason == PROBE:
            return replace(self, rounds=0)
        return replace(self, rounds=self.rounds + 1) if reason == OFF else Pause()

    def probed(self, accepted: int) -> Pause:
        """After a probe: the next one at once if a draft was kept, else later and later."""
        return replace(self, every=0 if accepted else min(max(2 * self.every, PROBE_FROM), PROBE_TO))


def expected(rates: Sequence[float], most: int) -> list[float]:
    """Tokens that a row's round emits, with K = 0..len(rates) drafts of which at most `most` are of use."""
    tokens, reach = [1.0], 1.0
    for i, rate in enumerate(rates):
        reach *= rate
        tokens.append(tokens[-1] + (reach if i < most else 0.0))
    return tokens


def choose(
    table: CostTable, histories: Sequence[History], pool: History, context: int, useful: Sequence[int], pause: Pause
) -> Choice:
    """One draft length for all rows. histories, useful: one a row; useful: drafts that the row's limit leaves room for;
    pool: everybody's history; context: committed tokens of the longest row.
    """
    most = min(MAX_DRAFTS, max(useful))
    seconds = table.rounds_at(len(histories), context)
    common = pool.rates()
    tokens = [0.0] * (MAX_DRAFTS + 1)
    for history, room in zip(histories, useful, strict=True):
        tokens = [a + b for a, b in zip(tokens, expected(history.rates(common), room), strict=True)]
    rates = [emitted / cost for emitted, cost in zip(tokens, seconds, strict=True)]
    if most < 1:
        return Choice(0, LIMIT, rates[0])
    best = max(range(most + 1), key=rates.__getitem__)
    if best:
        return Choice(best, BEST, rates[best])
    probe = max(range(1, most + 1), key=rates.__getitem__)
    loss = seconds[probe] / seconds[0] - tokens[probe] / tokens[0]  # expected, in plain rounds
    if pause.rounds >= max(pause.every, loss / PROBE_SHARE):
        return Choice(probe, PROBE, rates[0])
    return Choice(0, OFF, rates[0])


@dataclass(frozen=True)
class Trust:
    """What the drafter's confidence is worth: decayed counts by tenths of it."""

    tried: tuple[float, ...] = (0.0,) * BINS
    kept: tuple[float, ...] = (0.0,) * BINS

    def after(self, confidences: Sequence[float], accepted: int) -> Trust:
        """With one more round of one row; confidences: of the drafts that were verified."""
        tried, kept = list(self.tried), list(self.kept)
        for i, confidence in enumerate(confidences[: accepted + 1]):
            bin_ = _bin(confidence)
            tried[bin_], kept[bin_] = tried[bin_] * LASTING + 1, kept[bin_] * LASTING + (i < accepted)
        return Trust(tuple(tried), tuple(kept))

    def rate(self, confidence: float) -> float:
        """The chance that such a draft is kept if those before it are; at first, the confidence itself."""
        bin_ = _bin(confidence)
        return (self.kept[bin_] + WEIGHT * confidence) / (self.tried[bin_] + WEIGHT)


def _bin(confidence: float) -> int:
    return min(int(confidence * BINS), BINS - 1)


def worthwhile(
    table: CostTable,
    trust: Trust,
    confidences: Sequence[Sequence[float]],
    context: int,
    useful: Sequence[int],
    rate: float,
) -> int:
    """How many of the drafts that were made are worth verifying, the first always. confidences: [rows][K]; rate: tokens
    a second that the time is worth elsewhere.
    """
    made = len(confidences[0])
    if made < 2:
        return made
    seconds = table.verify_at(len(confidences), context)
    rows = [expected([trust.rate(each) for each in row], room) for row, room in zip(confidences, useful, strict=True)]
    return max(range(1, made + 1), key=lambda width: sum(row[width] for row in rows) - rate * seconds[width])


def break_even(table: CostTable, rows: int, context: int) -> list[float | None]:
    """For K = 1..MAX_DRAFTS the acceptance, equal at all positions, from which a round of K drafts beats plain
    decoding; None where even 1 would not do.
    """
    seconds = table.rounds_at(rows, context)
    found: list[float | None] = []
    for drafts in range(1, MAX_DRAFTS + 1):
        needed = seconds[drafts] / seconds[0]
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if expected([middle] * drafts, drafts)[-1] >= needed else (middle, high)
        found.append(high if drafts + 1 >= needed else None)
    return found


def _coarse(context: int) -> int:
    """A context that stays the same for some rounds, so that what follows from it need not be computed anew."""
    return -(-context // CONTEXT_STEP) * CONTEXT_STEP


@dataclass(frozen=True)
class Verified:
    """A row's part in a verify. width: drafts that were verified; allowed: that the grammars left, the most in any row;
    confidences: of all that were made, () where the drafter is not asked.
    """

    choice: Choice
    width: int
    allowed: int
    confidences: tuple[float, ...]

    def cut(self, trust: Trust) -> list[float]:
        """The chance of each draft that was made and not verified that it would have been kept: none of those that a
        grammar refuses.
        """
        doubted = [trust.rate(each) for each in self.confidences[self.width : self.allowed]]
        return doubted + [0.0] * (self.choice.drafts - self.allowed)

    @property
    def reason(self) -> str:
        """Why the verify had this width."""
        if self.width < self.allowed:
            return CONFIDENCE
        return GRAMMAR if self.allowed < self.choice.drafts else self.choice.reason


class Fixed:
    """A number of drafts that was asked for; 0 is plain decoding."""

    confident = False  # asks the drafter how sure it is

    def __init__(self, drafts: int):
        self.most = drafts

    def forget(self, ids: Sequence[int]) -> None:
        """See Auto, here and below."""

    def draft(self, rows: Sequence[int], context: int, useful: Sequence[int]) -> int:
        return max(0, min(self.most, max(useful)))

    def verify(
        self,
        rows: Sequence[int],
        context: int,
        useful: Sequence[int],
        confidences: Sequence[Sequence[float]],
        allowed: int,
    ) -> int | None:
        """None verifies all drafts there are."""
        return None

    def observe(self, accepted: Mapping[int, int]) -> str:
        return FIXED

    def timed(self, rows: Sequence[int], context: int, seconds: float) -> None:
        """Needs no times."""


class Auto:
    """Follows cost and acceptance. What it learns of everybody stays for the next batch, a request's own does not.

    A round is told three times: `draft` before its drafts are made, `verify` once they are there, `observe` when it is
    known what was kept. The drafts of a round are made while the round before it is not observed yet. The clock reaches
    no choice: `timed` only collects, for the table of the next start.
    """

    most = MAX_DRAFTS

    def __init__(self, table: CostTable, confident: bool = True):
        """confident: drafts that the drafter doubts are cut; without it, all that were made are verified."""
        self.table, self.confident = table, confident
        self.pool, self.trust, self.pause = History(), Trust(), Pause()
        self.live: dict[tuple[int, int, int], list[float]] = {}  # seconds of verifies, by cell of the table
        self._own: dict[int, History] = {}
        # By request, since rounds of several batches may interleave; the rows of a batch have the same choice.
        self._drafted: dict[int, Choice] = {}  # of the drafts that wait to be verified
        self._verified: dict[int, Verified] = {}  # the last verify

    def forget(self, ids: Sequence[int]) -> None:
        """Drops what is kept of these requests alone: their batch has ended."""
        for row in ids:
            for kept in (self._own, self._drafted, self._verified):
                kept.pop(row, None)

    def draft(self, rows: Sequence[int], context: int, useful: Sequence[int]) -> int:
        """How many drafts to make. rows: the requests' ids, unique in the engine; the rest as in
        `choose`."""
        own = [self._own.get(row, History()) for row in rows]
        choice = choose(self.table, own, self.pool, _coarse(context), useful, self.pause)
        self.pause = self.pause.chosen(choice.reason)
        self._drafted |= dict.fromkeys(rows, choice)
        return choice.drafts

    def verify(
        self,
        rows: Sequence[int],
        context: int,
        useful: Sequence[int],
        confidences: Sequence[Sequence[float]],
        allowed: int,
    ) -> int:
        """How many of the drafts to verify. confidences: of all drafts that were made; allowed: how many of them a
        grammar left, the most in any row; the rest as in `worthwhile`.
        """
        choice, width = self._drafted[rows[0]], allowed
        if self.confident:
            left = [row[:allowed] for row in confidences]
            width = worthwhile(self.table, self.trust, left, _coarse(context), useful, choice.rate)
        self._verified |= {
            row: Verified(choice, width, allowed, tuple(each)) for row, each in zip(rows, confidences, strict=True)
        }
        return width

    def observe(self, accepted: Mapping[int, int]) -> str:
        """The drafts that each request kept of the round last verified. Returns the reason of its length."""
        verified = self._verified[next(iter(accepted))]
        for row, kept in accepted.items() if verified.choice.drafts else ():
            width, cut = verified.width, self._verified[row].cut(self.trust)
            self._own[row] = self._own.get(row, History()).after(width, kept, RECENT, cut)
            self.pool = self.pool.after(width, kept, LASTING, cut)
            self.trust = self.trust.after(self._verified[row].confidences[:width], kept)
        if verified.choice.reason == PROBE:
            self.pause = self.pause.probed(sum(accepted.values()))
        return verified.reason

    def timed(self, rows: Sequence[int], context: int, seconds: float) -> None:
        """Seconds of the round last verified by these requests, in which their next drafts were made."""
        nearest = min(self.table.contexts, key=lambda each: abs(math.log(each / context)))
        drafts, width = self._drafted[rows[0]].drafts, self._verified[rows[0]].width
        verify = seconds - drafts * self.table.draft_at(len(rows))
        if verify > 0:
            self.live.setdefault((len(rows), nearest, width), []).append(verify)
