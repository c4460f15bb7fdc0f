"""Requests and the batch that carries them: who is in which row, who is done, who leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import mlx.core as mx

from .cache import Cache
from .depth import Auto, Fixed
from .drafter import DEFAULT_DRAFTING, Drafter, Drafting
from .errors import in_a_line
from .gemma4 import Gemma4
from .guide import Constraint, guide
from .kernels import metal_available
from .params import SamplingParams
from .penalties import Said
from .sampling import Rules
from .speculative import Round, Speculation, TokenLogprob, compact, prefill
from .stats import Stats
from .weights import Progress

if TYPE_CHECKING:
    from .text import TextStream


# Rounds from one time to the next that MLX gives its unused buffers back on Metal, the prefill's at first: prompts come
# in ever new sizes and full layers grow, so that else they pile up to its limit.
CLEAR_EVERY = 256
PROMPT_CALLER = 0.05  # of a round: a caller that takes longer with a chunk spoils the round's time


@dataclass(frozen=True)
class Result:
    """One prompt's answer. tokens: generated ids without the token that ended it (a stop string's tokens are kept).

    finish_reason: 'stop' (an end token or a stop string), 'length' (max_tokens, or the context is full), 'cancelled' or
    'error'. stats: complete when the whole batch is. logprobs: one for each token, where the request asked for them.
    error: with finish_reason 'error' why the text could not go on, in one line; text and tokens are what was good.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of one prompt's answer. index: which prompt; result: set in its last chunk; logprobs: as in Result."""

    index: int
    text: str
    tokens: list[int]
    result: Result | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Request:
    """A prompt on its way. id: unique in the engine; index: its number in its call; limit: tokens it may generate
    (max_tokens, or what the context leaves).
    """

    id: int
    index: int
    prompt: list[int]
    params: SamplingParams
    stream: TextStream
    end_tokens: frozenset[int]
    limit: int
    stats: Stats
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def remaining(self) -> int:
        return self.limit - len(self.tokens)

    def take(
        self,
        emitted: Sequence[int],
        drafted: int | None,
        reason: str = "",
        logprobs: Sequence[TokenLogprob] | None = None,
        error: str | None = None,
    ) -> Chunk:
        """Adds the tokens of a round, up to the one that ends the request; drafts past it do not count as accepted.

        drafted: how many drafts the round verified; None: the tokens come from the prefill. reason: why so many. error:
        why the request cannot go on after these tokens.
        """
        before, pieces, used = len(self.tokens), [], 0
        for used, token in enumerate(emitted, 1):  # noqa: B007
            if token in self.end_tokens:
                self.finish_reason = "stop"
            else:
                self.tokens.append(token)
                pieces.append(self._safely(self.stream.push, token))
                if self.finish_reason is None and self.stream.stopped:
                    self.finish_reason = "stop"
                elif self.finish_reason is None and not self.remaining:
                    self.finish_reason = "length"
            if self.finish_reason:
                break
        if error is not None and self.finish_reason is None:
            self.finish_reason, self.error = "error", error
        if drafted is not None:
            self.stats.count_round(drafted, max(used - 1, 0), reason)
        if self.params.logprobs is not None:
            kept = logprobs[: len(self.tokens) - before]
            self.logprobs += [replace(each, top=each.top[: self.params.logprobs]) for each in kept]
        return self._chunk(pieces, before)

    def cancel(self) -> Chunk:
        """Ends the request with what it has."""
        self.finish_reason = "cancelled"
        return self._chunk([], len(self.tokens))

    def _chunk(self, pieces: list[str], start: int) -> Chunk:
        """What was added since token `start`."""
        result, logprobs = None, None if self.params.logprobs is None else self.logprobs
        if self.finish_reason:
            pieces.append(self._safely(self.stream.finish))
        self.pieces += pieces
        if self.finish_reason:
            text = "".join(self.pieces)
            result = Result(text, self.tokens, self.finish_reason, self.stats, logprobs, self.error)
        return Chunk(self.index, "".join(pieces), self.tokens[start:], result, logprobs and logprobs[start:])

    def _safely(self, call: Callable[..., str], *args: int) -> str:
        """The text that a call of the stream gives. What it raises, whatever it is, ends this request alone."""
        try:
            return call(*args)
        except Exception as error:
            if self.error is None:
                self.finish_reason, self.error = "error", in_a_line(error)
            return ""


class Cancelled(Exception):
    """Raised inside a prefill that nobody waits for any more."""


class Batch:
    """Requests that are prefilled together and decoded in common rounds; a row that finishes leaves at once."""

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        requests: Sequence[Request],
        depth: Fixed | Auto,
        prefill_chunk: int,
        suppress: Sequence[int] = (),
        drafting: Drafting = DEFAULT_DRAFTING,
    ):
        self.target, self.drafter, self.suppress = target, drafter, suppress
        self.requests, self.live = list(requests), list(requests)
        self.depth, self.drafting = depth, drafting
        self._loop: Speculation | None = None  # from the prefill's end on
        self.longest = max(len(request.prompt) for request in requests)
        self.block = max(depth.most + 1, min(prefill_chunk, self.longest))

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
        emitted = loop.start(self.depth.draft(*self._rows(2)))
        for rounds in count():
            chunks = self._take(emitted, loop, cancel.is_set())
            if not self.live:
                yield from chunks
                break
            launched = time.perf_counter()
            width = self.depth.verify(*self._rows(1), loop.confidences, loop.waiting)
            loop.launch(width)  # works while the caller reads
            if metal_available() and rounds % CLEAR_EVERY == 0:
                mx.clear_cache()
            yielded = time.perf_counter()
            yield from chunks
            away = time.perf_counter() - yielded
            emitted = loop.step(self.depth.draft(*self._rows(2)))
            seconds = time.perf_counter() - launched
            if away < PROMPT_CALLER * seconds:  # else the round is hidden behind the caller's own work
                self.depth.timed(*self._rows(0)[:2], seconds)

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
        said = Said.of(prompts, target.config.vocab_size) if rules.penalties else None
        return Speculation(
            target,
            self.drafter,
            cache,
            rules,
            hidden,
            self.drafting,
            said,
            guide([request.constraint for request in self.requests], target.config.vocab_size),
            self.depth.confident,
        )

    def _take(self, emitted: Round, loop: Speculation, cancelled: bool) -> list[Chunk]:
        """Hands a round's tokens to their requests; those that finish leave the batch."""
        now = time.perf_counter()
        chunks, reason = [], ""
        if emitted.drafted is not None:
            accepted = [max(len(tokens) - 1, 0) for tokens in emitted.tokens]
            reason = self.depth.observe(dict(zip((r.id for r in self.live), accepted, strict=True)))
        reports = emitted.logprobs or [None] * len(self.live)
        rows = zip(self.live, emitted.tokens, reports, emitted.errors, strict=True)
        for request, tokens, report, error in rows:
            if not request.tokens:
                request.stats.ttft_s = now - self.began
            chunk = request.take(tokens, emitted.drafted, reason, report, error)
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

    def _rows(self, surely: int) -> tuple[list[int], int, list[int]]:
        """What the draft length may depend on: the live requests' ids, the longest row's tokens, and for how many
        drafts each row has room. surely: tokens that come anyway, with the drafts' round and before it.
        """
        ids = [request.id for request in self.live]
        context = max(len(request.prompt) + len(request.tokens) for request in self.live)
        return ids, context, [max(0, request.remaining - surely) for request in self.live]

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
