"""Rows of a cache that come, go, grow and change places: what they hold, what it takes, and that nothing is copied."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_history import History, come_and_go, damage, prompt

from benchmarks.trace import primitives
from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.cache.kv import LayerKV, layout
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec, capacity, row_bytes, saved_bytes, staged_bytes, with_bits

SPECS = (KVSpec(2, 4, 40), KVSpec(1, 4, None), KVSpec(2, 4, 40), KVSpec(2, 4, None))


def batch(lengths: Sequence[int], block: int = 9, specs: Sequence[KVSpec] = SPECS, lookback: int = 0) -> History:
    """A batch of prompts of these lengths."""
    history = History(Cache(specs, block, mx.float32, lookback), seed=sum(lengths))
    history.arrange([prompt(history.cache, n, 64, seed=i) for i, n in enumerate(lengths)])
    return history


def test_classes():
    """256, 512, 1024, then four an octave; from there on at most a fifth of a row is unused."""
    first = [256, 512, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120]
    assert sorted({capacity(n) for n in range(5121)}) == first
    for n in [*range(1, 3000), *range(3000, 300_000, 1009)]:
        assert capacity(n) >= n and capacity(capacity(n)) == capacity(n) and (n <= 1024 or n > 0.8 * capacity(n))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), window=st.sampled_from([1, 5, 40]), lookback=st.integers(0, 1))
def test_rows_that_come_and_go_see_what_brute_force_says(seed, window, lookback):
    """Prompts of several lengths and chunks join; rows leave, for good or saved, come back, grow and change places."""
    specs = [KVSpec(2, 4, window), KVSpec(1, 4, None)]
    history = History(Cache(specs, 9, mx.float32, lookback), seed)
    come_and_go(history, rounds=8, most=4, lengths=[1, 5, 40, 243, 300, 1100])


def asked(cache: Cache, tokens: int = 4) -> int:
    """The primitives of writing and attending to T tokens in all layers."""
    kv = [mx.zeros((cache.rows, spec.kv_heads, tokens, spec.head_dim)) for spec in cache.specs]
    queries = [mx.zeros((cache.rows, 2, tokens, spec.head_dim)) for spec in cache.specs]
    mx.eval(kv, queries, cache.buffers, cache.lengths)
    before, span = cache.buffers, cache.span(tokens)
    for i, each in enumerate(kv):
        span.write(i, each, each)
    found = primitives([span.attend(i, each) for i, each in enumerate(queries)], cache.buffers)
    cache.buffers = before
    return found


def test_a_batch_of_one_class_gathers_nothing():
    """Full or not, and whoever left. While there are empty places, what is written is laid out for all of them."""
    full, part = batch([30, 20, 10, 5]), batch([30, 20, 10, 5])
    part.arrange([0, 3, 2])
    layouts = 2 * len(SPECS) + 3  # of keys and values of each layer, and of the slots of each kind of layer
    views = 2 * 2  # of the places that are not empty: what is read of full layers is a view anyway
    assert asked(part.cache) == asked(full.cache) + layouts + views
    part.cache.trim()
    assert asked(part.cache) == asked(batch([30]).cache) == asked(full.cache)
    mixed = batch([300, 20, 400, 10])
    assert asked(mixed.cache) > asked(full.cache)
    mixed.arrange([1, 3])
    mixed.cache.trim()
    assert asked(mixed.cache) == asked(batch([20, 10]).cache)
    for history in (part, mixed):
        history.step(4, [4] * history.cache.rows)


def test_rows_that_grow_into_one_class_lie_in_order():
    """The last becomes the first of the larger class, and at last all are there."""
    history = batch([231, 191, 231, 234], block=9)
    assert history.cache.classes == [256] * 4
    for _ in range(7):
        history.step(9, [3, 2, 4, 9])
    assert history.cache.classes == [512, 256, 512, 512]
    for _ in range(10):
        history.step(9, [1, 9, 1, 1])
    assert history.cache.classes == [512] * 4 and asked(history.cache) == asked(batch([30, 20, 10, 5]).cache)


def test_bytes_are_what_was_said():
    """Of a row in a batch, of a batch that shrinks, of a saved row, and of a prompt's own cache."""
    lengths = [3, 247, 248, 1000, 1271, 1272, 6000]
    cache = batch(lengths, lookback=1).cache
    each = [row_bytes(SPECS, n, 9, 4, lookback=1) for n in lengths]
    assert cache.bytes == sum(each) == sum(a.nbytes + b.nbytes for a, b in cache.buffers)
    cache.arrange([1, 6])
    assert cache.bytes == sum(each)
    cache.trim()
    assert cache.bytes == each[1] + each[6] == sum(a.nbytes + b.nbytes for a, b in cache.buffers)
    cache.arrange([])
    cache.trim()
    assert cache.bytes == 0
    for tokens in (1, 39, 40, 41, 300):
        saved, _ = prompt(Cache(SPECS, 9, mx.float32, lookback=1), tokens, 64, seed=tokens)
        assert saved.bytes == saved_bytes(SPECS, tokens, 4, lookback=1)
    for tokens in (1, 48, 49, 300, 5000):
        own = Cache(SPECS, 64, mx.float32, lookback=1)
        own.open(tokens)
        assert own.bytes == staged_bytes(SPECS, tokens, 64, 4, lookback=1) <= row_bytes(SPECS, tokens, 64, 4, 1)


