"""`load`: folders or hub ids in, an engine out."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..cache.spec import KVSpec, row_bytes
from ..errors import UserError, shown
from ..files import hub, prefix_store
from ..files.folder import read_config, weight_bytes
from ..files.progress import Progress
from ..machine import device, memory
from ..models import loading
from ..models.config import GenerationDefaults, TargetConfig
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.linear import keep_rows
from ..models.quantization import MODES
from ..ops import kernel_report, kernels
from ..sampling.params import COUPLED, MAX_ROWS, count, flag, whole
from ..speculative.depth import AUTO
from ..speculative.drafting import DEFAULT_DRAFTING, Drafting
from ..text.tokenizer_files import check_tokenizer
from .arguments import check_depth, check_kv_bits, limit_of, prefix_cache_of, prefix_memory_of, told
from .calibration import Costs
from .engine import Engine
from .prefix_disk import PrefixDisk
from .priors import Priors
from .settings import MAX_WAITING, PREFILL_CHUNK, Settings
from .warmup import making_ready, warm_up
from .worker import Worker

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # else transformers misses PyTorch, on standard error
_computing: set[int] = set()  # processes in which a model was loaded: this one, or one that it was forked from


def load(
    model: str | os.PathLike[str] | None = None,
    draft_model: str | os.PathLike[str] = "auto",
    *,
    revision: str | None = None,
    num_draft_tokens: int | str = AUTO,
    dtype: str | mx.Dtype | None = None,
    draft_bits: int | None = None,
    kv_bits: int | None = None,
    kv_bits_rings: bool = False,
    row_invariant: bool = False,
    max_rows: int = MAX_ROWS,
    prefill_chunk: int = PREFILL_CHUNK,
    draft_position: int = 0,
    draft_temperature: float = 1.0,
    accept: str = COUPLED,
    draft_sources: str | Sequence[str] = DEFAULT_DRAFTING.sources,
    learning: bool = True,
    max_waiting: int = MAX_WAITING,
    memory_limit: int | None = None,
    prefix_memory: int | None = None,
    prefix_cache: str | os.PathLike[str] | None = None,
    prefix_cache_limit: int = prefix_store.LIMIT,
    wired_limit: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> Engine:
    """Loads a target and its drafter. Raises UserError for whatever cannot be loaded.

    model: a converted folder or a hub id; None is the small bundled pair. draft_model: a folder or a hub id; 'auto'
    looks for the target's drafter, 'none' decodes plainly. revision: of the repositories on the hub. num_draft_tokens:
    drafts a round; 0 decodes plainly, 'auto' follows measured costs and acceptance. learning: 'auto' follows
    the clock and what drafts kept, and leaves both for the next start; False takes them as they are kept, so that equal
    calls get equal draft lengths. dtype: 'float32', 'bfloat16' or 'float16'
    for weights that are not quantised, of both models; None keeps the target's on a GPU and is float32 on a CPU, which
    has no bf16 experts in MLX. draft_bits: quantises an unquantised drafter to 2, 3, 4, 5, 6 or 8 bits, its dense
    vocabulary head to at most 4, a centroid head not at all. kv_bits: 8 or 4 bits a number of the K/V of full layers,
    which is what a long context takes; None keeps the model's type. kv_bits_rings: those of sliding layers, too.
    row_invariant: has products of up to 128 rows give a row the bits that it has alone, so that drafts and company
    change fewer of a GPU's roundings, at the price of speed where MLX's own products are faster.
    max_rows: requests that are decoded at once; others wait,
    and each takes the memory of its K/V. max_waiting: requests that may wait; one more raises UserError. memory_limit:
    bytes that weights, K/V and what a pass computes may take together; None is what the machine has. prefix_memory:
    bytes of these for the K/V of prompts that may come again; 0 keeps none, None is a quarter of what is left beside
    the model and a long text. prefix_cache: a folder in which these K/V outlast the process, shared by processes;
    prefix_cache_limit: bytes of its files, of which those go first that nobody used for the longest time. wired_limit:
    keeps weights wired in a Mac's memory. prefill_chunk: prompt tokens a forward pass. draft_position: of the drafter's
    query, 0 or -1 after the newest token's index. draft_temperature: a factor of the request's, for drafts alone.
    draft_sources: who makes the drafts, names with commas or a tuple: 'mtp' is the drafter, 'copy' finds them in the
    request's own text, 'forced' has what a grammar leaves no choice of. accept: 'coupled'
    (sampled text never depends on drafts) or 'rejection' (more drafts are kept, the distribution is the target's, but
    the text depends on the drafts). notice: called with a sentence that the user should know; after the load it may be
    called in any thread. progress: called with the parts read and all parts of each model. stage: called with what
    takes seconds now, '' when it is over.
    """
    _check_process()
    kv_bits_rings = flag("kv_bits_rings", kv_bits_rings)
    notice = told("notice", notice)
    listeners = _Listeners(notice, told("progress", progress), told("stage", stage))
    wanted = _Wanted.of(model, draft_model, revision, dtype, draft_bits)
    settings = {
        "num_draft_tokens": check_depth(num_draft_tokens),
        "max_rows": count("max_rows", max_rows),
        "prefill_chunk": count("prefill_chunk", prefill_chunk),
        "drafting": Drafting(draft_position, draft_temperature, accept, draft_sources),
        "learning": flag("learning", learning),
        "max_waiting": count("max_waiting", max_waiting),
        "memory_limit": limit_of("memory_limit", memory_limit),
        "prefix_memory": prefix_memory_of(prefix_memory),
        "prefix_cache": prefix_cache_of(prefix_cache),
        "prefix_cache_limit": count("prefix_cache_limit", prefix_cache_limit, 2**63 - 1),
        "wired_limit": flag("wired_limit", wired_limit),
        "kv_bits": check_kv_bits(kv_bits, kv_bits_rings),
        "kv_bits_rings": kv_bits_rings,
        "row_invariant": flag("row_invariant", row_invariant),
    }
    pair, defaults = _find(wanted, listeners)
    worker = Worker()
    try:
        opening = worker.begin(partial(_open, pair, wanted, settings), *listeners.each(), lambda: None)
        encode = _import_text()  # takes seconds; meanwhile the models are read and run for the first time
        target, drafter = opening.wait()
        text = encode.Text(pair.target, target.config.vocab_size, target.config.media_token_ids, notice)
        made = Settings(**settings)
        costs = Costs.of_pair(pair, target, drafter, notice, made.drafting, made.specs(target.config))
        disk = PrefixDisk.of_model(pair.target, target, made, notice)
        priors = Priors.of_pair(pair, made.drafting, notice)
        more = {"no_drafter_reason": pair.reason, "costs": costs, "priors": priors, "worker": worker, "disk": disk}
        return Engine(target, drafter, text, defaults, **more, **settings)
    except BaseException:
        worker.stop()
        raise


@dataclass(frozen=True)
class _Listeners:
    """Functions that are called while a model loads, as `load` describes them."""

    notice: Callable[[str], None]
    progress: Progress
    stage: Callable[[str], None]

    def each(self) -> tuple[Callable[[str], None], Progress, Callable[[str], None]]:
        """Returns the three, in order."""
        return self.notice, self.progress, self.stage


@dataclass(frozen=True)
class _Wanted:
    """Which models are to be loaded, and how, as `load` describes it. dtype: None keeps the target's."""

    model: str | None
    draft_model: str
    revision: str | None
    dtype: mx.Dtype | None
    draft_bits: int | None

    @classmethod
    def of(cls, model: Any, draft_model: Any, revision: Any, dtype: Any, draft_bits: Any) -> _Wanted:
        """Checks each argument. Raises UserError."""
        if revision is not None and not isinstance(revision, str):
            raise UserError(f"revision is {shown(revision)}, expected the name of a revision on the hub")
        model = None if model is None else _location("model", model)
        draft_model = _location("draft_model", draft_model)
        return cls(model, draft_model, revision, _dtype(dtype), _draft_bits(draft_bits, draft_model))


