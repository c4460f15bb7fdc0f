"""Counts what Python asks of MLX while a `with` block runs: primitives of the graphs it evaluates, and waits of the
host.

It stands in front of mx.eval, mx.async_eval, mx.synchronize and the methods of an array that read its values. A
graph's primitives are the nodes of `mx.export_to_dot` at the moment it is handed over, so each is counted once; a
compiled chain is one. They are primitives on this backend: not launches, whose number the backend chooses. A wait is a
call that must let the device catch up; reading what is there already is none. Reads through the buffer protocol
(numpy.array of an array) are not seen. Tracing takes time: never measure seconds under it, but those of `waiting`,
relative to each other.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, Self

import mlx.core as mx
from mlx.utils import tree_flatten

READS = ("item", "tolist", "__int__", "__float__", "__bool__", "__index__", "__array__")


def primitives(*trees: Any) -> int:
    """Nodes of the graph that evaluating these arrays (or trees of arrays) would run."""
    arrays = [leaf for _, leaf in tree_flatten(list(trees)) if isinstance(leaf, mx.array)]
    if not arrays:
        return 0
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")


class Trace:
    """primitives, syncs: counted since the block began; waiting: seconds of the waits."""

    def __init__(self) -> None:
        self.primitives = self.syncs = 0
        self.waiting = 0.0
        self._running = False  # something was dispatched since the last wait
        self._inside = False  # a traced function may call another

    def __enter__(self) -> Self:
        self._module = {name: getattr(mx, name) for name in ("eval", "async_eval", "synchronize")}
        self._reads = {name: getattr(mx.array, name) for name in READS}
        for name, function in self._module.items():
            setattr(mx, name, self._traced(function, waits=name != "async_eval"))
        for name, function in self._reads.items():
            setattr(mx.array, name, self._traced(function, waits=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, function in self._module.items():
            setattr(mx, name, function)
        for name, function in self._reads.items():
            setattr(mx.array, name, function)

    def _traced(self, function: Callable, waits: bool) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                return self._count(function, waits, args, kwargs)
            finally:
                self._inside = False

        return call

    def _count(self, function: Callable, waits: bool, args: tuple, kwargs: dict) -> Any:
        nodes = primitives(*args)
        self.primitives += nodes
        self._running |= nodes > 0
        if not (waits and self._running):
            return function(*args, **kwargs)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.waiting += time.perf_counter() - start
        self.syncs += 1
        self._running = False
        return result
