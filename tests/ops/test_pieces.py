"""Products in pieces that a BLAS need not pack: what they are, and when they are taken."""

import mlx.core as mx
import pytest

from mlx_gemma_mtp.machine import blas, device
from mlx_gemma_mtp.models.linear import Embedding, Linear
from mlx_gemma_mtp.ops import pieces
from mlx_gemma_mtp.ops.pieces import BLOCK, BLOCK_ROWS, MANY

INPUTS, OUTPUTS = 16, 24


@pytest.fixture
def limit(monkeypatch):
    """Sets how many multiply-adds the BLAS takes as they lie."""
    return lambda count: monkeypatch.setattr(device, "small_product", lambda: count)


@pytest.fixture
def multiplied(monkeypatch):
    """The shapes of the left sides of all products."""
    shapes, matmul = [], mx.array.__matmul__
    monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: (shapes.append(a.shape), matmul(a, b))[1])
    return shapes


def same(a, b):
    """Whether two results are equal: to the bit with MLX's own BLAS, which adds in one order whatever the shape."""
    return mx.array_equal(a, b).item() if blas.is_reference() else mx.allclose(a, b, rtol=1e-5, atol=1e-5).item()


@pytest.mark.parametrize(
    ("rows", "most", "shape"),
    [
        (8, 8, (8, INPUTS)),  # it fits
        (24, 8, (3, 8, INPUTS)),
        (21, 8, (3, 7, INPUTS)),
        (16, 9, (2, 8, INPUTS)),
        (23, 8, (23, INPUTS)),  # a prime number of rows
        (24, 3, (24, INPUTS)),  # too few at a time
        (MANY, 8, (MANY // 8, 8, INPUTS)),
        (MANY + 8, 8, (MANY + 8, INPUTS)),  # packing pays
        (24, 0, (24, INPUTS)),  # a BLAS that always packs, or a GPU
    ],
)
def test_few_rows_are_multiplied_at_a_time(limit, multiplied, rows, most, shape):
    limit(most * INPUTS * OUTPUTS)
    linear, x = Linear(INPUTS, OUTPUTS), mx.random.normal((rows, INPUTS))
    y = linear(x)
    assert multiplied == [shape]
    assert same(y, mx.matmul(x, linear.weight.T))


def table(count):
    mx.random.seed(0)
    made = Embedding(count, INPUTS)
    made.weight = mx.random.normal((count, INPUTS))
    made.derive()
    return made


@pytest.mark.parametrize(("axes", "rows"), [((), 1), ((3,), 3), ((2, 4), 8)])
def test_a_small_table_is_multiplied_in_blocks(limit, multiplied, axes, rows):
    limit(8 * INPUTS * BLOCK)
    small, x = table(3 * BLOCK), mx.random.normal((*axes, INPUTS))
    y = small.as_linear(x)
    assert multiplied == [(3, rows, INPUTS)]
    assert y.shape == (*axes, 3 * BLOCK)
    assert same(y, mx.matmul(x, small.weight.T))
    assert mx.array_equal(small(mx.array([0, BLOCK + 1])), small.weight[mx.array([0, BLOCK + 1])])


@pytest.mark.parametrize("why", ["the BLAS packs", "it is large", "no whole blocks", "many rows", "many more rows"])
def test_any_other_table_is_multiplied_as_a_whole(limit, multiplied, monkeypatch, why):
    limit({"the BLAS packs": 0, "many more rows": 10**9}.get(why, 8 * INPUTS * BLOCK))
    if why == "it is large":
        monkeypatch.setattr(pieces, "SMALL", 3 * BLOCK * INPUTS * 4 - 1)
    whole = table(3 * BLOCK + (why == "no whole blocks"))
    x = mx.random.normal(({"many rows": 9, "many more rows": BLOCK_ROWS + 1}.get(why, 8), INPUTS))
    y = whole.as_linear(x)
    assert multiplied == [x.shape]
    assert same(y, mx.matmul(x, whole.weight.T))
