"""The batch: which request is in which row, which is done, which leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count

import mlx.core as mx

from ..cache.cache import Cache
from ..files.progress import Progress
from ..machine.device import metal_available
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..sampling.distribution import Rules
from ..sampling.penalties import TokenCounts
from ..speculative.costs import MAX_DRAFTS
from ..speculative.depth import AUTO, Depth, DraftRow
from ..speculative.drafting import DEFAULT_DRAFTING, Drafting
from ..speculative.guide import guide
from ..speculative.loop import Round, Speculation, compact
from ..speculative.prefill import prefill
from .request import Chunk, Request

# Rounds from one time to the next that MLX gives its unused buffers back on Metal, the prefill's at first: prompts come
# in ever new sizes and full layers grow, so that else they pile up to its limit.
CLEAR_EVERY = 256
PROMPT_CALLER = 0.05  # of a round: a caller that takes longer with a chunk spoils the round's time


class Cancelled(Exception):
    """Ends a prefill whose call was cancelled."""


class Batch:
    """Requests that are prefilled together and decoded in common rounds. A finished row leaves at once.

    Row i of the speculative loop holds live[i].
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        requests: Sequence[Request],
        depth: Depth,
        drafts: int | str,
        prefill_chunk: int,
        suppress: Sequence[int] = (),
        drafting: Drafting = DEFAULT_DRAFTING,
    ):
        self.target, self.drafter, self.suppress = target, drafter, suppress
        self.requests, self.live = list(requests), list(requests)
        self.depth, self.drafts, self.drafting = depth, drafts, drafting
        self._loop: Speculation | None = None  # from the prefill's end on
        self.longest = max(len(request.prompt) for request in requests)
        self.block = max((MAX_DRAFTS if drafts == AUTO else drafts) + 1, min(prefill_chunk, self.longest))

    def run(self, cancel: threading.Event, progress: Progress) -> Iterator[Chunk]:
        """Yields pieces of text as they are made, until every request is finished or `cancel` is set."""
        self.began = time.perf_counter()
        mx.reset_peak_memory()
        try:
            yield from self._rounds(cancel, progress)
        except Cancelled:
            yield from [request.cancel() for request in self.live]
        finally:  # also when the caller closes the stream early
            self._close()

    def _rounds(self, cancel: threading.Event, progress: Progress) -> Iterator[Chunk]:
        loop = self._loop = self._prefill(cancel, progress)
        emitted, seconds = loop.start(self.first), None
        for rounds in count():
            due = self._kept(emitted), seconds
            chunks = self._take(emitted, loop, cancel.is_set())
            if not self.live:
                self._count(*due)
                yield from chunks
                break
            launched = time.perf_counter()
            if not loop.waiting:  # nothing to choose: the host counts while the device works
                loop.launch()
            self._count(*due)
            width = self.depth.verify(*self._rows(1), loop.confidences, [loop.waiting] * len(self.live))
            loop.launch(width)  # works while the caller reads
            if metal_available() and rounds % CLEAR_EVERY == 0:
                mx.clear_cache()
            yielded = time.perf_counter()
            yield from chunks
            away = time.perf_counter() - yielded
            emitted = loop.step(max(self.depth.draft(*self._rows(2))))
            seconds = time.perf_counter() - launched
            if away >= PROMPT_CALLER * seconds:  # the round is hidden behind the caller's own work
                seconds = None

    def _kept(self, emitted: Round) -> dict[int, int] | None:
        """Returns how many drafts each request kept in a round; None for the first round, which verifies none."""
        if emitted.drafted is None:
            return None
        return {request.id: max(len(tokens) - 1, 0) for request, tokens in zip(self.live, emitted.tokens, strict=True)}

    def _count(self, kept: dict[int, int] | None, seconds: float | None) -> None:
        """Tells the draft length what a round took and kept."""
        if seconds is not None:
            self.depth.timed(seconds)
        if kept is not None:
            self.depth.observe(kept)

    def _prefill(self, cancel: threading.Event, progress: Progress) -> Speculation:
        def told(done: int) -> None:
            if cancel.is_set():
                raise Cancelled
            progress(min(done, self.longest), self.longest)

        if cancel.is_set():  # nobody waits for the first chunk either
            raise Cancelled
        prompts, target = [request.prompt for request in self.requests], self.target
        shape = (len(prompts), self.longest + self.block, self.block)
        cache = Cache(target.config.kv, *shape, target.dtype, lookback=self.drafting.lookback)
        hidden = prefill(target, cache, slice(0, len(prompts)), prompts, told)
        self.prefilled = time.perf_counter()
        for request in self.requests:
            request.stats.prompt_tps = len(request.prompt) / (self.prefilled - self.began)
        rules = self._rules()
        token_counts = TokenCounts.of(prompts, target.config.vocab_size) if rules.penalties else None
        self.first = max(self.depth.draft(*self._rows(2)))
        return Speculation(
            target,
            self.drafter,
            cache,
            rules,
            hidden,
            self.drafting,
            token_counts,
            guide([request.constraint for request in self.requests], target.config.vocab_size),
            self.depth.confident,
        )

    def _take(self, emitted: Round, loop: Speculation, cancelled: bool) -> list[Chunk]:
        """Hands a round's tokens to their requests; those that finish leave the batch."""
        now = time.perf_counter()
        chunks = []
        reports = emitted.logprobs or [None] * len(self.live)
        rows = zip(self.live, emitted.tokens, reports, emitted.errors, strict=True)
        for request, tokens, report, error in rows:
            if not request.tokens:
                request.stats.ttft_s = now - self.began
            chunk = request.take(tokens, emitted.drafted, self.depth.reason(request.id), report, error)
            chunks.append(chunk)
            if cancelled and chunk.result is None:
                chunks.append(request.cancel())
            request.stats.generation_tokens = len(request.tokens)
            request.stats.generation_tps = len(request.tokens) / max(now - self.prefilled, 1e-9)
        rows = compact([request.finish_reason is None for request in self.live])
        if len(rows) < len(self.live):
            self.live = [self.live[row] for row in rows]
            if rows:
                loop.retain(rows, self._rules())
        return chunks

    def _rows(self, due: int) -> tuple[list[DraftRow], int]:
        """Returns what the draft length may depend on: the live rows, and the committed tokens of the longest.

        due: tokens that each row emits before these drafts, and with their verify, whatever is accepted.
        """
        context = max(len(request.prompt) + len(request.tokens) for request in self.live)
        return [
            DraftRow(each.id, self.drafts, max(0, each.remaining - due), each.params.temperature > 0)
            for each in self.live
        ], context

    def _rules(self) -> Rules:
        return Rules.of([request.params for request in self.live], self.target.config.vocab_size, self.suppress)

    def _close(self) -> None:
        """Figures of the whole batch, however it ended."""
        self.depth.forget([request.id for request in self.requests])
        if self._loop is None:
            return
        seconds = max(time.perf_counter() - self.prefilled, 1e-9)
        tokens = sum(len(request.tokens) for request in self.requests)
        for request in self.requests:
            request.stats.host_syncs = self._loop.host_syncs
            request.stats.say_why_off()
            request.stats.peak_memory_gb = mx.get_peak_memory() / 1e9
            request.stats.batch_generation_tps = tokens / seconds
