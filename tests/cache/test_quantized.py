"""K/V in 8 and 4 bits: the same cache by the same rules, and bits of attention that no width changes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_history import HEADS, History, come_and_go, damage, kept, prompt, unpacked

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.cache.kv import LayerKV, QuantizedKV
from mlx_gemma_mtp.cache.packed import LastTokens, PackedSpan
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec, row_bytes, saved_bytes, staged_bytes, with_bits
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.ops import attention

FLOAT = (KVSpec(2, 32, 40), KVSpec(1, 64, None), KVSpec(2, 32, 40), KVSpec(2, 128, None))
CHOICES = [(8, False), (4, False), (8, True), (4, True)]
quantised = pytest.mark.parametrize(("bits", "rings"), CHOICES)


def test_full_layers_have_bits_and_rings_by_choice():
    assert with_bits(FLOAT, None) == FLOAT
    assert [spec.bits for spec in with_bits(FLOAT, 8)] == [None, 8, None, 8]
    assert [spec.bits for spec in with_bits(FLOAT, 4, rings=True)] == [4] * 4
    assert [spec.group for spec in FLOAT] == [32, 64, 32, 64]
    cache = Cache(with_bits(FLOAT, 8), 9, mx.float32)
    assert [type(layer) for layer in cache.rings.layers] == [LayerKV] * 2
    cache.arrange([Saved.empty(cache.specs, mx.float32)])
    assert [type(kvs[0]) for kvs in cache.layers] == [LayerKV, QuantizedKV] * 2


def test_heads_that_no_group_divides_are_refused():
    odd = KVSpec(2, 48, 40)
    assert with_bits([odd, FLOAT[1]], 8)[0] == odd
    with pytest.raises(
        UserError, match="kv_bits is 8, but this model has K/V heads of 48 numbers, expected a multiple"
    ):
        with_bits([odd, FLOAT[1]], 8, rings=True)


def test_a_position_takes_the_bytes_of_its_words_and_scales():
    """26B's full layers: 2 heads of 512, groups of 64, in 16 bits beside: 8.5 and 4.5 bits a number."""
    full = KVSpec(2, 512, None)
    numbers = 2 * 2 * 512
    assert full.slot_bytes(2) == numbers * 2
    assert [spec.slot_bytes(2) for spec in (*with_bits([full], 8), *with_bits([full], 4))] == [
        numbers * 17 // 16,
        numbers * 9 // 16,
    ]


@quantised
def test_bytes_are_what_was_said(bits, rings):
    specs = with_bits(FLOAT, bits, rings)
    for tokens in (1, 39, 300):
        saved, _ = prompt(Cache(specs, 9, mx.float32, lookback=1), tokens, 64, seed=tokens)
        assert saved.bytes == saved_bytes(specs, tokens, 4, lookback=1)
        own = Cache(specs, 64, mx.float32, lookback=1).open(tokens)
        assert own.bytes == staged_bytes(specs, tokens, 64, 4, lookback=1) < staged_bytes(FLOAT, tokens, 64, 4, 1)
        batch = Cache(specs, 9, mx.float32, lookback=1)
        batch.arrange([saved])
        assert batch.bytes == row_bytes(specs, tokens, 9, 4, lookback=1)
        assert batch.bytes == sum(array.nbytes for arrays in batch.buffers for array in arrays)


@quantised
def test_numbers_are_within_a_step_of_what_was_written(bits, rings):
    """A step is a group's range over 2^bits - 1. MLX keeps the larger end and 0 as they are, at the cost of the other
    end, which may be half a step more away.
    """
    spec = with_bits(FLOAT, bits, rings)[1]
    new = np.random.default_rng(bits).standard_normal((3, 2, 1, 7, 64)).astype(np.float32)
    new[0, 0, 0, 0] = 0
    step = (new.max(-1) - new.min(-1)) / (2**bits - 1)
    gaps = np.abs(kept(spec, new) - new)
    assert (gaps <= step[..., None] * 1.5 + 1e-6).all() and gaps.mean() < 0.3 * step.mean()
    assert not kept(spec, new)[0, 0, 0, 0].any()


