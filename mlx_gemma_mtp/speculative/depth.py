"""Who chooses the draft length of a batch: a number that was asked for, or what cost and acceptance say.

In exact arithmetic the emitted text never depends on any of this.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .choice import CONFIDENCE, FIXED, GRAMMAR, PROBE, Choice, Pause, Purse, choose, worthwhile
from .correction import Correction, Prices
from .costs import MAX_DRAFTS, CostTable
from .history import LASTING, RECENT, History, Trust

AUTO = "auto"  # what the user says for all of this
CONTEXT_STEP = 64
UNTIMED = 8  # rounds that were not timed, after which the table is taken as it is
OUTLIER = 2.0  # a round's time is not believed beyond this factor
LEARN = 16  # rounds that are timed in a cell before the next start hears of it


@dataclass(frozen=True)
class Verified:
    """One row's part in a verify.

    choice: how many drafts were made, and why. width: drafts that were verified. allowed: drafts that the grammars
    left, the most in any row. confidences: of all drafts that were made; () where the drafter is not asked. context:
    committed tokens of the longest row. seconds: the verify's time without the next drafts; None before it is timed.
    """

    choice: Choice
    width: int
    allowed: int
    confidences: tuple[float, ...]
    context: int
    seconds: float | None = None

    def cut(self, trust: Trust) -> list[float]:
        """Returns for each draft that was made and not verified the chance that it would have been kept.

        For a draft that a grammar refuses the chance is 0.
        """
        doubted = [trust.rate(each) for each in self.confidences[self.width : self.allowed]]
        return doubted + [0.0] * (self.choice.drafts - self.allowed)

    @property
    def reason(self) -> str:
        """The code of the reason for the width."""
        if self.width < self.allowed:
            return CONFIDENCE
        return GRAMMAR if self.allowed < self.choice.drafts else self.choice.reason


class Fixed:
    """A draft length that the caller asked for. 0 is plain decoding."""

    confident = False  # asks the drafter how sure it is

    def __init__(self, drafts: int):
        self.most = drafts

    def forget(self, ids: Sequence[int]) -> None:
        """Does nothing: a fixed length keeps nothing of a request."""

    def draft(self, rows: Sequence[int], context: int, useful: Sequence[int]) -> int:
        """Returns the length that was asked for, or less where no row has room for it."""
        return max(0, min(self.most, max(useful)))

    def verify(
        self,
        rows: Sequence[int],
        context: int,
        useful: Sequence[int],
        confidences: Sequence[Sequence[float]],
        allowed: int,
    ) -> int | None:
        """Returns None: all drafts that were made are verified."""
        return None

    def reason(self, row: int) -> str:
        """Returns the code of the reason for the length."""
        return FIXED

    def observe(self, accepted: Mapping[int, int]) -> None:
        """Does nothing: a fixed length needs no counts."""

    def timed(self, rows: Sequence[int], context: int, seconds: float) -> None:
        """Does nothing: a fixed length needs no times."""


class Auto:
    """A draft length that follows cost and acceptance. Common counts stay for the next batch; a request's own end with
    it.

    Each round calls four methods: `draft` before its drafts are made, `verify` once they are there, `timed` when the
    round is over (unless its time was disturbed), and `observe` once it is known which drafts were kept. The drafts of
    a round are made before the previous round is timed and observed. Rounds of several batches may interleave.
    """

    most = MAX_DRAFTS

    def __init__(self, table: CostTable, confident: bool = True, frozen: bool = False):
        """Starts from a table of measured costs.

        confident: drafts with low confidence are cut before the verify; False verifies all that were made. frozen: the
        table is not corrected, so no clock influences a choice.
        """
        self.table, self.confident, self.frozen = table, confident, frozen
        self.pool, self.trust, self.pause, self.purse = History(), Trust(), Pause(), Purse()
        self.correction, self._untimed = Correction(), 0
        self._rounds: Counter[tuple[int, int, int]] = Counter()  # timed since `learned`, by (rows, context, drafts)
        self._own: dict[int, History] = {}
        # By request, since rounds of several batches may interleave; the rows of a batch have the same choice.
        self._drafted: dict[int, Choice] = {}  # of the drafts that wait to be verified
        self._verified: dict[int, Verified] = {}  # the last verify
        self._prices: dict[tuple[int, int, bool], Prices] = {}  # until the next time comes

    def forget(self, ids: Sequence[int]) -> None:
        """Drops what is kept of these requests alone. Call it when their batch has ended."""
        for row in ids:
            for kept in (self._own, self._drafted, self._verified):
                kept.pop(row, None)

    def draft(self, rows: Sequence[int], context: int, useful: Sequence[int]) -> int:
        """Returns how many drafts to make.

        rows: the requests' ids, unique in the engine. context: committed tokens of the longest row. useful: for each
        row, how many drafts its limit leaves room for.
        """
        own = [self._own.get(row, History()) for row in rows]
        prices = self.prices(len(rows), context)
        choice = choose(prices, own, self.pool, useful, self.pause, self.purse)
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
        """Returns how many of the drafts to verify.

        rows: the requests' ids. context: committed tokens of the longest row. useful: for each row, how many drafts its
        limit leaves room for. confidences: [rows][K], of all drafts that were made. allowed: drafts that the grammars
        left, the most in any row.
        """
        choice, width = self._drafted[rows[0]], allowed
        if self.confident and allowed > 1:
            left = [row[:allowed] for row in confidences]
            width = worthwhile(self.prices(len(rows), context), self.trust, left, useful, choice.rate)
        self._verified |= {
            row: Verified(choice, width, allowed, tuple(each), context)
            for row, each in zip(rows, confidences, strict=True)
        }
        return width

    def reason(self, row: int) -> str:
        """Returns the code of the reason for the last verified length. row: the id of one of the round's requests."""
        return self._verified[row].reason

    def observe(self, accepted: Mapping[int, int]) -> None:
        """Takes in how many drafts each request kept in the last verified round.

        accepted: request id -> drafts kept.
        """
        verified = self._verified[next(iter(accepted))]
        if verified.choice.drafts:
            for row, kept in accepted.items():
                width, cut = verified.width, self._verified[row].cut(self.trust)
                self._own[row] = self._own.get(row, History()).after(width, kept, RECENT, cut)
                self.pool = self.pool.after(width, kept, LASTING, cut)
                self.trust = self.trust.after(self._verified[row].confidences[:width], kept)
        self.purse = self.purse.after(self._earned(verified, sum(accepted.values()) / len(accepted), len(accepted)))
        if verified.choice.reason == PROBE:
            self.pause = self.pause.probed(sum(accepted.values()))
        self._untimed += 1

    def _earned(self, verified: Verified, kept: float, rows: int) -> float:
        """Returns what a round's drafts earned against plain decoding, in plain rounds. kept: a row."""
        if not verified.choice.drafts:
            return 0.0
        prices = self.prices(rows, verified.context)
        drafts = verified.choice.drafts * prices.draft
        took = prices.verify(verified.width) + drafts
        if verified.seconds is not None:  # what it took, unless something else happened meanwhile
            took = max(took / OUTLIER, min(took * OUTLIER, verified.seconds + drafts))
        return 1 + kept - took / prices.rounds[0]

    def timed(self, rows: Sequence[int], context: int, seconds: float) -> None:
        """Takes in the time of the last verified round.

        rows: the ids of its requests. context: committed tokens of the longest row. seconds: of the verify and of the
        drafts that were made after it.
        """
        if self.frozen:
            return
        made, width = self._drafted[rows[0]].drafts, self._verified[rows[0]].width
        before = self.correction
        self.correction = before.after(self.table, len(rows), _step(context), width, made, seconds)
        if not self.correction.says_the_same(before, (len(rows), width)):
            self._prices.clear()
        if (len(rows), 0) in before.rounds and (len(rows), 0) not in self.correction.rounds:
            self.pause = replace(self.pause, checks=0)  # plain rounds are to be timed anew
        self._untimed = 0
        if not made and not self._verified[rows[0]].choice.drafts:
            return  # what a plain round took is asked for nowhere else
        nearest = min(self.table.contexts, key=lambda each: abs(math.log(each / context)))
        verify = seconds / self.correction.pace - made * self.prices(len(rows), context).draft
        self._verified |= {row: replace(self._verified[row], seconds=verify) for row in rows}
        self._rounds[len(rows), nearest, width] += 1

    def learned(self) -> tuple[dict[tuple[int, int, int], float], dict[int, float]]:
        """Returns costs.Verified and costs.Drafted for the cells that were timed often since the last call.

        A plain round keeps the table's seconds and the others are scaled to it, so a busy hour does not spoil the file.
        """
        verified, drafted = {}, {}
        for rows, context, width in [cell for cell, rounds in self._rounds.items() if rounds >= LEARN and cell[2]]:
            prices, plain = self.prices(rows, context), self.table.verify_at(rows, context)[0]
            verified[rows, context, 0] = plain
            verified[rows, context, width] = plain * prices.verify(width) / prices.rounds[0]
            drafted[rows] = plain * prices.draft / prices.rounds[0]
            del self._rounds[rows, context, width]
        return verified, drafted

    def prices(self, rows: int, context: int) -> Prices:
        """Returns the current estimate of what rounds cost. rows: how many. context: committed tokens of the longest
        row.
        """
        trusted = self.frozen or (self._untimed >= UNTIMED and not self.correction.rounds)
        context = _step(context)
        if (rows, context, trusted) not in self._prices:
            if trusted:
                rounds = self.table.rounds_at(rows, context)
                found = Prices(rounds, self.table.draft_at(rows), rounds)
            else:
                found = self.correction.prices(self.table, rows, context)
            self._prices[rows, context, trusted] = found
        return self._prices[rows, context, trusted]


def _step(context: int) -> int:
    """Returns the next multiple of CONTEXT_STEP: the same for many rounds, so that prices stay."""
    return -(-context // CONTEXT_STEP) * CONTEXT_STEP
