"""The facade: prompts in, text and figures out."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import finalize

import mlx.core as mx

from ..cache.spec import KVSpec
from ..errors import UserError
from ..files.progress import Progress
from ..machine import blas, device
from ..models import loading
from ..models.config import GenerationDefaults
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.linear import products_of
from ..models.loading import step_bytes
from ..ops import kernels
from ..ops.expert_paths import ROWS, ProductPath
from ..sampling.params import SamplingParams, count, flag
from ..speculative.costs import CostTable
from ..speculative.depth import Depth
from ..speculative.drafting import Drafting
from .arguments import Cancel, told
from .calibration import KINDS, TEXT, Costs
from .conversation import Conversation
from .intake import Intake, Options
from .kv_bytes import KVBytes, kv_bytes
from .prefix import Prefixes
from .prefix_disk import PrefixDisk
from .priors import Priors
from .request import Chunk, Request, Result
from .runner import Runner
from .settings import Settings
from .streams import AsyncStream, Stream, encoders
from .tables import Tables
from .worker import Worker

if TYPE_CHECKING:
    from ..text.encode import Prompt, Text
    from ..text.messages import Message

T = TypeVar("T")
MOST_REPEATS = 1000  # of a calibration
LIGHT_DRAFT = 0.15  # of a target step's bytes: a draft that reads more is worth quantising


class Engine:
    """A target, its drafter and its tokenizer; make it with `load`.

    Any thread may call it, and so may coroutines; all calls share one batch. Its own thread computes. `close` ends what
    runs and gives the memory back, and so does a `with` block, or forgetting the engine. Every call raises UserError
    after that, in a process that was forked after the load, and from a function that the engine's own thread calls.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        text: Text,
        defaults: GenerationDefaults,
        *,
        no_drafter_reason: str | None = None,
        costs: Mapping[str, Costs] | None = None,
        priors: Priors | None = None,
        worker: Worker | None = None,
        disk: PrefixDisk | None = None,
        **settings: Any,
    ):
        """worker: the one in whose thread the models were loaded; None makes one. disk: where prefixes outlast the
        engine. settings: fields of Settings.
        """
        self.text, self.defaults = text, defaults
        self.settings = Settings(**settings, suppress=tuple(defaults.suppress_token_ids))
        self.costs = costs or {kind: Costs(kind) for kind in KINDS}
        self._priors = priors or Priors()
        self._target_bytes, self._draft_bytes = step_bytes(target), step_bytes(drafter) if drafter else 0
        figures = {
            "accept": self.settings.drafting.accept,
            "target_step_bytes": self._target_bytes,
            "draft_step_bytes": self._draft_bytes,
        }
        reason = no_drafter_reason if drafter is None else None
        self._intake = Intake(text, defaults, target.config, self.settings.num_draft_tokens, reason, figures, disk)
        # The last references to the models are the worker's: what MLX keeps of them is its thread's.
        self._models = {"target": target, "drafter": drafter, **self._choosing(target, drafter)}
        self._worker = Worker() if worker is None else worker
        self._worker.drive(partial(_runner, self._models, self.settings, disk), partial(_free, self._models, disk))
        self._forgotten = finalize(self, self._worker.stop)
        self._forgotten.atexit = False

    def _choosing(self, target: Gemma4, drafter: Drafter | None) -> dict[str, Any]:
        """Who chooses draft lengths, and where the costs come from; without a drafter there are none."""
        settings, prompt = self.settings, self.text.encode(TEXT, chat_template=False)
        tables = None if drafter is None else Tables(target, drafter, self.costs, self._priors, prompt)
        frozen = not settings.learning
        depth = Depth(tables, settings.drafting.rejection, frozen, self._priors.known)
        return {"tables": tables, "depth": depth}

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
    ) -> Result | list[Result] | list[list[Result]]:
        """Returns the Result of a prompt, or a list of Results for a list of prompts, in order. With n > 1 it is a list
        of n Results in the place of each. All are decoded together, and with whatever else is asked meanwhile.
        `stream` describes the options.
        """
        (prompts, single), options = self.text.prompts(prompt), Options(**options)
        return _results(list(self._stream(prompts, params, options, whole=True)), single, options.n)

    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Result | list[Result] | list[list[Result]]:
        """Returns what `generate` does. A task that is cancelled meanwhile cancels its requests."""
        (prompts, single), options = self.text.prompts(prompt), Options(**options)
        stream = self._astream(prompts, params, options, whole=True)
        return _results([chunk async for chunk in stream], single, options.n)

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        system_prompt: str | None = None,
        chat_template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        allow_special: bool = False,
        continue_final_message: bool = False,
        num_draft_tokens: int | str | None = None,
        timeout: float | None = None,
        priority: int = 0,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        cache_salt: str | None = None,
        prediction: str | None = None,
    ) -> Stream:
        """Yields pieces of text as they are made. The last chunk of each prompt carries its Result.

        prompt: text (a user turn, or raw text with chat_template=False), chat messages, or token ids (a list or an
        array); or a list of these. params: one SamplingParams for all, or one for each prompt. All else holds for every
        prompt of the call.

        n: samples of each prompt, 1 to 1000, whose chunks have the index prompt * n + sample; sample i has the seed of
        params + i, or a fresh one where that is None. system_prompt: a message before the prompt's. tools: functions
        that the reply may call, in OpenAI's form; prompts given as ids are taken as if they held them. tool_choice:
        'auto' (the default), 'none', 'required', or the tool that the reply must call, by its name or as OpenAI's
        object. parallel_tool_calls: whether a reply may make several calls. allow_special: takes control strings in
        messages for control tokens. continue_final_message: goes on with the last message, which is the assistant's.
        num_draft_tokens: drafts a round; 0 decodes plainly, 'auto' follows cost and acceptance, None is the engine's.
        timeout: seconds after which the reply ends with finish_reason 'timeout' and the text so far. priority: -100 to
        100; the higher goes first. cancel: an event; once it is set, generation ends after the current round. progress:
        called with the prompts' tokens that are prefilled and all of them, by whoever reads the stream. cache_salt: any
        text; what is kept of these prompts is found by calls with the same salt alone, and the other way round.
        prediction: text that the replies are expected to be like, such as a file before its edit: where copies are a
        source of drafts, what follows it costs few passes. The text is the same without it.

        The stream ends, with what it has, when it is closed, forgotten, or its engine is closed. A reader that falls
        behind delays nobody but itself.

        Raises UserError before anything is generated: at once for an empty prompt, a prompt beyond the context, image
        or audio parts, and whatever is out of range or cannot be done together; with the first chunk for what is beyond
        the memory, and where too many requests wait.
        """
        options = Options(
            n,
            system_prompt,
            chat_template,
            tools,
            tool_choice,
            parallel_tool_calls,
            allow_special,
            continue_final_message,
            num_draft_tokens,
            timeout,
            priority,
            cancel,
            progress,
            cache_salt,
            prediction,
        )
        return self._stream(self.text.prompts(prompt)[0], params, options)

    def astream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> AsyncStream:
        """Yields what `stream` does, to `async for`. It begins, and raises, when the first chunk is asked for."""
        return self._astream(self.text.prompts(prompt)[0], params, Options(**options))

    def _stream(self, prompts: list[Prompt], params: Any, options: Options, whole: bool = False) -> Stream:
        self._worker.check()
        requests = self._intake.requests(prompts, params, options)
        return Stream(self._worker, requests, options.cancel, options.progress, self, whole)

    def _astream(self, prompts: list[Prompt], params: Any, options: Options, whole: bool = False) -> AsyncStream:
        async def begin() -> list[Request]:
            self._worker.check()
            take_in = partial(self._intake.requests, prompts, params, options)
            return await asyncio.get_running_loop().run_in_executor(encoders(), take_in)

        return AsyncStream(self._worker, begin, options.cancel, options.progress, self, whole)

    def conversation(
        self,
        system_prompt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        params: SamplingParams | None = None,
        messages: Iterable[Message] = (),
        **options: Any,
    ) -> Conversation:
        """Returns a conversation, which keeps the history.

        system_prompt, tools, params, options (those of `stream`): hold for every turn that does not give its own.
        messages: the history so far, in OpenAI's form. Raises UserError for messages that no turn could render.
        """
        return Conversation(self, system_prompt, tools, params, messages, **options)

    def call(self, function: Callable[..., T], *listeners: Callable[..., None]) -> T:
        """Runs a function of one's own with the models, in the thread that computes, between two rounds.

        Returns what it returns and raises what it raises. listeners: its arguments, functions that are called in the
        caller's thread.
        """
        return self._worker.call(function, *listeners)

    def close(self) -> None:
        """Ends what runs, with finish_reason 'cancelled', and gives the memory back. Closing once more does nothing."""
        self._worker.close()
        self._forgotten.detach()

    async def aclose(self) -> None:
        """Closes the engine; other tasks go on meanwhile."""
        await asyncio.get_running_loop().run_in_executor(encoders(), self.close)

    def __enter__(self) -> Engine:
        self._worker.check()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def target(self) -> Gemma4:
        """The target. Raises UserError once the engine is closed."""
        return self._model("target")

    @property
    def drafter(self) -> Drafter | None:
        """The drafter, None where texts are decoded plainly. Raises UserError once the engine is closed."""
        return self._model("drafter")

    @property
    def depth(self) -> Depth:
        """Who chooses draft lengths. Raises UserError once the engine is closed."""
        return self._model("depth")

    @property
    def prefixes(self) -> Prefixes:
        """What is kept of prompts and replies for others. Any thread may ask `known` and read `counts` and `bytes`.
        Raises UserError once the engine is closed.
        """
        return self._model("prefixes")

    @property
    def kv_bytes(self) -> KVBytes:
        """What K/V take now, in bytes. Any thread may ask. Raises UserError once the engine is closed."""
        return self._model("kv_bytes")()

    def _model(self, name: str) -> Any:
        if name not in self._models:
            self._worker.check()
        return self._models[name]

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, unless its request ignores them."""
        return self._intake.end_tokens

    @property
    def max_rows(self) -> int:
        """The most requests that are decoded at once."""
        return self.settings.max_rows

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of a prompt in one forward pass."""
        return self.settings.prefill_chunk

    @property
    def drafting(self) -> Drafting:
        """How drafts are made and accepted."""
        return self.settings.drafting

    @property
    def specs(self) -> tuple[KVSpec, ...]:
        """What the caches are made of: the K/V of each layer that owns some, in the bits that they are kept in."""
        return self.settings.specs(self.target.config)

    @property
    def description(self) -> str:
        """A line about what computes: weight formats, dtype, device, expert paths, bits of K/V, MLX's version."""
        dtype = str(self.target.dtype).removeprefix("mlx.core.")
        models = {"target": self.target} | ({"drafter": self.drafter} if self.drafter else {})
        formats = [f"{name} {loading.format_of(model)}" for name, model in models.items()]
        on_cpu = device.kind() is device.Kind.CPU
        where = f"CPU ({blas.name()})" if on_cpu else f"{device.kind()}, {kernels.summary()}"
        if moe := self.target.config.moe:
            ways = self.target.layers[0].experts.paths(self.target.dtype, moe.top_k)
            where += f", experts {' then '.join(ways)}"
        rules = [module.rule(self.target.dtype) for module in products_of(self.target)]
        if (ways := {" then ".join(rule.paths(ROWS + 1)) for rule in rules}) != {ProductPath.STOCK}:
            where += f", products {' or '.join(sorted(ways))}"
        if bits := self.settings.kv_bits:
            where += f", K/V of {'all' if self.settings.kv_bits_rings else 'full'} layers in {bits} bits"
        return f"{', '.join(formats)}, computed in {dtype} on {where}, MLX {mx.__version__}"

    @property
    def advice(self) -> str | None:
        """A line of advice to quantise the drafter, where its draft reads much of a target step's bytes; else None."""
        share = self._draft_bytes / self._target_bytes
        if self.drafter is None or share <= LIGHT_DRAFT or loading.is_quantized(self.drafter):
            return None
        slow = "" if device.traits().float32_sums else " (on a GPU: here such products are slower)"
        return (
            f"a draft reads {self._draft_bytes / 1e6:,.1f} MB of weights, {share:.0%} of a target step's "
            f"{self._target_bytes / 1e6:,.1f} MB; --draft-bits 8 (draft_bits=8 in Python) makes it lighter{slow}"
        )

    def calibrate(self, repeats: int = 5, progress: Progress | None = None, full: bool = False) -> dict[str, CostTable]:
        """Measures the cost of rounds of each kind of text, writes it for the next starts, and uses it from now on.
        Takes a minute or two.

        repeats: of each cell, 1 to 1000. progress: called with the rounds timed and all rounds. full: after long texts
        measure all numbers of rows and drafts, too, which takes several times as long, and memory for such a batch;
        else one row stands for more. Raises UserError without a drafter.
        """
        if self.drafter is None:
            raise UserError("there is no drafter, so nothing to choose; load one with draft_model=")
        repeats, full = count("repeats", repeats, MOST_REPEATS), flag("full", full)
        progress = told("progress", progress)
        return self._worker.call(partial(_calibrated, self._model("tables"), self.depth, repeats, full), progress)