@quantised
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1 << 30), lookback=st.integers(0, 1))
def test_rows_that_come_and_go_see_what_brute_force_says(bits, rings, seed, lookback):
    """Prompts join, rows leave, for good or saved, come back, grow and change places, with their windows wrapped."""
    specs = with_bits([KVSpec(2, 32, 40), KVSpec(1, 64, None)], bits, rings)
    history = History(Cache(specs, 9, mx.float32, lookback), seed)
    come_and_go(history, rounds=5, most=3, lengths=[1, 40, 243, 300])


@quantised
def test_a_write_that_was_only_built_can_be_dropped(bits, rings):
    cache = Cache(with_bits(FLOAT, bits, rings), 9, mx.float32)
    history = History(cache)
    history.arrange([prompt(cache, n, 64, seed=n) for n in (30, 250)])
    before = cache.buffers
    held = [np.array(array) for arrays in before for array in arrays]
    history.write(6)
    assert not any(
        new is old for a, b in zip(cache.buffers, before, strict=True) for new, old in zip(a, b, strict=True)
    )
    cache.buffers = before
    history.step(6, [1, 4])
    for array, handle in zip(held, (array for arrays in before for array in arrays), strict=True):
        np.testing.assert_array_equal(array, np.array(handle))


def test_a_damaged_row_damages_nobody_who_comes_into_its_place():
    cache = Cache(with_bits(FLOAT, 8, True), 9, mx.float32)
    history = History(cache)
    history.arrange([prompt(cache, n, 64, seed=n) for n in (30, 20)])
    damage(history)
    history.arrange([prompt(cache, 3, 64, seed=5), 1])
    history.arrange([0])
    for _ in range(3):
        history.step(9, [9])


@quantised
def test_a_beginning_is_restored_from_what_was_saved_besides(bits, rings):
    specs = with_bits(FLOAT, bits, rings)
    saved, layers = prompt(Cache(specs, 9, mx.float32), 300, 64, seed=1, slack=30)
    for tokens in (300, 285, 270):
        history = History(Cache(specs, 9, mx.float32))
        first = saved.first(tokens)
        assert first.bytes == sum(array.nbytes for arrays in first.layers for array in arrays)
        history.arrange([(first, [layer[:, :, :tokens] for layer in layers])])
        history.step(9, [5])


