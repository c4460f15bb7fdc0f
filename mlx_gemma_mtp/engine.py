"""The facade: text in, text and figures out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, overload

import mlx.core as mx

from . import blas, health, hub, kernels, memory, weights
from .calibration import KINDS, Costs
from .config import MODES, GenerationDefaults
from .costs import CostTable
from .depth import AUTO, Auto, Fixed
from .drafter import Drafter
from .errors import UserError
from .gemma4 import Gemma4
from .grammar import Grammars
from .guide import Constraint
from .kernels import metal_available
from .params import ACCEPT, COUPLED, MAX_ROWS, SamplingParams
from .scheduler import Batch, Chunk, Request, Result
from .stats import Stats
from .thinking import CLOSE, OPEN, Thinking
from .warmup import warm_up
from .weights import Progress

if TYPE_CHECKING:
    from .text import Prompt, Text

PREFILL_CHUNK = 256
DRAFT_TEMPERATURE = 1.0  # the drafter's, as a multiple of the request's
LIGHT_DRAFT = 0.15  # of a target step's bytes: a draft that reads more is worth quantising

CALIBRATION = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"

__all__ = ["Chunk", "Engine", "Result", "load"]


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
        draft_position: int = 0,
        draft_temperature: float = DRAFT_TEMPERATURE,
        accept: str = COUPLED,
        costs: Mapping[str, Costs] | None = None,
        frozen_costs: bool = False,
    ):
        self.target, self.drafter, self.text, self.defaults = target, drafter, text, defaults
        self.num_draft_tokens, self.max_rows, self.prefill_chunk = num_draft_tokens, max_rows, prefill_chunk
        self.draft_position, self.draft_temperature, self.accept = draft_position, draft_temperature, accept
        self.frozen_costs = frozen_costs
        self.costs = costs or {kind: Costs(kind) for kind in KINDS}
        self._autos: dict[str, Auto] = {}
        self._ids = count()  # requests, whichever call they come from
        # Reentrant: a stream that is forgotten may be closed by the garbage collector amid another one's round.
        self._lock, self._process = threading.RLock(), os.getpid()
        self._no_drafter_reason = no_drafter_reason
        self.end_tokens = frozenset((*defaults.eos_token_ids, *target.config.eos_token_ids))
        self._grammars: Grammars | None = None
        self._target_bytes = memory.step_bytes(target)
        self._draft_bytes = memory.step_bytes(drafter) if drafter else 0

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
        """The answer to a prompt, or the answers to a list of prompts, made as a batch, in order.
        Options: see `stream`.
        """
        chunks = self.stream(prompt, params, **options)
        results = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
        ordered = [results[index] for index in sorted(results)]
        return ordered[0] if _is_single(prompt) else ordered

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        system_prompt: str | None = None,
        chat_template: bool = True,
        num_draft_tokens: int | str | None = None,
        cancel: threading.Event | None = None,
        progress: Progress = weights.no_progress,
    ) -> Iterator[Chunk]:
        """Yields pieces of text as they are made; the last chunk of each prompt carries its Result.

        prompt: text (a user turn, or raw text with chat_template=False), chat messages, or token ids; or a list of
        these. params: for all, or one a prompt. num_draft_tokens: drafts a round, 0 decodes plainly, 'auto' follows
        cost and acceptance. cancel: set it to end after the current round. progress: told prefill's tokens done and in
        all. Raises UserError, before anything is generated, for an empty prompt, one beyond the context, image or audio
        parts, and settings out of range.
        """
        prompts = [prompt] if _is_single(prompt) else list(prompt)
        every = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if not prompts or len(every) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts with {len(every)} settings; expected a prompt or more, each with its settings"
            )
        drafts = self.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        check_depth(drafts)
        with self._in_use():
            encoded = [
                self.text.encode(prompt, system_prompt, chat_template, settings.thinking)
                for prompt, settings in zip(prompts, every, strict=True)
            ]
            requests = [self._request(i, tokens, every[i], drafts) for i, tokens in enumerate(encoded)]
        return self._guarded(self._run(requests, drafts, cancel or threading.Event(), progress))

    @property
    def description(self) -> str:
        """What computes: the dtype, the weights' format, the device, the experts' ways (paths.py) and MLX's version."""
        dtype = str(self.target.dtype).removeprefix("mlx.core.")
        models = {"target": self.target} | ({"drafter": self.drafter} if self.drafter else {})
        formats = [f"{name} {weights.format_of(model)}" for name, model in models.items()]
        device = f"Metal, {kernels.summary()}" if metal_available() else f"CPU ({blas.name()})"
        if moe := self.target.config.moe:
            ways = self.target.layers[0].experts.ways(self.target.dtype, moe.top_k)
            device += f", experts {' then '.join(ways)}"
        return f"{', '.join(formats)}, computed in {dtype} on {device}, MLX {mx.__version__}"

    @property
    def advice(self) -> str | None:
        """Whether quantising the drafter would pay, by the bytes that a draft and a target's step read."""
        share = self._draft_bytes / self._target_bytes
        if self.drafter is None or share <= LIGHT_DRAFT or weights.is_quantized(self.drafter):
            return None
        where = "" if metal_available() else " (on Metal: products with quantised weights are slower on this CPU)"
        return (
            f"a draft reads {self._draft_bytes / 1e6:,.1f} MB of weights, {share:.0%} of a target step's "
            f"{self._target_bytes / 1e6:,.1f} MB; --draft-bits 8 (draft_bits=8 in Python) makes it lighter{where}"
        )

    def _request(self, index: int, prompt: list[int], params: SamplingParams, drafts: int | str) -> Request:
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
            accept=self.accept,
            target_step_bytes=self._target_bytes,
            draft_step_bytes=self._draft_bytes,
        )
        end_tokens = frozenset() if params.ignore_eos else self.end_tokens
        limit = min(params.max_tokens, context - len(prompt))
        stream, constraint = self.text.stream(params.stop), self._constraint(params)
        return Request(next(self._ids), index, prompt, params, stream, end_tokens, limit, stats, constraint)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        """What the reply must follow, after the thought that may come first."""
        vocab, reply = self.target.config.vocab_size, None
        for kind, source in params.grammars.items():
            if self._grammars is None:
                self._grammars = Grammars(self.text.fast_tokenizer, vocab, tuple(self.end_tokens))
            reply = self._grammars.compile(kind, source)
        if not params.thinking or (reply is None and params.thinking_budget is None):
            return reply
        opening, closing = (self.text.token_id(name) for name in (OPEN, CLOSE))
        return Thinking(opening, closing, vocab, params.thinking_budget, reply, tuple(self.end_tokens))

    def _depth(self, drafts: int | str, requests: Sequence[Request]) -> Fixed | Auto:
        """Who chooses the draft length. The costs are measured or read once, when they are first needed."""
        if self.drafter is None or drafts != AUTO:
            return Fixed(0 if self.drafter is None else drafts)
        kind = "sampled" if any(request.params.temperature for request in requests) else "greedy"
        if self.frozen_costs and kind in self._autos:  # an equal call gets equal choices: nothing is kept of the last
            self._autos[kind] = self._auto(kind, self._autos[kind].table)
        if kind not in self._autos:
            prompt = self.text.encode(CALIBRATION, chat_template=False)
            self._autos[kind] = self._auto(kind, self.costs[kind].table(self.target, self.drafter, prompt))
        return self._autos[kind]

    def _auto(self, kind: str, table: CostTable) -> Auto:
        """Drafts that are accepted by rejection are not cut, see rejection.py."""
        return Auto(table, kind == "greedy" or self.accept == COUPLED, self.frozen_costs)

    def calibrate(self, repeats: int = 5, progress: Progress = weights.no_progress) -> dict[str, CostTable]:
        """Measures what rounds of each kind of text cost here, keeps it for the next starts, and goes by it from now
        on. Takes a minute or two. Raises UserError without a drafter.
        """
        if self.drafter is None:
            raise UserError("there is no drafter, so nothing to choose; load one with draft_model=")
        with self._in_use(), memory.wired_limit():
            prompt, tables = self.text.encode(CALIBRATION, chat_template=False), {}
            for kind, costs in self.costs.items():
                tables[kind] = costs.measured(self.target, self.drafter, prompt, repeats, progress)
                self._autos[kind] = self._auto(kind, tables[kind])
        return tables

    def _run(
        self, requests: list[Request], drafts: int | str, cancel: threading.Event, progress: Progress
    ) -> Iterator[Chunk]:
        try:
            with memory.wired_limit():
                for start in range(0, len(requests), self.max_rows):
                    some = requests[start : start + self.max_rows]
                    if cancel.is_set():  # nobody waits for these: no cache, no prefill, no measurement
                        yield from [request.cancel() for request in some]
                    else:
                        yield from self._batch(some, drafts).run(cancel, progress)
        finally:
            self._learn()

    def _batch(self, requests: list[Request], drafts: int | str) -> Batch:
        return Batch(
            self.target,
            self.drafter,
            requests,
            self._depth(drafts, requests),
            self.prefill_chunk,
            self.defaults.suppress_token_ids,
            self.draft_position,
            self.draft_temperature,
            self.accept,
        )

    def _learn(self) -> None:
        """What rounds took is for the next start's table; a call that is closed early tells as well."""
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
        """The same chunks; the engine is held while each is made, and free while the caller has it."""
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


