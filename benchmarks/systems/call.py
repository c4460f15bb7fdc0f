"""What is asked of a system, and what it answers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

TOP_K, TOP_P = 64, 0.95  # of the published generation_config.json; used at temperatures above 0
Drafts = int | str  # 0 decodes plainly, "auto" lets the system choose


@dataclass(frozen=True)
class Request:
    """One call: a batch of prompts as token ids."""

    prompts: list[list[int]]
    drafts: Drafts
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Timing:
    """What a call took. A round is a target's pass after the prefill, counted for each row that takes part in it;
    a pass serves all rows at once. offered[i], kept[i]: rounds that verified, and kept, at least i + 1 drafts.
    """

    tokens: list[list[int]]  # generated ids of each prompt
    seconds: float  # the whole call
    first_seconds: float  # until the first token of any row
    prefill_seconds: float  # until every row had one
    passes: int
    rounds: int = 0
    drafted: int = 0
    accepted: float = 0
    offered: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    peak_bytes: int | None = None  # of MLX's allocator

    def count(self, drafted: int, accepted: int) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.add([1] * drafted, [int(i < accepted) for i in range(drafted)])

    def add(self, offered: Sequence[int], kept: Sequence[int]) -> None:
        """Adds the positions' counts of some rounds."""
        for total, more in ((self.offered, offered), (self.kept, kept)):
            total += [0] * (len(more) - len(total))
            total[: len(more)] = [a + b for a, b in zip(total, more, strict=False)]


@dataclass(frozen=True)
class Backlog:
    """Requests that all wait from the start; texts have exactly so many tokens as their limits say, greedily.

    rows: the most that are decoded at once. joining: how many rows must be free before the next requests are taken in;
    `rows` is a batch after the other.
    """

    prompts: list[list[int]]
    limits: list[int]
    rows: int
    drafts: Drafts
    joining: int = 1


@dataclass
class Served:
    """What a backlog took. first_seconds: until each request's first token."""

    tokens: list[list[int]]
    seconds: float
    first_seconds: list[float]


class Clock:
    """Times of a call's first tokens."""

    def __init__(self, rows: int) -> None:
        self.began, self.first, self.all = time.perf_counter(), 0.0, 0.0
        self._waiting = set(range(rows))

    def saw(self, row: int) -> None:
        """A token of `row` is on the host."""
        if row in self._waiting:
            self._waiting.remove(row)
            self.all = time.perf_counter() - self.began
            self.first = self.first or self.all

    def timing(self, tokens: list[list[int]], passes: int) -> Timing:
        return Timing(tokens, time.perf_counter() - self.began, self.first, self.all, passes)


def plain(timing: Timing) -> Timing:
    """Rounds of a plain call: each row's tokens but the first, which the prefill gives."""
    timing.rounds = sum(max(0, len(row) - 1) for row in timing.tokens)
    return timing


class System(ABC):
    """A loaded system: made with the folders of a target and a drafter, the latter empty where there is none."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What computes."""

    @abstractmethod
    def call(self, request: Request) -> Timing:
        """One call, timed."""

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What else can be asked of this system alone."""
        return {}

    def serve(self, backlog: Backlog) -> Served:
        """A backlog, timed. Raises NotImplementedError where the system cannot take requests in while others run."""
        raise NotImplementedError(f"{type(self).__name__} takes no backlog")


class MlxSystem(System):
    """A system on MLX: `measured` is its call, with the peak of MLX's memory."""

    @abstractmethod
    def measured(self, request: Request) -> Timing: ...

    def about(self) -> dict[str, Any]:
        import mlx.core as mx

        from mlx_gemma_mtp.machine import blas

        return {"device": str(mx.default_device()), "blas_library": blas.name()}

    def call(self, request: Request) -> Timing:
        import mlx.core as mx

        mx.random.seed(request.seed)
        mx.reset_peak_memory()
        timing = self.measured(request)
        timing.peak_bytes = mx.get_peak_memory()
        return timing
