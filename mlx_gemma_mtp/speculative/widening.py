"""How much wider a verify may be for drafts that cost nothing to make: copies, and what a grammar forces.

They are priced by the verify alone, and by all rows together: a batch waits for its widest row.
"""

from __future__ import annotations

from collections.abc import Sequence

from .choice import MARGIN
from .correction import Prices
from .costs import WIDEST
from .depth import AUTO, Depth, DraftRow
from .drafting import FORCED
from .history import expected
from .mixture import Chain


def verified(
    depth: Depth,
    rows: Sequence[DraftRow],
    context: int,
    chains: Sequence[Chain],
    confidences: Sequence[Sequence[float]],
    waiting: Sequence[int],
) -> tuple[int | None, bool]:
    """Returns how many drafts of each row the next verify has at most, None for all, and whether its time is one of a
    width that the drafter's drafts have: not where others made it wider, or took their place.

    rows: as of this verify, in the order of the rest. context: committed tokens of a row, on average. confidences: of
    each row, those of the drafter's drafts. waiting: how many drafts of each row there are.
    """
    automatic = [row.drafts == AUTO for row in rows]
    replaced = [chain.replaced for chain in chains]
    depth.give_way(row.id for row, gone in zip(rows, replaced, strict=True) if gone)
    own = [
        min(chain.own, count) if auto else count for chain, count, auto in zip(chains, waiting, automatic, strict=True)
    ]
    led = [row.id for row, chain in zip(rows, chains, strict=True) if chain.sources[:1] == [FORCED]]
    width = depth.verify(rows, context, confidences, own, led)
    beside = any(chain.beside for chain in chains)
    known = depth.prices(len(rows), context) if beside else None
    if width is None or known is None:
        return width, True
    rates = [chain.rates for chain, auto in zip(chains, automatic, strict=True) if auto]
    useful = [row.useful for row, auto in zip(rows, automatic, strict=True) if auto]
    most = wider(rates, useful, width, *known, len(rows) - len(rates))
    return most, most == width and not any(replaced)


def wider(
    rates: Sequence[Sequence[float]], useful: Sequence[int], width: int, prices: Prices | None, drafts: int, others: int
) -> int:
    """Returns how many drafts of each row to verify, at least `width`, which the drafter's are worth.

    rates: of each row that may have more, the chance of each of its drafts, if all before it are kept. useful: how many
    its limit leaves room for. drafts: made in each round, whose time is spent. others: rows whose drafts are not asked.
    A width is taken where all rows together gain more than MARGIN by it, and none loses more than MARGIN.
    """
    most = min(max(map(len, rates), default=0), WIDEST)
    if prices is None or most <= width:
        return width
    kept = [expected([*row, *[0.0] * (most - len(row))], room) for row, room in zip(rates, useful, strict=True)]
    kept += [[1.0] * (most + 1)] * others
    took = [prices.verify(w) + drafts * prices.draft for w in range(most + 1)]
    best, gain = width, (1 + MARGIN) * sum(row[width] for row in kept) / took[width]
    for w in range(width + 1, most + 1):
        rate = sum(row[w] for row in kept) / took[w]
        loses = any(row[w] / took[w] < (1 - MARGIN) * row[width] / took[width] for row in kept)
        if rate > gain and not loses:
            best, gain = w, rate
    return best