def written(cache: Cache, pieces: list[int], seed: int) -> list[list[np.ndarray]]:
    """Writes and commits one sequence, the same for all pieces, in pieces of these widths: of each layer what the
    queries read, a token after the other.
    """
    rng, total = np.random.default_rng(seed), sum(pieces)
    make = lambda heads, spec: rng.standard_normal((cache.rows, heads, total, spec.head_dim)).astype(np.float32)  # noqa: E731
    kv = [(make(s.kv_heads, s), make(s.kv_heads, s), make(HEADS, s)) for s in cache.specs]
    found: list[list[np.ndarray]] = [[] for _ in cache.specs]
    start = 0
    for width in pieces:
        span = cache.span(width)
        for i, parts in enumerate(kv):
            keys, values, queries = (mx.array(part[:, :, start : start + width]) for part in parts)
            span.write(i, keys, values)
            attended = np.array(span.attend(i, queries))
            found[i] += [attended[:, :, t] for t in range(width)]
        cache.commit(mx.array([width] * cache.rows), [width] * cache.rows)
        start += width
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_no_width_changes_a_bit(bits):
    """Tokens one by one and in verifies of 2 to 16, over the end of the windows and of a class; rows of several
    lengths. In float32 with MLX's own products every bit is the same, and so is what is kept.
    """
    specs = with_bits([KVSpec(2, 32, 40), KVSpec(1, 64, None)], bits, rings=True)
    runs, prompts = [], [prompt(Cache(specs, 16, mx.float32), n, 64, seed=n)[0] for n in (30, 5, 210)]
    for width in range(1, 17):
        cache = Cache(specs, 16, mx.float32)
        cache.arrange(prompts)
        pieces = [width] * (36 // width) + ([36 % width] if 36 % width else [])
        found = written(cache, pieces, seed=3)
        runs.append((found, [cache.save(row) for row in range(cache.rows)]))
    for found, rows in runs[1:]:
        for layer, (ours, alone) in enumerate(zip(found, runs[0][0], strict=True)):
            np.testing.assert_array_equal(np.stack(ours), np.stack(alone), err_msg=str(layer))
        for ours, alone in zip(rows, runs[0][1], strict=True):
            for a, b in zip(ours.layers, alone.layers, strict=True):
                assert all(mx.array_equal(x, y) for x, y in zip(a, b, strict=True))


@quantised
def test_a_prompt_in_chunks_reads_what_decoding_reads(bits, rings):
    """And pieces of several prompts in one forward what each alone does."""
    specs = with_bits(FLOAT, bits, rings)
    one, chunks = (Cache(specs, 64, mx.float32).open(150) for _ in range(2))
    for ours, theirs in zip(written(one, [1] * 150, 7), written(chunks, [64, 64, 22], 7), strict=True):
        np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))
    histories = [History(Cache(specs, 64, mx.float32).open(200), seed) for seed in (1, 2)]
    for counts in ([40, 3], [64, 64], [1, 20]):
        span = PackedSpan([history.cache for history in histories], counts)
        new = [np.random.default_rng(5).standard_normal((sum(counts), 2, s.kv_heads, 1, s.head_dim)) for s in specs]
        for i, each in enumerate(new):
            span.write(i, mx.array(each[:, 0].astype(np.float32)), mx.array(each[:, 1].astype(np.float32)))
        queries = [mx.random.normal((sum(counts), HEADS, 1, s.head_dim)) * 2 / s.head_dim**0.5 for s in specs]
        found = [np.array(span.attend(i, each)) for i, each in enumerate(queries)]
        last, ends = LastTokens(span), np.cumsum(counts)
        for i, each in enumerate(queries):
            only = np.array(last.attend(i, each[mx.array(ends - 1)]))
            np.testing.assert_allclose(only, found[i][ends - 1], rtol=1e-6, atol=1e-6)
        for history, end, n in zip(histories, ends, counts, strict=True):
            own = slice(end - n, end)
            mine = [
                kept(s, e[own].astype(np.float32)).transpose(3, 1, 2, 0, 4) for s, e in zip(specs, new, strict=True)
            ]
            for i, each in enumerate(queries):
                asked = np.array(each)[own].transpose(2, 1, 0, 3)
                history.check(i, asked, found[i][own].transpose(2, 1, 0, 3), mine)
            history.commit(mine, [n])


def test_a_layer_has_two_arrays_and_a_write_two_scatters():
    """Words, and scales with biases; whatever the forward writes."""
    cache = Cache(with_bits(FLOAT, 4), 9, mx.float32)
    cache.arrange([Saved.empty(cache.specs, mx.float32)])
    (layer,) = cache.layers[3]
    assert [(array.shape, array.dtype) for array in layer.arrays] == [
        ((1, 4, 256, 16), mx.uint32),
        ((1, 8, 256, 2), mx.float32),
    ]
    assert unpacked(layer.spec, layer.arrays).shape == (2, 2, 256, 128)
    assert Span(cache, 0).attend(3, mx.zeros((1, 2, 1, 128))).shape == (1, 2, 1, 128)


def test_where_no_product_takes_batches_of_packed_matrices_they_are_dequantised(monkeypatch):
    rng, group, bits = np.random.default_rng(4), 32, 8
    sizes = (3, 4, 2, 32), (3, 2, 48, 32), (3, 2, 48, 32)
    queries, keys, values = (mx.array(rng.normal(size=size).astype(np.float32)) for size in sizes)
    packed = [mx.quantize(each, group, bits) for each in (keys, values)]
    newest = mx.array([10, 46, 20])[:, None, None, None] + mx.arange(2)[:, None]
    seen = mx.arange(48) <= newest
    mask = attention.additive_mask(seen, 4, 2)
    products = attention.quantized_attention(queries, *packed, mask, group, bits)
    traits = replace(device.traits(), packed_batches=False)
    monkeypatch.setattr(device, "traits", lambda: traits)
    monkeypatch.setattr(mx, "quantized_matmul", None)
    floats = attention.quantized_attention(queries, *packed, mask, group, bits)
    np.testing.assert_allclose(np.array(floats), np.array(products), atol=1e-5)