def _location(name: str, value: Any) -> str:
    """Returns a folder or a hub id as text. Raises UserError for any other value, and for an empty text."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise UserError(f"{name} is {shown(value)}, expected a folder or a hub id")
    if not os.fspath(value):
        raise UserError(f"{name} is empty, expected a folder or a hub id such as org/name")
    return os.fspath(value)


def _check_process() -> None:
    """Raises UserError in a process that was forked after MLX computed: MLX's threads did not come along, so the first
    array would never be ready.
    """
    if _computing and os.getpid() not in _computing:
        raise UserError(
            f"this process {os.getpid()} was forked from one that had loaded a model, which MLX does not survive; "
            "expected a fresh one: start it with multiprocessing's 'spawn'"
        )


def _dtype(dtype: Any) -> mx.Dtype | None:
    names = loading.DTYPES
    if dtype is None or (isinstance(dtype, mx.Dtype) and dtype in names.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in names:
        raise UserError(f"dtype is {shown(dtype)}, expected one of {', '.join(names)}")
    return names[dtype]


def _draft_bits(bits: Any, draft_model: str) -> int | None:
    if bits is None:
        return None
    known = MODES["affine"][1]
    return whole(
        "draft_bits",
        bits,
        lambda n: n in known and draft_model != "none",
        f"one of {known}, and a drafter to quantise",
    )


def _find(wanted: _Wanted, listeners: _Listeners) -> tuple[hub.Pair, GenerationDefaults]:
    """Returns the folders, downloaded where they are on the hub, and what the target's maker recommends.

    Checks configs, tokenizer and settings, which takes milliseconds. Raises UserError.
    """
    listeners.stage("looking for the model")
    pair = hub.find_pair(wanted.model, wanted.draft_model, wanted.revision)
    listeners.stage("checking the model's files")
    loading.check_pair(pair.target, pair.drafter)
    defaults = loading.read_generation_defaults(pair.target)
    defaults.check_vocabulary(TargetConfig.from_dict(read_config(pair.target)).vocab_size)
    check_tokenizer(pair.target)
    if pair.drafter is None and wanted.draft_model == "auto":
        listeners.notice(f"{pair.reason}; decoding plainly")
    return pair, defaults


def _open(pair: hub.Pair, wanted: _Wanted, settings: Mapping[str, Any], *told: Any) -> tuple[Gemma4, Drafter | None]:
    """Returns both models, with their weights read, after they have run for the first time.

    told: the functions of _Listeners, and one that is called in between, where a load that nobody waits for ends.
    Raises UserError where the models do not fit the memory or their files do not hold what config.json says.
    """
    *listeners, pause = told
    listeners = _Listeners(*listeners)
    listeners.stage("checking the kernels (the first start on this machine)")
    kernel_report.ensure(listeners.notice)
    cast = wanted.dtype
    if cast is None and not device.traits().float32_sums:
        cast = mx.float32
        listeners.notice(f"no GPU here: running on the {device.kind()}, in float32")
    specs = _check_memory(pair, cast, settings)
    _computing.add(os.getpid())
    target, drafter = _open_models(pair, cast, wanted.draft_bits)
    listeners.stage("")
    for model in (target, drafter) if drafter else (target,):
        loading.prepare(model, listeners.progress)
    if settings["row_invariant"]:
        _keep_rows([target, drafter] if drafter else [target], listeners.notice)
    listeners.stage(making_ready(target))
    warm_up(target, drafter, settings["max_rows"], pause, specs)
    listeners.stage("")
    return target, drafter


def _keep_rows(models: Sequence[Gemma4 | Drafter], notice: Callable[[str], None]) -> None:
    """Tells of weights whose products cannot keep a row's bits on this machine."""
    dtype = models[0].dtype
    if forms := sorted({form for model in models for form in keep_rows(model, dtype)}):
        why = kernels.why_off("few_rows") or "the kernel does not read them"
        notice(
            f"row_invariant holds for no products with {', '.join(forms)} weights here ({why}): they are MLX's own, "
            "whose bits may depend on the number of rows"
        )


