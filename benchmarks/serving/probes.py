"""What is counted in the process that computes: rows in use, rounds of an arrival, K/V read, memory.

All of it runs through the engine's own runner; what is not through `generate` is driven round by round in the engine's
thread, so that rounds can be counted.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx

from benchmarks.serving import arrival, work
from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.cache.kv import LayerKV
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.intake import Options
from mlx_gemma_mtp.engine.outbox import Item
from mlx_gemma_mtp.engine.plan import Plan
from mlx_gemma_mtp.engine.request import Delivery, Request
from mlx_gemma_mtp.engine.runner import Runner
from mlx_gemma_mtp.engine.scheduler import Scheduler

FREE = SamplingParams(temperature=0.0, ignore_eos=True)
PLENTY = 1 << 34  # bytes for prefixes


def methods(engine: Engine) -> dict[str, Callable[..., Any]]:
    """What benchmarks.systems answers besides calls, of this package alone."""
    return {
        "occupancy": lambda **work: occupancy(engine, **work),
        "arrival": lambda **work: engine.call(lambda: arrive(engine, **work)),
        "mixed": lambda **work: engine.call(lambda: mixed(engine, **work)),
        "prefixes": lambda **work: engine.call(lambda: prefixes(engine, **work)),
        "memory": lambda **work: memory(engine, **work),
        "encode": lambda texts: [engine.text.encode(text) for text in texts],
    }


def occupancy(engine: Engine, prompts: list[list[int]], limits: list[int], drafts: int | str) -> list[tuple[int, int]]:
    """(rows in use, requests that wait for one) in each round of a backlog."""
    rounds: list[tuple[int, int]] = []
    over = [0]
    usual, finished = Scheduler.plan, Scheduler.finished

    def planned(self: Scheduler, *args: Any) -> Plan:
        plan = usual(self, *args)
        rounds.append((len(plan.places), len(prompts) - over[0] - len(plan.places)))
        return plan

    def counted(self: Scheduler, id: int) -> None:
        over[0] += 1
        finished(self, id)

    every = [replace(FREE, max_tokens=limit) for limit in limits]
    with mock.patch.object(Scheduler, "plan", planned), mock.patch.object(Scheduler, "finished", counted):
        engine.generate(prompts, every, num_draft_tokens=drafts)
    return rounds


class Rounds:
    """A runner of an engine's models, driven here. rounds: of each what `arrival.summary` reads. prefixes: bytes for
    these.
    """

    def __init__(self, engine: Engine, max_rows: int, prefixes: int = 0):
        self.engine, self.rounds = engine, []
        settings = replace(engine.settings, max_rows=max_rows, prefix_memory=prefixes)
        tables = engine._models["tables"]
        self.runner = Runner(engine.target, engine.drafter, tables, engine.depth, settings)
        self._began = time.perf_counter()

    def submit(self, prompt: list[int], limit: int, drafts: int | str) -> Request:
        options = Options(num_draft_tokens=drafts)
        (request,) = self.engine._intake.requests([prompt], replace(FREE, max_tokens=limit), options)
        self.runner.submit(request)
        return request

    def round(self) -> None:
        tokens: dict[int, int] = {}
        items: list[Item] = []
        self.runner.round(items.extend)
        for item in items:
            if isinstance(item, Delivery) and item.chunk.tokens:
                tokens[item.id] = tokens.get(item.id, 0) + len(item.chunk.tokens)
        prompt = sum(piece.stop - piece.start for piece in self.runner._plan.pieces)
        seconds = time.perf_counter() - self._began
        self.rounds.append({"seconds": seconds, "tokens": tokens, "prompt": prompt})


def arrive(
    engine: Engine, prompts: list[list[int]], long: list[int], short: list[int], drafts: int | str,
    apart: int, streams: int = 7,
) -> dict[str, Any]:  # fmt: skip
    """Seven streams, after `apart` rounds a long prompt, after as many more a short one. Until both have ended."""
    rounds = Rounds(engine, max_rows=streams + 1)
    running = [rounds.submit(prompts[i % len(prompts)], 4000, drafts) for i in range(streams)]
    while any(not request.tokens for request in running):
        rounds.round()
    for _ in range(apart):
        rounds.round()
    arrivals: dict[str, Any] = {arrival.LONG: len(rounds.rounds)}
    late = {arrival.LONG: rounds.submit(long, 8, drafts)}
    for _ in range(apart):
        rounds.round()
    arrivals[arrival.SHORT] = len(rounds.rounds)
    late[arrival.SHORT] = rounds.submit(short, 8, drafts)
    while any(request.finish_reason is None for request in late.values()):
        rounds.round()
    rounds.runner.close()
    arrivals["ids"] = {name: request.id for name, request in late.items()}
    chunks = -(-len(short) // engine.settings.prefill_chunk)
    return {
        "summary": arrival.summary(rounds.rounds, [request.id for request in running], arrivals, chunks),
        "arrivals": arrivals,
        "seconds": [each["seconds"] for each in rounds.rounds],
    }


@contextmanager
def reads_counted() -> Iterator[Counter[str]]:
    """Slots and bytes of K/V that attention reads while the block runs: all of them, and those of full layers, where
    also the rows are counted. The drafter's reads are among them.
    """
    counted: Counter[str] = Counter()
    usual = LayerKV.attend

    def counting(self: LayerKV, rows: int, slots: int, *rest: mx.array) -> mx.array:
        shape = self.spec.kv_heads * self.spec.head_dim
        counted["bytes"] += 2 * rows * slots * shape * self.keys.itemsize
        counted["slots"] += rows * slots
        if self.spec.window is None:
            counted["full_slots"] += rows * slots
            counted["full_reads"] += rows
        return usual(self, rows, slots, *rest)

    with mock.patch.object(LayerKV, "attend", counting):
        yield counted


def mixed(engine: Engine, long: list[int], short: list[list[int]], drafts: int) -> dict[str, Any]:
    """K/V that a round reads with one long row and short ones, and what it reads of each row alone. `full_tokens`: the
    tokens that full layers hold of the rows at that time, once for each time that they are read.
    """

    def read(prompts: Sequence[list[int]]) -> Counter[str]:
        rounds = Rounds(engine, max_rows=len(prompts))
        requests = [rounds.submit(prompt, 200, drafts) for prompt in prompts]
        while any(len(request.tokens) < 4 for request in requests):
            rounds.round()
        with reads_counted() as counted:
            rounds.round()
        held = sum(len(request.prompt) + len(request.tokens) for request in requests)
        counted["full_tokens"] = held * counted["full_reads"] // len(prompts)
        rounds.runner.close()
        return counted

    each = [read([prompt]) for prompt in (long, *short)]
    return {"together": read([long, *short]), "alone": sum(each, Counter())}


def prefixes(engine: Engine, long: list[int], ends: list[list[int]], limit: int) -> dict[str, Any]:
    """A long beginning with several ends: milliseconds to the first token, and prompt tokens that are computed, with
    nothing kept and after the first; of all at once; and of a conversation whose turns are the ends.
    """
    chunk, runs = engine.settings.prefill_chunk, Rounds(engine, len(ends), PLENTY)

    def run(rounds: Rounds, some: list[list[int]]) -> dict[str, Any]:
        before = len(rounds.rounds)
        requests = [rounds.submit(prompt, limit, 0) for prompt in some]
        while any(request.finish_reason is None for request in requests):
            rounds.round()
        first = max(request.stats.ttft_s for request in requests) * 1000
        computed = sum(each["prompt"] for each in rounds.rounds[before:])
        return {"first_token_ms": first, "computed": computed, "texts": [request.tokens for request in requests]}

    cold = Rounds(engine, len(ends))
    prompts = [[*long, *end] for end in ends]
    found: dict[str, Any] = {"cold": [run(cold, [prompt]) for prompt in prompts]}
    found["after_the_first"] = [run(runs, [prompt]) for prompt in prompts][1:]
    found["at_once_cold"] = run(cold, prompts)
    runs.runner.keeping.prefixes.clear()
    found["at_once"] = run(runs, prompts)
    found["turns"], asked = [], list(long)
    for end in ends:
        asked += end
        turn = run(runs, [asked])
        asked += turn["texts"][0]
        found["turns"].append(turn | {"new": len(end) + (len(found["turns"]) > 0) * limit, "chunk": chunk})
    for each in (cold, runs):
        each.runner.close()
    return found


def memory(engine: Engine, prompts: list[list[int]], requests: int, every: int) -> list[dict[str, int]]:
    """After every so many requests of mixed prompts, settings and lengths: bytes of the batch's buffers, of MLX's other
    arrays, of its buffer cache, and of the process.
    """
    r, sizes = random.Random(0), []
    kinds = (FREE, replace(FREE, temperature=1.0, top_k=64, top_p=0.95), replace(FREE, repetition_penalty=1.2))
    for _ in range(requests // every):
        some = [work.filled(r.sample(prompts, 2), r.choice((1, 5, 30, 65, 129, 300, 700))) for _ in range(every)]
        params = [replace(r.choice(kinds), seed=r.randrange(1 << 30), max_tokens=r.randint(1, 16)) for _ in some]
        engine.generate(some, params)
        gc.collect()
        batch = engine.call(lambda *_: engine._worker._runner._loop.cache.bytes)  # no option of the product tells
        sizes.append(
            {
                "batch": batch,
                "arrays": mx.get_active_memory() - batch,
                "cached": mx.get_cache_memory(),
                "process": resident(),
            }
        )
    return sizes


def resident() -> int:
    """The bytes of this process that are in memory; 0 where that is not told."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
