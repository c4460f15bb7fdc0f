"""Tables of costs for tests."""

import random

from mlx_gemma_mtp.speculative.costs import ROWS, WIDEST, CostTable


def table(verify: float, draft: float, attention: float = 0.0) -> CostTable:
    """A plain step costs 1; each further token of a verify `verify`, each draft `draft`, of one row. After 32,768
    tokens each query costs `attention` more.
    """
    cells = {(rows, 100, w): 1 + verify * (rows * (w + 1) - 1) for rows in ROWS for w in range(WIDEST + 1)}
    far = {(rows, 32768, w): cells[rows, 100, w] + attention * rows * (w + 1) for rows, _, w in cells}
    return CostTable.of(cells | (far if attention else {}), {(rows, 100): draft for rows in ROWS})


def random_table(seed: int) -> CostTable:
    r = random.Random(seed)
    return table(r.choice([0.0, 0.02, 0.1, 0.3]), r.choice([0.01, 0.1, 0.3]))
