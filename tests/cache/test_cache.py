"""The cache against brute force: every schedule of writes and commits sees exactly the keys that it should."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cache.cache import Cache, Span, visible
from mlx_gemma_mtp.cache.spec import CAPACITY_STEP, KVSpec
from mlx_gemma_mtp.ops.attention import READ_STEP, slots_read

ROWS = 3


def make(window: int | None, block: int, ring_slots: int | None = None, rows: int = ROWS, capacity: int = 1) -> Cache:
    specs = [KVSpec(2, 4, window), KVSpec(1, 4, None)]
    return Cache(specs, rows, capacity, block, mx.float32, ring_slots)


class History:
    """What a cache should hold, as lists: the committed token stamps of each row, and the ones written past them."""

    def __init__(self, rows: int):
        self.committed = [[] for _ in range(rows)]
        self.stamp = 0

    def run(self, cache: Cache, schedule: list[tuple[int, list[int]]]) -> None:
        """Each entry writes T tokens to all rows and commits some; before that every query's view is compared."""
        for tokens, commits in schedule:
            self.step(cache, slice(0, cache.rows), tokens, commits)

    def step(self, cache: Cache, rows: slice, tokens: int, commits: list[int]) -> None:
        count = rows.stop - rows.start
        stamps = self.stamp + 1 + np.arange(count * tokens).reshape(count, tokens)
        self.stamp += count * tokens
        span = cache.span(rows, tokens)
        for i, layer in enumerate(cache.layers):
            kv = np.broadcast_to(stamps[:, None, :, None], (count, layer.spec.kv_heads, tokens, layer.spec.head_dim))
            span.write(i, mx.array(kv.astype(np.float32)), mx.array(-kv.astype(np.float32)))
        self.compare(cache, span, stamps)
        cache.commit(rows, mx.array(commits), [tokens] * count)
        for row, n in enumerate(commits):
            self.committed[rows.start + row] += stamps[row, :n].tolist()
        assert cache.lengths.tolist() == [len(c) for c in self.committed]
        assert all(most >= len(c) for most, c in zip(cache.length_bound, self.committed, strict=True))
        if self.stamp % 2:  # the host may read what was committed, or not
            cache.tighten_length_bound(rows, [tokens - n for n in commits])
        reader = Span(cache, rows, 0)
        self.compare(cache, reader, np.zeros((count, 1), int), reads=True)

    def compare(self, cache: Cache, span: Span, stamps: np.ndarray, reads: bool = False) -> None:
        for layer in cache.layers:
            window = layer.spec.window
            mask = np.array(visible(span.lengths, span.tokens, span.positions, layer.slots, window))
            assert not mask[..., slots_read(layer.slots, span.used) :].any()
            keys = np.array(layer.keys)
            for row in range(stamps.shape[0]):
                past = self.committed[span.rows.start + row]
                for t in range(stamps.shape[1]):
                    all_keys = past if reads else past + stamps[row, : t + 1].tolist()
                    # A drafter's query sits one past the last key, so it sees one key fewer of its window.
                    want = all_keys if window is None else all_keys[-(window - 1 if reads else window) :]
                    if window == 1 and reads:
                        want = []
                    seen = keys[span.rows.start + row, 0, mask[row, 0, t], 0]
                    assert sorted(seen.tolist()) == sorted(want), (window, row, t)


