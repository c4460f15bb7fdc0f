"""The KV cache: rows of keys and values, and how many tokens of each row count.

Token j past the committed ones of row b is written to slot (lengths[b] + j) % slots of each layer. Writing does not
change `lengths`; `commit` does, and nothing else. There is no rollback: a rejected token is a slot that no query may
see and that the next write covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from ..ops import fused
from ..ops.attention import attention_mask, slots_read
from ..ops.fused import number, numbers
from .kv import LayerKV
from .spec import CAPACITY_STEP, KVSpec


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


class Cache:
    """Keys and values of all rows.

    specs: one entry for each layer that owns K/V. rows: how many sequences. capacity: tokens that full layers hold at
    first, rounded up to 256; they grow as `span` needs. block: the longest write, which with the window sets the size
    of the rings. lookback: how far before the newest token's index a drafter's query may sit; its window begins so much
    earlier. lengths: int32 [rows], tokens committed. length_bound: for each row a number that the host knows its length
    not to exceed.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        rows: int,
        capacity: int,
        block: int,
        dtype: mx.Dtype,
        ring_slots: int | None = None,
        lookback: int = 0,
    ):
        self.block, self.lookback = block, lookback
        self.lengths = mx.zeros((rows,), mx.int32)
        self.length_bound = [0] * rows
        self.layers = []
        for spec in specs:
            least = spec.window and spec.window + block - 1 + lookback
            ring = ring_slots or least if spec.window else None
            assert not spec.window or ring >= least, "ring law: slots >= window + block - 1 + lookback"
            self.layers.append(LayerKV(spec, rows, ring or _round_up(capacity), dtype))

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def buffers(self) -> list[tuple[mx.array, mx.array]]:
        """The keys and values of all layers. A write copies a buffer while its handle is kept; assigning the handles
        that were there before drops a write that was only built.
        """
        return [(layer.keys, layer.values) for layer in self.layers]

    @buffers.setter
    def buffers(self, buffers: Sequence[tuple[mx.array, mx.array]]) -> None:
        for layer, (keys, values) in zip(self.layers, buffers, strict=True):
            layer.keys, layer.values = keys, values

    def span(self, rows: slice, tokens: int, counts: Sequence[int] | None = None) -> Span:
        """Returns the view of one forward that writes `tokens` tokens past the committed ones of the rows. Full layers
        grow where they have no room for these.

        counts: how many of the tokens are each row's own, the rest is padding; None for all.
        """
        assert tokens <= self.block, f"a write of {tokens} tokens into a cache made for blocks of {self.block}"
        needed = self.longest(rows) + tokens
        for layer in self.layers:
            if layer.spec.window is None and layer.slots < needed:
                layer.grow(_round_up(needed))
        return Span(self, rows, tokens, counts=counts)

    def longest(self, rows: slice) -> int:
        """Returns the length bound of the longest of these rows."""
        return max(self.length_bound[rows])

    def commit(self, rows: slice, n: mx.array, bound: Sequence[int]) -> None:
        """Commits n tokens of each row: lengths[rows] += n. Nothing else adds to `lengths`.

        n: int32 [B]. bound: for each row a number that the host knows n not to exceed.
        """
        if rows == slice(0, self.rows):
            self.lengths = self.lengths + n
        else:
            self.lengths = self.lengths.at[rows].add(n)
        self.length_bound[rows] = [old + more for old, more in zip(self.length_bound[rows], bound, strict=True)]

    def tighten_length_bound(self, rows: slice, fewer: Sequence[int]) -> None:
        """Lowers the length bounds: the host has read that so many fewer tokens of each row were committed than the
        bound given to `commit`.
        """
        self.length_bound[rows] = [bound - less for bound, less in zip(self.length_bound[rows], fewer, strict=True)]

    def move(self, rows: Mapping[int, int]) -> None:
        """Copies rows over others; rows: source by destination. So the last live rows fill the holes of those that
        left.

        The rows are copied out first and evaluated, since a write to a buffer that is still read copies the buffer.
        Then one row is written and evaluated after the other, since a second write before a host sync copies it, too.
        (One write of several rows is a scatter, which takes ten times as long on a CPU.)
        """
        if not rows:
            return
        copies = {}
        for place, source in rows.items():
            row = mx.array([source])  # a gather copies; a slice would go on reading the buffer
            copies[place] = self.lengths[row], [(keys[row], values[row]) for keys, values in self.buffers]
        mx.eval(list(copies.values()))
        for place, (length, copied) in copies.items():
            self.lengths[place : place + 1] = length
            for layer, (keys, values) in zip(self.layers, copied, strict=True):
                layer.keys[place : place + 1], layer.values[place : place + 1] = keys, values
            mx.eval([[layer.keys, layer.values] for layer in self.layers])
        for place, bound in [(place, self.length_bound[source]) for place, source in rows.items()]:
            self.length_bound[place] = bound

    def clear(self, row: int) -> None:
        """Empties a row for a new sequence. No query sees its old contents."""
        self.lengths[row] = self.length_bound[row] = 0


