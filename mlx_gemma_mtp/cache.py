"""The KV cache: rows, rings, and one move of the line.

Token j of row b goes to slot (lengths[b] + j) % slots of each layer. Writing does not move `lengths`; `commit` does,
and nothing else. There is no rollback: a rejected token is a slot that nobody may see and that the next write covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache

import mlx.core as mx
import numpy as np

from . import islands
from .config import KVSpec
from .islands import number
from .kernels.attention import attention, attention_mask

CAPACITY_STEP = 256


def visible(lengths: mx.array, written: int, queries: mx.array, slots: int, window: int | None) -> mx.array:
    """Which slots each query may see.

    lengths: [B] tokens committed; written: tokens written past them by this forward (0: none);
    queries: [B, T] absolute positions. Returns bool [B, 1, T, slots].

    After the write, slot s holds the newest position p <= last with p % slots == s. A stale token in that slot
    (written, never committed) lies exactly `slots` later than p, so the ring law slots >= window + block - 1 puts p
    out of sight.
    """
    lengths, queries, last = lengths[:, None, None, None], queries[:, None, :, None], number(written - 1)
    if window is None:  # a full layer never wraps
        return islands.in_line(lengths, queries, _count(slots), last)
    return islands.in_ring(lengths, queries, _count(slots), last, number(slots), number(window - 1))


@cache
def _count(end: int, start: int = 0) -> mx.array:
    return mx.array(np.arange(start, end, dtype=np.int32))  # from the host: no part of any graph


class LayerKV:
    """Keys and values of one layer, [rows, kv_heads, slots, head_dim]."""

    def __init__(self, spec: KVSpec, rows: int, slots: int, dtype: mx.Dtype):
        shape = (rows, spec.kv_heads, slots, spec.head_dim)
        self.spec = spec
        self.keys, self.values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def write(self, rows: slice, slot: mx.array, keys: mx.array, values: mx.array) -> None:
        """keys, values: [B, kv_heads, T, head_dim] of the rows; slot: of each, the same shape.

        In place when no other handle or queued read of the buffers is left. The old handles stay as they are, so that
        a write that was never dispatched can be dropped.
        """
        self.keys = self._written(self.keys, rows, slot, keys)
        self.values = self._written(self.values, rows, slot, values)

    def _written(self, old: mx.array, rows: slice, slot: mx.array, new: mx.array) -> mx.array:
        if rows == slice(0, old.shape[0]):
            return mx.put_along_axis(old, slot, new, axis=2)
        written = copy(old)  # an assignment would change the old handle too
        row, head = _count(rows.stop, rows.start)[:, None, None], _count(self.spec.kv_heads)[:, None]
        written[row, head, slot[..., 0]] = new
        return written

    def attend(self, rows: slice, queries: mx.array, mask: mx.array) -> mx.array:
        """queries: [B, heads, T, head_dim]; mask: see kernels.attention. Returns the queries' shape; scale is 1."""
        keys, values = self.keys, self.values
        if rows != slice(0, keys.shape[0]):
            keys, values = keys[rows], values[rows]
        return attention(queries, keys, values, mask)

    def grow(self, slots: int) -> None:
        """Full attention only: more slots at the end, contents kept."""
        rows, heads, old, dim = self.keys.shape
        extra = mx.zeros((rows, heads, slots - old, dim), self.keys.dtype)
        self.keys = mx.concatenate([self.keys, extra], axis=2)
        self.values = mx.concatenate([self.values, extra], axis=2)

    def move(self, source: int, destination: int) -> None:
        self.keys[destination] = self.keys[source]
        self.values[destination] = self.values[source]


