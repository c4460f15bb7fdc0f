"""`load_target`, `load_drafter`: local folder -> config -> modules -> strict weights.

What is read is what `convert` and mlx-community write: MLX names, one safetensors file or an index of several, MLX
quantisation described in config.json. Whatever is missing or left over is an error that names the tensor.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from ..files.files import content
from ..files.folder import INDEX, read_config, read_index, weight_files
from ..files.foreign import convert_command
from ..files.progress import Progress, no_progress
from ..files.safetensors import read_header
from . import gemma4
from .config import DrafterConfig, GenerationDefaults, QuantizationSpec, TargetConfig
from .drafter import Drafter
from .gemma4 import Gemma4
from .linear import Embedding, Linear, finish_loading
from .moe import ExpertLinear

MEDIA_PREFIXES = (
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "vision_embedder.",
    "multi_modal_projector.",
)
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
# What a file may hold where the module has packed weights, the scales of FP4 and FP8 modes, or a token ordering.
INTEGERS = {mx.uint32: (mx.uint32,), mx.uint8: (mx.uint8,), mx.int32: (mx.int32, mx.int64)}
DRAFTER_TRUNK = ("embed_tokens", "layers.", "norm")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
HEAD_BITS = 4  # at most, of a drafter's vocabulary head: the largest part of a draft step's bytes


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Returns the settings of generation_config.json, greedy where there is no such file. Raises UserError."""
    path = folder / "generation_config.json"
    return GenerationDefaults.from_dict(_read_settings(path) if os.path.lexists(path) else {})


def _read_settings(path: Path) -> Any:
    """JSON that people write by hand, too: with a byte order mark or NaN, of which only what is used matters."""
    try:
        return json.loads(content(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} cannot be read as JSON ({reason}); expected a JSON object; download it again"
        ) from None


def check_pair(target: Path, drafter: Path | None) -> None:
    """Raises UserError, naming both folders, for what is not a target with its drafter. Reads no weights."""
    raws = [read_config(folder) for folder in (target, drafter) if folder is not None]
    try:
        config = TargetConfig.from_dict(raws[0])
        for raw in raws[1:]:
            DrafterConfig.from_dict(raw, config)
    except UserError as error:
        raise UserError(f"{error} (target: {target}; drafter: {drafter or 'none'})") from None


def load_target(folder: Path, dtype: mx.Dtype | None = None, progress: Progress = no_progress) -> gemma4.Gemma4:
    """Returns the target in `folder` with its weights read.

    dtype: of everything that is not quantised; None keeps the file's, or where it has several that of most values.
    progress: called with the parts read and all parts. Raises UserError for a tensor that is missing, left over, broken
    or of another shape.
    """
    model = open_target(folder, dtype)
    prepare(model, progress)
    return model


