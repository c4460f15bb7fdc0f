"""Tensors that a folder may hold although nothing needs them: they repeat another tensor or what config.json says.

Trainers and older converters save them. One that says the same is left out; one that says something else is refused,
since the model that was meant would compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from ..files.safetensors import Tensor
from .config import DrafterConfig, LayerSpec, RopeSpec, TargetConfig
from .quantization import MATRIX

BLOCK_BYTES = 16 * 2**20  # of each of two tensors that are compared
LONGEST = 1 << 20  # bytes of what is compared with values
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
# Of a type's rounding, relative and absolute.
TOLERANCES = {
    "BF16": (2**-7, 0.0),
    "F16": (2**-9, 2**-23),
    "F32": (1e-4, 0.0),
    "F64": (1e-4, 0.0),
}  # relative, absolute
INV_FREQ = re.compile(
    r"(layers\.(?P<layer>\d+)\.self_attn\.)?(rotary_emb(_local)?)\.((?P<kind>sliding|full)_attention_)?(original_)?inv_freq"
)
ONES = re.compile(r"layers\.(?P<layer>\d+)\.(?P<norm>self_attn\.v_norm|router\.norm)\.weight")


@dataclass(frozen=True)
class Extra:
    """A tensor that must say what something else says.

    name: its own; twin: the tensor that it repeats, or None; values: else the values that it may have, any one of
    them; meaning: what it repeats, in words.
    """

    name: str
    meaning: str
    twin: str | None = None
    values: tuple[np.ndarray, ...] = ()

    def named(self, name: str, stored: Callable[[str], str]) -> Extra:
        """Returns it with the names that the tensors have in the files."""
        twin = stored(self.twin) if self.twin else None
        return replace(self, name=name, twin=twin, meaning=twin or self.meaning)


def extra_of(name: str, config: TargetConfig | DrafterConfig) -> Extra | None:
    """Returns what a tensor of this plain name must repeat; None for a tensor that means something by itself."""
    if name.startswith("lm_head.") and name != "lm_head.bias":
        return Extra(name, "", twin=f"embed_tokens.{name.removeprefix('lm_head.')}")
    if key := re.fullmatch(r"layers\.(\d+)\.self_attn\.v_proj\.(weight|scales|biases)", name):
        layer = _layer(key[1], config)
        return Extra(name, "", twin=name.replace("v_proj", "k_proj")) if layer and _shares_k(layer) else None
    if found := INV_FREQ.fullmatch(name):
        layer = _layer(found["layer"], config) if found["layer"] else None
        layers = [layer] if layer else [] if found["layer"] else config.layers
        ropes = {each.rope for each in layers if found["kind"] in (None, each.kind)}
        return Extra(name, "the rotation by config.json", values=tuple(v for rope in ropes for v in _frequencies(rope)))
    if found := ONES.fullmatch(name):
        layer = _layer(found["layer"], config)
        size = config.hidden_size if found["norm"] == "router.norm" else layer.kv.head_dim if layer else 0
        return Extra(name, "a norm without weights (all ones)", values=(np.ones(size),))
    if name.endswith(".bias") and MATRIX.fullmatch(name.removesuffix(".bias")):
        return Extra(name, "no bias (all zeros)", values=(np.zeros(1),))
    value = _scalars(config).get(re.sub(r"^layers\.\d+\.", "", name))
    return None if value is None else Extra(name, f"{value:g} by config.json", values=(np.array([value]),))


def check_extras(extras: tuple[Extra, ...], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError for the first extra that differs from what it should repeat. Reads them, and their twins, block
    by block.
    """
    for extra in extras:
        tensor = tensors[extra.name]
        same = _same(tensor, tensors.get(extra.twin)) if extra.twin else _among(tensor, extra.values)
        if not same:
            raise UserError(
                f"{where}: {extra.name} differs from {extra.meaning}, which it should repeat; a Gemma 4 has no such "
                "tensor of its own: take the original checkpoint"
            )


def _layer(index: str, config: TargetConfig | DrafterConfig) -> LayerSpec | None:
    return config.layers[int(index)] if int(index) < len(config.layers) else None


def _shares_k(layer: LayerSpec) -> bool:
    return layer.owns_kv and layer.v_is_k


def _frequencies(rope: RopeSpec) -> Iterator[np.ndarray]:
    """What writers keep as inverse frequencies: of the pairs that turn, of these and zeros for those that do not, or of
    all pairs, of which config.json says how many turn.
    """
    half = rope.head_dim // 2
    every = rope.theta ** (-2.0 * np.arange(half) / rope.head_dim)
    yield every
    yield every[: rope.pairs]
    yield np.where(np.arange(half) < rope.pairs, every, 0.0)


def _scalars(config: TargetConfig | DrafterConfig) -> dict[str, float]:
    """Factors that follow from sizes, under the names that they have in transformers and mlx-lm."""
    root = config.hidden_size**0.5
    per_layer = config.per_layer_size if isinstance(config, TargetConfig) else 0
    scalars = {"embed_scale": root, "embed_tokens.embed_scale": root, "router.scalar_root_size": 1 / root}
    if per_layer:
        scalars["embed_tokens_per_layer.embed_scale"] = per_layer**0.5
        scalars["per_layer_input_scale"] = 2**-0.5
        scalars["per_layer_model_projection_scale"] = 1 / root
    return scalars


def _same(tensor: Tensor, twin: Tensor | None) -> bool:
    """Whether two tensors hold the same values; two types of floats may."""
    if twin is None or tensor.shape != twin.shape:
        return False
    if tensor.dtype == twin.dtype:
        blocks = zip(_blocks(tensor, BLOCK_BYTES), _blocks(twin, BLOCK_BYTES), strict=True)
        return all(one == other for one, other in blocks)
    if tensor.dtype not in NUMPY or twin.dtype not in NUMPY:
        return False
    count = BLOCK_BYTES // 8
    pairs = zip(*(_blocks(each, count * np.dtype(NUMPY[each.dtype]).itemsize) for each in (tensor, twin)), strict=True)
    return all(np.array_equal(_floats(a, tensor.dtype), _floats(b, twin.dtype)) for a, b in pairs)


def _among(tensor: Tensor, values: tuple[np.ndarray, ...]) -> bool:
    """Whether a tensor has, up to rounding, one of these values. A single one stands for any number of its kind."""
    if tensor.dtype not in NUMPY or tensor.nbytes > LONGEST:
        return False
    held = np.concatenate([_floats(block, tensor.dtype) for block in _blocks(tensor, LONGEST)] or [np.zeros(0)])
    relative, absolute = TOLERANCES[tensor.dtype]
    return any(
        value.size in (1, held.size) and held.size > 0 and np.allclose(held, value, rtol=relative, atol=absolute)
        for value in values
    )


def _blocks(tensor: Tensor, size: int) -> Iterator[bytes]:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.nbytes, size):
            block = file.read(min(size, tensor.nbytes - start))
            if len(block) != min(size, tensor.nbytes - start):
                raise UserError(f"{tensor.path}: ended early; download it again")
            yield block


def _floats(block: bytes, dtype: str) -> np.ndarray:
    """float64, in which all of them are exact."""
    values = np.frombuffer(block, NUMPY[dtype])
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