class Cache:
    """K/V of all rows. `specs` has one entry for each KV-owning layer.

    rows: how many sequences; capacity: tokens that the full layers hold (rounded up to 256, see `reserve`);
    block: the longest write, which with the window sets the size of the rings.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        rows: int,
        capacity: int,
        block: int,
        dtype: mx.Dtype,
        ring_slots: int | None = None,
    ):
        self.block = block
        self.lengths = mx.zeros((rows,), mx.int32)
        self.layers = []
        for spec in specs:
            ring = spec.window and (ring_slots or spec.window + block - 1)
            assert not spec.window or ring >= spec.window + block - 1, "ring law: slots >= window + block - 1"
            self.layers.append(LayerKV(spec, rows, ring or _round_up(capacity), dtype))

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Positions that the full layers hold."""
        return min(layer.slots for layer in self.layers if layer.spec.window is None)

    @property
    def buffers(self) -> list[tuple[mx.array, mx.array]]:
        """Handles of all buffers: while they are kept, a write copies; assign them to drop one that was only built."""
        return [(layer.keys, layer.values) for layer in self.layers]

    @buffers.setter
    def buffers(self, buffers: Sequence[tuple[mx.array, mx.array]]) -> None:
        for layer, (keys, values) in zip(self.layers, buffers, strict=True):
            layer.keys, layer.values = keys, values

    def span(self, rows: slice, tokens: int) -> Span:
        """The view of one forward that writes `tokens` tokens past the committed ones of the rows."""
        assert tokens <= self.block, f"a write of {tokens} tokens into a cache made for blocks of {self.block}"
        return Span(self, rows, tokens)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` positions in the full layers; a host decision, from known upper bounds."""
        if tokens > self.capacity:
            for layer in self.layers:
                if layer.spec.window is None:
                    layer.grow(_round_up(tokens))

    def commit(self, rows: slice, n: mx.array) -> None:
        """lengths[rows] += n, the only move of the line. n: int32 [B]."""
        if rows == slice(0, self.rows):
            self.lengths = self.lengths + n
        else:
            self.lengths = self.lengths.at[rows].add(n)

    def move(self, source: int, destination: int) -> None:
        """Copies a row over another: how the last live row fills the hole that a leaver makes."""
        for layer in self.layers:
            layer.move(source, destination)
        self.lengths[destination] = self.lengths[source]

    def clear(self, row: int) -> None:
        """Empties a row for a new sequence. Its old contents are out of sight."""
        self.lengths[row] = 0


class Span:
    """One forward's view of the cache: `tokens` new positions on a contiguous range of rows.

    Masks and slot numbers depend on the window and the number of slots alone, so that layers of one kind share them.
    With tokens == 0 (the drafter) nothing is written, and the one query sits `query_offset` from the newest token's
    index.
    """

    def __init__(self, cache: Cache, rows: slice, tokens: int, query_offset: int = 0):
        self.cache, self.rows, self.tokens = cache, rows, tokens
        full = rows == slice(0, cache.rows)
        self.lengths = cache.lengths if full else cache.lengths[rows]
        steps = _count(tokens) if tokens else number(query_offset)
        self.positions = self.lengths[:, None] + steps  # [B, T]
        self._masks: dict[tuple[KVSpec, int, int], mx.array] = {}
        self._slots: dict[tuple[KVSpec, int], mx.array] = {}

    def at(self, column: mx.array) -> Span:
        """The same view for one query a row, at this column of the tokens written. column: [B]."""
        one = copy(self)
        one.positions = mx.take_along_axis(self.positions, column[:, None], axis=1)
        one._masks = {}
        return one

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """keys, values: [B, kv_heads, T, head_dim] of the new positions."""
        kv = self.cache.layers[layer]
        kv.write(self.rows, self._slot(kv.spec, kv.slots), keys, values)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """queries: [B, heads, T, head_dim] at `positions`. Returns the same shape."""
        kv = self.cache.layers[layer]
        return kv.attend(self.rows, queries, self._mask(kv.spec, kv.slots, queries.shape[1]))

    def _slot(self, spec: KVSpec, slots: int) -> mx.array:
        key = (spec, slots)
        if key not in self._slots:
            slot = (self.positions % number(slots))[:, None, :, None]
            shape = (slot.shape[0], spec.kv_heads, self.tokens, spec.head_dim)
            self._slots[key] = mx.broadcast_to(slot, shape)
        return self._slots[key]

    def _mask(self, spec: KVSpec, slots: int, heads: int) -> mx.array:
        key = (spec, slots, heads)
        if key not in self._masks:
            seen = visible(self.lengths, self.tokens, self.positions, slots, spec.window)
            self._masks[key] = attention_mask(seen, heads, spec.kv_heads)
        return self._masks[key]


def _round_up(tokens: int) -> int:
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
