"""What a round costs on this machine: a frozen table of measured seconds, and the file that keeps it.

A round that verifies w drafts and makes k new ones costs verify(w) + k * draft. Only ratios matter to whoever chooses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files.kept import KeptFile

MAX_DRAFTS = 7  # eight rows a sequence are the most that MLX's vector attention takes
ROWS = (1, 2, 4, 8)
FORMAT = 2
LARGEST = 1 << 31  # of rows and tokens in a file

Cell = tuple[int, int, int]  # rows, context, drafts verified
Verified = Mapping[Cell, float]  # seconds
Drafted = Mapping[int, float]  # rows -> seconds a draft


@dataclass(frozen=True)
class CostTable:
    """Measured seconds on a grid.

    verify[c][r][w]: a round of ROWS[r] rows after contexts[c] committed tokens that verifies w = 0..MAX_DRAFTS drafts
    and makes none. draft[r]: one draft of ROWS[r] rows. learned: (rows, w) of the cells that use has corrected.
    """

    contexts: tuple[int, ...]
    verify: tuple[tuple[tuple[float, ...], ...], ...]
    draft: tuple[float, ...]
    learned: frozenset[tuple[int, int]] = frozenset()

    @classmethod
    def of(cls, verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> CostTable:
        """Makes a table from measured cells, of which some are learned.

        A missing cell is interpolated by its number of tokens, rows * (w + 1), which decides most of a verify's time,
        from the rows with the most measured widths. Beyond the largest number the last slope continues. By how much a
        number of rows is off from that where it was measured, it is taken to be off beside. Where drafts were timed
        with a single number of rows, a draft's time is taken to grow with rows as a plain step's does.
        """
        contexts = tuple(sorted({context for _, context, _ in verified}))
        planes = []
        for context in contexts:
            own: dict[int, dict[int, float]] = {}
            for (rows, at, width), seconds in verified.items():
                if at == context:
                    own.setdefault(rows, {})[width] = seconds
            most, points = max(map(len, own.values())), {}
            for rows, cells in own.items():
                for width, seconds in cells.items() if len(cells) == most else ():
                    points.setdefault(rows * (width + 1), []).append(seconds)
            sizes = sorted(points)
            means = [sum(points[size]) / len(points[size]) for size in sizes]
            plane = []
            for rows in ROWS:
                line = [_line(rows * (width + 1), sizes, means) for width in range(MAX_DRAFTS + 1)]
                off = {width: math.log(s / line[width]) for width, s in own.get(rows, {}).items() if width < len(line)}
                if off:
                    line = [seconds * math.exp(each) for seconds, each in zip(line, spread(off), strict=True)]
                plane.append(tuple(rising(line)))
            planes.append(tuple(plane))
        rows = sorted(drafted)
        draft = [_line(count, rows, [drafted[each] for each in rows]) for count in ROWS]
        if len(rows) == 1:
            plain = [line[0] for line in planes[0]]
            draft = [each * step / _line(rows[0], ROWS, plain) for each, step in zip(draft, plain, strict=True)]
        return cls(contexts, tuple(planes), tuple(draft), frozenset((rows, width) for rows, _, width in learned))

    def verify_at(self, rows: int, context: int) -> list[float]:
        """Returns the seconds of verifying w = 0..MAX_DRAFTS drafts.

        Times are linear between grid points and continue with the last slope beyond them.
        """
        widths = range(MAX_DRAFTS + 1)
        planes = [[_line(rows, ROWS, [line[width] for line in plane]) for width in widths] for plane in self.verify]
        return [_line(context, self.contexts, [plane[width] for plane in planes]) for width in widths]

    def draft_at(self, rows: int) -> float:
        """Returns the seconds of one draft with this number of rows. They are remembered, since every round asks."""
        if rows not in self._drafts:
            self._drafts[rows] = _line(rows, ROWS, self.draft)
        return self._drafts[rows]

    def rounds_at(self, rows: int, context: int) -> tuple[float, ...]:
        """Returns the seconds of a round that makes and verifies K = 0..MAX_DRAFTS drafts.

        It is remembered, since every round asks.
        """
        if (rows, context) not in self._rounds:
            draft, verify = self.draft_at(rows), self.verify_at(rows, context)
            self._rounds[rows, context] = tuple(seconds + width * draft for width, seconds in enumerate(verify))
        return self._rounds[rows, context]

    @cached_property
    def _drafts(self) -> dict[int, float]:
        """What `draft_at` was asked so far."""
        return {}

    @cached_property
    def _rounds(self) -> dict[tuple[int, int], tuple[float, ...]]:
        """What `rounds_at` was asked so far; by the hash of the table it would take longer to find than to compute."""
        return {}


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
    return [_line(min(width, widths[-1]), widths, values) for width in range(MAX_DRAFTS + 1)]


def _line(x: float, xs: Sequence[int], ys: Sequence[float]) -> float:
    """Linear through the points; left of the first as there, right of the last with the last slope, never falling."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    right = min(bisect_left(xs, x), len(xs) - 1)
    slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right] + (slope if x < xs[right] else max(0.0, slope)) * (x - xs[right])


