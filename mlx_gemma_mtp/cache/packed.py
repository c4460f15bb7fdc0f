"""One forward over the next tokens of several prompts, each in a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .cache import Cache


class PackedSpan:
    """The view of one forward over the next counts[i] tokens of each of several caches of one row.

    Whatever is computed token by token is computed for the N = sum(counts) tokens, packed one behind the other, as for
    N rows of one token: positions is int32 [N, 1], and queries, keys and values are [N, heads, 1, head_dim]. `write`
    and `attend` go from cache to cache, so that nothing is padded.
    """

    is_prefill = True

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int]):
        raise NotImplementedError

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes a layer's K/V of the new positions. keys, values: [N, kv_heads, 1, head_dim]."""
        raise NotImplementedError

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of queries at `positions` over a layer's K/V: [N, heads, 1, head_dim], as `queries`
        are.
        """
        raise NotImplementedError


class LastTokens:
    """The view of the last token of each piece, for the layers that follow once all tokens' K/V are written.

    positions: int32 [B, 1].
    """

    is_prefill = True

    def __init__(self, span: PackedSpan):
        raise NotImplementedError

    def of(self, arrays: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Returns the tokens that go on of arrays of all packed tokens: [N, ...] each -> [B, ...]."""
        raise NotImplementedError

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of the last tokens over a layer's K/V: [B, heads, 1, head_dim], as `queries` are."""
        raise NotImplementedError
