"""What a cache should hold, kept as arrays, and what every query reads of it by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec, capacity, row_bytes

HEADS = 2  # of a query
Layers = list[np.ndarray]  # of one row: the keys and values of each layer, [2, kv_heads, n, D]
Kept = tuple[Saved, Layers]


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, places: np.ndarray, window: int | None
) -> np.ndarray:
    """Of the positions `places` [T], each of which sees itself and what comes before: queries [heads, T, D], keys and
    values [kv_heads, n, D], in float64. Without keys it is NaN.
    """
    slots, own = np.arange(keys.shape[1]), np.arange(len(queries)) * len(keys) // len(queries)
    seen = slots <= places[:, None]
    if window is not None:
        seen &= slots > places[:, None] - window
    scores = np.where(seen, queries.astype(float) @ keys[own].astype(float).swapaxes(1, 2), -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        return weights @ values[own] / weights.sum(axis=-1, keepdims=True)


def unpacked(spec: KVSpec, arrays: Sequence[mx.array]) -> np.ndarray:
    """The numbers that a row's arrays stand for, [2, kv_heads, n, D], read by hand: the first number of a word lies in
    its lowest bits; scales of keys and of values are followed by the biases of both.
    """
    arrays = [np.array(array)[0] for array in arrays]
    if spec.bits is None:
        return np.stack(arrays)
    words, scales = arrays
    count = 32 // spec.bits
    integers = (words[..., None] >> (spec.bits * np.arange(count, dtype=np.uint32))) & ((1 << spec.bits) - 1)
    integers = integers.reshape(2, spec.kv_heads, words.shape[1], -1, spec.group)
    scales, biases = scales.reshape(2, 2, spec.kv_heads, words.shape[1], -1, 1)
    return (integers * scales + biases).reshape(2, spec.kv_heads, words.shape[1], -1).astype(np.float32)


def kept(spec: KVSpec, new: np.ndarray) -> np.ndarray:
    """What is left of numbers along the last axis once they are written."""
    if spec.bits is None:
        return new
    parts = mx.quantize(mx.array(new), spec.group, spec.bits)
    return np.array(mx.dequantize(*parts, spec.group, spec.bits))


class History:
    """A cache beside the keys and values that its rows should hold. `step` compares every query's attention."""

    def __init__(self, cache: Cache, seed: int = 0):
        self.cache, self.rng = cache, np.random.default_rng(seed)
        empty = [np.zeros((2, spec.kv_heads, 0, spec.head_dim), np.float32) for spec in cache.specs]
        self.rows: list[Layers] = [empty] * cache.rows

    @property
    def lengths(self) -> list[int]:
        return [layers[0].shape[2] for layers in self.rows]

    def random(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def write(self, tokens: int) -> tuple[Span, Layers]:
        """Writes T tokens to all rows: the span, and of each layer what is kept of them, [B, 2, kv_heads, T, D]."""
        cache = self.cache
        span = cache.span(tokens)
        new = [self.random(cache.rows, 2, spec.kv_heads, tokens, spec.head_dim) for spec in cache.specs]
        for i, each in enumerate(new):
            span.write(i, mx.array(each[:, 0]), mx.array(each[:, 1]))
        return span, [kept(spec, each) for spec, each in zip(cache.specs, new, strict=True)]

    def commit(self, new: Layers, commits: Sequence[int], tight: bool = True) -> None:
        """Commits some tokens of each row. tight: the host reads how many they are."""
        tokens, before = new[0].shape[3], self.rows
        self.cache.commit(mx.array(list(commits)), [tokens] * len(commits))
        self.rows = [
            [np.concatenate([old, each[row, :, :, :n]], axis=2) for old, each in zip(before[row], new, strict=True)]
            for row, n in enumerate(commits)
        ]
        assert self.cache.lengths.tolist() == self.lengths
        assert all(bound >= n for bound, n in zip(self.cache.length_bound, self.lengths, strict=True))
        if tight:
            self.tighten()

    def tighten(self) -> None:
        bounds = self.cache.length_bound
        self.cache.tighten_length_bound([bound - n for bound, n in zip(bounds, self.lengths, strict=True)])
        assert self.cache.length_bound == self.lengths

    def step(self, tokens: int, commits: Sequence[int], tight: bool = True) -> None:
        """Writes T tokens to all rows, commits some, and compares what the forward and then a drafter read."""
        span, new = self.write(tokens)
        self.compare(span, new)
        self.commit(new, commits, tight)
        for offset in range(-self.cache.lookback, 1):
            self.compare(Span(self.cache, 0, offset), None, offset)

    def compare(self, span: Span, new: Layers | None, offset: int = 0) -> None:
        """new: what the span wrote; None for a drafter, whose query sits one past the last key, and `offset` from
        there.
        """
        for i, spec in enumerate(self.cache.specs):
            queries = self.random(self.cache.rows, HEADS, span.tokens or 1, spec.head_dim) * 2 / spec.head_dim**0.5
            self.check(i, queries, np.array(span.attend(i, mx.array(queries))), new, offset)

    def check(self, layer: int, queries: np.ndarray, found: np.ndarray, new: Layers | None, offset: int = 0) -> None:
        """Compares a layer's attention, [B, heads, T, D] as the queries are, with brute force. See `compare`."""
        window = self.cache.specs[layer].window
        for row, layers in enumerate(self.rows):
            past = layers[layer]
            held = past if new is None else np.concatenate([past, new[layer][row]], axis=2)
            places = past.shape[2] + (np.arange(queries.shape[2]) if new is not None else np.array([offset]))
            want = attention(queries[row], *held, places, window)
            np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-5, err_msg=f"{layer, row}")

    def saved(self, row: int, slack: int = 0) -> Kept:
        """A row as it is saved, whose contents are compared."""
        saved, layers = self.cache.save(row, slack), self.rows[row]
        assert saved.tokens == self.lengths[row]
        assert saved.bytes == sum(array.nbytes for arrays in saved.layers for array in arrays)
        for arrays, spec, layer in zip(saved.layers, self.cache.specs, layers, strict=True):
            least = saved.tokens if spec.window is None else spec.window - 1 + self.cache.lookback
            count = arrays[0].shape[2]
            assert min(least, saved.tokens) <= count <= min(least + slack, saved.tokens)
            rounding = 0 if spec.bits is None else 1e-6
            held = layer[:, :, layer.shape[2] - count :]
            np.testing.assert_allclose(unpacked(spec, arrays), held, rtol=rounding, atol=rounding)
        return saved, layers

    def arrange(self, places: Sequence[int | Kept]) -> None:
        self.cache.arrange([place if isinstance(place, int) else place[0] for place in places])
        self.rows = [self.rows[place] if isinstance(place, int) else place[1] for place in places]
        assert self.cache.lengths.tolist() == self.cache.length_bound == self.lengths


