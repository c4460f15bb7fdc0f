"""An engine whose rounds take a given time and give given tokens: the real worker, outboxes, replies, and no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.outbox import Item
from mlx_gemma_mtp.engine.request import Delivery, Request
from mlx_gemma_mtp.engine.worker import Worker


@dataclass
class Script:
    """Drives the worker as engine.runner does. seconds: of a round, which MLX would take without the interpreter.
    tokens: of a round of each request, over and over.
    """

    seconds: float
    tokens: list[int]
    requests: dict[int, Request] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        self.ended[id] = reason

    def pause(self, id: int) -> None:
        """Nobody falls behind here."""

    def resume(self, id: int) -> None:
        """Nor is anybody to go on."""

    def next_deadline(self) -> None:
        return None

    def round(self, deliver: Callable[[list[Item]], None]) -> None:
        time.sleep(self.seconds)
        given: list[Item] = []
        for id, request in list(self.requests.items()):
            if reason := self.ended.pop(id, None):
                request.cancel(reason)
            else:
                request.take(self.tokens, len(self.tokens) - 1, "fixed")
            chunk = request.chunk()
            given.append(Delivery(id, chunk))
            if chunk.result is not None:
                del self.requests[id]
        self.ended.clear()
        deliver(given)

    def fail(self, error: BaseException) -> list[Item]:
        raise error

    def close(self) -> list[Item]:
        given: list[Item] = []
        for id, request in self.requests.items():
            request.cancel()
            given.append(Delivery(id, request.chunk()))
        self.requests.clear()
        return given


def scripted(engine: Engine, seconds: float, text: str) -> Any:
    """An engine that answers everything with a text, over and over, a part of it each round."""
    made = Engine.__new__(Engine)
    made.__dict__ |= vars(engine)
    tokens = engine.text.spelled(text)
    made._worker = Worker()
    made._worker.drive(lambda: Script(seconds, tokens))
    return made