def _open_models(pair: hub.Pair, cast: mx.Dtype | None, draft_bits: int | None) -> tuple[Gemma4, Drafter | None]:
    """Returns both models, checked against their files' headers, before the weights of either are read.

    MLX's global random state, from which new modules draw, is the host's and stays as it was.
    """
    high, low = mx.random.state[0].tolist()
    try:
        target = loading.open_target(pair.target, cast)
        if pair.drafter is None:
            return target, None
        # The drafter reads the target's K/V and hidden states: of one type, or everything would be float32.
        return target, loading.open_drafter(pair.drafter, target.config, cast or target.dtype, draft_bits)
    finally:
        mx.random.seed(high << 32 | low)


def _import_text() -> ModuleType:
    """Imports text.encode and, without its advice on standard error, what takes long of its libraries.

    Where that fails, text.encode itself fails, and says why.
    """
    quiet = ADVICE not in os.environ  # mlx_lm sets it, too
    if quiet:
        os.environ[ADVICE] = "1"
    with _late_interrupt():
        try:
            with suppress(ImportError):
                import_module("transformers.models.auto.tokenization_auto")
        finally:
            if quiet:
                os.environ.pop(ADVICE, None)
        return import_module("..text.encode", __package__)


@contextmanager
def _late_interrupt() -> Iterator[None]:
    """Lets Ctrl-C wait for the end of a block that imports: modules of an import that it tears lack parts for as long
    as the process lives, and no later load works.
    """
    handler, signals = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Ctrl-C comes to the main thread, and to who listens
        return
    signal.signal(signal.SIGINT, lambda *told: signals.append(told))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if signals:
            handler(*signals[0])


def _check_memory(pair: hub.Pair, cast: mx.Dtype | None, settings: Mapping[str, Any]) -> tuple[KVSpec, ...]:
    """Returns what the caches will be made of. Raises UserError for K/V that cannot have the bits that were asked for,
    and for models that do not fit the memory with one row of a short text. Reads no weights.

    cast: the dtype to compute in; float32 doubles the bytes of 16-bit weights.
    """
    config = TargetConfig.from_dict(read_config(pair.target))
    folders = [folder for folder in (pair.target, pair.drafter) if folder is not None]
    widened = cast is not None and cast == mx.float32
    needed = sum(weight_bytes(folder, widened) for folder in folders)
    specs = Settings(**settings).specs(config)
    needed += row_bytes(specs, 1, settings["prefill_chunk"], 4 if widened else 2)
    advice = "convert it with -q --q-bits 4, or take a smaller model"
    memory.check(needed, f"the model in {pair.target}", advice, settings["memory_limit"])
    return specs
