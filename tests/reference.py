"""Our numbers in the shape of the oracle's: logits of a whole text, of decoding, and of draft steps."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.sampling.distribution import soft_cap


def forward(model: Gemma4, tokens: Sequence[int], chunks: Sequence[int] = ()) -> tuple[np.ndarray, Cache, mx.array]:
    """Logits [n, V] of a text fed in chunks of these sizes (then token by token), the cache, the last hidden state."""
    sizes = [*chunks, *[1] * (len(tokens) - sum(chunks))] if chunks else [len(tokens)]
    cache = Cache(model.config.kv, max(sizes), mx.float32).open(len(tokens))
    logits, start = [], 0
    for size in sizes:
        hidden = model(mx.array([list(tokens[start : start + size])]), cache.span(size))
        cache.commit(mx.array([size]), [size])
        logits.append(np.array(soft_cap(model.logits(hidden), model.config.softcap))[0])
        start += size
    return np.concatenate(logits), cache, hidden[:, -1]


def draft_steps(target: Gemma4, drafter: Drafter, tokens: Sequence[int], steps: int) -> tuple[list, list, list]:
    """Greedy draft steps after `tokens`, whose last one has no K/V yet: tokens, (logits, ids), carried hidden."""
    _, cache, hidden = forward(target, tokens[:-1])
    span = Span(cache, 0)
    rotations = drafter.ropes.tables(span.positions)
    newest, drafted, scores, carried = mx.array([tokens[-1]]), [], [], []
    for _ in range(steps):
        y, hidden = drafter(target.embed(newest), hidden, span, rotations)
        logits, ids = drafter.scores(y)
        ids = mx.arange(logits.shape[-1])[None] if ids is None else ids
        newest = mx.take_along_axis(ids, mx.argmax(logits, axis=-1, keepdims=True), axis=-1)[..., 0]
        drafted.append(int(newest.item()))
        scores.append((np.array(logits)[0], np.array(ids)[0]))
        carried.append(np.array(hidden)[0])
    return drafted, scores, carried
