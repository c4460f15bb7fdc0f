"""Memory: what a run needs, what there is, and the wired limit on a Mac."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ..errors import UserError
from . import device
from .device import metal_available


def total_bytes() -> int:
    """Returns the bytes that a model can use: the recommended working set on a Mac, physical memory elsewhere."""
    if metal_available():
        return int(device.info()["max_recommended_working_set_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(needed: int, what: str, advice: str) -> None:
    """Raises UserError where `needed` bytes cannot fit.

    what: the thing that needs them; advice: what the user can do.
    """
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
    """Keeps weights wired in memory on a Mac, up to the recommended working set, while any such block runs.

    mlx_lm does so, too.
    """
    if not metal_available():
        yield
        return
    _wired.enter()
    try:
        yield
    finally:
        _wired.leave()
