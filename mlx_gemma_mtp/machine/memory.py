"""Memory: what there is, what MLX may keep of it unused, and the wired limit on a Mac."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from ..errors import UserError, size
from . import device


def total_bytes() -> int:
    """Returns the bytes that a model can use: the recommended working set on a Mac, most of an NVIDIA GPU's memory,
    physical memory elsewhere.
    """
    if told := device.traits().memory:
        name, share = told
        return int(share * device.info()[name])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check(needed: int, what: str, advice: str, limit: int | None = None) -> None:
    """Raises UserError where `needed` bytes cannot fit.

    what: the thing that needs them; advice: what the user can do. limit: bytes that the user allows, None for what the
    machine has.
    """
    available = total_bytes()
    if limit is not None and needed > limit:
        raise UserError(f"{what} needs {size(needed)}, memory_limit is {size(limit)}; raise it, or {advice}")
    if needed > available:
        raise UserError(f"{what} needs {size(needed)}, this machine has {size(available)} for it; {advice}")


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
def wired_limit(on: bool = True) -> Iterator[None]:
    """Keeps weights wired in memory on a Mac, up to the recommended working set, while any such block runs.

    mlx_lm does so, too. on: whether to do it at all. Other programs cannot have wired memory, whatever they need.
    """
    if not on or not device.traits().wires:
        yield
        return
    _wired.enter()
    try:
        yield
    finally:
        _wired.leave()


LEAST_CACHE = 64 << 20  # bytes


class _Kept:
    """The limit of MLX's cache of unused buffers: of several engines in a process the largest counts."""

    def __init__(self) -> None:
        self.limit, self.lock = 0, threading.Lock()

    def raise_to(self, limit: int) -> None:
        with self.lock:
            if limit > self.limit:
                self.limit = limit
                mx.set_cache_limit(limit)


_kept = _Kept()


def limit_cache(transient: int) -> None:
    """Limits MLX's cache of unused buffers to what rounds use again and again. Without a limit it grows to MLX's own,
    which is all memory: packed prompts have ever new sizes, and so have caches that grow.

    transient: bytes that a round needs beside weights and K/V, and frees again.
    """
    _kept.raise_to(max(transient, LEAST_CACHE))
