"""How many bytes of weights a launch reads: each expert once for 8 rows. Counted in the emulator.

Beside it stock MLX, counted by the same harness in MLX's own kernel text: each expert once for every pair.
"""

import mlx.core as mx
import numpy as np
import pytest
import stock
from cases import coded, recorded, uniform
from emulator import Reads

from mlx_gemma_mtp.ops.kernels import down, gate_up
from mlx_gemma_mtp.ops.kernels.grouping import ROWS, group_reference
from mlx_gemma_mtp.ops.kernels.products import Weights

WIDTHS = (1, 2, 3, 4, 5, 8, 16, 32)
INPUTS, SIZE, OUTPUTS = 64, 4, 8
LANES = 64 // 8  # that share a scale: each takes 8 values at 4 bits
NAMED = 4  # times that gather_qmv's text names each 16 bits of weights, for four values; a compiler loads them once


def generated(tokens: int) -> list[np.ndarray]:
    """Even routes of the real shape, as `recorded`."""
    return [uniform(tokens)]


def needed(routes: np.ndarray, rows: int) -> int:
    """Readings of an expert: the sum over experts of ceil(rows / R)."""
    return int((-(-np.bincount(routes.reshape(-1)) // rows)).sum())


def check(
    reads: dict[str, Reads], weights: Weights, experts: int, readings: int, distinct: int, named: int = 1
) -> None:
    """A launch's reads of its weights: so many readings of an expert, of so many distinct ones."""
    for name, array, sharing in (
        ("weight", weights.weight, named),
        ("scales", weights.scales, LANES),
        ("biases", weights.biases, LANES),
    ):
        one = array.nbytes // experts
        assert reads[name].total == readings * one * sharing
        assert reads[name].distinct == distinct * one
        assert reads[name].units == distinct * one // 16


def run(routes: np.ndarray, experts: int, rows: int, both: Weights, single: Weights) -> None:
    """Launches both kernels."""
    chosen = mx.array(routes.astype(np.uint32))
    groups = group_reference(chosen.reshape(-1), experts, rows)
    x, scale = mx.ones((len(routes), INPUTS)), mx.ones(chosen.shape) / chosen.shape[1]
    gate_up.gate_up_metal(x, both, chosen, groups)
    down.down_metal(mx.ones((chosen.size, INPUTS)), single, chosen, scale, groups)


@pytest.fixture
def counting(emulator):
    emulator.counting = True
    return emulator


@pytest.mark.parametrize("tokens", WIDTHS)
def test_each_expert_is_read_once_for_eight_rows(counting, tokens):
    """On recorded routes of the bundled target and on generated ones of 128 experts."""
    for routes, experts in ((recorded, 24), (generated, 128)):
        both, single = coded(experts, 2 * SIZE, INPUTS), coded(experts, OUTPUTS, INPUTS)
        for one in routes(tokens):
            run(one, experts, ROWS, both, single)
            union = len(np.unique(one))
            check(counting.reads["expert_gate_up"], both, experts, needed(one, ROWS), union)
            check(counting.reads["expert_down"], single, experts, needed(one, ROWS), union)
            assert (needed(one, ROWS) == union) == (np.bincount(one.reshape(-1)).max() <= ROWS)
            assert needed(one, ROWS) < one.size or union == one.size


@pytest.mark.skipif(stock.missing() is not None, reason=str(stock.missing()))
@pytest.mark.parametrize("tokens", WIDTHS)
def test_stock_mlx_reads_an_expert_for_every_pair(counting, tokens):
    """On the same routes; our kernels at one row a group read as much."""
    for routes, experts in ((recorded, 24), (generated, 128)):
        weights = coded(experts, OUTPUTS, INPUTS)
        for one in routes(tokens):
            pairs = mx.array(one.reshape(-1).astype(np.uint32))
            stock.gather(mx.ones((pairs.size, INPUTS)), weights, mx.arange(pairs.size, dtype=mx.uint32), pairs)
            check(counting.reads["gather_qmv"], weights, experts, one.size, len(np.unique(one)), NAMED)
        run(one, experts, 1, coded(experts, 2 * SIZE, INPUTS), weights)
        check(counting.reads["expert_down"], weights, experts, one.size, len(np.unique(one)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 32])
def test_the_real_26b_layer(emulator, tokens, dtype):
    """2816 inputs, 704 inner, 128 experts, 8 of them, 4 bits in groups of 64: values, bits of a row alone, bytes."""
    experts = mx.array(uniform(tokens).astype(np.uint32))
    both, single = coded(128, 1408, 2816, dtype), coded(128, 2816, 704, dtype)
    x = mx.random.normal((tokens, 2816), key=mx.random.key(0)).astype(dtype)
    scale = mx.softmax(mx.random.normal((tokens, 8), key=mx.random.key(1)), axis=-1)
    groups = group_reference(experts.reshape(-1), 128)
    close = {mx.float32: 1e-5, mx.bfloat16: 2**-7}[dtype]
    inner = gate_up.gate_up_metal(x, both, experts, groups)
    assert gate_up.difference(inner, gate_up.gate_up_reference(x, both, experts), close) is None
    combined = down.down_metal(inner, single, experts, scale, groups)
    assert down.difference(combined, down.down_reference(inner, single, experts, scale), close) is None
    alone = group_reference(experts[-1], 128)
    assert mx.array_equal(gate_up.gate_up_metal(x[-1:], both, experts[-1:], alone), inner[-8:])
    assert mx.array_equal(down.down_metal(inner[-8:], single, experts[-1:], scale[-1:], alone), combined[-1:])
    emulator.counting = True
    gate_up.gate_up_metal(x, both, experts, groups)
    read, union = emulator.reads["expert_gate_up"]["weight"], len(np.unique(np.array(experts)))
    assert read.total == needed(np.array(experts), ROWS) * 1408 * 352 * 4
    assert read.distinct == union * 1408 * 352 * 4
    print(f"{tokens} tokens: {experts.size} pairs, {union} experts, {read.total} bytes of gate and up read")
