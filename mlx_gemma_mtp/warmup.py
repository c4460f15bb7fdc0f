"""The first run of everything on a CPU, while something else is waited for.

A fused kernel costs MLX's CPU backend a second of g++ the first time on a machine; afterwards it lies in MLX's own
cache. Which kernels there are follows from the kinds of layers and the layout of arrays, not from their sizes.
"""

from __future__ import annotations

from .calibration import KINDS, Bench
from .drafter import Drafter
from .gemma4 import Gemma4
from .kernels import metal_available
from .memory import step_bytes

MOST_BYTES = 1e9  # a step of a larger model takes so long that its kernels may be made as they come
PROMPT = [2, 3, 4, 5]
_done: set[tuple] = set()


def warm_up(target: Gemma4, drafter: Drafter | None) -> None:
    """Runs a short prompt, and rounds with drafts and without, in one row and in two; once a process for each kind of
    pair. Does nothing on Metal.
    """
    kind = (type(target), target.config.moe is None, drafter and type(drafter.masked_embedding))
    if metal_available() or kind in _done or step_bytes(target) > MOST_BYTES:
        return
    _done.add(kind)
    for rows in (1, 2):
        Bench(target, drafter, PROMPT, KINDS["greedy"], rows, 0).rounds(2)
