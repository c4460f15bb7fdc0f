"""Memory: what a run needs, what there is, and the wired limit on a Mac."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from .cache import CAPACITY_STEP
from .config import TargetConfig
from .drafter import Drafter
from .errors import UserError
from .gemma4 import Gemma4
from .kernels import metal_available
from .safetensors_io import read_header, weight_files


def total_bytes() -> int:
    """Memory that a model can use: the recommended working set on a Mac, physical memory elsewhere."""
    if metal_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weight_bytes(folder: Path, widened: bool = False) -> int:
    """Bytes of a folder's tensors; widened: 16-bit floats, also scales and biases of quantised weights, as float32."""
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file).values()]
    return sum(t.nbytes * (2 if widened and t.dtype in ("BF16", "F16") else 1) for t in tensors)


def step_bytes(model: Gemma4 | Drafter) -> int:
    """Bytes of weights that one token's step of one row reads: experts that are not chosen and rows of tables are not.

    For a drafter, those of one draft.
    """
    shares = model.step_shares()
    return sum(
        int(value.nbytes * next((share for part, share in shares.items() if part in path), 1.0))
        for path, value in tree_flatten(model.parameters())
    )


def model_bytes(model: Gemma4 | Drafter) -> int:
    """Bytes of all weights of a loaded model."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def kv_bytes(config: TargetConfig, tokens: int, rows: int, block: int, item_size: int) -> int:
    """Bytes that a cache takes for `tokens` positions of `rows` sequences.

    Rings have window + block - 1 positions however short the text is, full layers grow in steps of 256.
    """
    whole = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    slots = [spec.window + block - 1 if spec.window else whole for spec in config.kv]
    per_row = sum(2 * n * spec.kv_heads * spec.head_dim for n, spec in zip(slots, config.kv, strict=True))
    return rows * per_row * item_size


def check(needed: int, what: str, advice: str) -> None:
    """Raises UserError when `needed` bytes cannot fit."""
    available = total_bytes()
    if needed > available:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB, this machine has {available / 1e9:.1f} GB for it; {advice}"
        )


class _Wired:
    """Who needs weights wired: the first raises MLX's limit, the last one puts it back, in whatever order they end."""

    def __init__(self) -> None:
        self.users, self.before, self.lock = 0, 0, threading.Lock()

    def enter(self) -> None:
        with self.lock:
            if not self.users:
                self.before = mx.set_wired_limit(total_bytes())
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                mx.synchronize()
                mx.set_wired_limit(self.before)


_wired = _Wired()


@contextmanager
def wired_limit() -> Iterator[None]:
    """On a Mac, keeps weights wired up to the recommended working set while any such block runs (as mlx_lm)."""
    if not metal_available():
        yield
        return
    _wired.enter()
    try:
        yield
    finally:
        _wired.leave()
