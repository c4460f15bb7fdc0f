"""The largest of many against a sort of all, which orders equals by column."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.ops import topk as module
from mlx_gemma_mtp.ops.topk import topk, total

RNG = np.random.default_rng(0)
VALUES = {
    "normal": lambda shape: RNG.normal(size=shape),
    "all equal": np.zeros,
    "few values": lambda shape: RNG.integers(-2, 3, shape),
    "as bf16 rounds": lambda shape: np.array(mx.array(RNG.normal(size=shape)).astype(mx.bfloat16).astype(mx.float32)),
    "mostly -inf": lambda shape: np.where(RNG.random(shape) < 0.001, RNG.normal(size=shape), -np.inf),
    "nothing but -inf": lambda shape: np.full(shape, -np.inf),
    "rising": lambda shape: np.broadcast_to(np.arange(shape[-1]), shape),
    "falling": lambda shape: np.broadcast_to(-np.arange(shape[-1]), shape),
    "some inf": lambda shape: np.where(RNG.random(shape) < 0.01, np.inf, RNG.normal(size=shape)),
}


def best(values: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


@pytest.fixture(autouse=True)
def grouped(monkeypatch):
    """So few values that all are looked at are left to one test."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "FEW", 4)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("shape", [(4096,), (2, 3, 5000), (1, 1, 8191), (3, 97)], ids=str)
def test_the_largest_are_those_of_a_sort(name, shape):
    """Whatever the last group lacks, and also where k is more than there are."""
    values = VALUES[name](shape).astype(np.float32)
    for k in (1, 2, 20, 64, 300, shape[-1], shape[-1] + 1):
        found, columns = topk(mx.array(values), k)
        assert np.array_equal(np.array(columns), best(values, k)), k
        assert np.array_equal(np.array(found), np.take_along_axis(values, best(values, k), -1)), k


def test_the_rule_for_few_gives_the_same(monkeypatch):
    values = VALUES["few values"]((2, 4000)).astype(np.float32)
    want = np.array(topk(mx.array(values), 40)[1])
    monkeypatch.setattr(module, "SMALL", 1 << 20)
    assert np.array_equal(np.array(topk(mx.array(values), 40)[1]), want)


def test_a_larger_k_goes_on_where_a_smaller_ends():
    values = mx.array(VALUES["few values"]((2, 20_000)).astype(np.float32))
    most = np.array(topk(values, 500)[1])
    for k in (1, 7, 64, 255):
        assert np.array_equal(np.array(topk(values, k)[1]), most[..., :k])


def test_a_vocabulary_of_262144_is_grouped_and_exact(monkeypatch):
    monkeypatch.undo()
    values = np.round(RNG.normal(size=(1, 2, 262_144)).astype(np.float32) * 4, 1)
    assert module._group(2, 262_144, 64) > 1
    for k in (20, 64, 256):
        assert np.array_equal(np.array(topk(mx.array(values), k)[1]), best(values, k))


@pytest.mark.parametrize("size", [4096, 5001])
def test_columns_exist_though_some_values_are_nan(size):
    """And a row's NaN is nothing to the other rows."""
    values = RNG.normal(size=(3, size)).astype(np.float32)
    values[0, ::3], values[1] = np.nan, np.nan
    columns = np.array(topk(mx.array(values), 30)[1])
    assert columns.max() < size and np.array_equal(columns[2], best(values[2], 30))


@pytest.mark.parametrize("size", [4096, 5001])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_total_is_finite_where_all_values_are(size, bad):
    values = RNG.normal(size=(2, 3, size)).astype(np.float32)
    np.testing.assert_allclose(np.array(total(mx.array(values))), values.sum(axis=-1), atol=1e-2)
    values[1, 2, size - 1] = bad
    finite = np.isfinite(np.array(total(mx.array(values))))
    assert not finite[1, 2] and finite.sum() == 5
