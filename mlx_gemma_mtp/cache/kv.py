"""Keys and values of one layer."""

from __future__ import annotations

from copy import copy

import mlx.core as mx

from ..ops.attention import attention
from ..ops.fused import numbers
from .spec import KVSpec


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
        """Writes K/V of the rows. keys, values: [B, kv_heads, T, head_dim]; slot: int32, where each value goes, of the
        same shape.

        The write is in place where no other handle and no queued read of a buffer is left. Handles that are kept stay
        as they are, so that a write that was never dispatched can be dropped.
        """
        self.keys = self._written(self.keys, rows, slot, keys)
        self.values = self._written(self.values, rows, slot, values)

    def _written(self, old: mx.array, rows: slice, slot: mx.array, new: mx.array) -> mx.array:
        if rows == slice(0, old.shape[0]):
            return mx.put_along_axis(old, slot, new, axis=2)
        written = copy(old)  # an assignment would change the old handle too
        row, head = numbers(rows.stop, rows.start)[:, None, None], numbers(self.spec.kv_heads)[:, None]
        written[row, head, slot[..., 0]] = new
        return written

    def attend(self, rows: slice, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns the attention of queries over the first `slots` slots, with scale 1: [B, heads, T, head_dim].

        queries: of that shape; mask: from `attention_mask`.
        """
        keys, values = self.keys, self.values
        if rows != slice(0, keys.shape[0]) or slots < self.slots:
            keys, values = keys[rows, :, :slots], values[rows, :, :slots]
        return attention(queries, keys, values, mask)

    def grow(self, slots: int) -> None:
        """Adds slots at the end up to `slots` of them, contents kept. Rings have no end: this is for full layers."""
        rows, heads, old, dim = self.keys.shape
        extra = mx.zeros((rows, heads, slots - old, dim), self.keys.dtype)
        self.keys = mx.concatenate([self.keys, extra], axis=2)
        self.values = mx.concatenate([self.values, extra], axis=2)
