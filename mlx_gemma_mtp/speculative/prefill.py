"""Prefill: prompts, each in a cache of its own, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..cache.cache import Cache
from ..models.gemma4 import Gemma4


def chunk(target: Gemma4, caches: Sequence[Cache], pieces: Sequence[Sequence[int]]) -> mx.array:
    """Feeds each cache of one row the next piece of its prompt, and commits it. Returns the hidden states of each
    piece's last token, [B, H]. Nothing is evaluated.
    """
    raise NotImplementedError


def prefill(
    target: Gemma4,
    prompts: Sequence[Sequence[int]],
    block: int,
    lookback: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Cache], mx.array]:
    """Feeds whole prompts in chunks of `block` tokens, each evaluated before the next. Returns a cache of each prompt,
    and the hidden states of their last tokens, [B, H].

    progress: told after each chunk how many tokens of the longest prompt are done.
    """
    raise NotImplementedError


def batch(
    target: Gemma4,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    block: int,
    lookback: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Cache, mx.array]:
    """Feeds whole prompts in chunks of `chunk` tokens. Returns a cache of them all for writes of at most `block` tokens,
    and the hidden states of their last tokens, [B, H].
    """
    raise NotImplementedError
