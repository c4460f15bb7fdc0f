"""How far a table of costs is off: the times of the last rounds over what the table says of them.

A table may be from a bad moment, of another number of rows, or of a shape that the machine has not. Only ratios between
draft lengths matter, so a factor that all cells share does no harm. Each cell (rows, context, drafts) has the lower
tercile of its last times; cells without times follow their neighbours. Of contexts there are those of CONTEXTS: a round
counts for the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median_low

from .costs import WIDEST, Cell, CostTable, Place, distance, nearest, spread

KEEP = 9  # times of a cell
SURE = 4  # times, from which a cell stands for itself
OFF, OFF_MOST, OFF_OF = 1.35, 4, 5  # the pace has changed when 4 of 5 rounds are off by more than this
LIKE = 1.25  # times within this factor may be equal but for noise
PLAIN_FIRST = 3  # plain rounds that are timed before anything is compared with them
NEAR = 1.0  # places that are not farther apart are so alike that a length that was tried there counts as tried here
DRAFT_WEIGHT = 1.0  # of what the table says of a draft, in timed drafts
GUESS = 0.27  # of a plain round: what each draft costs at least where no length was timed
DRAFT_GUESS = 0.1  # of a plain round, likewise
DRAFT_LEAST = 0.1  # of what the table says of a draft
TRUST = 6.0  # of a table that earlier starts corrected, in times of each cell
TRUST_HALF = 32  # rounds that are timed, after which it is half of that


@dataclass(frozen=True)
class Prices:
    """The estimated seconds of rounds with a given number of rows.

    rounds[K]: a round that makes and verifies K = 0..WIDEST drafts. draft: one draft. tried: the largest K that was
    timed. hope[K]: an optimistic time, for K above tried. live: whether rounds are timed. anchored: whether enough
    plain rounds were timed to compare with.
    """

    rounds: tuple[float, ...]
    draft: float
    hope: tuple[float, ...]
    tried: int = WIDEST
    live: bool = False
    anchored: bool = True

    def verify(self, width: int) -> float:
        """Returns the seconds of a round that verifies `width` drafts and makes none."""
        return max(self.rounds[width] - width * self.draft, self.rounds[0])

    def risk(self, drafts: int, tokens: float) -> float:
        """Returns the loss of a round against plain decoding, in plain rounds.

        drafts: how many the round makes and verifies. tokens: emitted by each row.
        """
        return self.rounds[drafts] / self.rounds[0] - tokens


@dataclass(frozen=True)
class Correction:
    """The ratios of the last measured times to the table's, oldest first.

    taken: rounds that were timed. Where earlier starts corrected the table, the first times say little against its
    shape. rounds: by (rows, context, K), of rounds that make and verify K drafts. drafts: by (rows, context), of one
    draft. pace: by how much the machine is slower than it was at first; ratios are without it. plain_off, draft_off: by
    how much the last rounds without and with drafts were off from their cells.

    A cell does not change by itself, but a machine does: it is busy, or hot, or no longer. When most of the last plain
    rounds are off together, the pace has changed, and old times of rounds with drafts change with it. When rounds with
    drafts are, old plain times are forgotten, since a plain round can be timed at once.
    """

    rounds: Mapping[Cell, tuple[float, ...]] = field(default_factory=dict)
    drafts: Mapping[Place, tuple[float, ...]] = field(default_factory=dict)
    pace: float = 1.0
    taken: int = 0
    plain_off: tuple[float, ...] = ()
    draft_off: tuple[float, ...] = ()

    def after(self, table: CostTable, rows: int, context: int, width: int, made: int, seconds: float) -> Correction:
        """Returns the correction with the time of one more round.

        width: drafts that it verified. made: drafts that it made. seconds: its time.
        """
        whole, draft = table.rounds_at(rows, context)[width], table.draft_at(rows, context)
        place, seconds = (rows, nearest(context)), seconds / self.pace
        plain = self.rounds.get((*place, 0))
        if made and not width and plain:  # the difference to a plain round is the drafts'
            scale = middle(plain)
            ratio = (seconds - scale * whole) / (made * draft)
            ratio = max(DRAFT_LEAST * scale, min(ratio, scale * whole / draft))  # a draft is no dearer than a round
            return replace(self, drafts={**self.drafts, place: (*self.drafts.get(place, ()), ratio)[-KEEP:]})
        ratio = (seconds + (width - made) * self.draft(table, rows, context)) / whole
        if ratio <= 0:
            return self
        times = self.rounds.get((*place, width), ())
        off = (ratio / median_low(times),) if len(times) >= SURE else ()
        rounds = {**self.rounds, (*place, width): (*times, ratio)[-KEEP:]}
        found = replace(self, rounds=rounds, taken=self.taken + 1)
        return found._drafted(place, off) if width else found._plain(place, off)

    def _plain(self, place: Place, off: tuple[float, ...]) -> Correction:
        """Returns the correction after a plain round that was off by this factor."""
        plain_off = (*self.plain_off, *off)[-OFF_OF:]
        change = _common(plain_off)
        if change == 1:
            return replace(self, plain_off=plain_off)
        times = self.rounds[(*place, 0)]
        times = (*times[:-OFF_OF], *(each / change for each in times[-OFF_OF:]))
        return replace(self, rounds={**self.rounds, (*place, 0): times}, pace=self.pace * change, plain_off=())

    def _drafted(self, place: Place, off: tuple[float, ...]) -> Correction:
        """Returns the correction after a round with drafts that was off by this factor."""
        draft_off = (*self.draft_off, *off)[-OFF_OF:]
        if _common(draft_off) == 1:
            return replace(self, draft_off=draft_off)
        rounds = {cell: times for cell, times in self.rounds.items() if cell != (*place, 0)}
        return replace(self, rounds=rounds, draft_off=())

    def says_the_same(self, before: Correction, cell: Cell) -> bool:
        """Returns whether prices are what they were before the last time came. cell: of that time."""
        old, new = before.rounds.get(cell, ()), self.rounds.get(cell, ())
        return self.drafts is before.drafts and len(old) == len(new) == KEEP and middle(old) == middle(new)

    def prices(self, table: CostTable, rows: int, context: int) -> Prices:
        """Returns the table's seconds for a number of rows and a context, corrected by the last times.

        A length that was not timed is taken to cost at least what a straight line through the timed lengths gives.
        Where no length was timed, each draft is taken to cost at least GUESS of a plain round.
        """
        place = (rows, nearest(context))
        rounds = [
            math.exp(f) * s for f, s in zip(self.factors(table, place), table.rounds_at(rows, context), strict=True)
        ]
        more = [rounds[cell[2]] for cell in self.rounds if cell[:2] == place and cell[2]]
        if more and rounds[0] > LIKE * min(more):  # plain rounds were timed amid noise: less work cannot take longer
            rounds[0] = min(more)
        near = [cell for cell in self.rounds if distance(cell[:2], place) <= NEAR]
        learned = table.learned_at(place, NEAR)
        tried = max([learned, *(cell[2] for cell in near)])
        rounds = list(accumulate(rounds, max))
        slope = (rounds[tried] - rounds[0]) / tried if tried else GUESS * rounds[0]
        line = [rounds[0] + slope * drafts for drafts in range(WIDEST + 1)]
        hope = (*rounds[: tried + 1], *line[tried + 1 :])
        rounds = [*rounds[: tried + 1], *map(max, rounds[tried + 1 :], line[tried + 1 :])]
        plain = sum(len(self.rounds[cell]) for cell in near if cell[2] == 0)
        anchored = plain >= PLAIN_FIRST or learned > 0
        return Prices(tuple(rounds), self.draft(table, rows, context), hope, tried, True, anchored)

    def draft(self, table: CostTable, rows: int, context: int) -> float:
        """Returns the seconds of one draft: a weighted mean of the middle one of the measured times and the table's.

        The table's time counts as at least DRAFT_GUESS of a plain round. It is one of those that the middle is taken
        of: a single time that is far too long would make every verify look free, since a round's time is of both.
        """
        place, draft = (rows, nearest(context)), table.draft_at(rows, context)
        plain = self.rounds.get((*place, 0))
        scale = middle(plain) if plain else math.exp(self.factors(table, place)[0])
        known = table.learned_at(place, NEAR)
        guess = (draft if known else max(draft, DRAFT_GUESS * table.rounds_at(rows, context)[0])) * scale
        times = self.drafts.get(place, ())
        timed = median_low((*times, guess / draft)) * draft * len(times)
        return (timed + guess * DRAFT_WEIGHT) / (len(times) + DRAFT_WEIGHT)

    def factors(self, table: CostTable, place: Place) -> list[float]:
        """Returns for each width the logarithm of measured over tabulated seconds.

        Widths that were not timed in this place follow the nearest place that has times, then their neighbours.
        """
        own = self._logs(place)
        others = {cell[:2] for cell in self.rounds if cell[:2] != place}
        shape = [0.0] * (WIDEST + 1)
        if others:
            beside = self._logs(min(others, key=lambda other: (distance(other, place), other)))
            shape = spread({width: log for width, (log, _) in beside.items()})
        if not own:
            return shape
        apart = {width: log - shape[width] for width, (log, _) in own.items()}
        steady = dict(apart)
        for width, (_, count) in own.items():
            if count < SURE and len(own) > 1:  # one time alone is half believed
                elsewhere = spread({w: log for w, log in apart.items() if w != width})[width]
                steady[width] = (count**2 * apart[width] + elsewhere) / (count**2 + 1)
        found = [a + b for a, b in zip(shape, spread(steady), strict=True)]
        weight = TRUST * 0.5 ** (self.taken / TRUST_HALF) if table.learned_at(place, NEAR) else 0.0
        common = sum(log * count for log, count in own.values()) / sum(count for _, count in own.values())
        counts = [own[width][1] if width in own else 1 for width in range(WIDEST + 1)]
        return [(log * count + weight * common) / (count + weight) for log, count in zip(found, counts, strict=True)]

    def _logs(self, place: Place) -> dict[int, tuple[float, int]]:
        """Width -> the logarithm of its ratio, and the number of times behind it."""
        cells = ((cell[2], times) for cell, times in self.rounds.items() if cell[:2] == place)
        return {width: (math.log(middle(times)), len(times)) for width, times in cells}


def middle(times: Sequence[float]) -> float:
    """Returns the lower tercile of the times (the least of three): noise mostly adds to a time."""
    return sorted(times)[(len(times) - 1) // 3]


def _common(off: Sequence[float]) -> float:
    """Returns the factor by which most of these rounds are off together, or 1."""
    up, down = (sum(each > OFF for each in off), sum(each * OFF < 1 for each in off))
    return median_low(off) if max(up, down) >= OFF_MOST else 1.0