def open_target(folder: Path, dtype: mx.Dtype | None = None) -> gemma4.Gemma4:
    """Returns the target in `folder`, checked against its files' headers. Its weights are lazy; `prepare` reads them.

    dtype: of everything that is not quantised; None keeps the file's. Raises UserError for a tensor that is missing,
    left over, broken or of another shape.
    """
    config = TargetConfig.from_dict(read_config(folder))
    tensors = read_tensors(folder)
    model = gemma4.build(config)
    prefix = next((p for p in ("language_model.model.", "model.") if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None or any(".experts.gate_up_proj" in name for name in tensors):
        raise UserError(
            f"{folder} has Hugging Face tensor names; convert it first: {convert_command(folder, f'{folder.name}-mlx')}"
        )
    unused = _unused_tensors(config, prefix)
    tensors = {k: v for k, v in tensors.items() if not _is_media(k) and k.rsplit(".", 1)[0] not in unused}
    _assign(model, tensors, lambda path: prefix + path, config.quantization, folder, dtype)
    return model


def load_drafter(
    folder: Path,
    target: TargetConfig,
    dtype: mx.Dtype | None = None,
    progress: Progress = no_progress,
    bits: int | None = None,
) -> Drafter:
    """Returns the drafter in `folder`, paired with its target's config, with its weights read.

    dtype: of everything that is not quantised; None keeps the file's. progress: called with the parts read and all
    parts. bits: quantises its matrices while loading; a dense vocabulary head has 4 bits or fewer, a centroid head is
    not quantised, since a draft reads little of it. Raises UserError for a folder that is quantised already, and for
    tensors that do not fit.
    """
    model = open_drafter(folder, target, dtype, bits)
    prepare(model, progress)
    return model


def open_drafter(folder: Path, target: TargetConfig, dtype: mx.Dtype | None = None, bits: int | None = None) -> Drafter:
    """Returns the drafter in `folder`, checked against its files' headers. Its weights are lazy; `prepare` reads them.

    target: the config to pair it with. dtype: of everything that is not quantised; None keeps the file's. bits:
    quantises its matrices. Raises UserError for another target's drafter, for a folder that is quantised already, and
    for tensors that do not fit.
    """
    config = DrafterConfig.from_dict(read_config(folder), target)
    if bits is not None and config.quantization is not None:
        raise UserError(f"{folder} is quantised already; leave out draft_bits ({bits}), or take the bf16 drafter")
    model = Drafter(config)
    name = lambda path: f"model.{path}" if path.startswith(DRAFTER_TRUNK) else path  # noqa: E731
    _assign(model, read_tensors(folder), name, config.quantization, folder, dtype)
    if bits is not None:
        _quantize_drafter(model, bits)
    if config.centroids:
        _check_ordering(model.masked_embedding.token_ordering, config.vocab_size, folder)
    return model


def _check_ordering(ordering: mx.array, vocab: int, folder: Path) -> None:
    """Its entries are looked up in the embedding. Reads this one tensor."""
    strange = [n for n in (mx.min(ordering).item(), mx.max(ordering).item()) if not 0 <= n < vocab]
    if strange:
        raise UserError(
            f"{folder}: masked_embedding.token_ordering has {strange[0]}, expected token ids from 0 to {vocab - 1}; "
            "download it again"
        )


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Returns all tensors of a folder by name, lazily. An index, where there is one, says which file holds which
    tensor. Raises UserError.
    """
    placed = read_index(folder)
    tensors: dict[str, mx.array] = {}
    for path in weight_files(folder):
        read_header(path)  # MLX takes overlaps, holes and a name that occurs twice
        try:
            held = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read ({reason}); download or convert it again") from None
        stray = sorted(k for k in held if placed and placed.get(k) != path.name)
        if stray:
            raise UserError(
                f"{path} holds {stray[0]!r}, but {INDEX} does not place it there; download the folder again"
            )
        tensors |= held
    return tensors


def _is_media(name: str) -> bool:
    return name.startswith(MEDIA_PREFIXES) or name.removeprefix("model.").startswith(MEDIA_PREFIXES)


def _unused_tensors(config: TargetConfig, prefix: str) -> set[str]:
    """Google's E2B and E4B files also hold K/V projections for the layers that share K/V; nobody reads them."""
    names = ("k_proj", "v_proj", "k_norm")
    shared = [i for i, layer in enumerate(config.layers) if not layer.owns_kv]
    return {f"{prefix}layers.{i}.self_attn.{name}" for i in shared for name in names}


def _file_path(path: str) -> str:
    """A module's path in the file: the containers of fused linears are ours alone."""
    return path.replace(".qkv.", ".").replace(".gate_up.", ".")


def _assign(
    model: nn.Module,
    tensors: dict[str, mx.array],
    name: Callable[[str], str],
    quantization: QuantizationSpec | None,
    folder: Path,
    dtype: mx.Dtype | None,
) -> None:
    """Puts every tensor in its place, lazily and strictly."""

    def quantised(path: str, module: nn.Module) -> bool | dict[str, Any]:
        file_path = name(_file_path(path))
        if f"{file_path}.scales" not in tensors or not isinstance(module, (Linear, Embedding, ExpertLinear)):
            return False
        form = quantization.of(file_path) if quantization else None
        if form is None:
            raise UserError(
                f"{folder}: {file_path} is quantised but config.json's 'quantization' does not say so; convert it again"
            )
        if module.weight.shape[-1] % form["group_size"]:
            raise UserError(
                f"{folder}: {file_path} has rows of {module.weight.shape[-1]}, config.json's 'quantization' groups of "
                f"{form['group_size']}; convert it again"
            )
        return form

    nn.quantize(model, class_predicate=quantised)
    wanted = {path: (name(_file_path(path)), value) for path, value in tree_flatten(model.parameters())}
    missing = sorted({file for file, _ in wanted.values()} - tensors.keys())
    extra = sorted(tensors.keys() - {file for file, _ in wanted.values()})
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has an unknown", extra)
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(f"{folder} {what} tensor {names[0]!r}{more}; is it a complete, converted Gemma 4 folder?")
    dtype = dtype or _prevailing([tensors[file] for file, _ in wanted.values()])
    loaded = []
    for path, (file, value) in wanted.items():
        tensor = tensors[file]
        if tensor.shape != value.shape:
            raise UserError(f"{folder}: {file} has shape {tensor.shape}, expected {value.shape} by config.json")
        if tensor.dtype not in (INTEGERS.get(value.dtype) or FLOATS):
            raise UserError(f"{folder}: {file} is of {tensor.dtype}, expected what convert writes; download it again")
        loaded.append((path, _cast(tensor, value, dtype)))
    _check_float_types(folder, {file: tensors[file].dtype for file, _ in wanted.values()})
    tensors.clear()
    model.load_weights(loaded)


def _check_float_types(folder: Path, types: dict[str, mx.Dtype]) -> None:
    """Refuses bfloat16 beside float16: nobody writes both, and read as the other a tensor has other values."""
    first = {dtype: file for file, dtype in reversed(types.items())}
    if mx.bfloat16 in first and mx.float16 in first:
        raise UserError(
            f"{folder}: {first[mx.float16]} is of float16 but {first[mx.bfloat16]} of bfloat16; expected one "
            "of the two; download it again"
        )


def _prevailing(tensors: list[mx.array]) -> mx.Dtype | None:
    """The type that most of the floats have, where they have several, else None. A model computes in one type: beside
    16-bit weights a norm of float32 would make float32 of every activation after it.
    """
    sizes: Counter[mx.Dtype] = Counter()
    for tensor in tensors:
        if mx.issubdtype(tensor.dtype, mx.floating):
            sizes[tensor.dtype] += tensor.size
    return sizes.most_common(1)[0][0] if len(sizes) > 1 else None


def _cast(tensor: mx.array, like: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if mx.issubdtype(like.dtype, mx.integer):
        return tensor.astype(like.dtype)
    return tensor if dtype is None else tensor.astype(dtype)


def is_quantized(model: nn.Module) -> bool:
    """Returns whether any module has MLX-quantised weights."""
    return any("scales" in module for module in model.modules())


def format_of(model: nn.Module) -> str:
    """Returns the formats of a model's weights, such as '4-bit' or '4- and 8-bit', or 'unquantised'."""
    bits = sorted({module.bits for module in model.modules() if "scales" in module})
    return f"{'- and '.join(map(str, bits))}-bit" if bits else "unquantised"


def _quantize_drafter(model: Drafter, bits: int) -> None:
    """Lazily, like the load itself: `prepare` evaluates part by part."""

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        sparse = path.startswith("masked_embedding") or (path == "embed_tokens" and model.config.centroids)
        if sparse or not isinstance(module, (Linear, Embedding)):
            return False
        group_size = next((size for size in (64, 32) if module.weight.shape[-1] % size == 0), None)
        wanted = min(bits, HEAD_BITS) if path == "embed_tokens" else bits
        return {"group_size": group_size, "bits": wanted} if group_size else False

    nn.quantize(model, class_predicate=form)


def prepare(model: nn.Module, progress: Progress) -> None:
    """Reads, merges and lays out a model's weights part by part, so that the peak memory stays one part above the
    whole.
    """
    parts = [*model.layers, *(child for name, child in model.children().items() if name != "layers")]
    for done, part in enumerate(parts, 1):
        finish_loading(part)
        progress(done, len(parts))


def step_bytes(model: Gemma4 | Drafter) -> int:
    """Returns the bytes of weights that a target reads for one token of one row, or a drafter for one draft.

    Experts that are not chosen and table rows that are not looked up do not count.
    """
    shares = model.step_shares()
    return sum(
        int(value.nbytes * next((share for part, share in shares.items() if part in path), 1.0))
        for path, value in tree_flatten(model.parameters())
    )


def model_bytes(model: Gemma4 | Drafter) -> int:
    """Returns the bytes of all weights of a loaded model."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))