def check_depth(drafts: int | str) -> None:
    """Raises UserError for what is no draft length."""
    if drafts != AUTO and (isinstance(drafts, (str, bool)) or drafts < 0):
        raise UserError(f"num_draft_tokens is {drafts!r}, expected '{AUTO}', 0 (plain decoding) or more")


def load(
    model: str | None = None,
    draft_model: str = "auto",
    *,
    revision: str | None = None,
    num_draft_tokens: int | str = AUTO,
    dtype: str | None = None,
    draft_bits: int | None = None,
    max_rows: int = MAX_ROWS,
    prefill_chunk: int = PREFILL_CHUNK,
    draft_position: int = 0,
    draft_temperature: float = DRAFT_TEMPERATURE,
    accept: str = COUPLED,
    frozen_costs: bool = False,
    notice: Callable[[str], None] = lambda message: None,
    progress: Progress = weights.no_progress,
) -> Engine:
    """Loads a target and its drafter.

    model: a converted folder or a hub id, None for the small bundled pair; draft_model: likewise, 'auto' to look for
    the target's drafter, 'none' for plain decoding. num_draft_tokens: drafts a round; 0 decodes plainly, 'auto' follows
    what rounds cost on this machine (measured once, kept in the user's cache folder, corrected in use) and what is
    accepted; frozen_costs takes the costs as they are in the file, so that equal calls get equal draft lengths. dtype:
    'float32', 'bfloat16' or 'float16' for what is not quantised; None keeps the folder's, except on a CPU, which gets
    float32 (MLX's CPU has no bf16 experts).
    draft_bits: quantise a drafter that is not quantised while loading it (2, 3, 4, 5, 6 or 8 bits in groups of 64, a
    dense vocabulary head at 4 bits or fewer, a centroid head not at all); None leaves it as it is. max_rows: prompts in
    one batch, the others wait for the next; each costs the memory of its K/V. draft_position, draft_temperature: see
    Speculation. accept: which drafts of sampled text stay, 'coupled' (the text never depends on them) or 'rejection'
    (block verification: more stay and the distribution is the same, but the text depends on drafts, and so on draft
    length, drafter and batch). notice: told in a sentence what the user should know; progress: parts read and in all,
    of each model. Raises UserError for whatever cannot be loaded.
    """
    if not 0 < draft_temperature < float("inf"):
        raise UserError(f"draft_temperature is {draft_temperature}, expected a number above 0; 1 is the request's own")
    check_depth(num_draft_tokens)
    if accept not in ACCEPT:
        raise UserError(f"accept is {accept!r}, expected one of {', '.join(ACCEPT)}")
    for name, value in {"max_rows": max_rows, "prefill_chunk": prefill_chunk}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if dtype is not None and dtype not in weights.DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(weights.DTYPES)}")
    bits = MODES["affine"][1]
    if draft_bits is not None and (draft_bits not in bits or draft_model == "none"):
        raise UserError(f"draft_bits is {draft_bits}, expected one of {bits}, and a drafter to quantise")
    pair = hub.find_pair(model, draft_model, revision)
    weights.check_pair(pair.target, pair.drafter)
    defaults = weights.read_generation_defaults(pair.target)
    health.ensure(notice)
    cast = weights.DTYPES[dtype] if dtype else None
    if cast is None and not metal_available():
        cast = mx.float32
        notice("no Metal here: running on the CPU, in float32")
    _check_memory(pair, cast)
    target = weights.load_target(pair.target, cast, progress)
    drafter = weights.load_drafter(pair.drafter, target.config, cast, progress, draft_bits) if pair.drafter else None
    if drafter is None and draft_model == "auto":
        notice(f"{pair.reason}; decoding plainly")
    warming = threading.Thread(target=warm_up, args=(target, drafter))
    warming.start()
    from .text import Text  # seconds, for it imports transformers

    warming.join()
    return Engine(
        target,
        drafter,
        Text(pair.target, target.config.media_token_ids),
        defaults,
        no_drafter_reason=pair.reason,
        num_draft_tokens=num_draft_tokens,
        max_rows=max_rows,
        prefill_chunk=prefill_chunk,
        draft_position=draft_position,
        draft_temperature=draft_temperature,
        accept=accept,
        costs=Costs.of_pair(pair, target, drafter, notice),
        frozen_costs=frozen_costs,
    )


def _check_memory(pair: hub.Pair, cast: mx.Dtype | None) -> None:
    """Refuses what cannot fit, before anything is read. A cast to float32 can double 16-bit weights."""
    folders = [folder for folder in (pair.target, pair.drafter) if folder is not None]
    needed = sum(memory.weight_bytes(folder, widened=cast == mx.float32) for folder in folders)
    memory.check(needed, f"the model in {pair.target}", "convert it with -q --q-bits 4, or take a smaller model")


def _is_single(prompt: Prompt | Sequence[Prompt]) -> bool:
    """One prompt (text, chat messages, token ids), or several."""
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], (dict, int)))
