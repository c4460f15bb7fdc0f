"""Where a round's time goes: clocks and counters around the functions that a round is made of.

A round: DRAFT (`propose` of the source of drafts), VERIFY (Gemma4.__call__ and its logits), ACCEPT (loop.accepted),
then dispatches and one readback. A clock stops while another runs inside it, so the parts add up.
"""

from __future__ import annotations

import cProfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import CodeType
from typing import Any
from unittest import mock

import mlx.core as mx

from benchmarks.trace import Trace
from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.engine.engine import Engine, Result
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.speculative import loop
from mlx_gemma_mtp.speculative.drafting import SOURCES

STAGES = (
    *(("draft", source, "propose") for source in SOURCES.values()),
    ("verify", Gemma4, "__call__"),
    ("logits", Gemma4, "logits"),
    ("accept", loop, "accepted"),
)
HOST = (
    ("dispatch", mx, "async_eval"),
    ("readback", mx, "eval"),
    ("readback", mx.array, "tolist"),
    ("readback", mx.array, "item"),
)
PARTS = ("draft", "verify", "logits", "accept", "dispatch", "readback")


@dataclass
class Clocks:
    """Seconds and primitives by part since the last `reset`."""

    alone: bool = False  # evaluate what a stage returns before it ends, so that nothing overlaps
    trace: Trace | None = None
    seconds: Counter[str] = field(default_factory=Counter)
    primitives: Counter[str] = field(default_factory=Counter)
    _open: list[str] = field(default_factory=lambda: ["rest"])
    _since: float = field(default_factory=time.perf_counter)

    def reset(self) -> None:
        self.seconds.clear()
        self.primitives.clear()
        self._since = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The functions are clocked while the block runs."""
        with ExitStack() as stack:
            host = () if self.alone else HOST
            for part, owner, name in (*STAGES, *host):
                function = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, self._clocked(part, function)))
            yield

    def _clocked(self, part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch(part)
            nodes = self.trace.primitives if self.trace else 0
            try:
                result = function(*args, **kwargs)
                if self.alone:
                    mx.eval(result)
                return result
            finally:
                if self.trace:
                    self.primitives[part] += self.trace.primitives - nodes
                self._switch(None)

        return call

    def _switch(self, part: str | None) -> None:
        """Books the time since the last switch on the open part, and opens another, or closes it (None)."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
        if part is None:
            self._open.pop()
        else:
            self._open.append(part)


@dataclass
class Load:
    """What is generated for a measurement, again and again the same text."""

    engine: Engine
    prompts: Sequence[str]
    drafts: int
    max_tokens: int

    def run(self, began: Callable[[], None] = lambda: None) -> tuple[float, int, list[Result]]:
        """began: called when every row has its first token. Returns (seconds since then, rounds, the results)."""
        params = SamplingParams(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True)
        results: dict[int, Result] = {}
        seen: set[int] = set()
        start = 0.0
        for chunk in self.engine.stream(list(self.prompts), params, num_draft_tokens=self.drafts):
            if chunk.index not in seen:
                seen.add(chunk.index)
                if len(seen) == len(self.prompts):
                    began()
                    start = time.perf_counter()
            if chunk.result is not None:
                results[chunk.index] = chunk.result
        seconds = time.perf_counter() - start
        return seconds, max(result.stats.rounds for result in results.values()), list(results.values())


def measure(load: Load, repeats: int) -> dict[str, Any]:
    """Figures of a round, the last ones of a text with their fewer drafts included; times are medians over interleaved
    repeats.

    round_ms: of the loop as it is. loop_ms: the host's time in it by part; readback is waiting, rest is what is not
    listed. alone_ms: of each stage, evaluated before the next begins. primitives: by stage, rest as before.
    """
    load.run()  # warm
    whole, loop, alone = [], [], []
    for _ in range(repeats):
        seconds, rounds, results = load.run()
        whole.append(1000 * seconds / rounds)
        loop.append(_clocked(load, alone=False))
        alone.append(_clocked(load, alone=True))
    nodes, syncs = _counts(load)
    return {
        "rounds": rounds,
        "tokens_per_round": round(sum(r.stats.tokens_per_round for r in results) / len(results), 3),
        "round_ms": round(median(whole), 3),
        "round_ms_all": [round(each, 3) for each in whole],
        "loop_ms": {part: median(each[part] for each in loop) for part in loop[0]},
        "alone_ms": {part: median(each[part] for each in alone) for part in alone[0]},
        "primitives": nodes,
        "primitives_per_round": round(sum(nodes.values()), 1),
        "host_syncs_per_round": syncs,
    }


def _clocked(load: Load, alone: bool) -> dict[str, float]:
    clocks = Clocks(alone)
    with clocks.running():
        _, rounds, _ = load.run(clocks.reset)
    if alone:
        del clocks.seconds["rest"]
    return _a_round(clocks.seconds, rounds, 1000)


def _counts(load: Load) -> tuple[dict[str, float], float]:
    """Primitives a round by stage, in a run whose stages are evaluated one by one; host syncs a round of the loop."""
    with Trace() as trace:
        clocks, before = Clocks(True, trace), []
        with clocks.running():
            _, rounds, _ = load.run(lambda: (clocks.reset(), before.append(trace.primitives)))
    nodes = clocks.primitives
    nodes["rest"] = trace.primitives - before[0] - sum(nodes.values())
    with Trace() as trace:
        load.run(lambda: before.append(trace.syncs))
    return _a_round(nodes, rounds, 1), round((trace.syncs - before[1]) / rounds, 2)


def _a_round(counter: Counter[str], rounds: int, unit: float) -> dict[str, float]:
    return {part: round(counter[part] * unit / rounds, 3) for part in (*PARTS, "rest") if part in counter}


def profile(load: Load, top: int) -> list[dict[str, Any]]:
    """The functions with the most time of their own in a call, prefill included, by cProfile: milliseconds and calls a
    round.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    _, rounds, _ = load.run()
    profiler.disable()
    entries = sorted(profiler.getstats(), key=lambda entry: -entry.inlinetime)[:top]
    return [
        {
            "function": _named(entry.code),
            "own_ms": round(1000 * entry.inlinetime / rounds, 3),
            "calls": round(entry.callcount / rounds, 2),
        }
        for entry in entries
    ]


def _named(code: CodeType | str) -> str:
    """A Python function's file, line and name; a built-in's own description."""
    return code if isinstance(code, str) else f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"
