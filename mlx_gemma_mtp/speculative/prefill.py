"""Prefill: ragged prompts, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..cache.cache import Cache
from ..models.gemma4 import Gemma4


def prefill(
    target: Gemma4,
    cache: Cache,
    rows: slice,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Feeds ragged prompts in chunks of the cache's block. Each row commits its own tokens alone.

    progress: told after each chunk how many tokens of the longest prompt are done. Returns each row's hidden state at
    its last token, [B, H].
    """
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = mx.array([list(p) + [0] * (width - len(p)) for p in prompts])
    hidden = None
    for start in range(0, width, cache.block):
        tokens = padded[:, start : start + cache.block]
        step = tokens.shape[1]
        counts = [max(0, min(length - start, step)) for length in lengths]  # each row's own tokens in this chunk
        last = mx.array([length - 1 - start for length in lengths])  # the last token's column, if it is in this chunk
        here = target(tokens, cache.span(rows, step, counts), mx.clip(last, 0, step - 1))[:, 0]
        cache.commit(rows, mx.array(counts), counts)
        inside = ((last >= 0) & (last < step))[:, None]
        hidden = here if hidden is None else mx.where(inside, here, hidden)
        mx.eval(hidden, cache.lengths)
        progress(start + step)
    return hidden
