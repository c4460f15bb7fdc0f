"""The cache against brute force: every schedule of writes and commits sees exactly the keys that it should."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_history import History

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec
from mlx_gemma_mtp.ops.attention import READ_STEP, slots_read

ROWS = 3


def make(window: int | None, block: int, rows: int = ROWS, lookback: int = 0) -> Cache:
    cache = Cache([KVSpec(2, 4, window), KVSpec(1, 4, None)], block, mx.float32, lookback)
    cache.arrange([Saved.empty(cache.specs, mx.float32)] * rows)
    return cache


def ragged_schedule(seed: int, rounds: int = 12, block: int = 5) -> list[tuple[int, list[int]]]:
    rng = np.random.default_rng(seed)
    return [(block, rng.integers(0, block + 1, ROWS).tolist()) for _ in range(rounds)]


schedules = st.lists(
    st.integers(1, 6).flatmap(
        lambda t: st.tuples(st.just(t), st.lists(st.integers(0, t), min_size=ROWS, max_size=ROWS), st.booleans())
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(window=st.sampled_from([1, 2, 5, 8]), lookback=st.integers(0, 1), schedule=schedules)
def test_every_schedule_sees_what_brute_force_says(window, lookback, schedule):
    """The host may read after a step how many tokens were committed, or not."""
    history = History(make(window, 6, lookback=lookback))
    for step in schedule:
        history.step(*step)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lookback", [0, 1])
def test_the_ring_law_is_tight(seed, lookback):
    """window + block - 1 + lookback slots are right; with one fewer a rejected token comes into sight."""

    def run(cache: Cache) -> None:
        history = History(cache, seed)
        for step in ragged_schedule(seed):
            history.step(*step)

    run(make(8, 5, lookback=lookback))
    short = make(8, 5, lookback=lookback)
    (ring,) = short.layers[0]
    ring.arrays, ring.slots = tuple(array[:, :, :-1] for array in ring.arrays), ring.slots - 1
    with pytest.raises(AssertionError):
        run(short)


def test_what_a_cache_has_no_room_for_is_refused():
    with pytest.raises(AssertionError, match="blocks of 5"):
        make(8, 5).span(6)
    with pytest.raises(AssertionError, match="window of no query"):
        Span(make(8, 5, lookback=1), 0, -2)
    cache = Cache([KVSpec(1, 4, None)], 8, mx.float32)
    cache.open(250)
    cache.commit(mx.array([250]), [250])
    cache.span(6)
    with pytest.raises(AssertionError, match="opened for 250 tokens"):
        cache.span(7)


def test_full_layers_grow_and_keep_their_contents():
    history = History(make(4, block=100))
    for _ in range(6):
        history.step(100, [100, 40, 0])
    assert history.cache.classes == [1024, 512, 256] and history.lengths == [600, 240, 0]


def test_a_write_that_was_only_built_can_be_dropped():
    history = History(make(4, block=100))
    for commits in ([100, 2, 5], [100, 0, 1]):
        history.step(100, commits)
    history.step(6, [3, 6, 0])
    before = history.cache.buffers
    assert len(before) == 3  # one ring, full layers of two classes
    history.write(6)
    assert not any(new[0] is old[0] for new, old in zip(history.cache.buffers, before, strict=True))
    history.cache.buffers = before
    kept = [(np.array(keys), np.array(values)) for keys, values in before]
    history.step(6, [1, 1, 1])
    for arrays, handles in zip(kept, before, strict=True):
        for array, handle in zip(arrays, handles, strict=True):
            np.testing.assert_array_equal(array, np.array(handle))


def test_slots_that_were_never_written_are_not_read():
    """And what is read of the others is the same to the bit, however many there are."""
    few, many = (make(64, block=block) for block in (16, 300))
    assert (few.classes[0], many.classes[0]) == (256, 1024)
    mx.random.seed(0)
    kv = [mx.random.normal((ROWS, spec.kv_heads, 9, 4)) for spec in few.specs]
    queries = mx.random.normal((ROWS, 2, 9, 4))
    seen = []
    for cache in (few, many):
        span = cache.span(9)
        for i in range(2):
            span.write(i, kv[i], kv[i])
        seen.append([np.array(span.attend(i, queries)) for i in range(2)])
        cache.length_bound = [256] * ROWS  # as if nobody had read how short the rows are
        seen.append([np.array(Span(cache, 0).attend(i, queries[:, :, :1])) for i in range(2)])
    assert slots_read(256, 9) == READ_STEP < 256
    for ours, wide in zip(seen[:2], seen[2:], strict=True):
        for layer in range(2):
            np.testing.assert_array_equal(ours[layer], wide[layer])
