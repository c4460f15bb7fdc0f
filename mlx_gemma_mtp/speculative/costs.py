"""What a round costs on this machine: a frozen table of measured seconds, and the file that keeps it.

A round that verifies w drafts and makes k new ones costs verify(w) + k * draft. Only ratios matter to whoever chooses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..files.kept import KeptFile

MAX_DRAFTS = 7  # of the drafter: eight rows a sequence are the most that MLX's vector attention takes
WIDEST = 15  # of all sources
ROWS = (1, 2, 4, 8)
CONTEXTS = (0, 4096, 16384, 32768)  # tokens, after which rounds are measured; 0 is a short text
NEAR = 1.0  # places that are not farther apart are so alike that a length that was tried there counts as tried here
HERE = 0.6  # places that are not farther apart are one: three rows are nearest to four
FORMAT = 3
LARGEST = 1 << 31  # of rows and tokens in a file

Place = tuple[int, int]  # rows, context
Cell = tuple[int, int, int]  # rows, context, drafts verified
Verified = Mapping[Cell, float]  # seconds
Drafted = Mapping[Place, float]  # seconds a draft
Plane = tuple[tuple[float, ...], ...]  # of each number of ROWS, the seconds of each width


class Attention(NamedTuple):
    """What `context` tokens of a text add to a round, in plain steps of one row.

    target: to each query of the target's verify. drafter: to each draft.
    """

    target: float
    drafter: float
    context: int


@lru_cache(maxsize=1024)
def nearest(context: int) -> int:
    """Returns that of CONTEXTS for which a round after so many tokens stands."""
    return min(CONTEXTS, key=lambda each: abs(each - context))


@lru_cache(maxsize=1024)
def distance(one: Place, other: Place) -> float:
    """Returns how far two places are apart: in powers of two of their rows, and steps of CONTEXTS."""
    steps = CONTEXTS.index(nearest(one[1])) - CONTEXTS.index(nearest(other[1]))
    return abs(math.log2(one[0] / other[0])) + abs(steps)


@dataclass(frozen=True)
class CostTable:
    """Measured seconds on a grid.

    verify[c][r][w]: a round of ROWS[r] rows that have contexts[c] committed tokens each, which verifies w = 0..WIDEST
    drafts and makes none. draft[c][r][0]: one draft. learned: cells that use has corrected. timed: cells that were
    measured on this machine, learned ones among them. estimated: whether the longest context was not measured.
    """

    contexts: tuple[int, ...]
    verify: tuple[Plane, ...]
    draft: tuple[Plane, ...]
    learned: frozenset[Cell] = frozenset()
    timed: frozenset[Cell] = frozenset()
    estimated: bool = False

    @classmethod
    def of(
        cls,
        verified: Verified,
        drafted: Drafted,
        learned: Iterable[Cell] = (),
        attention: Attention | None = None,
        timed: Iterable[Cell] = (),
    ) -> CostTable:
        """Makes a table from measured cells, of which some are learned.

        attention: by which its context is estimated, unless so long a one was measured. timed: cells that were measured
        on this machine; none where the table is a guess, or of somebody else's.

        At the shortest context a missing cell is interpolated by its number of tokens, rows * (w + 1), which decides
        most of a verify's time, from the rows with the most measured widths. Beyond the largest number the last slope
        continues. By how much a number of rows is off from that where it was measured, it is taken to be off beside.
        Where drafts were timed with a single number of rows, a draft's time is taken to grow with rows half as a
        plain step's does, in powers: a drafter is dense, and its rows share the reading of its weights. What a longer
        context adds is taken to be in proportion to rows.
        """
        contexts = sorted({context for _, context, _ in verified})
        short = _short_plane({(rows, w): s for (rows, at, w), s in verified.items() if at == contexts[0]})
        first = min(context for _, context in drafted)
        own = {rows: seconds for (rows, context), seconds in drafted.items() if context == first}
        drafts = _short_drafts(own, [line[0] for line in short])
        each = {(*place, 0): seconds for place, seconds in drafted.items()}
        added = [(_added(short, verified, context), _added(drafts, each, context)) for context in contexts[1:]]
        if estimated := attention is not None and contexts[-1] < attention.context:
            query, more = attention.target * short[0][0], attention.drafter * short[0][0]
            contexts.append(attention.context)
            added.append(({1: {0: query, WIDEST: (WIDEST + 1) * query}}, {1: {0: more}}))
        verify, draft = [short], [drafts]
        for of_verify, of_draft in added:
            verify.append(_longer(short, of_verify, verify[-1]))
            draft.append(_longer(drafts, of_draft, draft[-1]))
        return cls(tuple(contexts), tuple(verify), tuple(draft), frozenset(learned), frozenset(timed), estimated)

    def verify_at(self, rows: int, context: int) -> list[float]:
        """Returns the seconds of verifying w = 0..WIDEST drafts.

        Times are linear between grid points and continue with the last slope beyond them. context: tokens of a row.
        """
        widths = range(WIDEST + 1)
        planes = [[_line(rows, ROWS, [line[width] for line in plane]) for width in widths] for plane in self.verify]
        return [_line(context, self.contexts, [plane[width] for plane in planes]) for width in widths]

    def draft_at(self, rows: int, context: int) -> float:
        """Returns the seconds of one draft of so many rows. They are remembered, since every round asks."""
        if (rows, context) not in self._drafts:
            lines = [_line(rows, ROWS, [line[0] for line in plane]) for plane in self.draft]
            self._drafts[rows, context] = _line(context, self.contexts, lines)
        return self._drafts[rows, context]

    def rounds_at(self, rows: int, context: int) -> tuple[float, ...]:
        """Returns the seconds of a round that makes and verifies K = 0..WIDEST drafts.

        It is remembered, since every round asks.
        """
        if (rows, context) not in self._rounds:
            draft, verify = self.draft_at(rows, context), self.verify_at(rows, context)
            self._rounds[rows, context] = tuple(seconds + width * draft for width, seconds in enumerate(verify))
        return self._rounds[rows, context]

    def learned_at(self, place: Place) -> int:
        """Returns the largest width that use has corrected in this place or one beside it, 0 where there is none. It is
        remembered, since every round asks.
        """
        if place not in self._learned:
            self._learned[place] = _widest(self.learned, place, NEAR) or 0
        return self._learned[place]

    def timed_at(self, place: Place) -> int | None:
        """Returns the largest width that was measured in this very place, None where nothing was. It is remembered,
        since every round asks.
        """
        if place not in self._timed:
            self._timed[place] = _widest(self.timed, place, HERE)
        return self._timed[place]

    def knows(self, rows: int) -> bool:
        """Returns whether rounds of so many rows after a short text were measured or corrected."""
        return self.timed_at((rows, 0)) is not None or self.learned_at((rows, 0)) > 0

    @cached_property
    def _drafts(self) -> dict[Place, float]:
        """What `draft_at` was asked so far."""
        return {}

    @cached_property
    def _rounds(self) -> dict[Place, tuple[float, ...]]:
        """What `rounds_at` was asked so far; by the hash of the table it would take longer to find than to compute."""
        return {}

    @cached_property
    def _learned(self) -> dict[Place, int]:
        """What `learned_at` was asked so far."""
        return {}

    @cached_property
    def _timed(self) -> dict[Place, int | None]:
        """What `timed_at` was asked so far."""
        return {}


def _widest(cells: Iterable[Cell], place: Place, within: float) -> int | None:
    """Returns the largest width of the cells that lie no farther than this from a place; None where there is none."""
    return max((cell[2] for cell in cells if distance(cell[:2], place) <= within), default=None)


Added = dict[int, dict[int, float]]  # rows -> width -> seconds that a longer context adds, a row


def _short_plane(cells: Mapping[tuple[int, int], float]) -> Plane:
    """Returns the seconds of the shortest context. cells: those that were measured, by (rows, width)."""
    own: dict[int, dict[int, float]] = {}
    for (rows, width), seconds in cells.items():
        own.setdefault(rows, {})[width] = seconds
    most, points = max(map(len, own.values())), {}
    for rows, line in own.items():
        for width, seconds in line.items() if len(line) == most else ():
            points.setdefault(rows * (width + 1), []).append(seconds)
    sizes = sorted(points)
    means = [sum(points[size]) / len(points[size]) for size in sizes]
    plane = []
    for rows in ROWS:
        line = [_line(rows * (width + 1), sizes, means) for width in range(WIDEST + 1)]
        off = {width: math.log(s / line[width]) for width, s in own.get(rows, {}).items() if width <= WIDEST}
        if off:
            line = [seconds * math.exp(each) for seconds, each in zip(line, spread(off), strict=True)]
        known = max(off, default=WIDEST) + 1
        plane.append(tuple(accumulate([*rising(line[:known]), *line[known:]], max)))  # no guess moves what was measured
    return tuple(plane)


def _short_drafts(drafted: Mapping[int, float], plain: Sequence[float]) -> Plane:
    """Returns the seconds of a draft at the shortest context, as those of one width. drafted: by rows. plain: steps of
    each of ROWS.
    """
    rows = sorted(drafted)
    draft = [_line(count, rows, [drafted[each] for each in rows]) for count in ROWS]
    if len(rows) == 1:
        draft = [each * math.sqrt(step / _line(rows[0], ROWS, plain)) for each, step in zip(draft, plain, strict=True)]
    return tuple((seconds,) for seconds in draft)


def _added(short: Plane, cells: Verified, context: int) -> Added:
    """Returns what the cells of a longer context add to the shortest one."""
    added: Added = {}
    for (rows, at, width), seconds in cells.items():
        if at == context and width < len(short[0]):
            before = _line(rows, ROWS, [line[width] for line in short])
            added.setdefault(rows, {})[width] = (seconds - before) / rows
    return added


def _longer(short: Plane, added: Added, last: Plane) -> Plane:
    """Returns the seconds of a longer context: no less than those of the last one, a shorter context. Numbers of rows
    that were not measured follow the nearest one, and widths are on a line through those that were.
    """
    if not added:
        return last
    plane = []
    for rows, line, least in zip(ROWS, short, last, strict=True):
        more = added[min(added, key=lambda count: (abs(math.log2(count / rows)), count))]
        widths = sorted(more)
        values = [more[width] for width in widths]
        found = [seconds + rows * _line(width, widths, values) for width, seconds in enumerate(line)]
        plane.append(tuple(map(max, rising(found), least)))
    return tuple(plane)


def rising(values: Sequence[float]) -> list[float]:
    """Returns the nearest sequence that never falls (pool adjacent violators). More work cannot be cheaper; noise can
    make it look so.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks.pop(-2), blocks.pop()
            blocks.append(((a * m + b * n) / (m + n), m + n))
    return [value for value, count in blocks for _ in range(count)]


