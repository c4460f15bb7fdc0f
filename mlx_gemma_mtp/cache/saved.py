"""The keys and values of one sequence, outside of any cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .spec import KVSpec


@dataclass(frozen=True, eq=False)
class Saved:
    """The K/V of one sequence by itself, from `Cache.save`; `Cache.arrange` makes a row of it again.

    tokens: n, how many the sequence has. layers: keys and values of each layer that owns some, [1, kv_heads, m,
    head_dim], of the positions n - m to n - 1 in order: all n in full layers, the last ones in sliding layers.
    """

    tokens: int
    layers: tuple[tuple[mx.array, mx.array], ...]

    @classmethod
    def empty(cls, specs: Sequence[KVSpec], dtype: mx.Dtype) -> Saved:
        """Returns a sequence of no tokens."""
        nothing = [mx.zeros((1, spec.kv_heads, 0, spec.head_dim), dtype) for spec in specs]
        return cls(0, tuple((each, each) for each in nothing))

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def first(self, tokens: int) -> Saved:
        """Returns the beginning of the sequence, as views. `Cache.arrange` takes it if the sliding layers still hold a
        window of it: if it is short, or if so many positions more were saved (`slack`).
        """
        assert tokens <= self.tokens, f"the first {tokens} of {self.tokens} tokens"
        layers = []
        for keys, values in self.layers:
            held = max(keys.shape[2] - (self.tokens - tokens), 0)
            layers.append((keys[:, :, :held], values[:, :, :held]))
        return Saved(tokens, tuple(layers))