def test_a_class_follows_from_the_length_alone():
    """Whatever was drafted, and built before anybody knew how much of it stayed; whether the row was away meanwhile."""
    classes: dict[int, set[int]] = {}
    for tokens, kept, away in ((1, 1, False), (9, 1, False), (9, 3, False), (9, 2, True)):
        history = batch([221, 100])
        while history.lengths[0] < 260:
            _, new = history.write(tokens)
            history.commit(new, [kept, 1], tight=False)
            history.cache.span(tokens)  # of the next verify, which is built before the host reads
            history.tighten()
            if away:
                history.arrange([history.saved(0), 1])
            history.cache.span(tokens)
            classes.setdefault(history.lengths[0], set()).add(history.cache.classes[0])
    assert all(len(each) == 1 for each in classes.values()), classes
    assert {each for found in classes.values() for each in found} == {256, 512}


def test_what_lay_in_a_place_before_is_gone():
    """A row whose numbers were damaged leaves; whoever comes into its place, and grows there, reads none of them."""
    history = batch([30, 20])
    damage(history)
    newcomer = prompt(history.cache, 3, 64, seed=5)
    history.arrange([1, newcomer])
    history.arrange([newcomer, 1])
    for keys, values in history.cache.buffers:
        assert mx.isfinite(keys[:, :, 45:]).all() and mx.isfinite(values[:, :, 45:]).all()
    history.arrange([0])
    for _ in range(6):
        history.step(9, [9])


