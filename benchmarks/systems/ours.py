"""mlx_gemma_mtp through its Python interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mlx.utils import tree_flatten

from benchmarks.serving import probes
from benchmarks.systems.call import TOP_K, TOP_P, Backlog, Clock, MlxSystem, Request, Served, Timing
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.models.loading import step_bytes

MOST_ROWS = 128  # more than anybody asks for: every call is one batch, as with the peers


class Ours(MlxSystem):
    def __init__(self, target: str, drafter: str, rows: int | None = None) -> None:
        draft_model, max_rows = drafter or "none", rows or MOST_ROWS
        # Prompts come again: what is measured is computed each time, as by the peers.
        self.engine = load(model=target, draft_model=draft_model, max_rows=max_rows, prefix_memory=0)

    def about(self) -> dict[str, Any]:
        """What computes, and the bytes of weights that a pass reads."""
        target, drafter = self.engine.target, self.engine.drafter
        shares = target.step_shares()
        experts = sum(
            value.nbytes for path, value in tree_flatten(target.parameters()) if any(part in path for part in shares)
        )
        share = next(iter(shares.values()), 1.0)
        return super().about() | {
            "computes": self.engine.description,
            "end_tokens": sorted(self.engine.end_tokens),
            "dense_bytes": step_bytes(target) - int(experts * share),
            "expert_bytes": experts,
            "expert_share": share,
            "draft_bytes": step_bytes(drafter) if drafter else 0,
        }

    def measured(self, request: Request) -> Timing:
        params = SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, top_k=TOP_K, top_p=TOP_P, seed=request.seed
        )
        clock, results = Clock(len(request.prompts)), {}
        for chunk in self.engine.stream(request.prompts, params, num_draft_tokens=request.drafts):
            clock.saw(chunk.index)
            if chunk.result is not None:
                results[chunk.index] = chunk.result
        ordered = [results[index] for index in sorted(results)]
        timing = clock.timing([result.tokens for result in ordered], 0)
        timing.prefill_seconds = max(result.stats.ttft_s for result in ordered)
        timing.passes = max(result.stats.rounds for result in ordered)
        for stats in (result.stats for result in ordered):
            timing.rounds += stats.rounds
            timing.drafted += stats.drafted
            timing.accepted += stats.accepted
            timing.add(stats.offered, stats.kept)  # rounds of a chosen draft length are not alike
        return timing

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What benchmarks.serving counts in this process."""
        return probes.methods(self.engine)

    def serve(self, backlog: Backlog) -> Served:
        """In one call, or, where all rows must be free before others join, in calls of `rows` prompts."""
        every = [SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True) for limit in backlog.limits]
        count = len(backlog.prompts)
        size = backlog.rows if backlog.joining == backlog.rows else count
        began, first, results = time.perf_counter(), {}, {}
        for start in range(0, count, size):
            part = slice(start, start + size)
            chunks = self.engine.stream(backlog.prompts[part], every[part], num_draft_tokens=backlog.drafts)
            for chunk in chunks:
                if chunk.tokens:
                    first.setdefault(start + chunk.index, time.perf_counter() - began)
                if chunk.result is not None:
                    results[start + chunk.index] = chunk.result
        seconds = time.perf_counter() - began
        return Served([results[i].tokens for i in range(count)], seconds, [first[i] for i in range(count)])
