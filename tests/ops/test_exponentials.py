"""e^x by plain arithmetic: against float64 over the whole range, and the same bits wherever a number stands."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.ops.exponentials import LEAST, exponentials

ZERO = mx.zeros((1, 1))


def exp(x):
    return np.array(exponentials(mx.array(x, mx.float32).reshape(1, -1), ZERO))[0]


def test_it_is_as_near_as_its_argument_is_rounded():
    x = np.concatenate([np.linspace(LEAST, 0, 400_003), -np.geomspace(1e-12, 87, 100_001)]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(exp(x) / want - 1) / (1 + np.abs(x))).max() < 2**-23


def test_gates_ask_for_more_than_one():
    x = np.linspace(0, 80, 400_003).astype(np.float32)
    assert (np.abs(exp(x) / np.exp(x.astype(np.float64)) - 1) / (1 + x)).max() < 2**-22


def test_the_ends_are_exact():
    found = exp([0.0, -0.0, -np.inf, np.nan, -87.1, -104.0, -1e4, -1e30])
    np.testing.assert_array_equal(found, [1, 1, 0, np.nan, 0, 0, 0, 0])
    assert exp([LEAST])[0] == pytest.approx(np.exp(LEAST), rel=1e-5)


def test_halves_and_wholes_of_the_exponent_are_smooth():
    """Where n changes, f jumps from 1/2 to -1/2."""
    x = -(np.arange(125) + 0.5) * np.log(2)
    around = (x[:, None] + np.linspace(-1e-4, 1e-4, 21)).astype(np.float32).reshape(-1)
    assert np.abs(exp(around) / np.exp(around.astype(np.float64)) - 1).max() < 1e-5
    ascending = exp(np.sort(around))
    assert (ascending[1:] >= ascending[:-1] * (1 - 3e-7)).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 16, 33, 191])
def test_bits_do_not_depend_on_the_company(count):
    """A vectorised loop ends in a scalar one, and rows of their own largest numbers are read in another loop."""
    rng = np.random.default_rng(count)
    scores = rng.normal(0, 20, (7, 1024)).astype(np.float32)
    largest = scores.max(axis=1, keepdims=True)
    whole = np.array(exponentials(mx.array(scores), mx.array(largest)))
    for start in (0, 1, 6, 500, 1024 - count):
        part = scores[:, start : start + count]
        np.testing.assert_array_equal(
            np.array(exponentials(mx.array(part), mx.array(largest))), whole[:, start : start + count]
        )
        row = exponentials(mx.array(part[3]), mx.array(largest[3]))
        np.testing.assert_array_equal(np.array(row), whole[3, start : start + count])
        at_once = exponentials(mx.array(part[3] - largest[3]), mx.array([0.0]))
        np.testing.assert_array_equal(np.array(at_once), whole[3, start : start + count])
    view = mx.array(scores)[:, 3::2]
    np.testing.assert_array_equal(np.array(exponentials(view, mx.array(largest))), whole[:, 3::2])


def test_without_a_compiler_bits_are_the_same():
    x = np.random.default_rng(0).uniform(-100, 0, 4099).astype(np.float32)
    before = exp(x)
    mx.disable_compile()
    try:
        np.testing.assert_array_equal(exp(x), before)
    finally:
        mx.enable_compile()
