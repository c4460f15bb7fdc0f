"""Figures for Prometheus, under vLLM's names where it has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .limits import Places

if TYPE_CHECKING:
    from ..engine.request import Result

PREFIX = "mlx_gemma_mtp:"
FIRST = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)  # seconds
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
WHOLE = (0.3, 0.5, 1, 1.5, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))
ENDS = ("stop", "length", "tool_calls", "repetition", "timeout", "cancelled", "error")
PHASES = ("waiting", "decoding")  # of a request that its client leaves: before and after its first text

HELP = {
    "num_requests_running": "Choices that have a row, at most.",
    "num_requests_waiting": "Choices that wait for a row, at least.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "Tokens of replies.",
    "request_success": "Choices that ended, by their end.",
    "request_cancelled": "Requests that their client left, by phase.",
    "request_refused": "Requests that were refused because too many wait.",
    "time_to_first_token_seconds": "From a choice's arrival to its first token, waiting included.",
    "inter_token_latency_seconds": "Between two tokens, the mean of a choice: a round gives several at once.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "Before a choice's prompt was begun: its first token's time without the prefill.",
    "request_prefill_time_seconds": "Of a choice's prompt.",
    "request_decode_time_seconds": "Of a choice's tokens.",
    "request_prompt_tokens": "Tokens of a choice's prompt.",
    "request_generation_tokens": "Tokens of a choice.",
    "request_rows": "Choices that shared a round with this one, itself included, in the mean.",
    "num_preemptions": "How often a choice left its row, to go on later.",
    "prefix_cache_queries": "Prompt tokens that kept prefixes were asked for.",
    "prefix_cache_hits": "Prompt tokens that were not computed, since a prefix was kept.",
    "spec_decode_num_drafts": "Rounds of a row that verified drafts.",
    "spec_decode_num_draft_tokens": "Drafts that were verified.",
    "spec_decode_num_accepted_tokens": "Drafts that were kept.",
    "spec_decode_num_offered_tokens_per_pos": "Rounds of a row that verified a draft at this position.",
    "spec_decode_num_accepted_tokens_per_pos": "Rounds of a row that kept a draft at this position.",
    "rounds": "Rounds of a row, by the drafts that they verified and why so many.",
    "requests_without_drafts": "Choices that verified no draft, by the reason.",
    "weight_bytes": "Bytes of weights that were read for the tokens of replies; rows of a round share them.",
    "memory_active_bytes": "Bytes of MLX's arrays.",
    "memory_peak_bytes": "The most bytes of MLX's arrays.",
    "memory_cache_bytes": "Bytes of buffers that MLX keeps unused.",
}


class Metrics:
    """The figures of one server; all of them are there from the start, at zero.

    places: of its choices. rows: how many of them have a row, at most. prefix: what the names begin with.
    """

    def __init__(self, places: Places, rows: int, prefix: str = PREFIX):
        self._places, self._rows, self._prefix, self.registry = places, rows, prefix, CollectorRegistry()
        self._gauges = {name: self._made(Gauge, name) for name in GAUGES}
        self._counters = {name: self._made(Counter, name) for name in COUNTERS}
        self._labelled = {name: self._made(Counter, name, labelnames=labels) for name, labels in LABELLED.items()}
        self._histograms = {name: self._made(Histogram, name, buckets=some) for name, some in HISTOGRAMS.items()}
        for end in ENDS:
            self._labelled["request_success"].labels(end)
        for phase in PHASES:
            self._labelled["request_cancelled"].labels(phase)

    def _made(self, kind: type, name: str, **options: Any) -> Any:
        return kind(self._prefix + name, HELP[name], registry=self.registry, **options)

    def text(self) -> bytes:
        """Returns all figures as Prometheus reads them."""
        taken = self._places.taken
        self._gauges["num_requests_running"].set(min(taken, self._rows))
        self._gauges["num_requests_waiting"].set(max(taken - self._rows, 0))
        self._gauges["memory_active_bytes"].set(mx.get_active_memory())
        self._gauges["memory_peak_bytes"].set(mx.get_peak_memory())
        self._gauges["memory_cache_bytes"].set(mx.get_cache_memory())
        return generate_latest(self.registry)

    def refused(self) -> None:
        """Counts a request for which there was no place."""
        self._counters["request_refused"].inc()

    def ended(self, results: Iterable[Result], seconds: float, left: str | None) -> None:
        """Counts a request that has ended. seconds: since it came. left: the phase in which its client left, or
        None.
        """
        self._histograms["e2e_request_latency_seconds"].observe(seconds)
        for result in results:
            self._count(result)
        if left is not None:
            self._labelled["request_cancelled"].labels(left).inc()

    def _count(self, result: Result) -> None:
        stats, tokens = result.stats, len(result.tokens)
        self._labelled["request_success"].labels(result.finish_reason).inc()
        self._time(result)
        counts = {
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": tokens,
            "num_preemptions": stats.preemptions,
            "prefix_cache_queries": stats.prompt_tokens,
            "prefix_cache_hits": stats.cached_tokens,
            "spec_decode_num_drafts": stats.offered[0] if stats.offered else 0,
            "spec_decode_num_draft_tokens": stats.drafted,
            "spec_decode_num_accepted_tokens": stats.accepted,
        }
        read = stats.target_step_bytes * stats.rounds + stats.draft_step_bytes * stats.drafted
        counts["weight_bytes"] = read / max(stats.rows, 1)
        for name, count in counts.items():
            self._counters[name].inc(count)
        for position, (offered, kept) in enumerate(zip(stats.offered, stats.kept, strict=True)):
            self._labelled["spec_decode_num_offered_tokens_per_pos"].labels(position).inc(offered)
            self._labelled["spec_decode_num_accepted_tokens_per_pos"].labels(position).inc(kept)
        for drafts, reasons in stats.depths.items():
            for reason, count in reasons.items():
                self._labelled["rounds"].labels(drafts, reason).inc(count)
        if stats.mtp_reason is not None:
            self._labelled["requests_without_drafts"].labels(stats.mtp_reason).inc()

    def _time(self, result: Result) -> None:
        stats, tokens = result.stats, len(result.tokens)
        prefill = stats.prompt_tokens / stats.prompt_tps if stats.prompt_tps else 0.0
        decode = stats.generation_tokens / stats.generation_tps if stats.generation_tps else 0.0
        seen = {"request_prompt_tokens": stats.prompt_tokens, "request_generation_tokens": tokens}
        if tokens:
            seen |= {"time_to_first_token_seconds": stats.ttft_s, "request_prefill_time_seconds": prefill}
            seen |= {"request_queue_time_seconds": max(stats.ttft_s - prefill, 0.0)}
        if stats.generation_tps:
            seen |= {"request_decode_time_seconds": decode, "request_rows": stats.rows}
            seen |= {"inter_token_latency_seconds": 1 / stats.generation_tps}
        for name, value in seen.items():
            self._histograms[name].observe(value)


GAUGES = (
    *("num_requests_running", "num_requests_waiting"),
    *("memory_active_bytes", "memory_peak_bytes", "memory_cache_bytes"),
)
COUNTERS = (
    *("prompt_tokens", "generation_tokens", "request_refused", "num_preemptions", "prefix_cache_queries"),
    *("prefix_cache_hits", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    *("spec_decode_num_accepted_tokens", "weight_bytes"),
)
LABELLED = {
    "request_success": ["finished_reason"],
    "request_cancelled": ["phase"],
    "spec_decode_num_offered_tokens_per_pos": ["position"],
    "spec_decode_num_accepted_tokens_per_pos": ["position"],
    "rounds": ["drafts", "reason"],
    "requests_without_drafts": ["reason"],
}
HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST,
    "inter_token_latency_seconds": BETWEEN,
    "e2e_request_latency_seconds": WHOLE,
    "request_queue_time_seconds": WHOLE,
    "request_prefill_time_seconds": WHOLE,
    "request_decode_time_seconds": WHOLE,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_rows": (1, 2, 4, 8, 16, 32, 64),
}


def metrics_routes(metrics: Metrics) -> APIRouter:
    """Returns the route that tells the figures."""
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Tells the server's figures to Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
