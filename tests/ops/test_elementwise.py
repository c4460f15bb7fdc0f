"""Norms and gates of many numbers: the bits of those of few, or what is as near to the exact numbers."""

import platform

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.ops import elementwise, fused
from mlx_gemma_mtp.ops.elementwise import MANY
from mlx_gemma_mtp.ops.fused import number

SHAPES = [(MANY // 64, 64), (MANY // 128 + 1, 2, 64), (3, MANY // 100, 50)]


def normal(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_many_have_the_bits_of_few(shape):
    x, residual, weight, scale = normal(*shape), normal(*shape) * 3, normal(shape[-1]), mx.array([0.37])
    total = mx.square(x).sum(axis=-1, keepdims=True)
    few = fused.normed(x, total, number(1e-4), weight)
    np.testing.assert_array_equal(np.array(elementwise.normed(x, total, number(1e-4), weight)), np.array(few))
    ours = np.array(elementwise.normed_sum(residual, x, total, number(1e-4), weight, scale))
    few = np.array(fused.normed_sum(residual, x, total, number(1e-4), weight, scale))
    if platform.machine() == "x86_64":
        np.testing.assert_array_equal(ours, few)
    else:  # a compiler may make one operation of a product and a sum there
        np.testing.assert_allclose(ours, few, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_types_are_those_of_few(shape):
    x, one = normal(*shape).astype(mx.bfloat16), mx.ones((1,), mx.bfloat16)
    total, weight = mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True), mx.ones((shape[-1],), mx.bfloat16)
    for ours, few in (
        (elementwise.normed(x, total, number(1e-4), weight), fused.normed(x, total, number(1e-4), weight)),
        (
            elementwise.normed_sum(x, x, total, number(1e-4), weight, one),
            fused.normed_sum(x, x, total, number(1e-4), weight, one),
        ),
        (elementwise.geglu(x, x), fused.geglu(x, x)),
    ):
        assert ours.dtype == few.dtype == mx.bfloat16
        np.testing.assert_array_equal(np.array(ours.astype(mx.float32)), np.array(few.astype(mx.float32)))


@pytest.mark.parametrize("by_width", [False, True])
def test_gates_of_many_are_as_near_to_the_exact_ones(by_width, monkeypatch):
    monkeypatch.setattr(elementwise.device, "rounds_by_width", lambda: by_width)
    ends = np.array([-3e4, -88, -12, -6.4, -6.2, -1e-30, 0, 1e-30, 6.2, 12, 88, 3e4, np.nan], np.float32)
    both = np.random.default_rng(0).normal(0, 4, (2 * MANY, 2)).astype(np.float32)
    both[: len(ends), 0] = ends
    gate, up = mx.split(mx.array(both), 2, axis=1)  # views, as of one product
    found = np.array(elementwise.geglu(gate, up))
    x, y = both.astype(np.float64).T
    want = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * y
    np.testing.assert_allclose(found[:, 0], want, rtol=3e-6, atol=1e-6)
    few = np.array(fused.geglu(gate, up))
    assert np.array_equal(found, few, equal_nan=True) is not by_width
