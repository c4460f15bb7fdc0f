"""The KV cache: rows of keys and values, and how many tokens of each row count.

Token j past the committed ones of row b is written to slot (lengths[b] + j) % slots of each layer. Writing does not
change `lengths`; `commit` does, and nothing else. There is no rollback: a rejected token is a slot that no query may
see and that the next write covers.

Sliding layers keep a ring for every row. Full layers keep each row in the buffers of its capacity class, so that a long
row does not make the others long. While all rows are of one class, a forward gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..ops import fused
from ..ops.attention import attention_mask, slots_read
from ..ops.fused import number, numbers
from .kv import LayerKV, Pair
from .saved import Saved
from .shelf import Shelf
from .spec import KVSpec, capacity, ring_slots


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
    """Keys and values of the rows of a batch. It begins with no rows: `arrange` brings them, or `open`.

    specs: one entry for each layer that owns K/V. block: the longest write, which with the window sets the size of the
    rings. lookback: how far before the newest token's index a drafter's query may sit; its window begins so much
    earlier. lengths: int32 [rows], tokens committed. length_bound: for each row a number that the host knows its length
    not to exceed. classes: each row's capacity class. layers: for each layer its LayerKVs, one in sliding layers, one
    for each class in full layers.
    """

    def __init__(self, specs: Sequence[KVSpec], block: int, dtype: mx.Dtype, lookback: int = 0):
        self.specs, self.block, self.dtype, self.lookback = tuple(specs), block, dtype, lookback
        self.lengths = mx.zeros((0,), mx.int32)
        self.length_bound: list[int] = []
        self.classes: list[int] = []
        sliding = [spec for spec in specs if spec.window is not None]
        self._full = [spec for spec in specs if spec.window is None]
        self._rings = Shelf(sliding, [ring_slots(spec.window, block, lookback) for spec in sliding], dtype)
        self._shelves: dict[int, Shelf] = {}  # by class, rising; those without rows wait for some
        self._room: int | None = None  # tokens that the rings and the row of an opened cache have room for
        kinds = [spec.window is not None for spec in specs]
        self._homes = [(sliding, kinds[:i].count(sliding)) for i, sliding in enumerate(kinds)]
        self._seat()

    @property
    def rows(self) -> int:
        return len(self.length_bound)

    @property
    def bytes(self) -> int:
        """The bytes of all buffers, unused places included."""
        return self._rings.bytes + sum(shelf.bytes for shelf in self._shelves.values())

    @property
    def buffers(self) -> list[Pair]:
        """The keys and values of all layers, in their order. A write copies a buffer while its handle is kept;
        assigning the handles that were there before drops a write that was only built.
        """
        return [(kv.keys, kv.values) for layer in self.layers for kv in layer]

    @buffers.setter
    def buffers(self, buffers: Sequence[Pair]) -> None:
        for kv, (keys, values) in zip([kv for layer in self.layers for kv in layer], buffers, strict=True):
            kv.keys, kv.values = keys, values

    def open(self, tokens: int) -> None:
        """Makes one empty row that holds `tokens` tokens and never more. Its buffers never grow, and its rings are no
        larger than these tokens need.
        """
        assert not self.rows, "a cache is opened once"
        raise NotImplementedError

    def arrange(self, places: Sequence[int | Saved]) -> None:
        """Goes on with these rows in this order: an int is a row as it was, a Saved comes into the batch in that place.

        It is called between a readback and the next launch, and no verify may be built. Rows that change their place
        are copied out and evaluated. What is written into the batch's buffers is not: it is the first link of the next
        write's own chain, so that no buffer is copied. Buffers grow to the rows there are, one layer after the other.
        """
        raise NotImplementedError

    def save(self, row: int, slack: int = 0) -> Saved:
        """Returns copies of a row's committed tokens, evaluated. No verify may be built.

        slack: how many positions before the window sliding layers save besides, so that a beginning that is so many
        tokens shorter can be restored (`Saved.first`).
        """
        raise NotImplementedError

    def span(self, tokens: int) -> Span:
        """Returns the view of one forward that writes `tokens` tokens past the committed ones of all rows. Rows that
        have outgrown their class move to the next one.
        """
        raise NotImplementedError

    def growth(self, tokens: int) -> int:
        """Returns the bytes that `span(tokens)` would add to the cache's."""
        raise NotImplementedError

    def trim(self) -> None:
        """Gives back the memory of unused places and of classes without rows."""
        raise NotImplementedError

    def commit(self, n: mx.array, bound: Sequence[int]) -> None:
        """Commits n tokens of each row: lengths += n. Nothing else adds to `lengths`.

        n: int32 [B]. bound: for each row a number that the host knows n not to exceed.
        """
        self.lengths = self.lengths + n
        self.length_bound = [old + more for old, more in zip(self.length_bound, bound, strict=True)]

    def tighten_length_bound(self, fewer: Sequence[int]) -> None:
        """Lowers the length bounds: the host has read that so many fewer tokens of each row were committed than the
        bound given to `commit`.
        """
        self.length_bound = [bound - less for bound, less in zip(self.length_bound, fewer, strict=True)]

    def _seat(self) -> None:
        """Lists the buffers anew, after rows or buffers have changed."""
        self.live = [shelf for shelf in self._shelves.values() if shelf.rows]
        self.layers: list[list[LayerKV]] = [
            [shelf.layers[i] for shelf in ([self._rings] if sliding else self._shelves.values())]
            for sliding, i in self._homes
        ]


class Span:
    """One forward's view of the cache: `tokens` new positions T of all B rows.

    Masks and slot numbers depend on the window and the number of slots alone, so that layers of one kind share them.
    With tokens == 0 (a drafter) nothing is written, and the one query sits `query_offset` from the newest token's
    index. positions: int32 [B, T], absolute.
    """

    is_prefill = False

    def __init__(self, cache: Cache, tokens: int, query_offset: int = 0):
        raise NotImplementedError

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes a layer's K/V of the new positions. layer: the index among those that own K/V; keys, values: [B,
        kv_heads, T, head_dim].
        """
        raise NotImplementedError

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of queries at `positions` over a layer's K/V: [B, heads, T, head_dim], as `queries`
        are.
        """
        raise NotImplementedError
