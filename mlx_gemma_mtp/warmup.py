"""The first run of everything on a CPU, while something else is waited for.

A fused kernel costs MLX's CPU backend a second of g++ the first time on a machine; afterwards it lies in MLX's own
cache. Which kernels there are follows from the kinds of layers and the layout of arrays, not from their sizes.
"""

from __future__ import annotations

import mlx.core as mx

from .cache import Cache
from .drafter import Drafter
from .gemma4 import Gemma4
from .kernels import metal_available
from .memory import step_bytes
from .params import SamplingParams
from .sampling import Rules
from .speculative import Speculation, prefill

MOST_BYTES = 1e9  # a step of a larger model takes so long that its kernels may be made as they come
PROMPTS = [[2, 3, 4, 5], [2, 3]]  # ragged
GREEDY = SamplingParams(temperature=0.0, top_k=-1, top_p=1.0, seed=0)
_done: set[tuple] = set()


def warm_up(target: Gemma4, drafter: Drafter | None) -> None:
    """Runs short prompts, and rounds with drafts and without, in one row and in two; once a process for each kind of
    pair. Does nothing on Metal.
    """
    kind = (type(target), target.config.moe is None, drafter and type(drafter.masked_embedding))
    if metal_available() or kind in _done or step_bytes(target) > MOST_BYTES:
        return
    _done.add(kind)
    for rows in (1, 2):
        cache = Cache(target.config.kv, rows, capacity=16, block=8, dtype=target.dtype)
        hidden = prefill(target, cache, slice(0, rows), PROMPTS[:rows])
        loop = Speculation(target, drafter, cache, Rules.of([GREEDY] * rows, target.config.vocab_size), hidden)
        for drafts in (2, 0, 0):
            loop.start(drafts) if drafts else loop.step(0)
    mx.synchronize()