def test_a_beginning_is_restored_from_what_was_saved_besides():
    """With slack a shorter beginning is whole; without, only one that the window holds."""
    cache = Cache(SPECS, 9, mx.float32)
    for length, slack in ((300, 30), (39, 0), (20, 0)):
        saved, layers = prompt(cache, length, 64, seed=length, slack=slack)
        for tokens in (length, length - slack // 2, length - slack):
            history = History(Cache(SPECS, 9, mx.float32))
            history.arrange([(saved.first(tokens), [layer[:, :, :tokens] for layer in layers])])
            history.step(9, [5])
    saved, _ = prompt(cache, 300, 64, seed=1, slack=30)
    with pytest.raises(AssertionError, match="38 positions of 269 tokens, expected 39"):
        cache.arrange([saved.first(269)])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("length", [1, 20, 48, 49, 96, 300])
def test_who_leaves_takes_what_would_be_saved(length, bits):
    """In whatever slots of the rings the window lies."""
    specs = SPECS if bits is None else with_bits([KVSpec(2, 32, 40), KVSpec(1, 64, None)], bits, True)
    cache, rng = Cache(specs, 9, mx.float32).open(length), np.random.default_rng(length)
    for start in range(0, length, 9):
        count = min(9, length - start)
        span = cache.span(count, known=True)
        for layer, spec in enumerate(specs):
            new = mx.array(rng.standard_normal((1, spec.kv_heads, count, spec.head_dim)).astype(np.float32))
            span.write(layer, new, -new)
        cache.commit(mx.array([count]), [count])
        mx.eval(cache.buffers, cache.lengths)
    saved, left = cache.save(0), cache.leave()
    assert saved.tokens == left.tokens == length
    for kept, moved in zip(saved.layers, left.layers, strict=True):
        for one, other in zip(kept, moved, strict=True):
            np.testing.assert_array_equal(np.array(one), np.array(other))


def test_what_a_ring_no_longer_holds_is_not_saved():
    """A verify wrote over the positions before the window: the slack is what is left."""
    history = batch([300])
    history.step(9, [1])
    assert [keys.shape[2] for keys, _ in history.saved(0, slack=20)[0].layers] == [40, 301, 40, 301]
    history.step(2, [2])
    assert [keys.shape[2] for keys, _ in history.saved(0, slack=20)[0].layers] == [42, 303, 42, 303]


def dispatched(cache: Cache, tokens: int) -> None:
    """A forward as the loop runs it: each layer's write follows another layer's read."""
    span, read = cache.span(tokens), mx.zeros(())
    for i, spec in enumerate(cache.specs):
        new = mx.zeros((cache.rows, spec.kv_heads, tokens, spec.head_dim)) + read
        span.write(i, new, new)
        read = 0 * span.attend(i, mx.zeros((cache.rows, spec.kv_heads, tokens, spec.head_dim)) + read).max()
    mx.async_eval(read)
    del span, new
    cache.commit(mx.array([tokens] * cache.rows), [tokens] * cache.rows)
    mx.eval(read, cache.lengths)


def peak(run: Callable[[], object]) -> int:
    """The bytes that were in use besides those before."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    mx.synchronize()
    return mx.get_peak_memory() - before


def test_rows_come_leave_and_move_in_place():
    """A hundred rounds, with a change of rows before most of them: no buffer is copied, and no memory stays behind."""
    specs = [KVSpec(2, 16, None), KVSpec(2, 16, 4000), KVSpec(2, 16, None)]
    cache = Cache(specs, 8, mx.float32)
    own = Cache(specs, 64, mx.float32)
    own.open(7000)
    own.commit(mx.array([6000]), [6000])
    saved = own.save(0)
    cache.arrange([saved] * 8)
    mx.eval(cache.buffers)
    row, whole, usual = row_bytes(specs, 6000, 8, 4), cache.bytes, peak(lambda: dispatched(cache, 4))
    assert whole == 8 * row
    start, rng = mx.get_active_memory(), np.random.default_rng(0)
    for _ in range(100):
        stay = [each for each in range(cache.rows) if rng.random() < 0.8]
        if rng.random() < 0.3:
            rng.shuffle(stay)
        places: list[int | Saved] = [int(each) for each in stay]
        for _ in range(rng.integers(9 - len(stay))):
            places.insert(int(rng.integers(len(places) + 1)), saved)
        changed = sum(place != at for at, place in enumerate(places))

        def change(places: list[int | Saved] = places or [saved]) -> None:
            cache.arrange(places)
            dispatched(cache, 4)

        assert peak(change) < usual + 1.1 * max(changed, 1) * row
        cache.tighten_length_bound([bound - 6000 for bound in cache.length_bound])  # so that nothing grows
        cache.lengths = mx.full((cache.rows,), 6000, mx.int32)
    assert cache.bytes == whole and mx.get_active_memory() < start + row / 4


@pytest.mark.parametrize("bits", [None, 8])
def test_a_write_takes_no_copy_of_its_buffer(bits):
    """A round's peak is far below the buffers that it writes to, packed ones included: a CPU copies what one layer's
    products read, never what it writes.
    """
    specs = with_bits([KVSpec(2, 64, None)] * 8, bits)
    cache = Cache(specs, 8, mx.float32)
    saved = [tuple(part.zeros(1, 2000) for part in layout(spec, mx.float32)) for spec in specs]
    cache.arrange([Saved(2000, tuple(saved))] * 3)
    mx.eval(cache.buffers)
    for _ in range(3):
        assert peak(lambda: dispatched(cache, 1)) < cache.bytes / 2


def test_a_row_that_grows_takes_its_own_size():
    """Into the next class, from among others: the row is copied, the buffers of the others are not."""
    specs = [KVSpec(2, 16, None)] * 3
    cache = Cache(specs, 8, mx.float32)
    own = Cache(specs, 64, mx.float32)
    own.open(10_240)
    own.commit(mx.array([10_220]), [10_220])
    shorter = own.save(0)
    cache.arrange([shorter] * 6)
    mx.eval(cache.buffers)
    usual, old, new = peak(lambda: dispatched(cache, 1)), shorter.bytes, row_bytes(specs, 10_234, 8, 4)
    cache.length_bound[2] = 10_234
    assert peak(lambda: dispatched(cache, 1)) < usual + 1.25 * (old + new) < cache.bytes / 2
    assert cache.classes == [10_240, 10_240, 12_288, 10_240, 10_240, 10_240]


def test_a_long_row_does_not_make_the_others_long(monkeypatch):
    """6,000 tokens beside seven times 100: what is kept and what is read is what each needs, and a fifth at most."""
    specs = [KVSpec(2, 4, None), KVSpec(2, 4, 64), KVSpec(2, 4, None)]
    lengths, block = [100, 100, 6000, 100, 100, 100, 100, 100], 9
    history = batch(lengths, block, specs)
    needed = sum(staged_bytes([spec], 1, 1, 4) // 256 * n for n in lengths for spec in specs if spec.window is None)
    rings = 8 * row_bytes([specs[1]], 1, block, 4)
    assert history.cache.bytes <= 1.2 * needed + rings
    read, attend = [], LayerKV.attend

    def probe(self: LayerKV, rows: int, slots: int, *rest: mx.array) -> mx.array:
        read.append(rows * slots if self.spec.window is None else 0)
        return attend(self, rows, slots, *rest)

    monkeypatch.setattr(LayerKV, "attend", probe)
    span, _ = history.write(block)
    for i in range(3):
        span.attend(i, mx.zeros((8, 2, block, 4)))
    assert sum(read) <= 1.2 * 2 * (sum(lengths) + 8 * block)
    history.step(block, [block] * 8)


def test_lookers_back_read_their_own_window():
    for lookback in (0, 1):
        history = batch([300, 20, 60], lookback=lookback)
        history.arrange([2, prompt(history.cache, 50, 16, seed=9), 0])
        history.step(4, [1, 4, 0])
        assert Span(history.cache, 0, -lookback).positions.tolist() == [[n - lookback] for n in history.lengths]
