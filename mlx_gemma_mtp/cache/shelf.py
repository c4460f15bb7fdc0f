"""Buffers that the same rows lie in: of all sliding layers, or of the full layers for the rows of one class."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .kv import LayerKV
from .spec import KVSpec


class Shelf:
    """The K/V of some rows of a batch, one LayerKV for each of some layers, all with the same number of places.

    rows: which row of the batch lies in each place, from the first place on. Places behind them are empty: what is
    written there nobody sees. order: int32 [places], the row whose K/V a write puts into each place; None where place i
    is row i of the whole batch and no place is empty. gather: int32 [len(rows)], `rows` as an array; None where place i
    is row i of the whole batch.
    """

    def __init__(self, specs: Sequence[KVSpec], slots: Sequence[int], dtype: mx.Dtype):
        self.layers = [LayerKV(spec, n, dtype) for spec, n in zip(specs, slots, strict=True)]
        self.places = 0
        self.rows: list[int] = []
        self.order: mx.array | None = None
        self.gather: mx.array | None = None

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def longest(self, bounds: Sequence[int]) -> int:
        """Returns the largest length bound of these rows; bounds: of all rows."""
        return max([bounds[row] for row in self.rows])

    def seat(self, batch: int) -> None:
        """Derives what follows from `rows`. batch: how many rows there are in all."""
        whole, empty = self.rows == list(range(batch)), self.places - len(self.rows)
        self.gather = None if whole else mx.array(self.rows, mx.int32)
        self.order = None if whole and not empty else mx.array([*self.rows, *self.rows[:1] * empty], mx.int32)

    def resize(self, places: int, slots: int | None = None) -> None:
        """Keeps the first places, or adds empty ones, and adds slots up to `slots`, one layer after the other."""
        for layer in self.layers:
            layer.resize(places, slots)
        self.places = places
