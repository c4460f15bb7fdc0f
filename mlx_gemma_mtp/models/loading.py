"""`load_target`, `load_drafter`: local folder -> config -> modules -> strict weights.

What is read is what `convert`, mlx-community and Google write: any prefix of names, one safetensors file or an index
of several, MLX quantisation described in config.json. Whatever is missing or left over is an error that names the
tensor (contents.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError, clipped
from ..files import foreign
from ..files.files import content
from ..files.folder import read_config, weight_files
from ..files.headers import read_headers
from ..files.progress import Progress, no_progress
from ..files.safetensors import Tensor
from . import gemma4
from .config import DrafterConfig, GenerationDefaults, TargetConfig
from .contents import MEDIA, Contents
from .drafter import Drafter
from .gemma4 import Gemma4
from .linear import Embedding, Linear, finish_loading
from .quantization import plain

FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}  # of equally many values the first counts
ONE_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")
LARGEST_FLOAT16 = 65504.0
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

    dtype: of everything that is not quantised; None keeps the file's, or where it has several that of most values (of
    equally many bfloat16, then float16).
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
    model = gemma4.build(config)
    _assign(model, config, folder, dtype)
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
    _assign(model, config, folder, dtype)
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
    """Returns all tensors of a folder by name, lazily. Raises UserError where the headers or the index are broken."""
    read_headers(folder)  # MLX takes overlaps, holes and a name that occurs twice
    return _lazy_tensors(folder)


def _lazy_tensors(folder: Path) -> dict[str, mx.array]:
    """As read_tensors, of a folder whose headers were read."""
    tensors: dict[str, mx.array] = {}
    for path in weight_files(folder):
        try:
            tensors |= mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} cannot be read ({reason}); download or convert it again") from None
    return tensors


def file_path(path: str) -> str:
    """Returns a parameter's plain name in the files: the containers of fused linears are ours alone."""
    return path.replace(".qkv.", ".").replace(".gate_up.", ".")


def _assign(model: nn.Module, config: TargetConfig | DrafterConfig, folder: Path, dtype: mx.Dtype | None) -> None:
    """Puts every tensor in its place, lazily and strictly."""
    headers = read_headers(folder)
    if found := foreign.of_tensors(name for name in headers if not plain(name).startswith(MEDIA)):
        raise found.refusal(folder)
    if config.quantization is None and (expert := next(filter(ONE_EXPERT.search, headers), None)):
        command = foreign.convert_folder_command(folder, "-mlx")
        raise UserError(
            f"{folder} has each expert in a tensor of its own ({clipped(expert)!r}); expected those of a layer in one; "
            f"convert it: {command}"
        )
    contents = Contents.of(config, headers, str(folder))
    contents.check_extras(headers, str(folder))
    forms = {path: form.setting for path, form in contents.formats.items()}
    nn.quantize(model, class_predicate=lambda path, module: forms.get(file_path(path), False))
    places = {path: contents.places[file_path(path)] for path, _ in tree_flatten(model.parameters())}
    prevailing = _prevailing([headers[place.name] for place in places.values()])
    tensors, loaded = _lazy_tensors(folder), []
    if dtype is None and prevailing is not None and prevailing == mx.float16:
        _check_range(folder, {name: tensors[name] for name in {place.name for place in places.values()}})
    dtype = dtype or prevailing
    for path, like in tree_flatten(model.parameters()):
        place = places[path]
        tensor = tensors[place.name]
        if place.rows is not None:
            tensor = tensor[..., slice(*place.rows), :]
        assert tensor.shape == like.shape, f"{path} is {like.shape}, {place.name} {tensor.shape}"
        loaded.append((path, _cast(tensor, like, dtype)))
    tensors.clear()
    model.load_weights(loaded)


def _prevailing(tensors: list[Tensor]) -> mx.Dtype | None:
    """The type that most of the floats have, None where all have one. A model computes in one type: beside 16-bit
    weights a norm of float32 would make float32 of every activation after it. Of two types with equally many values
    the first in FLOATS counts.
    """
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] += math.prod(tensor.shape)
    return FLOATS[max(FLOATS, key=lambda dtype: sizes[dtype])] if len(sizes) > 1 else None


def _check_range(folder: Path, tensors: dict[str, mx.array]) -> None:
    """Raises UserError for a tensor whose values float16 does not reach. Reads those of other floats: they are few."""
    for name, tensor in tensors.items():
        if tensor.dtype in (mx.bfloat16, mx.float32) and mx.abs(tensor).max().item() > LARGEST_FLOAT16:
            raise UserError(
                f"{folder}: {name} has values beyond float16, the type of most of its tensors; expected up to "
                f"{LARGEST_FLOAT16:g}; load it with dtype='bfloat16'"
            )


def _cast(tensor: mx.array, like: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """In the type that is computed in; packed weights and token ids in their module's."""
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
