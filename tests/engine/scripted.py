"""A runner for the worker's tests whose rounds are scripted, and requests for it."""

from __future__ import annotations

import itertools
import threading
import time

from mlx_gemma_mtp.engine.request import Advance, Chunk, Delivery, Request, Result
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.sampling.params import SamplingParams

IDS = itertools.count()


def request(rounds: int = 3, index: int = 0, prompt: int = 2, deadline: float | None = None) -> Request:
    """A request that lasts `rounds` rounds."""
    parts = [1] * prompt, SamplingParams(max_tokens=rounds), None, frozenset(), rounds, Stats(prompt)
    return Request(next(IDS), index, *parts, deadline=deadline)


def requests(*rounds: int) -> list[Request]:
    return [request(each, index) for index, each in enumerate(rounds)]


class Scripted:
    """A Runner: each round gives every request one chunk, with the round's number as its token.

    work: is called in each round; what it raises, the round does. wait: rounds wait for this event, if it is given.
    """

    def __init__(self, work=lambda: None, wait: threading.Event | None = None, refuse: Exception | None = None):
        self.work, self.wait, self.refuse = work, wait, refuse
        self.live: dict[int, Request] = {}
        self.given: dict[int, list[int]] = {}
        self.ending: dict[int, str] = {}
        self.paused: set[int] = set()
        self.rounds, self.closed, self.log = 0, False, []
        self.thread = threading.get_ident()

    def _here(self, *what) -> None:
        assert threading.get_ident() == self.thread and not self.closed
        self.log.append(what)

    @property
    def busy(self) -> bool:
        return bool(self.ending) or any(id not in self.paused for id in self.live)

    def submit(self, request: Request) -> None:
        self._here("submit", request.id)
        if self.refuse is not None and self.live:
            raise self.refuse
        self.live[request.id], self.given[request.id] = request, []

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        self._here("cancel", id)
        if id in self.live:
            self.ending[id] = reason

    def pause(self, id: int) -> None:
        self._here("pause", id)
        self.paused.add(id)

    def resume(self, id: int) -> None:
        self._here("resume", id)
        self.paused.discard(id)

    def next_deadline(self) -> float | None:
        return min((each.deadline for each in self.live.values() if each.deadline is not None), default=None)

    def round(self, deliver) -> None:
        if self.wait is not None:
            self.wait.wait(30)
        self.rounds += 1
        self.work()
        now = time.monotonic()
        self.ending |= {id: "timeout" for id, each in self.live.items() if each.deadline and each.deadline <= now}
        items = [self._end(id, reason) for id, reason in self.ending.items()]
        self.ending.clear()
        for id in [id for id in self.live if id not in self.paused]:
            tokens, asked = self.given[id], self.live[id]
            if not tokens:
                items.append(Advance(id, len(asked.prompt), len(asked.prompt)))
            tokens.append(len(tokens))
            last = len(tokens) == asked.limit
            items.append(self._end(id, "length") if last else Delivery(id, Chunk(asked.index, "x", tokens[-1:])))
        deliver(items)

    def _end(self, id: int, reason: str, error: str | None = None) -> Delivery:
        asked, tokens = self.live.pop(id), self.given.pop(id)
        result = Result("x" * len(tokens), tokens, reason, asked.stats, error=error)
        return Delivery(id, Chunk(asked.index, "x", tokens[-1:] if reason == "length" else [], result))

    def fail(self, error: Exception) -> list:
        self._here("fail", str(error))
        return [self._end(id, "error", str(error)) for id in list(self.live)]

    def close(self) -> list:
        items = [self._end(id, "cancelled") for id in list(self.live)]
        self.closed = True
        return items


class Busy(Scripted):
    """A Scripted that has always something to do."""

    busy = True