def _runner(models: dict[str, Any], settings: Settings, disk: PrefixDisk | None) -> Runner:
    runner = Runner(**models, settings=settings, disk=disk)
    models["prefixes"] = runner.keeping.prefixes
    models["kv_bytes"] = partial(kv_bytes, runner.scheduler, runner.keeping.prefixes, disk)
    return runner


def _calibrated(tables: Tables, depth: Depth, repeats: int, full: bool, progress: Progress) -> dict[str, CostTable]:
    measured = tables.measured(repeats, progress, full)
    depth.adopt(measured)
    return measured


def _free(models: dict[str, Any], disk: PrefixDisk | None) -> None:
    """Gives the models' memory back, once what was kept of prompts is written. A module refers to itself by what it
    compiled, so it waits for a collector.
    """
    if disk is not None:
        disk.close()
    models.clear()
    gc.collect()
    mx.clear_cache()


def _results(chunks: Sequence[Chunk], single: bool, n: int) -> Any:
    """The results of a call, in the order of its prompts, with n > 1 a list for each prompt; of a single prompt its
    own.
    """
    ordered = [chunk.result for chunk in sorted(chunks, key=lambda chunk: chunk.index)]
    each = ordered if n == 1 else [ordered[at : at + n] for at in range(0, len(ordered), n)]
    return each[0] if single else each