def updated(
    verified: Verified, drafted: Drafted, newer: Verified, drafts: Drafted
) -> tuple[dict[Cell, float], dict[int, float]]:
    """Returns measured cells with newer ones in their place.

    newer, drafts: as `verified` and `drafted`. What was timed is a round that also makes drafts. So where a draft's
    time changes, that of the verifies that were not timed again changes the other way.
    """
    cells = dict(verified)
    for rows, context, width in verified.keys() - newer.keys():
        if rows in drafts and rows in drafted:
            least = newer.get((rows, context, 0), verified.get((rows, context, 0), 0.0))
            rest = verified[rows, context, width] + width * (drafted[rows] - drafts[rows])
            cells[rows, context, width] = max(rest, least, 1e-12)
    return cells | dict(newer), {**drafted, **drafts}


# Where nothing is known yet, in plain steps: what fits a dense model on a Mac without being optimistic.
UNKNOWN = CostTable.of(
    {(rows, 1, width): 1 + 0.15 * (rows * (width + 1) - 1) for rows in ROWS for width in range(MAX_DRAFTS + 1)},
    dict.fromkeys(ROWS, 0.12),
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

    def read(self) -> tuple[dict[Cell, float], dict[int, float], set[Cell]] | None:
        """Returns the measured cells, and those of them that use has corrected, or None where there is no file. Raises
        ValueError for a file that is not a table of this key.
        """
        if (data := self.load()) is None:
            return None
        try:
            verified = {(rows, context, width): s for rows, context, width, s in data["verify"]}
            drafted = {rows: s for rows, s in data["draft"]}
            learned = {(rows, context, width) for rows, context, width in data["learned"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it is no table of costs ({type(error).__name__}: {error})") from None
        cells = [(rows, context, width + 1) for rows, context, width in verified if _whole(rows, context, width)]
        sane = len(cells) == len(verified) and all(1 <= each <= LARGEST for cell in cells for each in cell)
        sane = sane and learned <= verified.keys() and all(_whole(rows) and 1 <= rows <= LARGEST for rows in drafted)
        if not (verified and drafted and sane and all(map(_possible, (*verified.values(), *drafted.values())))):
            raise ValueError("it has no or impossible times")
        return verified, drafted, learned

    def write(self, verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> None:
        """Writes the cells, whole or not at all. Raises OSError."""
        cells = [[*cell, seconds] for cell, seconds in sorted(verified.items())]
        drafts = [[rows, seconds] for rows, seconds in sorted(drafted.items())]
        self.save({"verify": cells, "draft": drafts, "learned": [list(cell) for cell in sorted(learned)]})
