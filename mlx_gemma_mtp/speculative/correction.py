"""How far a table of costs is off, by the times of the last rounds, and what rounds are likely to cost then.

A table may be from a bad moment, of another number of rows, or of a shape that the machine has not. Only ratios between
draft lengths matter, so a factor that all cells share does no harm. Of contexts there are those of CONTEXTS: a round
counts for the nearest. How the factors follow from times: likeliest.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from statistics import median_low

from .costs import NEAR, WIDEST, CostTable, Place, distance, nearest
from .likeliest import NOISE, NONE, Factors, Time, nearer, told

KEEP = 16  # times of a cell, of each kind: with drafts that were made, and without
FIT = 0.02  # of the logarithm of a factor: by how much new times of a kind may move it until all follow
SURE = 4  # times, from which a cell stands for itself
OFF, OFF_MOST, OFF_OF = 1.35, 4, 5  # the pace has changed when 4 of 5 rounds are off by more than this
LIKE = 1.25  # times within this factor may be equal but for noise
SAME = 0.005  # of the logarithm of a factor: a change that changes no choice
PLAIN_FIRST = 3  # plain rounds that are timed before anything is compared with them
PLAIN_SURE = 8  # plain rounds, from which more of them change little
GUESS = 0.27  # of a plain round: what each draft costs at least where no length was timed
DRAFT_GUESS = 0.1  # of a plain round, likewise
HOPE = 0.4  # of what drafts cost so far: what more of them may cost at best

Times = Mapping[int, tuple[Time, ...]]  # of rounds, by the drafts that they verified, oldest first


@dataclass(frozen=True)
class Prices:
    """The estimated seconds of rounds with a given number of rows.

    rounds[K]: a round that makes and verifies K = 0..WIDEST drafts. draft: one draft. tried: the largest K that was
    timed, or measured beforehand. hope[K]: an optimistic time, for K above tried. live: whether rounds are timed.
    plain: how many plain rounds were timed to compare with, KEEP at least where earlier starts did it. timed: whether
    rounds of this place were measured beforehand.
    """

    rounds: tuple[float, ...]
    draft: float
    hope: tuple[float, ...]
    tried: int = WIDEST
    live: bool = False
    plain: int = KEEP
    timed: bool = False

    @property
    def anchored(self) -> bool:
        """Whether enough plain rounds were timed to compare with."""
        return self.plain >= PLAIN_FIRST

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
    """The last times of rounds, and the factors that follow from them.

    rounds: by (rows, context) and K, of rounds that verify K drafts, oldest first. factors: by (rows, context). pace:
    by how much the machine is slower than it was at first; times are without it. plain_off, draft_off: by how much the
    last rounds without and with drafts were off from the middle one of their cell. waiting: by (rows, context), K, and
    whether drafts were made, by how much the times that the factors do not follow yet would move one: one more time of
    many says little.

    A cell does not change by itself, but a machine does: it is busy, or hot, or no longer. When most of the last plain
    rounds are off together, the pace has changed, and old times of rounds with drafts change with it. When rounds with
    drafts are, old plain times are forgotten, since a plain round can be timed at once.
    """

    rounds: Mapping[Place, Times] = field(default_factory=dict)
    factors: Mapping[Place, Factors] = field(default_factory=dict)
    pace: float = 1.0
    plain_off: tuple[float, ...] = ()
    draft_off: tuple[float, ...] = ()
    waiting: Mapping[tuple[Place, int, bool], float] = field(default_factory=dict)

    def after(self, table: CostTable, rows: int, context: int, width: int, made: int, seconds: float) -> Correction:
        """Returns the correction with the time of one more round.

        width: drafts that it verified. made: drafts that it made. seconds: its time.
        """
        own, draft = table.draft_at(rows, context), _draft(table, rows, context)
        verify = table.rounds_at(rows, context)[width] - width * own
        place, seconds = (rows, nearest(context)), seconds / self.pace
        time, before = Time(verify / seconds, made * draft / seconds), self.rounds.get(place, {}).get(width, ())
        *usual, said = told((*before, time), width, self.at(place))
        off = (median_low(usual) / said,) if len(before) >= SURE else ()
        found = self._with(place, width, time, math.log(said))
        found = found._drafted(place, off) if width else found._plain(place, off)
        settled = place in found.factors and found.pace == self.pace and max(map(abs, found.waiting.values())) < FIT
        return found if settled else found._fitted(table, place)

    def _with(self, place: Place, width: int, time: Time, early: float) -> Correction:
        """Returns the correction with one more time, which is early by this logarithm.

        The oldest one of KEEP of its kind goes. So plain rounds, of which there may be many, do not push out the few
        that tell what a draft takes.
        """
        times, drafting = self.rounds.get(place, {}), time.drafts > 0
        before, kind = times.get(width, ()), (place, width, drafting)
        alike = [i for i, each in enumerate(before) if (each.drafts > 0) == drafting]
        if len(alike) >= KEEP:
            before = before[: alike[0]] + before[alike[0] + 1 :]
        moved = self.waiting.get(kind, 0.0) + max(-NOISE, min(early, NOISE)) / (len(alike) + 1)
        return replace(
            self,
            rounds={**self.rounds, place: {**times, width: (*before, time)}},
            # the first time of all says how fast the machine is
            factors=self.factors or {place: (-math.log(time.verify + time.drafts),) * len(NONE)},
            waiting={**self.waiting, kind: moved},
        )

    def _plain(self, place: Place, off: tuple[float, ...]) -> Correction:
        """Returns the correction after a plain round that was off by this factor."""
        plain_off = (*self.plain_off, *off)[-OFF_OF:]
        change = _common(plain_off)
        if change == 1:
            return replace(self, plain_off=plain_off)
        times = self.rounds[place]
        late = [Time(verify * change, drafts * change) for verify, drafts in times[0][-OFF_OF:]]
        times = {**times, 0: (*times[0][:-OFF_OF], *late)}
        return replace(self, rounds={**self.rounds, place: times}, pace=self.pace * change, plain_off=())

    def _drafted(self, place: Place, off: tuple[float, ...]) -> Correction:
        """Returns the correction after a round with drafts that was off by this factor."""
        draft_off = (*self.draft_off, *off)[-OFF_OF:]
        if _common(draft_off) == 1:
            return replace(self, draft_off=draft_off)
        times = {width: some for width, some in self.rounds[place].items() if width}
        return replace(self, rounds={**self.rounds, place: times}, draft_off=())

    def at(self, place: Place) -> Factors:
        """Returns the factors of a place, or of the nearest that has some."""
        if place in self.factors or not self.factors:
            return self.factors.get(place, NONE)
        return self.factors[min(self.factors, key=lambda other: (distance(other, place), other))]

    def _fitted(self, table: CostTable, place: Place) -> Correction:
        """Returns the correction with the factors of a place one step nearer to the likeliest ones."""
        others = {other: each for other, each in self.factors.items() if other != place}
        prior = replace(self, factors=others).at(place)
        found = nearer(self.at(place), prior, self.rounds[place], table.learned_at(place) > 0)
        return replace(self, factors={**self.factors, place: found}, waiting={})

    def without(self, places: Collection[Place]) -> Correction:
        """Returns the correction without the times of these places."""
        rounds, factors = (
            {place: each for place, each in part.items() if place not in places} for part in (self.rounds, self.factors)
        )
        return replace(self, rounds=rounds, factors=factors, waiting={})

    def says_the_same(self, before: Correction, place: Place) -> bool:
        """Returns whether prices are nearly those of an earlier correction. place: of the times since."""
        old, new = before.rounds.get(place, {}), self.rounds[place]
        if old.keys() != new.keys() or len(old.get(0, ())) < min(len(new.get(0, ())), PLAIN_SURE):
            return False
        pairs = zip(before.factors[place], self.factors[place], strict=True)
        return before.factors is self.factors or all(abs(a - b) < SAME for a, b in pairs)

    def prices(self, table: CostTable, rows: int, context: int) -> Prices:
        """Returns the table's seconds for a number of rows and a context, corrected by the last times.

        A length that was not timed is taken to cost at least what a straight line through the timed lengths gives.
        Where no length was timed, each draft is taken to cost at least GUESS of a plain round.
        """
        place = (rows, nearest(context))
        whole, own = table.rounds_at(rows, context), table.draft_at(rows, context)
        *factors, of_draft = map(math.exp, self.at(place))
        verify = [factor * (seconds - k * own) for k, (seconds, factor) in enumerate(zip(whole, factors, strict=True))]
        draft = min(of_draft * _draft(table, rows, context), verify[0])  # no dearer than a plain round
        rounds = [seconds + k * draft for k, seconds in enumerate(verify)]
        more = [rounds[width] for width in self.rounds.get(place, ()) if width]
        if more and rounds[0] > LIKE * min(more):  # plain rounds were timed amid noise: less work cannot take longer
            rounds[0] = min(more)
        near = [times for other, times in self.rounds.items() if distance(other, place) <= NEAR]
        learned = table.learned_at(place)
        timed = table.timed_at(place)
        tried = max([learned, timed or 0, *(max(times, default=0) for times in near)])
        rounds = list(accumulate(rounds, max))
        known, last = rounds[: tried + 1], rounds[tried]
        slope = (last - rounds[0]) / tried if tried else GUESS * rounds[0]
        further = [slope * more for more in range(1, WIDEST + 1 - tried)]
        beyond = [max(seconds, last + each) for seconds, each in zip(rounds[tried + 1 :], further, strict=True)]
        hope = (*known, *(last + HOPE * each for each in further))
        plain = KEEP if learned else sum(len(times.get(0, ())) for times in near)
        if timed is not None and abs(self.at(place)[0]) < math.log(OFF):  # rounds take what was measured
            plain = max(plain, PLAIN_FIRST)
        return Prices((*known, *beyond), draft, hope, tried, True, plain, timed is not None)


def _draft(table: CostTable, rows: int, context: int) -> float:
    """Returns the table's seconds of a draft; at least DRAFT_GUESS of a plain round where no use has corrected it."""
    own, known = table.draft_at(rows, context), table.learned_at((rows, nearest(context)))
    return own if known else max(own, DRAFT_GUESS * table.rounds_at(rows, context)[0])


def _common(off: Sequence[float]) -> float:
    """Returns the factor by which most of these rounds are off together, or 1."""
    up, down = (sum(each > OFF for each in off), sum(each * OFF < 1 for each in off))
    return median_low(off) if max(up, down) >= OFF_MOST else 1.0
