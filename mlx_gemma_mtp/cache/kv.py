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
        row, head = numbers(rows.stop, rows.start)[:, None, None], numbers(self.spec.kv_heads)[:, None]
        written[row, head, slot[..., 0]] = new
        return written

    def attend(self, rows: slice, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """queries: [B, heads, T, head_dim] over the first `slots` slots; mask: see kernels.attention. Returns the
        queries' shape; scale is 1.
        """
        keys, values = self.keys, self.values
        if rows != slice(0, keys.shape[0]) or slots < self.slots:
            keys, values = keys[rows, :, :slots], values[rows, :, :slots]
        return attention(queries, keys, values, mask)

    def grow(self, slots: int) -> None:
        """Full attention only: more slots at the end, contents kept."""
        rows, heads, old, dim = self.keys.shape
        extra = mx.zeros((rows, heads, slots - old, dim), self.keys.dtype)
        self.keys = mx.concatenate([self.keys, extra], axis=2)
        self.values = mx.concatenate([self.values, extra], axis=2)
