"""`load`: folders or hub ids in, an engine out."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..cache.spec import kv_bytes
from ..errors import UserError
from ..files import hub
from ..files.folder import check_text_files, read_config, weight_bytes
from ..files.progress import Progress
from ..machine import memory
from ..machine.device import metal_available
from ..models import loading
from ..models.config import MODES, TargetConfig
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..ops import kernel_report
from ..sampling.params import COUPLED, MAX_ROWS, count, shown, whole
from ..speculative.depth import AUTO
from ..speculative.drafting import Drafting
from .calibration import Costs
from .engine import PREFILL_CHUNK, Engine, check_depth, told
from .warmup import making_ready, warm_up

if TYPE_CHECKING:
    from ..text.encode import Text

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # else transformers misses PyTorch, on standard error
_computing: set[int] = set()  # processes in which a model was loaded: this one, or one that it was forked from


def _location(name: str, value: Any) -> str:
    """Returns a folder or a hub id as text. Raises UserError for any other value, and for an empty text."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise UserError(f"{name} is {shown(value)}, expected a folder or a hub id")
    if not os.fspath(value):
        raise UserError(f"{name} is empty, expected a folder or a hub id such as org/name")
    return os.fspath(value)


def load(
    model: str | os.PathLike[str] | None = None,
    draft_model: str | os.PathLike[str] = "auto",
    *,
    revision: str | None = None,
    num_draft_tokens: int | str = AUTO,
    dtype: str | mx.Dtype | None = None,
    draft_bits: int | None = None,
    max_rows: int = MAX_ROWS,
    prefill_chunk: int = PREFILL_CHUNK,
    draft_position: int = 0,
    draft_temperature: float = 1.0,
    accept: str = COUPLED,
    frozen_costs: bool = False,
    notice: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    stage: Callable[[str], None] | None = None,
) -> Engine:
    """Loads a target and its drafter.

    model: a converted folder or a hub id, None for the small bundled pair; draft_model: likewise, 'auto' to look for
    the target's drafter, 'none' for plain decoding. num_draft_tokens: drafts a round; 0 decodes plainly, 'auto' follows
    what rounds cost on this machine (measured once, kept in the user's cache folder, corrected in use) and what is
    accepted; frozen_costs takes the costs as they are in the file, so that equal calls get equal draft lengths. dtype:
    'float32', 'bfloat16' or 'float16' for what is not quantised; None keeps the target's, for its drafter too, but on
    a CPU it is float32 (MLX's CPU has no bf16 experts).
    draft_bits: quantise a drafter that is not quantised while loading it (2, 3, 4, 5, 6 or 8 bits in groups of 64, a
    dense vocabulary head at 4 bits or fewer, a centroid head not at all); None leaves it as it is. max_rows: prompts in
    one batch, the others wait for the next; each costs the memory of its K/V. draft_position, draft_temperature: see
    Drafting. accept: which drafts of sampled text stay, 'coupled' (the text never depends on them) or 'rejection'
    (block verification: more stay and the distribution is the same, but the text depends on drafts, and so on draft
    length, drafter and batch). notice: told in a sentence what the user should know; progress: parts read and in all,
    of each model; stage: what is being done that may take seconds, '' for nothing. Raises UserError for
    whatever cannot be loaded.
    """
    _check_process()
    notice, progress, stage = told("notice", notice), told("progress", progress), told("stage", stage)
    num_draft_tokens, max_rows = check_depth(num_draft_tokens), count("max_rows", max_rows)
    prefill_chunk = count("prefill_chunk", prefill_chunk)
    drafting = Drafting(draft_position, draft_temperature, accept)
    if revision is not None and not isinstance(revision, str):
        raise UserError(f"revision is {shown(revision)}, expected the name of a revision on the hub")
    draft_model = _location("draft_model", draft_model)
    cast, draft_bits = _dtype(dtype), _draft_bits(draft_bits, draft_model)
    stage("looking for the model")
    pair = hub.find_pair(None if model is None else _location("model", model), draft_model, revision)
    stage("checking the model's files")
    loading.check_pair(pair.target, pair.drafter)
    config = TargetConfig.from_dict(read_config(pair.target))
    defaults = loading.read_generation_defaults(pair.target)
    defaults.check_vocabulary(config.vocab_size)
    check_text_files(pair.target)
    stage("checking the Metal kernels (the first start on this machine)")
    kernel_report.ensure(notice)
    if cast is None and not metal_available():
        cast = mx.float32
        notice("no Metal here: running on the CPU, in float32")
    _check_memory(pair, config, cast, prefill_chunk)
    _computing.add(os.getpid())
    target, drafter = _open_models(pair, cast, draft_bits)
    stage("")
    for each in (target, drafter) if drafter else (target,):
        loading.prepare(each, progress)
    if drafter is None and draft_model == "auto":
        notice(f"{pair.reason}; decoding plainly")
    stage(making_ready(target))
    text = _load_text(pair.target, target, drafter, max_rows)
    stage("")
    return Engine(
        target,
        drafter,
        text,
        defaults,
        no_drafter_reason=pair.reason,
        num_draft_tokens=num_draft_tokens,
        max_rows=max_rows,
        prefill_chunk=prefill_chunk,
        drafting=drafting,
        costs=Costs.of_pair(pair, target, drafter, notice),
        frozen_costs=frozen_costs,
    )


def _check_process() -> None:
    """Raises UserError in a process that was forked after MLX computed: its threads did not come along, so that the
    first array would be waited for in vain.
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


def _open_models(pair: hub.Pair, cast: mx.Dtype | None, draft_bits: int | None) -> tuple[Gemma4, Drafter | None]:
    """Both models, checked before the weights of either are read. MLX's global random state, from which new modules
    draw, is the host's and stays as it was.
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


def _load_text(folder: Path, target: Gemma4, drafter: Drafter | None, max_rows: int) -> Text:
    """Returns the tokenizer, whose libraries take seconds to import: meanwhile the models run for the first time.

    The other thread imports nothing that touches MLX. A thread in which MLX computed or compiled takes the
    interpreter's lock once more when it ends, and aborts the process where that is ending, too (after Ctrl-C, say).
    """
    with ThreadPoolExecutor(1) as pool:
        importing = pool.submit(_import_transformers)
        warm_up(target, drafter, max_rows)
        importing.result()
    text = import_module("..text.encode", __package__)
    return text.Text(folder, target.config.vocab_size, target.config.media_token_ids)


def _import_transformers() -> None:
    """Imports what takes long of text.encode's libraries. Where it fails, text.encode itself fails, and says why."""
    quiet = ADVICE not in os.environ  # mlx_lm sets it, too
    if quiet:
        os.environ[ADVICE] = "1"
    try:
        with suppress(ImportError):
            import_module("transformers.models.auto.tokenization_auto")
    finally:
        if quiet:
            os.environ.pop(ADVICE, None)


def _check_memory(pair: hub.Pair, config: TargetConfig, cast: mx.Dtype | None, block: int) -> None:
    """Refuses what cannot fit with one row of a short text, before anything is read. A cast to float32 can double
    16-bit loading.
    """
    folders = [folder for folder in (pair.target, pair.drafter) if folder is not None]
    widened = cast is not None and cast == mx.float32
    needed = sum(weight_bytes(folder, widened) for folder in folders)
    needed += kv_bytes(config.kv, 1, 1, block, 4 if widened else 2)
    memory.check(needed, f"the model in {pair.target}", "convert it with -q --q-bits 4, or take a smaller model")
