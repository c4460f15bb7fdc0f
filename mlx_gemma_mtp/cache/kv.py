"""Keys and values of one layer."""

from __future__ import annotations

import mlx.core as mx

from ..ops.attention import attention
from .spec import KVSpec

Pair = tuple[mx.array, mx.array]


class LayerKV:
    """Keys and values of one layer, [rows, kv_heads, slots, head_dim]: at first of no rows."""

    def __init__(self, spec: KVSpec, slots: int, dtype: mx.Dtype):
        shape = (0, spec.kv_heads, slots, spec.head_dim)
        self.spec, self.slots = spec, slots
        self.keys, self.values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, slot: mx.array, keys: mx.array, values: mx.array) -> None:
        """Writes K/V of all rows. keys, values: [rows, kv_heads, T, head_dim]; slot: int32, where each value goes, of
        the same shape.

        The write is in place where no other handle and no queued read of a buffer is left. Handles that are kept stay
        as they are, so that a write that was never dispatched can be dropped.
        """
        self.keys = mx.put_along_axis(self.keys, slot, keys, axis=2)
        self.values = mx.put_along_axis(self.values, slot, values, axis=2)

    def attend(self, rows: int, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns the attention of queries over the first `slots` slots of the first `rows` rows, with scale 1: [rows,
        heads, T, head_dim].

        queries: of that shape; mask: from `attention_mask`.
        """
        keys, values = self.keys, self.values
        if rows < self.rows or slots < self.slots:
            keys, values = keys[:rows, :, :slots], values[:rows, :, :slots]
        return attention(queries, keys, values, mask)

    def resize(self, rows: int, slots: int | None = None) -> None:
        """Keeps the first `rows` rows, or adds empty ones, and adds slots at the end up to `slots` of them.

        It waits for the device where contents are kept, so that the old buffers are gone when the next layer's turn
        comes.
        """
        copies = self.rows > 0
        self.slots = self.slots if slots is None else slots
        self.keys, self.values = (_resized(old, rows, self.slots) for old in (self.keys, self.values))
        if copies:
            mx.eval(self.keys, self.values)

    def copied(self, row: int) -> Pair:
        """Returns copies of a row, [1, kv_heads, slots, head_dim] each; they are to be evaluated before a write."""
        index = mx.array([row])  # a gather copies; a slice would go on reading the buffer
        return mx.take(self.keys, index, axis=0), mx.take(self.values, index, axis=0)

    def saved(self, row: int, first: int, stop: int) -> Pair:
        """Returns copies of a row's positions first to stop - 1, in order; they are to be evaluated before a write."""
        begin, end = first % self.slots, first % self.slots + stop - first
        parts = (begin, min(end, self.slots)), (0, max(end - self.slots, 0))  # the second, often empty, makes a copy
        buffers = (self.keys, self.values)
        return tuple(mx.concatenate([old[row : row + 1, :, a:b] for a, b in parts], axis=2) for old in buffers)

    def assign(self, row: int, pair: Pair, first: int = 0) -> None:
        """Makes a row of the keys and values of positions first and after, [1, kv_heads, m, head_dim], m <= slots. All
        other slots become empty, since what nobody sees must still be finite.

        Nothing is evaluated: as the first link of the next write's chain this is in place, too.
        """
        laid = [_laid(new, first % self.slots, self.slots) for new in pair]
        if self.rows > 1:
            old, place = (self.keys, self.values), mx.array([row])
            laid = [mx.slice_update(one, new, place, (0,)) for one, new in zip(old, laid, strict=True)]
        self.keys, self.values = laid


def _resized(old: mx.array, rows: int, slots: int) -> mx.array:
    """Returns a new buffer of so many rows and slots: what is in the first rows of `old`, and zeros."""
    count, heads, before, dim = old.shape
    if not count:
        return mx.zeros((rows, heads, slots, dim), old.dtype)
    kept = old[:rows]
    if rows <= count and slots == before:
        return mx.concatenate([kept, kept[:0]], axis=0)  # one array alone would stay a view
    return mx.pad(kept, ((0, max(rows - count, 0)), (0, 0), (0, slots - before), (0, 0)))


def _laid(new: mx.array, begin: int, slots: int) -> mx.array:
    """Returns a row of so many slots, [1, heads, slots, dim]: `new` from slot `begin` on, round the end, and zeros."""
    _, heads, count, dim = new.shape
    assert count <= slots, f"{count} positions for {slots} slots"
    wrapped = max(begin + count - slots, 0)
    if not wrapped:
        return mx.pad(new, ((0, 0), (0, 0), (begin, slots - count - begin), (0, 0)))
    empty = mx.zeros((1, heads, slots - count, dim), new.dtype)
    return mx.concatenate([new[:, :, count - wrapped :], empty, new[:, :, : count - wrapped]], axis=2)
