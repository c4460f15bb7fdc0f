"""Buffers that the same rows lie in: of all sliding layers, or of the full layers for the rows of one class."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .kv import layer_kv
from .spec import KVSpec


class Shelf:
    """The K/V of some rows of a batch, one LayerKV for each of some layers, all with the same number of places.

    bytes: of all layers. alike: for each layer the first one of its spec. rows: which row of the batch lies in each
    place, from the first place on. empty: how many places are behind them: what is written there nobody sees. gather:
    int32 [len(rows)], `rows` as an array; None where these are all rows of the batch in their order.
    """

    def __init__(self, specs: Sequence[KVSpec], slots: Sequence[int], dtype: mx.Dtype):
        self.layers = [layer_kv(spec, n, dtype) for spec, n in zip(specs, slots, strict=True)]
        self.alike = [specs.index(spec) for spec in specs]
        self.places = self.bytes = 0
        self.rows: list[int] = []
        self.gather: mx.array | None = None

    def longest(self, bounds: Sequence[int]) -> int:
        """Returns the largest length bound of these rows; bounds: of all rows."""
        return max([bounds[row] for row in self.rows])

    @property
    def empty(self) -> int:
        return self.places - len(self.rows)

    def seat(self, batch: int) -> None:
        """Derives `gather` from `rows`. batch: how many rows there are in all."""
        self.gather = None if self.rows == list(range(batch)) else mx.array(self.rows, mx.int32)

    def resize(self, places: int, slots: int | None = None) -> None:
        """Keeps the first places, or adds empty ones, and adds slots up to `slots`, one layer after the other."""
        for layer in self.layers:
            layer.resize(places, slots)
        self.places, self.bytes = places, sum(layer.bytes for layer in self.layers)
