"""Prefill: prompts, each in a cache of its own, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..cache.cache import Cache
from ..cache.packed import PackedSpan
from ..cache.spec import KVSpec
from ..models.gemma4 import Gemma4


def chunk(target: Gemma4, caches: Sequence[Cache], pieces: Sequence[Sequence[int]], at_once: bool = False) -> mx.array:
    """Feeds each cache of one row the next piece of its prompt, and commits it. Returns the hidden states of each
    piece's last token, [B, H].

    at_once: the device begins while the rest is built; else nothing is evaluated.
    """
    counts = [len(piece) for piece in pieces]
    tokens = mx.array([token for piece in pieces for token in piece])
    hidden = target.prefill(tokens, PackedSpan(caches, counts), at_once)
    for cache, count in zip(caches, counts, strict=True):
        cache.commit(mx.array([count]), [count])
    return hidden


def prefill(
    target: Gemma4,
    prompts: Sequence[Sequence[int]],
    block: int,
    lookback: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    specs: Sequence[KVSpec] | None = None,
) -> tuple[list[Cache], mx.array]:
    """Feeds whole prompts in chunks of `block` tokens, each evaluated before the next. Returns a cache of each prompt,
    and the hidden states of their last tokens, [B, H].

    progress: told after each chunk how many tokens of the longest prompt are done. specs: of the caches; None for
    those of the model's type.
    """
    specs = target.config.kv if specs is None else specs
    caches = [Cache(specs, block, target.dtype, lookback).open(len(prompt)) for prompt in prompts]
    hidden: dict[int, mx.array] = {}
    for start in range(0, longest := max(map(len, prompts)), block):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) > start]
        fed = [caches[row] for row in rows]
        states = chunk(target, fed, [prompts[row][start : start + block] for row in rows], at_once=True)
        mx.eval(states, [cache.lengths for cache in fed])
        hidden |= zip(rows, states, strict=True)
        progress(min(start + block, longest))
    return caches, mx.stack([hidden[row] for row in range(len(prompts))])


def batch(
    target: Gemma4,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    block: int,
    lookback: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    specs: Sequence[KVSpec] | None = None,
) -> tuple[Cache, mx.array]:
    """Feeds whole prompts in chunks of `chunk` tokens. Returns one cache of them all, for writes of at most `block`
    tokens, and the hidden states of their last tokens, [B, H]. specs: as `prefill` takes them.
    """
    caches, hidden = prefill(target, prompts, chunk, lookback, progress, specs)
    cache = Cache(target.config.kv if specs is None else specs, block, target.dtype, lookback)
    cache.arrange([each.save(0) for each in caches])
    return cache, hidden
