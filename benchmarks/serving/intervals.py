"""Medians and their intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression, median

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_list(self) -> list[float]:
        return [round(value, 4) for value in (self.middle, self.low, self.high)]


def of_median(values: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Of the median, by bootstrap: the values are drawn again with replacement, equally for equal seeds."""
    r, n = random.Random(seed), len(values)
    drawn = sorted(median(r.choices(values, k=n)) for _ in range(draws))
    return Interval(median(values), *_ends(drawn))


def of_slope(values: Sequence[float], block: int = 5, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Of the slope of values over their numbers, by bootstrap of blocks of the residuals: neighbours are alike."""
    places = range(len(values))
    slope, start = linear_regression(places, values)
    rest = [value - start - slope * i for i, value in enumerate(values)]
    r, drawn = random.Random(seed), []
    for _ in range(draws):
        noise: list[float] = []
        while len(noise) < len(rest):
            first = r.randrange(max(1, len(rest) - block + 1))
            noise += rest[first : first + block]
        again = [start + slope * i + noise[i] for i in places]
        drawn.append(linear_regression(places, again).slope)
    return Interval(slope, *_ends(sorted(drawn)))


def _ends(drawn: Sequence[float]) -> tuple[float, float]:
    cut = round(0.025 * len(drawn))
    return drawn[cut], drawn[-1 - cut]
