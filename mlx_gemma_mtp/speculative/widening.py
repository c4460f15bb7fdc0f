"""How much wider a verify may be for drafts that cost nothing to make: copies, and what a grammar forces.

They are priced by the verify alone, and by all rows together: a batch waits for its widest row.
"""

from __future__ import annotations

from collections.abc import Sequence

from .choice import MARGIN
from .correction import Prices
from .history import expected

STEPS = 4  # of the last widths that were priced, by which wider ones are


def seconds(prices: Prices, width: int) -> float:
    """Returns the seconds of a round that verifies `width` drafts and makes none. Beyond the widths that have a price
    it goes on as over the last of them.
    """
    last = len(prices.rounds) - 1
    if width <= last:
        return prices.verify(width)
    slope = (prices.verify(last) - prices.verify(last - STEPS)) / STEPS
    return prices.verify(last) + (width - last) * max(slope, 0.0)


def wider(
    rates: Sequence[Sequence[float]], useful: Sequence[int], width: int, prices: Prices | None, drafts: int, others: int
) -> int:
    """Returns how many drafts of each row to verify, at least `width`, which the drafter's are worth.

    rates: of each row that may have more, the chance of each of its drafts, if all before it are kept. useful: how many
    its limit leaves room for. drafts: made in each round, whose time is spent. others: rows whose drafts are not asked.
    A width is taken where all rows together gain more than MARGIN by it, and none loses more than MARGIN.
    """
    most = max(map(len, rates), default=0)
    if prices is None or most <= width:
        return width
    kept = [expected([*row, *[0.0] * (most - len(row))], room) for row, room in zip(rates, useful, strict=True)]
    kept += [[1.0] * (most + 1)] * others
    took = [seconds(prices, w) + drafts * prices.draft for w in range(most + 1)]
    best, gain = width, (1 + MARGIN) * sum(row[width] for row in kept) / took[width]
    for w in range(width + 1, most + 1):
        rate = sum(row[w] for row in kept) / took[w]
        loses = any(row[w] / took[w] < (1 - MARGIN) * row[width] / took[width] for row in kept)
        if rate > gain and not loses:
            best, gain = w, rate
    return best
