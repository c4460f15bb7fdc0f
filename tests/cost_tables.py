"""Tables of costs for tests."""

import random

from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, ROWS, CostTable


def table(verify: float, draft: float) -> CostTable:
    """A plain step costs 1; each further token of a verify `verify`, each draft `draft`, of one row."""
    cells = {(rows, 100, w): 1 + verify * (rows * (w + 1) - 1) for rows in ROWS for w in range(MAX_DRAFTS + 1)}
    return CostTable.of(cells, dict.fromkeys(ROWS, draft))


def random_table(seed: int) -> CostTable:
    r = random.Random(seed)
    return table(r.choice([0.0, 0.02, 0.1, 0.3]), r.choice([0.01, 0.1, 0.3]))
