"""The likeliest factors by which a table of costs is off, given noisy times of rounds.

A round is of one verify and of some drafts that were made after it. The logarithms of the factors, of a verify of each
width and of a draft, are taken to be normal around what was known before: all are off together by any factor, wide
verifies against narrow ones by some, neighbours alike. A time is off by noise, now and then by far, so it counts the
less, the farther it is from others of its kind (Student's t). Rounds of one kind verified as many drafts, and made
others or did not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from .costs import WIDEST

if TYPE_CHECKING:
    import numpy as np  # else where it is used: a command's help is told without it

NOISE, DEGREES = 0.12, 3.0  # of the logarithm of a time: its scale, and how heavy its tails are
DOUBT = 0.25  # likewise the scale, of the only time of its kind
COMMON, DRAFT = 3.0, 0.6  # how far all factors may be off together, and a draft's beside that: deviations of logarithms
STEEP, SMOOTH, OWN = 0.35, 0.15, 0.15  # of wide verifies against a plain one, of neighbours, and of one width
REACH = 3.0  # widths over which neighbours are alike
KNOWN = 0.4  # of these deviations where earlier starts corrected the table

DRAFTS = WIDEST + 1  # the place of a draft's factor
NONE = (0.0,) * (DRAFTS + 1)

Factors = tuple[float, ...]  # logarithms, of each width and of a draft


class Time(NamedTuple):
    """What the table says of a round over what it took: of its verify, and of the drafts that it made."""

    verify: float
    drafts: float


def told(times: Iterable[Time], width: int, factors: Factors) -> list[float]:
    """Returns what these factors say of each round over what it took. width: drafts that each verified."""
    verify, draft = math.exp(factors[width]), math.exp(factors[DRAFTS])
    return [time.verify * verify + time.drafts * draft for time in times]


def nearer(now: Factors, prior: Factors, times: Mapping[int, Sequence[Time]], known: bool) -> Factors:
    """Returns factors that are one step nearer to the likeliest ones (Gauss and Newton).

    prior: those that are likeliest without any time. times: of rounds, by the drafts that they verified. known: whether
    earlier starts corrected the table, so that the prior is closer.
    """
    import numpy as np

    at, widths = np.array(now), np.repeat([*times], [*map(len, times.values())])
    factors = np.exp(at)
    verify, drafts = np.fromiter(chain(*chain(*times.values())), float).reshape(-1, 2).T
    verify, drafts = verify * factors[widths], drafts * factors[DRAFTS]
    said = verify + drafts
    residuals, of_verify, of_drafts = -np.log(said), verify / said, drafts / said
    weights = _weights(2 * widths + (drafts > 0), residuals)
    each, some = weights * of_verify, weights * of_drafts  # of a verify's factor, and of a draft's: the slopes
    prior_precision = _precision(known)
    precision, pull = prior_precision.copy(), prior_precision @ (np.array(prior) - at)
    precision.flat[:: DRAFTS + 2] += np.bincount(widths, each * of_verify, DRAFTS + 1)
    shared = np.bincount(widths, some * of_verify, DRAFTS + 1)
    precision[DRAFTS] += shared
    precision[:, DRAFTS] += shared
    precision[DRAFTS, DRAFTS] += some @ of_drafts
    pull += np.bincount(widths, each * residuals, DRAFTS + 1)
    pull[DRAFTS] += some @ residuals
    return tuple((at + np.linalg.solve(precision, pull)).tolist())


@lru_cache(maxsize=2)
def _precision(known: bool) -> np.ndarray:
    """Returns the inverse of the covariance of the factors, [DRAFTS + 1, DRAFTS + 1]."""
    import numpy as np

    widths = np.arange(WIDEST + 1)
    steep = widths / (widths + 1.0)
    alike = np.exp(-np.abs(widths[:, None] - widths) / REACH)
    found = np.zeros((DRAFTS + 1, DRAFTS + 1))
    found[:DRAFTS, :DRAFTS] = STEEP**2 * np.outer(steep, steep) + SMOOTH**2 * alike + OWN**2 * np.eye(DRAFTS)
    found[DRAFTS, DRAFTS] = DRAFT**2
    return np.linalg.inv(found * (KNOWN if known else 1.0) ** 2 + COMMON**2)


def _weights(kinds: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Returns how much each time counts: less, the farther it is from the lower tercile of its kind, since noise mostly
    adds to a time. A single time is compared with what was expected, and doubted more: where it is an outlier, no other
    says so, and drafts that look dear are not made again.
    """
    import numpy as np

    counts = np.bincount(kinds)
    terciles = residuals[np.lexsort((residuals, kinds))][np.cumsum(counts) - counts + (counts - 1) // 3]
    scale, usual = np.where(counts == 1, DOUBT, NOISE)[kinds], np.where(counts == 1, 0.0, terciles)[kinds]
    return (DEGREES + 1) / (DEGREES + ((residuals - usual) / scale) ** 2) / scale**2
