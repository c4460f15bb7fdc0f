"""One forward over pieces of several prompts: each reads its own cache alone, as if there were no other."""

from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_history import HEADS, History

from mlx_gemma_mtp.cache import view
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.cache.packed import LastTokens, PackedSpan
from mlx_gemma_mtp.cache.spec import KVSpec
from mlx_gemma_mtp.machine import blas

SPECS = (KVSpec(2, 4, 5), KVSpec(1, 4, None))


def opened(length: int, block: int = 6) -> Cache:
    return Cache(SPECS, block, mx.float32).open(length)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    pieces=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=6),
    at_once=st.sampled_from([2, 16]),
)
def test_pieces_see_what_brute_force_says(seed, pieces, at_once):
    """at_once: how many queries are attended to in a block, where nothing is fused."""
    with patch.object(view, "queries_at_once", lambda *_: at_once):
        check(seed, pieces)


def check(seed, pieces):
    """pieces: of each forward, for each of three prompts; 0: it takes no part. Every third token's position is asked
    about by brute force, and of each piece the last one alone.
    """
    histories = [History(opened(300), seed + row) for row in range(3)]
    rng = np.random.default_rng(seed)
    for counts in pieces:
        part = [(history, n) for history, n in zip(histories, counts, strict=True) if n]
        if not part:
            continue
        counts = [n for _, n in part]
        span = PackedSpan([history.cache for history, _ in part], counts)
        starts = [history.lengths[0] for history, _ in part]
        every = [start + t for start, n in zip(starts, counts, strict=True) for t in range(n)]
        assert span.positions.tolist() == [[position] for position in every]
        new = [rng.standard_normal((sum(counts), 2, s.kv_heads, 1, s.head_dim)).astype(np.float32) for s in SPECS]
        queries = [mx.array(rng.standard_normal((sum(counts), HEADS, 1, s.head_dim)).astype(np.float32)) for s in SPECS]
        found = []
        for i, each in enumerate(new):
            span.write(i, mx.array(each[:, 0]), mx.array(each[:, 1]))
            found.append(np.array(span.attend(i, queries[i])))
        last = LastTokens(span)
        ends = np.cumsum(counts) - 1
        assert last.positions.tolist() == [span.positions.tolist()[end] for end in ends]
        for i in range(len(SPECS)):
            (chosen,) = last.of([queries[i]])
            np.testing.assert_array_equal(np.array(chosen), np.array(queries[i])[ends])
            np.testing.assert_allclose(np.array(last.attend(i, chosen)), found[i][ends], rtol=1e-6, atol=1e-6)
        for j, (history, n) in enumerate(part):
            own = slice(ends[j] + 1 - n, ends[j] + 1)
            mine = [each[own].transpose(3, 1, 2, 0, 4) for each in new]  # [1, 2, kv_heads, n, D]
            asked = [np.array(each)[own].transpose(2, 1, 0, 3) for each in queries]
            for i in range(len(SPECS)):
                history.check(i, asked[i], found[i][own].transpose(2, 1, 0, 3), mine)
            history.commit(mine, [n])


def test_only_single_rows_are_packed():
    cache = Cache(SPECS, 6, mx.float32)
    with pytest.raises(AssertionError, match="several single rows"):
        PackedSpan([cache], [3])
    with pytest.raises(AssertionError, match="several single rows"):
        PackedSpan([opened(9), opened(9)], [3, 0])


def test_a_prompt_has_the_bits_of_its_pieces():
    """With MLX's own BLAS, which adds in one order: in one forward as in many, in rings that lie otherwise."""
    rng = np.random.default_rng(3)
    new = [mx.array(rng.standard_normal((3, 64, HEADS, 1, 4)).astype(np.float32)) for _ in SPECS]
    found = []
    for block, sizes in ((64, [64]), (40, [40, 24]), (7, [7, 1, 1, 6, 7, 7, 7, 7, 7, 7, 7])):
        cache, at, parts = opened(64, block), 0, ([], [])
        for size in sizes:
            span = PackedSpan([cache], [size])
            for i, (queries, keys, values) in enumerate(new):
                heads = SPECS[i].kv_heads
                span.write(i, *(each[at : at + size, :heads] for each in (keys, values)))
                parts[i].append(span.attend(i, queries[at : at + size]))
            cache.commit(mx.array([size]), [size])
            at += size
        found.append([np.concatenate([np.array(each) for each in part]) for part in parts])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            if blas.is_reference():
                np.testing.assert_array_equal(one, two)
            else:
                np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
