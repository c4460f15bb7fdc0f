"""Keys and values of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..ops.attention import Quantized, attention, quantized_attention
from ..ops.exponentials import exponentials
from .spec import KVSpec

Arrays = tuple[mx.array, ...]  # of one layer, or of some of its rows: rows along axis 0, positions along axis 2


@dataclass(frozen=True)
class Part:
    """The form of one of a layer's arrays: [rows, heads, slots, width]."""

    heads: int
    width: int
    dtype: mx.Dtype

    def zeros(self, rows: int, slots: int) -> mx.array:
        return mx.zeros((rows, self.heads, slots, self.width), self.dtype)


def layout(spec: KVSpec, dtype: mx.Dtype) -> tuple[Part, ...]:
    """Returns the forms of the arrays that a layer's K/V are kept in. dtype: the model's.

    Keys and values; or, quantised, the packed words of keys and then values, and beside them, of `dtype`, the scales of
    both and then the biases of both. All of them lie side by side as heads, so that the matrix of each is contiguous.
    """
    if spec.bits is None:
        return (Part(spec.kv_heads, spec.head_dim, dtype),) * 2
    words = Part(2 * spec.kv_heads, spec.head_dim * spec.bits // 32, mx.uint32)
    return words, Part(4 * spec.kv_heads, spec.head_dim // spec.group, dtype)


class LayerKV:
    """Keys and values of one layer, [rows, kv_heads, slots, head_dim] each: at first of no rows.

    arrays: what they are kept in, by `layout`.
    """

    def __init__(self, spec: KVSpec, slots: int, dtype: mx.Dtype):
        self.spec, self.slots = spec, slots
        self.arrays: Arrays = tuple(part.zeros(0, slots) for part in layout(spec, dtype))

    @property
    def rows(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def indices(self, slot: mx.array) -> Arrays:
        """Returns for each array where its numbers go, as `write` takes it. slot: int32 [rows, 1, T, 1]."""
        rows, _, tokens, _ = slot.shape
        shapes = [(rows, array.shape[1], tokens, array.shape[3]) for array in self.arrays]
        made = {shape: mx.broadcast_to(slot, shape) for shape in shapes}
        return tuple(made[shape] for shape in shapes)

    def write(self, slots: Arrays, keys: mx.array, values: mx.array) -> None:
        """Writes K/V of all rows. keys, values: [rows, kv_heads, T, head_dim]; slots: from `indices`.

        The write is in place where no other handle and no queued read of a buffer is left. Handles that are kept stay
        as they are, so that a write that was never dispatched can be dropped.
        """
        self._put(slots, (keys, values))

    def attend(self, rows: int, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns the attention of queries over the first `slots` slots of the first `rows` rows, with scale 1: [rows,
        heads, T, head_dim].

        queries: of that shape; mask: from `attention_mask`.
        """
        return attention(queries, *self._read(rows, slots), mask)

    def attend_block(self, first: int, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns the attention of many queries of one row, [1, heads, T, head_dim], over `slots` slots from slot
        `first` on; behind the last one comes the first. mask: from `band`.
        """
        return attention(queries, *self._read(1, slots, first), mask, exponentials)

    def resize(self, rows: int, slots: int | None = None) -> None:
        """Keeps the first `rows` rows, or adds empty ones, and adds slots at the end up to `slots` of them.

        It waits for the device where contents are kept, so that the old buffers are gone when the next layer's turn
        comes.
        """
        copies = self.rows > 0
        self.slots = self.slots if slots is None else slots
        self.arrays = tuple(_resized(old, rows, self.slots) for old in self.arrays)
        if copies:
            mx.eval(self.arrays)

    def copied(self, row: int) -> Arrays:
        """Returns copies of a row, [1, heads, slots, width] each; they are to be evaluated before a write."""
        index = mx.array([row])  # a gather copies; a slice would go on reading the buffer
        return tuple(mx.take(old, index, axis=0) for old in self.arrays)

    def saved(self, row: int, first: int, stop: int) -> Arrays:
        """Returns copies of a row's positions first to stop - 1, in order; they are to be evaluated before a write."""
        begin, end = first % self.slots, first % self.slots + stop - first
        parts = (begin, min(end, self.slots)), (0, max(end - self.slots, 0))  # the second, often empty, makes a copy
        return tuple(mx.concatenate([old[row : row + 1, :, a:b] for a, b in parts], axis=2) for old in self.arrays)

    def lying(self, row: int, first: int, stop: int) -> Arrays:
        """Returns what `saved` does, as views where these positions lie in order."""
        begin, end = first % self.slots, first % self.slots + stop - first
        if end > self.slots:
            return self.saved(row, first, stop)
        return tuple(old[row : row + 1, :, begin:end] for old in self.arrays)

    def assign(self, row: int, arrays: Arrays, first: int = 0) -> None:
        """Makes a row of what was copied or saved of positions first and after, [1, heads, m, width] each, m <= slots.
        All other slots become empty, since what nobody sees must still be finite.

        Nothing is evaluated: as the first link of the next write's chain this is in place, too.
        """
        laid = tuple(_laid(new, first % self.slots, self.slots) for new in arrays)
        if self.rows > 1:
            place = mx.array([row])
            laid = tuple(mx.slice_update(old, new, place, (0,)) for old, new in zip(self.arrays, laid, strict=True))
        self.arrays = laid

    def _put(self, slots: Arrays, new: Arrays) -> None:
        (one, other), (here, there) = self.arrays, slots  # a layer has two arrays, whatever it keeps in them
        self.arrays = (
            mx.put_along_axis(one, here, new[0], axis=2),
            mx.put_along_axis(other, there, new[1], axis=2),
        )

    def _read(self, rows: int, slots: int, first: int = 0) -> Arrays:
        """Returns `slots` slots of the first `rows` rows, from slot `first` on, round the end."""
        if rows == self.rows and slots == self.slots and not first:
            return self.arrays
        one, other = self.arrays
        end = first + slots
        if end <= self.slots:
            return one[:rows, :, first:end], other[:rows, :, first:end]
        parts = slice(first, None), slice(end - self.slots)
        return tuple(mx.concatenate([each[:rows, :, part] for part in parts], axis=2) for each in self.arrays)


class QuantizedKV(LayerKV):
    """Keys and values of one layer in few bits, by groups along each head.

    What is written is what is read, by the forward that wrote it, too, so that a text does not depend on how many
    tokens a forward writes.
    """

    def write(self, slots: Arrays, keys: mx.array, values: mx.array) -> None:
        """Writes K/V of all rows, quantised. keys, values: [rows, kv_heads, T, head_dim]; slots: from `indices`."""
        both = mx.concatenate([keys, values], axis=1)
        words, scales, biases = mx.quantize(both, self.spec.group, self.spec.bits)
        self._put(slots, (words, mx.concatenate([scales, biases], axis=1)))

    def attend(self, rows: int, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns what `LayerKV.attend` does, over the numbers that the words stand for."""
        return quantized_attention(queries, *self._packed(rows, slots), mask, self.spec.group, self.spec.bits)

    def attend_block(self, first: int, slots: int, queries: mx.array, mask: mx.array) -> mx.array:
        """Returns what `LayerKV.attend_block` does, over the numbers that the words stand for."""
        packed = self._packed(1, slots, first)
        return quantized_attention(queries, *packed, mask, self.spec.group, self.spec.bits, exponentials)

    def _packed(self, rows: int, slots: int, first: int = 0) -> tuple[Quantized, Quantized]:
        """Returns words, scales and biases of keys and of values; which of them as in `_read`."""
        words, scales = self._read(rows, slots, first)
        (keys, values), parts = mx.split(words, 2, axis=1), mx.split(scales, 4, axis=1)
        return (keys, *parts[0::2]), (values, *parts[1::2])


def layer_kv(spec: KVSpec, slots: int, dtype: mx.Dtype) -> LayerKV:
    """Returns the K/V of one layer, in the bits that its spec says."""
    return (LayerKV if spec.bits is None else QuantizedKV)(spec, slots, dtype)


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
    if count == slots and begin == 0:
        return new
    wrapped = max(begin + count - slots, 0)
    if not wrapped:
        return mx.pad(new, ((0, 0), (0, 0), (begin, slots - count - begin), (0, 0)))
    empty = mx.zeros((1, heads, slots - count, dim), new.dtype)
    return mx.concatenate([new[:, :, count - wrapped :], empty, new[:, :, : count - wrapped]], axis=2)