class Span:
    """One forward's view of the cache: `tokens` new positions T of a contiguous range of B rows.

    Masks and slot numbers depend on the window and the number of slots alone, so that layers of one kind share them.
    With tokens == 0 (a drafter) nothing is written, and the one query sits `query_offset` from the newest token's
    index. positions: int32 [B, T], absolute.

    With `counts` the forward belongs to a prefill of ragged prompts: whatever it computes token by token, it computes
    for the N = sum(counts) tokens that are no padding, packed one behind the other. packed_index: int32 [N], the places
    from 0 to B * T - 1 of the packed tokens. unpack_index: int32 [B * T], where each place's token lies among the
    packed ones; for padding it is any. Both are None where there is no padding. is_prefill: layers run eagerly, since
    the shape of a prompt hardly comes again and compiling for it would not pay.
    """

    def __init__(
        self, cache: Cache, rows: slice, tokens: int, query_offset: int = 0, counts: Sequence[int] | None = None
    ):
        assert -cache.lookback <= query_offset <= 0, "the rings hold the window of no query before that"
        self.cache, self.rows, self.tokens = cache, rows, tokens
        self.used = cache.longest(rows) + tokens  # no query sees a slot from here on
        self.is_prefill, self.packed_index, self.unpack_index, self._real = counts is not None, None, None, None
        if counts is not None and min(counts) < tokens:
            real = np.arange(tokens) < np.array(counts)[:, None]  # [B, T]
            self._real = mx.array(real)[:, None, :, None]
            self.packed_index = mx.array(np.flatnonzero(real).astype(np.int32))
            self.unpack_index = mx.array(np.where(real.ravel(), np.cumsum(real, dtype=np.int32) - 1, 0))
        full = rows == slice(0, cache.rows)
        self.lengths = cache.lengths if full else cache.lengths[rows]
        steps = numbers(tokens) if tokens else number(query_offset)
        self.positions = self.lengths[:, None] + steps  # [B, T]
        self._masks: dict[tuple[KVSpec, int, int], mx.array] = {}
        self._slots: dict[tuple[KVSpec, int], mx.array] = {}

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes a layer's K/V of the new positions. layer: the index among those that own K/V; keys, values: [B,
        kv_heads, T, head_dim].
        """
        kv = self.cache.layers[layer]
        if self._real is not None:  # padding repeats another row's token; nobody sees it, but 0 times NaN is NaN
            keys, values = (mx.where(self._real, new, 0) for new in (keys, values))
        kv.write(self.rows, self._slot(kv.spec, kv.slots), keys, values)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of queries at `positions` over a layer's K/V: [B, heads, T, head_dim], as `queries`
        are.
        """
        kv = self.cache.layers[layer]
        read = slots_read(kv.slots, self.used)
        return kv.attend(self.rows, read, queries, self._mask(kv.spec, kv.slots, read, queries.shape[1]))

    def _slot(self, spec: KVSpec, slots: int) -> mx.array:
        key = (spec, slots)
        if key not in self._slots:
            slot = (self.positions % number(slots))[:, None, :, None]
            shape = (slot.shape[0], spec.kv_heads, self.tokens, spec.head_dim)
            self._slots[key] = mx.broadcast_to(slot, shape)
        return self._slots[key]

    def _mask(self, spec: KVSpec, slots: int, read: int, heads: int) -> mx.array:
        key = (spec, slots, heads)
        if key not in self._masks:
            seen = visible(self.lengths, self.tokens, self.positions, slots, spec.window, read)
            self._masks[key] = attention_mask(seen, heads, spec.kv_heads)
        return self._masks[key]


class LastTokenSpan(Span):
    """The view of one token of each row of a span, for the layers that follow once all tokens' K/V are written.

    column: int32 [B], which of the span's T tokens goes on; only its query is asked. gather_index: int32 [B], where
    that token lies among the span's packed ones.
    """

    def __init__(self, span: Span, column: mx.array):
        super().__init__(span.cache, span.rows, span.tokens)
        self.is_prefill = span.is_prefill
        self.positions = mx.take_along_axis(span.positions, column[:, None], axis=1)
        index = mx.arange(column.size) * span.tokens + column
        self.gather_index = index if span.unpack_index is None else span.unpack_index[index]
        self._column = column[:, None, None, None]

    def of(self, inputs: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Returns the tokens that go on of arrays of all packed tokens: [N, ...] each -> [B, ...]."""
        return tuple(each[self.gather_index] for each in inputs)

    def gather_queries(self, queries: mx.array) -> mx.array:
        """Returns the queries of the tokens that go on: [B, heads, T, head_dim] -> [B, heads, 1, head_dim]."""
        return mx.take_along_axis(queries, self._column, axis=2)


def _round_up(tokens: int) -> int:
    return -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