def prompt(cache: Cache, length: int, chunk: int, seed: int, slack: int = 0) -> Kept:
    """A prompt of so many tokens, prefilled in a cache of its own, for the rows of `cache`."""
    own = Cache(cache.specs, chunk, cache.dtype, cache.lookback)
    own.open(length)
    assert own.classes == [capacity(length)] and own.lengths.tolist() == [0]
    history, before = History(own, seed), own.bytes
    for start in range(0, length, chunk):
        count = min(chunk, length - start)
        if start + chunk < length:
            history.commit(history.write(count)[1], [count])
        else:  # what comes before is compared by other tests
            history.step(count, [count])
    assert own.bytes == before
    return history.saved(0, slack)


def come_and_go(history: History, rounds: int, most: int, lengths: Sequence[int]) -> None:
    """Prompts of these lengths join, at most so many at once; rows leave, for good or saved, come back, grow and change
    places: whatever is read is compared, and so are bytes where what is not needed is given back.
    """
    cache, rng = history.cache, history.rng
    parked: list[Kept] = []
    for _ in range(rounds):
        places: list[int | Kept] = []
        for row in range(cache.rows):
            fate = rng.random()
            if fate < 0.7:
                places.append(row)
            elif fate < 0.85:
                parked.append(history.saved(row))
        if rng.random() < 0.3:
            rng.shuffle(places)
        while len(places) < most and rng.random() < 0.6:
            if parked and rng.random() < 0.4:
                joiner = parked.pop(int(rng.integers(len(parked))))
            else:
                length, chunk = int(rng.choice(lengths)), int(rng.choice([3, 16, 64]))
                joiner = prompt(cache, length, chunk, int(rng.integers(1 << 30)))
            places.insert(int(rng.integers(len(places) + 1)), joiner)
        history.arrange(places)
        for _ in range(3 if places else 0):
            tokens = int(rng.integers(1, cache.block + 1))
            commits = rng.integers(0, tokens + 1, len(places)).tolist()
            history.step(tokens, commits, tight=bool(rng.integers(2)))
        history.tighten()
        if rng.random() < 0.3:
            cache.trim()
            held = [cache.classes[row] - 2 * cache.block for row in range(cache.rows)]
            each = [row_bytes(cache.specs, n, cache.block, cache.dtype.size, cache.lookback) for n in held]
            assert cache.bytes == sum(each)


def damage(history: History) -> None:
    """What is written and not committed of all rows is NaN."""
    span, new = history.write(history.cache.block)
    for i, each in enumerate(new):
        nan = mx.full(each[:, 0].shape, np.nan)
        span.write(i, nan, nan)
    mx.eval(history.cache.buffers)
