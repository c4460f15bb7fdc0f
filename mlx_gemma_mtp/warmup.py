"""The first run of everything on a CPU, while something else is waited for.

A fused kernel costs MLX's CPU backend a second of g++ the first time on a machine; afterwards it lies in MLX's own
cache. Which kernels there are follows from the kinds of layers and the layout of arrays, not from their sizes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx

from .calibration import KINDS, Bench
from .drafter import Drafter
from .gemma4 import Gemma4
from .kernels import metal_available
from .memory import step_bytes

MOST_BYTES = 1e9  # a step of a larger model takes so long that its kernels may be made as they come
PROMPT = [2, 3, 4, 5]
_done: set[tuple] = set()


def wanted(target: Gemma4) -> bool:
    """Whether kernels are to be made before they are needed."""
    return not metal_available() and step_bytes(target) <= MOST_BYTES


def making_ready(target: Gemma4) -> str:
    """What `load` does last, for whoever waits."""
    if wanted(target) and not kernels():
        return "compiling kernels for this CPU (once on this machine) and importing the tokenizer"
    return "importing the tokenizer"


def kernels() -> int:
    """How many fused kernels MLX has compiled on this machine for its CPU backend."""
    folder = Path(tempfile.gettempdir(), "mlx", mx.__version__, "cpu")
    return sum(1 for _ in folder.glob("*.so"))


def warm_up(target: Gemma4, drafter: Drafter | None, max_rows: int) -> None:
    """Runs a short prompt, and rounds with drafts and without, in one row and, where there may be more, in two; once a
    process for each kind of pair. Does nothing on Metal.
    """
    if not wanted(target):
        return
    for rows in (1, 2)[:max_rows]:
        kind = (rows, type(target), target.config.moe is None, drafter and type(drafter.masked_embedding))
        if kind in _done:
            continue
        _done.add(kind)
        Bench(target, drafter, PROMPT, KINDS["greedy"], rows, 0).rounds(2)
