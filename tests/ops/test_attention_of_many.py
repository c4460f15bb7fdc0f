"""Attention of a prefill's blocks of queries: a mask of the last keys alone, and scores that are many."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.ops.attention import READ_STEP, attention_reference, band, masked
from mlx_gemma_mtp.ops.elementwise import MANY
from mlx_gemma_mtp.ops.exponentials import exponentials


@pytest.mark.parametrize("slots", [40 * READ_STEP, 40 * READ_STEP + 1, READ_STEP])
@pytest.mark.parametrize("window", [None, 24])
def test_blocks_attend_to_what_they_see(slots, window):
    rng, queries, heads, dim = np.random.default_rng(slots), 12, 4, 16
    sizes = (heads, queries), (2, slots), (2, slots)
    q, k, v = (rng.normal(size=(1, *size, dim)).astype(np.float32) for size in sizes)
    begin = slots - queries
    seen = begin if window is None else 0
    mask = band(queries, slots - seen, begin - seen, window, heads // 2)
    found = attention_reference(*map(mx.array, (q, k, v)), mask, exponentials)
    scores = np.einsum("hqd,hkd->hqk", q[0].astype(np.float64), k[0].repeat(2, 0))
    behind = begin + np.arange(queries)[:, None] - np.arange(slots)
    scores[:, (behind < 0) | (behind >= (window or slots))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdims=True), v[0].repeat(2, 0))
    np.testing.assert_allclose(np.array(found[0]), want, atol=1e-5)
    assert window or slots < READ_STEP * 2 or heads * queries * slots >= MANY  # else it would test few


def test_a_mask_of_the_last_keys_leaves_the_other_scores_as_they_are():
    scores, mask = mx.arange(24.0).reshape(1, 2, 3, 4), mx.array([[0, -mx.inf], [0, 0], [-mx.inf, 0]])
    kept = mx.array(scores)
    want = np.array(scores)
    want[..., 2:] += np.array(mask)
    np.testing.assert_array_equal(np.array(masked(scores, mask)), want)
    np.testing.assert_array_equal(np.array(scores), np.array(kept))
