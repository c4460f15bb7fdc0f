"""The facade: prompts in, text and figures out."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import mlx.core as mx

from ..cache.spec import kv_bytes
from ..errors import UserError
from ..files.progress import Progress
from ..machine import blas, memory
from ..machine.device import metal_available
from ..models import loading
from ..models.config import GenerationDefaults
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.loading import model_bytes, step_bytes
from ..ops import kernels
from ..sampling.params import MAX_ROWS, SamplingParams, count, flag
from ..speculative.auto import Auto
from ..speculative.costs import MAX_DRAFTS, CostTable
from ..speculative.depth import AUTO, Depth
from ..speculative.drafting import DEFAULT_DRAFTING, Drafting
from .arguments import Cancel, check_depth, event, settings_of, told, told_of, tools_of
from .calibration import KINDS, TEXT, Costs
from .constraints import Calls, Constraints
from .request import Chunk, Request, Result
from .scheduler import Batch
from .stats import Stats

if TYPE_CHECKING:
    from ..text.encode import Prompt, Text

PREFILL_CHUNK = 256
MOST_REPEATS = 1000  # of a calibration
LIGHT_DRAFT = 0.15  # of a target step's bytes: a draft that reads more is worth quantising


class Engine:
    """A target, its drafter and its tokenizer; make it with `load`.

    Several streams may be open at once and be read in any order. One thread at a time: a call from a second thread
    while the engine computes raises UserError, and so does any call in a process that was forked after the load.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        text: Text,
        defaults: GenerationDefaults,
        *,
        no_drafter_reason: str | None = None,
        num_draft_tokens: int | str = AUTO,
        max_rows: int = MAX_ROWS,
        prefill_chunk: int = PREFILL_CHUNK,
        drafting: Drafting = DEFAULT_DRAFTING,
        costs: Mapping[str, Costs] | None = None,
        frozen_costs: bool = False,
    ):
        self.target, self.drafter, self.text, self.defaults = target, drafter, text, defaults
        self.num_draft_tokens, self.max_rows, self.prefill_chunk = num_draft_tokens, max_rows, prefill_chunk
        self.drafting, self.frozen_costs = drafting, frozen_costs
        self.costs = costs or {kind: Costs(kind) for kind in KINDS}
        self._autos: dict[str, Auto] = {}
        self._ids = itertools.count()  # requests, whichever call they come from
        # Reentrant: a stream that is forgotten may be closed by the garbage collector amid another one's round.
        self._lock, self._process = threading.RLock(), os.getpid()
        self._no_drafter_reason = no_drafter_reason
        self.end_tokens = text.end_token_ids.union(defaults.eos_token_ids, target.config.eos_token_ids)
        self._constraints = Constraints(text, target.config.vocab_size, self.end_tokens)
        self._target_bytes = step_bytes(target)
        self._draft_bytes = step_bytes(drafter) if drafter else 0
        self._weight_bytes = sum(model_bytes(model) for model in (target, drafter) if model is not None)
        self._kv_bytes = 0  # of the batches of open streams

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Result: ...

    @overload
    def generate(
        self, prompt: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, **options: Any
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Returns the Result of a prompt, or a list of Results for a list of prompts, in order. A list is decoded as a
        batch. `stream` describes the options.
        """
        prompts, single = self.text.prompts(prompt)
        chunks = self.stream(prompts, params, **options)
        results = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
        ordered = [results[index] for index in sorted(results)]
        return ordered[0] if single else ordered

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        system_prompt: str | None = None,
        chat_template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        allow_special: bool = False,
        continue_final_message: bool = False,
        num_draft_tokens: int | str | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Chunk]:
        """Yields pieces of text as they are made. The last chunk of each prompt carries its Result.

        prompt: text (a user turn, or raw text with chat_template=False), chat messages, or token ids (a list or an
        array); or a list of these. params: one SamplingParams for all, or one for each prompt. All else holds for every
        prompt of the call.

        system_prompt: a message before the prompt's. tools: functions that the reply may call, in OpenAI's form;
        prompts given as ids are taken as if they held them. tool_choice: 'auto' (the default), 'none', 'required', or
        the tool that the reply must call, by its name or as OpenAI's object. parallel_tool_calls: whether a reply may
        make several calls. allow_special: takes control strings in messages for control tokens. continue_final_message:
        goes on with the last message, which is the assistant's. num_draft_tokens: drafts a round; 0 decodes plainly,
        'auto' follows cost and acceptance, None is the engine's. cancel: an event; once it is set, generation ends
        after the current round. progress: called with the prefill's tokens done and in all.

        Raises UserError before anything is generated: for an empty prompt, a prompt beyond the context or the memory,
        image or audio parts, and whatever is out of range or cannot be done together.
        """
        prompts, _ = self.text.prompts(prompt)
        every = settings_of(params, len(prompts))
        drafts = self.num_draft_tokens if num_draft_tokens is None else check_depth(num_draft_tokens)
        flag("chat_template", chat_template)
        special = {"allow_special": allow_special, "continue_final_message": continue_final_message}
        tools, choice = tools_of(tools, tool_choice, parallel_tool_calls)
        cancel, progress = event(cancel), told("progress", progress)
        with self._in_use():
            encode = partial(self.text.encode, system_prompt=system_prompt, chat_template=chat_template, **special)
            encoded = [
                encode(prompt, thinking=settings.thinking, tools=told_of(tools, prompt))
                for prompt, settings in zip(prompts, every, strict=True)
            ]
            calls = self._constraints.calls(tools, choice, any(settings.grammars for settings in every))
            requests = [self._request(i, tokens, every[i], drafts, calls) for i, tokens in enumerate(encoded)]
            for request in requests:
                self._check_fits(request, drafts)
        return self._guarded(self._run(requests, drafts, cancel, progress))

    @property
    def description(self) -> str:
        """A line about what computes: weight formats, dtype, device, expert paths and MLX's version."""
        dtype = str(self.target.dtype).removeprefix("mlx.core.")
        models = {"target": self.target} | ({"drafter": self.drafter} if self.drafter else {})
        formats = [f"{name} {loading.format_of(model)}" for name, model in models.items()]
        device = f"Metal, {kernels.summary()}" if metal_available() else f"CPU ({blas.name()})"
        if moe := self.target.config.moe:
            ways = self.target.layers[0].experts.paths(self.target.dtype, moe.top_k)
            device += f", experts {' then '.join(ways)}"
        return f"{', '.join(formats)}, computed in {dtype} on {device}, MLX {mx.__version__}"

    @property
    def advice(self) -> str | None:
        """A line of advice to quantise the drafter, where its draft reads much of a target step's bytes; else None."""
        share = self._draft_bytes / self._target_bytes
        if self.drafter is None or share <= LIGHT_DRAFT or loading.is_quantized(self.drafter):
            return None
        where = "" if metal_available() else " (on Metal: products with quantised weights are slower on this CPU)"
        return (
            f"a draft reads {self._draft_bytes / 1e6:,.1f} MB of weights, {share:.0%} of a target step's "
            f"{self._target_bytes / 1e6:,.1f} MB; --draft-bits 8 (draft_bits=8 in Python) makes it lighter{where}"
        )

    def _request(
        self, index: int, prompt: list[int], params: SamplingParams, drafts: int | str, calls: Calls
    ) -> Request:
        context = self.target.config.context
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, expected fewer than the context of {context}; shorten it"
            )
        params = params.resolved(self.defaults)
        vocabulary = self.target.config.vocab_size
        for token in params.logit_bias:
            if token >= vocabulary:
                raise UserError(f"logit_bias has token id {token}, expected 0 to {vocabulary - 1}")
        reason = self._no_drafter_reason if self.drafter is None else None if drafts else "the draft length is 0"
        stats = Stats(
            len(prompt),
            mtp=reason is None,
            mtp_reason=reason,
            blas=blas.name(),
            seed=params.seed,
            accept=self.drafting.accept,
            target_step_bytes=self._target_bytes,
            draft_step_bytes=self._draft_bytes,
        )
        end_tokens = frozenset() if params.ignore_eos else self.end_tokens
        limit = min(params.max_tokens, context - len(prompt))
        in_thought = self.text.opens_thought(prompt)
        stream = self.text.stream(params.stop, calls.read, in_thought)
        constraint = self._constraints.of(params, calls, in_thought)
        return Request(next(self._ids), index, prompt, params, stream, end_tokens, limit, stats, constraint)

    def _depth(self) -> Depth:
        """Returns who chooses the draft lengths of a batch. All batches share what is known of each kind of text."""
        depth = Depth(None if self.drafter is None else self._table, self.drafting.rejection, self.frozen_costs)
        depth.autos = self._autos
        return depth

    def _table(self, kind: str, idle: bool) -> CostTable | None:
        """Returns the cost table of a kind of text. Where there is none it is measured, if idle, and else missing."""
        costs = self.costs[kind]
        return costs.table(self.target, self.drafter, self._calibration_prompt()) if idle else costs.kept()

    def _calibration_prompt(self) -> list[int]:
        return self.text.encode(TEXT, chat_template=False)

    def calibrate(self, repeats: int = 5, progress: Progress | None = None) -> dict[str, CostTable]:
        """Measures the cost of rounds of each kind of text, writes it for the next starts, and uses it from now on.
        Takes a minute or two.

        repeats: of each cell, 1 to 1000. progress: called with the rounds timed and all rounds. Raises UserError
        without a drafter.
        """
        if self.drafter is None:
            raise UserError("there is no drafter, so nothing to choose; load one with draft_model=")
        repeats, progress = count("repeats", repeats, MOST_REPEATS), told("progress", progress)
        with self._in_use(), memory.wired_limit():
            prompt, tables = self._calibration_prompt(), {}
            for kind, costs in self.costs.items():
                tables[kind] = costs.measured(self.target, self.drafter, prompt, repeats, progress)
            self._depth().adopt(tables)
        return tables

    def _run(self, requests: list[Request], drafts: int | str, cancel: Cancel, progress: Progress) -> Iterator[Chunk]:
        waiting = requests
        try:
            with memory.wired_limit():
                while waiting and not cancel.is_set():
                    some = waiting[: self._rows_that_fit(waiting, drafts)]
                    waiting, taken = waiting[len(some) :], self._needed(some, drafts)
                    self._kv_bytes += taken
                    try:
                        yield from self._batch(some, drafts).run(cancel, progress)
                    finally:
                        self._kv_bytes -= taken
            yield from [request.cancel() for request in waiting]  # for these nothing was prefilled or measured
        finally:
            self._learn()

    def _most_drafts(self, drafts: int | str, requests: Sequence[Request]) -> int:
        """Returns the most drafts that a round of these requests makes: no more than the longest text can take."""
        if self.drafter is None:
            return 0
        return MAX_DRAFTS if drafts == AUTO else min(drafts, max(request.limit for request in requests))

    def _needed(self, requests: Sequence[Request], drafts: int | str) -> int:
        """Returns the bytes of K/V that a batch of these requests needs, if every text grows to its limit."""
        most, longest = self._most_drafts(drafts, requests), max(len(request.prompt) for request in requests)
        block = max(most + 1, min(self.prefill_chunk, longest))
        tokens = max(longest + block, *(len(request.prompt) + request.limit + most + 1 for request in requests))
        return kv_bytes(self.target.config.kv, tokens, len(requests), block, self.target.dtype.size)

    def _check_fits(self, request: Request, drafts: int | str) -> None:
        """Raises UserError for a text that would not fit even alone."""
        memory.check(
            self._weight_bytes + self._needed([request], drafts),
            f"a prompt of {len(request.prompt)} tokens with max_tokens={request.limit} on this model",
            "lower max_tokens, shorten the prompt, or take a smaller model",
        )

    def _rows_that_fit(self, waiting: Sequence[Request], drafts: int | str) -> int:
        """Returns how many of the requests, from the first on, go into one batch: as many as max_rows and memory allow.

        Raises UserError where open streams leave too little for one.
        """
        free = memory.total_bytes() - self._weight_bytes - self._kv_bytes
        for rows in range(min(self.max_rows, len(waiting)), 0, -1):
            if self._needed(waiting[:rows], drafts) <= free:
                return rows
        raise UserError(
            f"the next prompt needs {self._needed(waiting[:1], drafts) / 1e9:.1f} GB of K/V, weights and open streams "
            f"leave {max(free, 0) / 1e9:.1f} GB; finish or close other streams first, or lower max_tokens"
        )

    def _batch(self, requests: list[Request], drafts: int | str) -> Batch:
        return Batch(
            self.target,
            self.drafter,
            requests,
            self._depth(),
            self._most_drafts(drafts, requests) if drafts != AUTO else drafts,
            self.prefill_chunk,
            self.defaults.suppress_token_ids,
            self.drafting,
        )

    def _learn(self) -> None:
        """Writes what rounds took for the next start. A call that is closed early does so, too."""
        for kind, auto in self._autos.items():
            self.costs[kind].learn(*auto.learned())

    @contextmanager
    def _in_use(self, wait: bool = False) -> Iterator[None]:
        """Holds the engine for this thread, as long as the block runs. wait: for another thread's round to end.

        Raises UserError in a forked child (Metal, BLAS and MLX's threads do not survive a fork), and where another
        thread is computing and nothing says to wait.
        """
        if os.getpid() != self._process:
            raise UserError(
                f"this engine was loaded in process {self._process} and this is process {os.getpid()}, forked from it; "
                "load it in the child, which multiprocessing must start with 'spawn'"
            )
        if not self._lock.acquire(blocking=wait):
            raise UserError(
                "the engine is computing in another thread; expected one thread at a time: give prompts as one list, "
                "read streams in turn, or hold a threading.Lock around each call"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _guarded(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Yields the chunks. The engine is held while each is made, and free while the caller has it."""
        try:
            while True:
                with self._in_use():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            if os.getpid() == self._process:  # a child's copy of the stream has nothing to give back
                with self._in_use(wait=True):
                    chunks.close()
