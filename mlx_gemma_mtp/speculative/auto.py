"""What is known of one kind of text, and the draft lengths that follow: by cost and acceptance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from .choice import CONFIDENCE, GRAMMAR, LIMIT, PROBE, PURSE_KNOWN, Choice, Pause, Purse, choose, worthwhile
from .correction import SURE, Correction, Prices
from .costs import Cell, CostTable, Drafted, Verified, nearest
from .history import KNOWN, LASTING, RECENT, Acceptance, History, Trust

CONTEXT_STEP = 64
UNTIMED = 8  # rounds that were not timed, after which the table is taken as it is
OUTLIER = 2.0  # a round's time is not believed beyond this factor
LEARN = 16  # rounds with drafts that are timed in a place before the next start hears of it


class Part(NamedTuple):
    """An automatic row's part in a verify.

    made: drafts that were made for it. allowed: those of them that its grammar left. width: those of them that were
    verified. confidences: of the allowed ones; none where the source of drafts was not asked. pooled: whether what it
    keeps says something of other texts.
    """

    made: int
    allowed: int
    width: int
    confidences: Sequence[float]
    pooled: bool = True

    def cut(self, trust: Trust) -> list[float]:
        """Returns for each draft that was made and not verified the chance that it would have been kept.

        For a draft that a grammar refuses the chance is 0.
        """
        doubted = [trust.rate(each) for each in self.confidences[self.width : self.allowed]]
        return doubted + [0.0] * (self.made - self.allowed)

    def reason(self, choice: Choice) -> str:
        """Returns the code of the reason for the width. choice: that of the round's drafts."""
        if self.width < self.allowed:
            return CONFIDENCE
        if self.allowed < self.made:
            return GRAMMAR
        return LIMIT if self.made < choice.drafts else choice.reason


