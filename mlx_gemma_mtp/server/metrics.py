"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .families import COUNTERS, GAUGES, HELP, HISTOGRAMS, LABELLED, SHARES
from .limits import Places

if TYPE_CHECKING:
    from ..engine.kv_bytes import KVBytes
    from ..engine.request import Result
    from ..engine.stats import Stats

PREFIX = "mlx_gemma_mtp:"
ENDS = ("stop", "length", "tool_calls", "repetition", "timeout", "cancelled", "error")
UNKNOWN = (
    b"# memory_bandwidth_ratio is not here: this machine's bandwidth is not known; "
    b"python -m mlx_gemma_mtp.doctor measures it, and the next start takes it up\n"
)
PHASES = ("waiting", "decoding")  # of a request that its client leaves: before and after its first text


class Metrics:
    """The figures of one server; all of them are there from the start, at zero.

    places: of its choices. rows: how many of them have a row, at most. prefix: what the names begin with. kv: tells
    what K/V take, None where nobody knows. bandwidth: of the memory, in bytes a second, None where it is not known:
    then there is no share of it, and a comment says how to get it.
    """

    def __init__(
        self,
        places: Places,
        rows: int,
        prefix: str = PREFIX,
        kv: Callable[[], KVBytes | None] = lambda: None,
        bandwidth: float | None = None,
    ):
        self._kv, self._bandwidth = kv, bandwidth
        self._places, self._rows, self._prefix, self.registry = places, rows, prefix, CollectorRegistry()
        self._gauges = {name: self._made(Gauge, name) for name in GAUGES}
        self._counters = {name: self._made(Counter, name) for name in COUNTERS}
        self._labelled = {name: self._made(Counter, name, labelnames=labels) for name, labels in LABELLED.items()}
        self._histograms = {name: self._made(Histogram, name, buckets=some) for name, some in HISTOGRAMS.items()}
        if bandwidth is not None:
            self._made(Gauge, "memory_bandwidth_bytes_per_second").set(bandwidth)
            self._histograms["memory_bandwidth_ratio"] = self._made(Histogram, "memory_bandwidth_ratio", buckets=SHARES)
        self._read = self._generated = 0.0  # bytes of weights, and tokens
        for end in ENDS:
            self._labelled["request_success"].labels(end)
        for phase in PHASES:
            self._labelled["request_cancelled"].labels(phase)

    def _made(self, kind: type, name: str, **options: Any) -> Any:
        return kind(self._prefix + name, HELP[name], registry=self.registry, **options)

    def text(self) -> bytes:
        """Returns all figures as Prometheus reads them."""
        taken = self._places.taken
        now = {
            "num_requests_running": min(taken, self._rows),
            "num_requests_waiting": max(taken - self._rows, 0),
            "memory_active_bytes": mx.get_active_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            "memory_cache_bytes": mx.get_cache_memory(),
            "weight_bytes_per_token": self._read / max(self._generated, 1),
        }
        if (kv := self._kv()) is not None:
            now |= {"kv_cache_used_bytes": kv.used, "kv_cache_reserved_bytes": kv.reserved}
            now |= {"kv_cache_usage_perc": kv.reserved / max(kv.limit, 1)}
            now |= {"prefix_cache_memory_bytes": kv.memory, "prefix_cache_disk_bytes": kv.disk}
        for name, value in now.items():
            self._gauges[name].set(value)
        return generate_latest(self.registry) + (b"" if self._bandwidth else UNKNOWN)

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
            "spec_decode_num_refused_tokens": stats.refused,
        }
        counts["weight_bytes"] = _read(stats) / max(stats.rows, 1)
        self._read, self._generated = self._read + counts["weight_bytes"], self._generated + tokens
        for name, count in counts.items():
            self._counters[name].inc(count)
        for position, (offered, kept) in enumerate(zip(stats.offered, stats.kept, strict=True)):
            self._labelled["spec_decode_num_offered_tokens_per_pos"].labels(position).inc(offered)
            self._labelled["spec_decode_num_accepted_tokens_per_pos"].labels(position).inc(kept)
        for source, each in stats.sources.items():
            self._labelled["spec_decode_num_draft_tokens_per_source"].labels(source).inc(each["drafted"])
            self._labelled["spec_decode_num_accepted_tokens_per_source"].labels(source).inc(each["accepted"])
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
            if self._bandwidth is not None:
                seen |= {"memory_bandwidth_ratio": _read(stats) / decode / self._bandwidth}
        for name, value in seen.items():
            self._histograms[name].observe(value)


def _read(stats: Stats) -> int:
    """The bytes of weights that were read for a choice and for the rows beside it, at least: more rows wake more
    experts.
    """
    return stats.target_step_bytes * stats.rounds + stats.draft_step_bytes * stats.drafted


def metrics_routes(metrics: Metrics) -> APIRouter:
    """Returns the route that tells the figures."""
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    def figures() -> Response:
        """Tells the server's figures to Prometheus. In a thread of its own, since it looks at the disk."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