def spread(known: Mapping[int, float]) -> list[float]:
    """Returns a value for each width: linear between known ones, beyond them as the last."""
    widths = sorted(known)
    values = [known[width] for width in widths]
    return [_line(min(width, widths[-1]), widths, values) for width in range(WIDEST + 1)]


def _line(x: float, xs: Sequence[int], ys: Sequence[float]) -> float:
    """Linear through the points; left of the first as there, right of the last with the last slope, never falling."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right] + (slope if x < xs[right] else max(0.0, slope)) * (x - xs[right])


def updated(
    verified: Verified, drafted: Drafted, newer: Verified, drafts: Drafted
) -> tuple[dict[Cell, float], dict[Place, float]]:
    """Returns measured cells with newer ones in their place.

    newer, drafts: as `verified` and `drafted`. What was timed is a round that also makes drafts. So where a draft's
    time changes, that of the verifies that were not timed again changes the other way.
    """
    cells = dict(verified)
    for rows, context, width in verified.keys() - newer.keys():
        place = (rows, context)
        if place in drafts and place in drafted:
            least = newer.get((*place, 0), verified.get((*place, 0), 0.0))
            rest = verified[rows, context, width] + width * (drafted[place] - drafts[place])
            cells[rows, context, width] = max(rest, least, 1e-12)
    return cells | dict(newer), {**drafted, **drafts}


# Where nothing is known yet, in plain steps: what fits a dense model on a Mac without being optimistic. After 32,768
# tokens each query reads a quarter of what a step reads.
UNKNOWN = CostTable.of(
    {(rows, 0, width): 1 + 0.15 * (rows * (width + 1) - 1) for rows in ROWS for width in range(WIDEST + 1)},
    {(rows, 0): 0.12 for rows in ROWS},
    attention=Attention(0.25, 0.02, CONTEXTS[-1]),
)


def _whole(*values: Any) -> bool:
    return all(type(value) is int for value in values)


def _possible(seconds: Any) -> bool:
    """Whether a step can take so long. Within these limits no ratio of two of them overflows."""
    return isinstance(seconds, float) and 1e-12 <= seconds <= 1e6


class CostFile(KeptFile):
    """The file of the measured seconds of one pair on one machine.

    key: what the times depend on (pair, chip, backend, BLAS, dtype, versions). A file with another key is not read.
    """

    def __init__(self, key: Mapping[str, Any], folder: Path | None = None):
        super().__init__("costs", FORMAT, key, folder)

    def read(self) -> tuple[dict[Cell, float], dict[Place, float], set[Cell]] | None:
        """Returns the measured cells, and those of them that use has corrected, or None where there is no file. Raises
        ValueError for a file that is not a table of this key.
        """
        if (data := self.load()) is None:
            return None
        try:
            verified = {(rows, context, width): s for rows, context, width, s in data["verify"]}
            drafted = {(rows, context): s for rows, context, s in data["draft"]}
            learned = {(rows, context, width) for rows, context, width in data["learned"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it is no table of costs ({type(error).__name__}: {error})") from None
        cells = (*verified, *((*place, 0) for place in drafted))
        sane = all(_whole(*cell) and cell[0] >= 1 and all(0 <= each <= LARGEST for each in cell) for cell in cells)
        sane = sane and learned <= verified.keys()
        if not (verified and drafted and sane and all(map(_possible, (*verified.values(), *drafted.values())))):
            raise ValueError("it has no or impossible times")
        return verified, drafted, learned

    def write(self, verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> None:
        """Writes the cells, whole or not at all. Raises OSError."""
        cells = [[*cell, seconds] for cell, seconds in sorted(verified.items())]
        drafts = [[*place, seconds] for place, seconds in sorted(drafted.items())]
        self.save({"verify": cells, "draft": drafts, "learned": [list(cell) for cell in sorted(learned)]})
