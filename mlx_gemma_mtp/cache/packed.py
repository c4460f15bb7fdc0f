"""One forward over the next tokens of several prompts, each in a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from .cache import Cache, Span


class PackedSpan:
    """The view of one forward over the next counts[i] tokens of each of several caches of one row.

    Whatever is computed token by token is computed for the N = sum(counts) tokens, packed one behind the other, as for
    N rows of one token: positions is int32 [N, 1], and queries, keys and values are [N, heads, 1, head_dim]. `write`
    and `attend` go from cache to cache, so that nothing is padded. ends: where each cache's tokens end among the N.
    """

    is_prefill = True

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int]):
        assert all(cache.rows == 1 for cache in caches) and min(counts) > 0, "a piece of each of several single rows"
        self.caches, self.counts, self.ends = caches, counts, list(accumulate(counts))
        self.spans = [cache.span(count, known=True) for cache, count in zip(caches, counts, strict=True)]
        self.positions = _joined([span.positions.swapaxes(0, 1) for span in self.spans])

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes a layer's K/V of the new positions. keys, values: [N, kv_heads, 1, head_dim]."""
        for span, new_keys, new_values in zip(self.spans, self._each(keys), self._each(values), strict=True):
            span.write(layer, new_keys, new_values)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of queries at `positions` over a layer's K/V: [N, heads, 1, head_dim], as `queries`
        are.
        """
        attended = [span.attend(layer, own) for span, own in zip(self.spans, self._each(queries), strict=True)]
        return _joined([each.swapaxes(0, 2) for each in attended])

    def _each(self, packed: mx.array) -> list[mx.array]:
        """Returns each cache's part of an array of all packed tokens: [N, heads, 1, D] -> [1, heads, count, D] each."""
        parts = [packed] if len(self.spans) == 1 else mx.split(packed, self.ends[:-1], axis=0)
        return [part.swapaxes(0, 2) for part in parts]


class LastTokens:
    """The view of the last token of each of the B pieces, for the layers that follow once all tokens' K/V are written.

    positions: int32 [B, 1].
    """

    is_prefill = True

    def __init__(self, span: PackedSpan):
        self._index = mx.array(span.ends, mx.int32) - 1
        self._spans = [Span(cache, n, last=True) for cache, n in zip(span.caches, span.counts, strict=True)]
        self.positions = span.positions[self._index]

    def of(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Returns the tokens that go on of arrays of all packed tokens: [N, ...] each -> [B, ...]."""
        return tuple(each[self._index] for each in arrays)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of the last tokens over a layer's K/V: [B, heads, 1, head_dim], as `queries` are."""
        return _joined([span.attend(layer, queries[i : i + 1]) for i, span in enumerate(self._spans)])


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