schedules = st.lists(
    st.integers(1, 6).flatmap(
        lambda t: st.tuples(st.just(t), st.lists(st.integers(0, t), min_size=ROWS, max_size=ROWS))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(window=st.sampled_from([1, 2, 5, 8]), schedule=schedules)
def test_every_schedule_sees_what_brute_force_says(window, schedule):
    History(ROWS).run(make(window, block=6), schedule)


def ragged_schedule(seed: int, rounds: int = 12, block: int = 5) -> list[tuple[int, list[int]]]:
    rng = np.random.default_rng(seed)
    return [(block, rng.integers(0, block + 1, ROWS).tolist()) for _ in range(rounds)]


@pytest.mark.parametrize("seed", range(6))
def test_the_ring_law_is_tight(seed, monkeypatch):
    """window + block - 1 slots are right; with one fewer a rejected token comes into sight."""
    History(ROWS).run(make(8, block=5), ragged_schedule(seed))
    short = make(8, block=5, ring_slots=None)
    for layer in short.layers:
        if layer.spec.window:
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    with pytest.raises(AssertionError):
        History(ROWS).run(short, ragged_schedule(seed))


def test_a_ring_that_breaks_the_law_is_refused():
    with pytest.raises(AssertionError, match="ring law"):
        make(8, block=5, ring_slots=11)
    with pytest.raises(AssertionError, match="blocks of 5"):
        make(8, block=5).span(slice(0, ROWS), 6)


def test_full_layers_grow_and_keep_their_contents():
    cache, history = make(4, block=100), History(ROWS)
    history.run(cache, [(100, [100, 40, 0])] * 6)
    assert cache.layers[1].slots == 3 * CAPACITY_STEP and cache.lengths.tolist() == [600, 240, 0]


def test_row_ranges_move_and_clear():
    """A forward names rows; a leaver's place is filled by another row; a cleared row starts anew."""
    cache, history = make(4, block=6), History(ROWS)
    history.run(cache, [(6, [6, 2, 5]), (4, [1, 4, 0])])
    history.step(cache, slice(1, 2), 5, [5])  # a joiner's prefill, alone
    history.step(cache, slice(0, 2), 3, [3, 1])
    cache.move({0: 2})
    history.committed[0] = list(history.committed[2])
    assert cache.lengths.tolist() == [len(c) for c in history.committed]
    history.step(cache, slice(0, 2), 4, [2, 4])
    cache.clear(1)
    history.committed[1] = []
    history.run(cache, [(6, [3, 6, 1]), (6, [6, 6, 6])])


def test_a_write_that_was_only_built_can_be_dropped():
    cache, history = make(4, block=6), History(ROWS)
    history.run(cache, [(6, [6, 2, 5])])
    before = cache.buffers
    span = cache.span(slice(0, ROWS), 6)
    for i, layer in enumerate(cache.layers):
        junk = mx.full((ROWS, layer.spec.kv_heads, 6, 4), 1e9)
        span.write(i, junk, junk)
    cache.buffers = before
    assert max(float(layer.keys.max()) for layer in cache.layers) < 1e9
    history.run(cache, [(6, [1, 1, 1])])


def test_slots_that_were_never_written_are_not_read():
    """And what is read of the others is the same to the bit, however many there are."""
    few, many = make(64, block=16, capacity=1), make(64, block=16, capacity=CAPACITY_STEP + 1)
    mx.random.seed(0)
    kv = [mx.random.normal((ROWS, layer.spec.kv_heads, 9, 4)) for layer in few.layers]
    queries = mx.random.normal((ROWS, 2, 9, 4))
    seen = []
    for cache in (few, many):
        span = cache.span(slice(0, ROWS), 9)
        for i in range(2):
            span.write(i, kv[i], kv[i])
        if cache is many:
            span.used = CAPACITY_STEP + 1
        seen.append([np.array(span.attend(i, queries)) for i in range(2)])
    assert slots_read(few.layers[1].slots, 9) == READ_STEP < CAPACITY_STEP
    for ours, wide in zip(*seen, strict=True):
        np.testing.assert_array_equal(ours, wide)


def test_a_row_that_moves_copies_no_buffer():
    """What moving takes is the rows that move, of all layers: not a buffer, however many rows move at once."""
    rows, slots = 8, 16_384
    cache = Cache([KVSpec(2, 16, None), KVSpec(2, 16, 64)], rows, slots, block=8, dtype=mx.float32)
    stamps = mx.arange(rows, dtype=mx.float32)[:, None, None, None]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys + stamps, layer.values - stamps
    cache.commit(slice(0, rows), mx.arange(rows), list(range(rows)))
    mx.eval(cache.lengths, cache.buffers)
    one_row = sum(2 * layer.keys.nbytes // rows for layer in cache.layers)
    for movers in ({0: 7}, {1: 6, 2: 5}):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cache.move(movers)
        mx.eval(cache.lengths, *[array for buffers in cache.buffers for array in buffers])
        assert mx.get_peak_memory() - before < 1.1 * len(movers) * one_row
    for layer in cache.layers:
        assert np.array(layer.keys[:, 0, -1, 0]).tolist() == [7, 6, 5, 3, 4, 5, 6, 7]
        assert np.array(layer.values[:, 1, 0, 0]).tolist() == [-7, -6, -5, -3, -4, -5, -6, -7]
    assert cache.lengths.tolist() == cache.length_bound == [7, 6, 5, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("lookback", [0, 1])
def test_a_query_that_looks_back_sees_its_own_window(window, lookback):
    """After ragged writes with padding: of each row the last `window` committed keys up to the query, and none else."""
    for seed in range(4):
        cache = Cache([KVSpec(1, 4, window)], ROWS, 1, 5, mx.float32, lookback=lookback)
        committed: list[list[int]] = [[] for _ in range(ROWS)]
        for i, (tokens, commits) in enumerate(ragged_schedule(seed, 8)):
            stamps = 1 + 100 * i + np.arange(ROWS * tokens).reshape(ROWS, tokens)
            kv = mx.array(np.broadcast_to(stamps[:, None, :, None], (ROWS, 1, tokens, 4)).astype(np.float32))
            cache.span(slice(0, ROWS), tokens).write(0, kv, kv)
            cache.commit(slice(0, ROWS), mx.array(commits), [tokens] * ROWS)
            committed = [[*past, *new[:n].tolist()] for past, new, n in zip(committed, stamps, commits, strict=True)]
            span, kv = Span(cache, slice(0, ROWS), 0, -lookback), cache.layers[0]
            seen = np.array(visible(span.lengths, 0, span.positions, kv.slots, window))[:, 0, 0]
            for row, past in enumerate(committed):
                # The query sits at the newest token's index less `lookback`; that token is not in the cache yet.
                first = len(past) - lookback - window + 1
                want = past[max(first, 0) :] if first < len(past) else []
                assert sorted(np.array(kv.keys)[row, 0, seen[row], 0].tolist()) == sorted(want), (seed, i, row)
    with pytest.raises(AssertionError, match="window of no query"):
        Span(cache, slice(0, ROWS), 0, -lookback - 1)