class Auto:
    """What is known of one kind of text, and the draft lengths that follow from it.

    It knows costs and everybody's acceptance, and nothing of a single request. One length serves all automatic rows of
    a batch. Their partners, whose length is fixed, count as rows that emit one token a round.
    """

    def __init__(
        self,
        table: CostTable,
        confident: bool = True,
        frozen: bool = False,
        borrowed: bool = False,
        prior: Acceptance | None = None,
    ):
        """Starts from a table of measured costs.

        confident: drafts with low confidence are cut before the verify; False verifies all that were made. frozen: the
        table is not corrected, so no clock influences a choice. borrowed: the table is of another kind, or a guess.
        prior: what drafts had kept in earlier starts; None where this is the first.
        """
        self.table, self.confident, self.frozen, self.borrowed, self.prior = table, confident, frozen, borrowed, prior
        known = Acceptance() if prior is None else prior.at_most(KNOWN)
        self.pool, self.trust, self.pause = known.history, known.trust, Pause()
        self.purse = Purse(PURSE_KNOWN) if table.timed else Purse()
        self.correction, self._priced, self._untimed = Correction(), Correction(), 0
        self._observed = 0  # rows' rounds, since `accepted`
        self._rounds: Counter[Cell] = Counter()  # timed since `learned`
        self._prices: dict[tuple[int, int, bool], Prices] = {}  # by `_priced`, which says the same as `correction`

    def on(self, table: CostTable) -> Auto:
        """Returns one that goes by this table, its own, and knows what this one knows: of acceptance alone, where the
        table that it went by was borrowed; else of costs, too, but for places where the table says something else.
        """
        if self.borrowed:
            auto = Auto(table, self.confident, self.frozen, prior=self.prior)
            auto.pool, auto.trust = self.pool, self.trust
            return auto
        if table != self.table:
            old = {place for place in self.correction.rounds if table.rounds_at(*place) != self.table.rounds_at(*place)}
            if old:
                self.correction = self._priced = self.correction.without(old)
            self._rounds = Counter({cell: count for cell, count in self._rounds.items() if cell[:2] not in old})
            self.table, self._prices = table, {}
        return self

    def anew(self) -> Auto:
        """Returns one that knows no more than this one did at first."""
        return Auto(self.table, self.confident, self.frozen, self.borrowed, self.prior)

    def choose(self, rows: int, context: int, histories: Sequence[History], useful: Sequence[int]) -> Choice:
        """Returns how many drafts each automatic row makes at most, and why.

        rows: all rows of the batch. context: committed tokens of a row. histories, useful: of the automatic
        rows, what they kept so far and how many drafts their limits leave room for.
        """
        prices = self.prices(rows, context)
        choice = choose(prices, histories, self.pool, useful, self.pause, self.purse, rows - len(histories))
        self.pause = self.pause.chosen(choice.reason)
        return choice

    def width(
        self,
        choice: Choice,
        rows: int,
        context: int,
        confidences: Sequence[Sequence[float]],
        allowed: Sequence[int],
        useful: Sequence[int],
    ) -> int:
        """Returns how many drafts of the automatic rows to verify.

        choice: that of the drafts. rows: all rows of the batch. context: committed tokens of a row.
        confidences: of each automatic row, those of its drafts; fewer where the source of drafts was not asked.
        allowed: of each, how many drafts its grammar left. useful: of each, how many its limit leaves room for.
        """
        most = max(allowed, default=0)
        if (
            not self.confident
            or most < 2
            or any(len(sure) < left for sure, left in zip(confidences, allowed, strict=True))
        ):
            return most
        prices = self.prices(rows, context)
        if choice.reason == PROBE:  # cut by what more drafts cost at worst it would tell nothing of them
            prices = replace(prices, rounds=prices.hope)
        return worthwhile(prices, self.trust, confidences, useful, choice.rate)

    def observe(self, part: Part, kept: int, own: History) -> History:
        """Takes in how many drafts a row kept, and returns what it kept so far. own: what it kept before."""
        cut = part.cut(self.trust)
        if part.pooled:
            self.pool = self.pool.after(part.width, kept, LASTING, cut)
            self.trust = self.trust.after(part.confidences[: part.width], kept)
            self._observed += 1
        return own.after(part.width, kept, RECENT, cut)

    def earned(
        self, choice: Choice, kept: int, rows: int, context: int, width: int, seconds: float | None = None
    ) -> None:
        """Takes in what a round's drafts earned against plain decoding.

        choice: that of the drafts. kept: by all rows together. rows: that had a part in it. width: drafts verified.
        seconds: of the verify, without the next drafts; None where they are not known.
        """
        earned = 0.0
        if choice.drafts:
            prices = self.prices(rows, context)
            drafts = choice.drafts * prices.draft
            took = prices.verify(width) + drafts
            if seconds is not None:  # what it took, unless something else happened meanwhile
                took = max(took / OUTLIER, min(took * OUTLIER, seconds + drafts))
            earned = 1 + kept / rows - took / prices.rounds[0]
        self.purse = self.purse.after(earned)
        if choice.reason == PROBE:
            self.pause = self.pause.probed(kept)
        self._untimed += 1

    def timed(self, rows: int, context: int, width: int, made: int, drafting: bool, seconds: float) -> float | None:
        """Takes in the time of a round, and returns the seconds of its verify at the machine's usual pace.

        rows: how many. context: committed tokens of each. width: drafts verified. made: drafts made after it.
        drafting: whether drafts were made for this verify. Where it is plain all around, it returns None: nobody asks.
        """
        if self.frozen:
            return None
        before, place = self.correction, (rows, nearest(_step(context)))
        self.correction = before.after(self.table, rows, _step(context), width, made, seconds)
        if not self.correction.says_the_same(self._priced, place):
            self._prices.clear()
            self._priced = self.correction
        if 0 in before.rounds.get(place, ()) and 0 not in self.correction.rounds[place]:
            self.pause = replace(self.pause, checks=0)  # plain rounds are to be timed anew
        self._untimed = 0
        if not made and not drafting:
            return None
        self._rounds[(*place, width)] += 1
        return seconds / self.correction.pace - made * self.prices(rows, context).draft

    def learned(self) -> tuple[Verified, Drafted]:
        """Returns costs.Verified and costs.Drafted for the cells that were timed often since the last call.

        A plain round keeps the table's seconds and the others are scaled to it, so a busy hour does not spoil the file.
        """
        verified, drafted = {}, {}
        if self.borrowed:  # its times have no scale
            return verified, drafted
        rounds = Counter()
        for cell, count in self._rounds.items():
            rounds[cell[:2]] += count if cell[2] else 0
        for place in [place for place, count in rounds.items() if count >= LEARN]:
            prices, plain = self.prices(*place), self.table.verify_at(*place)[0]
            widths = [cell[2] for cell, count in self._rounds.items() if cell[:2] == place and count >= SURE]
            scale = plain / prices.rounds[0]
            verified |= {(*place, width): scale * prices.verify(width) for width in widths} | {(*place, 0): plain}
            drafted[place] = scale * prices.draft
            self._rounds = Counter({cell: count for cell, count in self._rounds.items() if cell[:2] != place})
        return verified, drafted

    def accepted(self) -> Acceptance | None:
        """Returns what was kept of the drafts; None where too few were verified since the last call, or nothing is to
        be learned.
        """
        if self.frozen or self._observed < LEARN:
            return None
        self._observed = 0
        return Acceptance(self.pool, self.trust)

    def prices(self, rows: int, context: int) -> Prices:
        """Returns the current estimate of what rounds cost. rows: how many. context: committed tokens of a row."""
        trusted = self.frozen or (self._untimed >= UNTIMED and not self.correction.rounds)
        context = _step(context)
        if (rows, context, trusted) not in self._prices:
            if trusted:
                rounds = self.table.rounds_at(rows, context)
                found = Prices(rounds, self.table.draft_at(rows, context), rounds)
            else:
                found = self.correction.prices(self.table, rows, context)
            self._prices[rows, context, trusted] = found
        return self._prices[rows, context, trusted]


def _step(context: int) -> int:
    """Returns the next multiple of CONTEXT_STEP: the same for many rounds, so that prices stay."""
    return -(-context // CONTEXT_STEP) * CONTEXT_STEP
