"""Begins a child process of test_exits.py: an engine whose rounds take a few milliseconds of MLX, or the bundled pair.

The engine is real but for its runner: that is `Computing`, whose requests last as many rounds as max_tokens says.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from weakref import finalize

import mlx.core as mx
from scripted import Scripted, request

from mlx_gemma_mtp.engine.streams import AsyncStream, Stream
from mlx_gemma_mtp.engine.worker import Worker


class Computing(Scripted):
    """Its rounds compute and compile in the worker's thread, as a model's do."""

    def __init__(self):
        weights = mx.random.normal((600, 600))
        self.state, self.step = mx.ones((8, 600)), mx.compile(lambda x: mx.softmax(x @ weights) + x)
        super().__init__(self._compute)

    def _compute(self) -> None:
        for _ in range(3):
            self.state = self.step(self.state)
        mx.eval(self.state)


class Small:
    """What an engine is to its callers: `stream`, `generate`, both for coroutines, `close`."""

    def __init__(self):
        self.worker = Worker()
        self.worker.drive(Computing)
        finalize(self, self.worker.stop).atexit = False

    def stream(self, rounds: int = 10**9, **options):
        return Stream(self.worker, [request(rounds)], None, None, self, **options)

    def generate(self, rounds: int = 10**9):
        return next(self.stream(rounds, whole=True)).result

    def astream(self, rounds: int = 10**9, **options):
        async def begin():
            return [request(rounds)]

        return AsyncStream(self.worker, begin, None, None, self, **options)

    def close(self) -> None:
        self.worker.close()


def interrupted_soon(seconds: float = 0.05) -> None:
    """Sends this process Ctrl-C in a while."""

    def send() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
