"""`load_target`, `load_drafter`: local folder -> config -> modules -> strict weights.

What is read is what `convert` and mlx-community write: MLX names, one safetensors file or an index of several, MLX
quantisation described in config.json. Whatever is missing or left over is an error that names the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import gemma4
from .config import DrafterConfig, GenerationDefaults, QuantizationSpec, TargetConfig
from .drafter import Drafter
from .errors import UserError
from .linear import Embedding, Linear, settle

MEDIA_PREFIXES = (
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "vision_embedder.",
    "multi_modal_projector.",
)
DRAFTER_TRUNK = ("embed_tokens", "layers.", "norm")
Progress = Callable[[int, int], None]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BITS = (2, 3, 4, 5, 6, 8)  # of MLX's affine quantisation
HEAD_BITS = 4  # at most, of a drafter's vocabulary head: the largest part of a draft step's bytes


def no_progress(done: int, total: int) -> None:
    """Nobody watches."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return _read_json(folder / "config.json", f"{folder} is no model folder: it has no config.json")


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """generation_config.json, or greedy where there is none."""
    path = folder / "generation_config.json"
    return GenerationDefaults.from_dict(_read_json(path, "") if path.is_file() else {})


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{missing}; expected a converted Gemma 4 folder (python -m convert --hf-path SOURCE --mlx-path OUT)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; download or convert the folder again") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds {type(raw).__name__}, expected a JSON object; download or convert the folder again"
        )
    return raw


def load_target(folder: Path, dtype: mx.Dtype | None = None, progress: Progress = no_progress) -> gemma4.Gemma4:
    """The target in `folder`, evaluated. dtype: of everything not quantised; None keeps the file's.

    progress: told parts done and in all. Raises UserError for whatever is missing, left over, broken or of another
    shape.
    """
    config = TargetConfig.from_dict(read_config(folder))
    tensors = read_tensors(folder)
    model = gemma4.build(config)
    prefix = next((p for p in ("language_model.model.", "model.") if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None or any(".experts.gate_up_proj" in name for name in tensors):
        raise UserError(
            f"{folder} has Hugging Face tensor names; convert it first: "
            f"python -m convert --hf-path {folder} --mlx-path {folder.name}-mlx"
        )
    unused = _unused_tensors(config, prefix)
    tensors = {k: v for k, v in tensors.items() if not _is_media(k) and k.rsplit(".", 1)[0] not in unused}
    _assign(model, tensors, lambda path: prefix + path, config.quantization, folder, dtype)
    _prepare(model, progress)
    return model


def load_drafter(
    folder: Path,
    target: TargetConfig,
    dtype: mx.Dtype | None = None,
    progress: Progress = no_progress,
    bits: int | None = None,
) -> Drafter:
    """The drafter in `folder`, paired with its target's config; otherwise as `load_target`.

    bits: quantise its matrices while loading, as `convert --pair -q` does with 8: the head at 4 bits or fewer, the
    centroids not at all. Raises UserError where the folder is quantised already.
    """
    config = DrafterConfig.from_dict(read_config(folder), target)
    if bits is not None and config.quantization is not None:
        raise UserError(f"{folder} is quantised already; leave out draft_bits ({bits}), or take the bf16 drafter")
    model = Drafter(config)
    name = lambda path: f"model.{path}" if path.startswith(DRAFTER_TRUNK) else path  # noqa: E731
    _assign(model, read_tensors(folder), name, config.quantization, folder, dtype)
    if bits is not None:
        _quantize_drafter(model, bits)
    _prepare(model, progress)
    return model


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder, lazily."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index, "").get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, mx.array] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(
                f"{folder} has no weight file {name!r}; expected it beside config.json: download the folder again"
            )
        try:
            tensors |= mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is no complete safetensors file ({error}); download or convert it again") from None
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
        if f"{file_path}.scales" not in tensors:
            return False
        if quantization is None:
            raise UserError(
                f"{folder}: {file_path} is quantised but config.json has no 'quantization'; convert it again"
            )
        return quantization.of(file_path)

    nn.quantize(model, class_predicate=quantised)
    wanted = {path: (name(_file_path(path)), value) for path, value in tree_flatten(model.parameters())}
    missing = sorted({file for file, _ in wanted.values()} - tensors.keys())
    extra = sorted(tensors.keys() - {file for file, _ in wanted.values()})
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has an unknown", extra)
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(f"{folder} {what} tensor {names[0]!r}{more}; is it a complete, converted Gemma 4 folder?")
    loaded = []
    for path, (file, value) in wanted.items():
        tensor = tensors[file]
        if tensor.shape != value.shape:
            raise UserError(f"{folder}: {file} has shape {tensor.shape}, expected {value.shape} by config.json")
        loaded.append((path, _cast(tensor, value, dtype)))
    tensors.clear()
    model.load_weights(loaded)


def _cast(tensor: mx.array, like: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if mx.issubdtype(like.dtype, mx.integer):
        return tensor.astype(like.dtype)
    return tensor if dtype is None else tensor.astype(dtype)


def is_quantized(model: nn.Module) -> bool:
    """Whether any module has MLX-quantised weights."""
    return any("scales" in module for module in model.modules())


def _quantize_drafter(model: Drafter, bits: int) -> None:
    """Lazily, like the load itself: `_prepare` evaluates part by part."""

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.startswith("masked_embedding") or not isinstance(module, (Linear, Embedding)):
            return False
        group_size = next((size for size in (64, 32) if module.weight.shape[-1] % size == 0), None)
        wanted = min(bits, HEAD_BITS) if path == "embed_tokens" else bits
        return {"group_size": group_size, "bits": wanted} if group_size else False

    nn.quantize(model, class_predicate=form)


def _prepare(model: nn.Module, progress: Progress) -> None:
    """Reads, merges and lays out part by part, so that the peak stays one part above the whole."""
    parts = [*model.layers, *(child for name, child in model.children().items() if name != "layers")]
    for done, part in enumerate(parts, 1):
        settle(part)
        progress(done, len(parts))
