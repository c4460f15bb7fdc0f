"""What one forward sees of a cache's buffers: slots, masks, and which rows lie where."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..ops import fused
from ..ops.attention import attention_mask, slots_read
from ..ops.fused import number, numbers
from .kv import LayerKV
from .shelf import Shelf


def visible(
    lengths: mx.array, written: int, queries: mx.array, slots: int, window: int | None, read: int | None = None
) -> mx.array:
    """Returns which slots each query may see, bool [B, 1, T, read].

    lengths: [B] tokens committed. written: how many tokens this forward writes past them, 0 for none. queries: [B, T]
    absolute positions. slots: of the layer. window: how many keys a query sees, itself included; None for all. read:
    how many slots are asked about, from the first on; None for all.

    After the write, slot s holds the newest position p <= last with p % slots == s. A stale token in that slot
    (written, never committed) lies exactly `slots` later than p, so the ring law slots >= window + block - 1 puts p
    out of sight.
    """
    lengths, queries, last = lengths[:, None, None, None], queries[:, None, :, None], number(written - 1)
    if window is None:  # a full layer never wraps
        return fused.in_line(lengths, queries, numbers(read or slots), last)
    return fused.in_ring(lengths, queries, numbers(read or slots), last, number(slots), number(window - 1))


class View:
    """One forward's view of the rows of one shelf: it writes `tokens` new positions T of each, or none.

    lengths: [B] of all rows of the batch. positions: int32 [B, T], absolute, of their queries. used: no query sees a
    slot from here on. Masks and slot numbers depend on the window and the number of slots alone, so that layers of one
    kind share them.
    """

    def __init__(self, shelf: Shelf, lengths: mx.array, positions: mx.array, tokens: int, used: int):
        self.shelf, self.tokens, self.used = shelf, tokens, used
        if shelf.gather is not None:
            lengths, positions = mx.take(lengths, shelf.gather), mx.take(positions, shelf.gather, axis=0)
        self.lengths, self.positions = lengths, positions
        self._slots: dict[int, tuple[mx.array, ...]] = {}  # by the first layer of a spec
        self._masks: dict[tuple[int, int], mx.array] = {}

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes the K/V of the shelf's rows, of keys and values of all rows. Zeros go into empty places."""
        kv, shelf = self.shelf.layers[layer], self.shelf
        if shelf.gather is not None:
            keys, values = mx.take(keys, shelf.gather, axis=0), mx.take(values, shelf.gather, axis=0)
        if shelf.empty:
            zeros = _zeros((shelf.empty, *keys.shape[1:]), keys.dtype)
            keys, values = mx.concatenate([keys, zeros], axis=0), mx.concatenate([values, zeros], axis=0)
        kv.write(self._slot(shelf.alike[layer], kv), keys, values)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of the shelf's rows, in their order; queries: of all rows."""
        kv, gather = self.shelf.layers[layer], self.shelf.gather
        if gather is not None:
            queries = mx.take(queries, gather, axis=0)
        read = slots_read(kv.slots, self.used)
        mask = self._mask(self.shelf.alike[layer], kv, read, queries.shape[1])
        return kv.attend(len(self.shelf.rows), read, queries, mask)

    def _slot(self, first: int, kv: LayerKV) -> tuple[mx.array, ...]:
        if first not in self._slots:
            slot, empty = (self.positions % number(kv.slots))[:, None, :, None], self.shelf.empty
            if empty:
                slot = mx.concatenate([slot, _zeros((empty, *slot.shape[1:]), mx.int32)], axis=0)
            self._slots[first] = kv.indices(slot)
        return self._slots[first]

    def _mask(self, first: int, kv: LayerKV, read: int, heads: int) -> mx.array:
        key = (first, heads)
        if key not in self._masks:
            seen = visible(self.lengths, self.tokens, self.positions, kv.slots, kv.spec.window, read)
            self._masks[key] = attention_mask(seen, heads, kv.spec.kv_heads)
        return self._masks[key]


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Returns zeros that are made once and kept, so that they are no part of any graph."""
    zeros = mx.zeros(shape, dtype)
    mx.eval(zeros)
    return zeros
