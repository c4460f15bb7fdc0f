"""What one forward sees of a cache's buffers: slots, masks, and which rows lie where."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from ..ops import fused, lanes
from ..ops.attention import attention_mask, band, queries_at_once, slots_read
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
    slot from here on. start: the first of the positions, where there is one row, the host knows it, and nothing is
    fused: then queries are attended to in blocks. Masks and slot numbers depend on the window and the number of slots
    alone, so that layers of one kind share them.
    """

    def __init__(
        self,
        shelf: Shelf,
        lengths: mx.array,
        positions: mx.array,
        tokens: int,
        used: int,
        start: int | None = None,
    ):
        self.shelf, self.tokens, self.used, self.start = shelf, tokens, used, start
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
        if self.start is not None:
            return self._in_blocks(kv, queries)
        read = slots_read(kv.slots, self.used)
        mask = self._mask(self.shelf.alike[layer], kv, read, queries.shape[1])
        return kv.attend(len(self.shelf.rows), read, queries, mask)

    def _in_blocks(self, kv: LayerKV, queries: mx.array) -> mx.array:
        """Returns the attention of the one row's queries, block by block; each reads what its first query sees and what
        comes after it.
        """
        (_, heads, tokens, _), window, attended = queries.shape, kv.spec.window, []
        step, first, ways = queries_at_once(heads, self.used, window), lanes.turn(), lanes.number()
        for at in range(0, tokens, step):
            block, begin = queries[:, :, at : at + step], self.start + at
            count, low = block.shape[2], max(0, begin + 1 - window) if window else 0
            read = slots_read(kv.slots, begin + count - low)
            seen = 0 if window else begin  # by all of them
            mask = band(count, read - seen, begin - low - seen, window, heads // kv.spec.kv_heads)
            with lanes.lane(first + len(attended)):
                if len(attended) >= ways:  # MLX goes in breadth: without this it would hold the scores of all blocks
                    block = mx.depends(block, attended[-ways])
                attended.append(kv.attend_block(low % kv.slots, read, block, mask))
        return attended[0] if len(attended) == 1 else mx.concatenate(attended, axis=2)

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
