"""The keys and values of one sequence, outside of any cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .kv import Arrays, layout
from .spec import KVSpec


@dataclass(frozen=True, eq=False)
class Saved:
    """The K/V of one sequence by itself, from `Cache.save`; `Cache.arrange` makes a row of it again.

    tokens: n, how many the sequence has. layers: of each layer that owns K/V the arrays that it keeps them in
    (`layout`), [1, heads, m, width], of the positions n - m to n - 1 in order along axis 2: all n in full layers, the
    last ones in sliding layers.
    """

    tokens: int
    layers: tuple[Arrays, ...]

    @classmethod
    def empty(cls, specs: Sequence[KVSpec], dtype: mx.Dtype) -> Saved:
        """Returns a sequence of no tokens."""
        parts = [layout(spec, dtype) for spec in specs]
        return cls(0, tuple(tuple(part.zeros(1, 0) for part in layer) for layer in parts))

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for arrays in self.layers for array in arrays)

    def first(self, tokens: int) -> Saved:
        """Returns the beginning of the sequence, as views. `Cache.arrange` takes it if the sliding layers still hold a
        window of it: if it is short, or if so many positions more were saved (`slack`).
        """
        assert tokens <= self.tokens, f"the first {tokens} of {self.tokens} tokens"
        layers = []
        for arrays in self.layers:
            held = max(arrays[0].shape[2] - (self.tokens - tokens), 0)
            layers.append(tuple(array[:, :, :held] for array in arrays))
        return Saved(tokens, tuple(layers))
