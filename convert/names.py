"""Which tensors a Gemma 4 checkpoint must hold, and what they are called in the written folder.

Pure functions of the raw config. Shapes follow transformers' `modeling_gemma4.py`; the written
names are mlx-lm's and mlx-vlm's. H hidden, I intermediate, V vocabulary, E experts, L layers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.safetensors import Tensor

from .config import TARGETS

Shape = tuple[int, ...]

MULTIMODAL = (
    "model.vision_tower.",
    "model.vision_embedder.",
    "model.embed_vision.",
    "model.audio_tower.",
    "model.embed_audio.",
)
MEDIA = (*MULTIMODAL, *(prefix.removeprefix("model.") for prefix in MULTIMODAL))  # as published; as mlx-vlm writes


@dataclass(frozen=True)
class Entry:
    """One written tensor: the rows start:stop of axis -2 of a source tensor, or all of it where they are None."""

    name: str
    shape: Shape
    source: str
    source_shape: Shape
    rows: tuple[int, int] | None = None


def target_entries(text: dict, kind: str) -> list[Entry]:
    """Returns the written tensors of a target whose source has model_type `kind`."""
    entries = []
    for name, shape in _text_tensors(text):
        entries += _moved(name, shape, TARGETS[kind] + name, "language_model.model.")
    return entries


def drafter_entries(config: dict, text: dict) -> list[Entry]:
    """Returns the written tensors of a drafter: the source's names, unchanged."""
    shapes = {f"model.{name}": shape for name, shape in _text_tensors(text)}
    hidden, backbone = text["hidden_size"], config["backbone_hidden_size"]
    shapes["pre_projection.weight"] = (hidden, 2 * backbone)
    shapes["post_projection.weight"] = (backbone, hidden)
    if config.get("use_ordered_embeddings"):
        shapes["masked_embedding.centroids.weight"] = (config["num_centroids"], hidden)
        shapes["masked_embedding.token_ordering"] = (text["vocab_size"],)
    return [Entry(name, shape, name, shape) for name, shape in shapes.items()]


def kind(name: str) -> str:
    """Returns what a tensor is, whichever its layer: `self_attn.q_proj`, `input_layernorm`, `embed_tokens`."""
    name = re.sub(r"^(language_model\.)?model\.(language_model\.)?(layers\.\d+\.)?", "", name)
    return name.removesuffix(".weight")


def group(entry: Entry) -> str:
    """Returns the kind of module that holds a matrix, as people call it; vectors are one group."""
    if len(entry.shape) == 1 and not is_integer(entry.name):
        return "norms and scalars"
    return kind(entry.name).split(".")[0]


def kv_shape(text: dict, layer_type: str) -> tuple[int, int]:
    """Returns (key/value heads, their width) of a layer.

    Full layers have their own number of heads only under attention_k_eq_v.
    """
    full = layer_type == "full_attention"
    own_heads = full and text["attention_k_eq_v"] and text["num_global_key_value_heads"]
    return own_heads or text["num_key_value_heads"], text["global_head_dim"] if full else text["head_dim"]


def is_integer(name: str) -> bool:
    """Returns whether a tensor is the one of token ids (a drafter's); all others are floats, or quantised."""
    return name.endswith(".token_ordering")


def check(entries: list[Entry], found: dict[str, Tensor], text: dict, kind: str) -> None:
    """Raises UserError unless each source tensor is used once or known to be unused, and each expected one is there."""
    if any(name.startswith("language_model.model.") for name in found):
        raise UserError(
            "tensors named language_model.model.*: the source is in the MLX layout already;"
            " expected a Hugging Face checkpoint; use the folder as it is"
        )
    expected = {entry.source: entry.source_shape for entry in entries}
    for name, shape in expected.items():
        if name not in found:
            raise UserError(
                f"tensor {name!r} is missing; expected shape {list(shape)}; download the weights"
                " again, or check that config.json belongs to them"
            )
        if found[name].shape != shape:
            raise UserError(
                f"tensor {name!r} has shape {list(found[name].shape)}; expected {list(shape)} by"
                " config.json; use the config.json of these weights"
            )
    unused = unused_kv(text, kind)
    for name in sorted(found.keys() - expected.keys()):
        if name not in unused and not name.startswith(MULTIMODAL):
            raise UserError(
                f"tensor {name!r} is unknown; expected only tensors that config.json calls for;"
                " use the config.json of these weights"
            )


def _text_tensors(text: dict) -> Iterator[tuple[str, Shape]]:
    """(name without prefix, shape) of the text model, in the source's spelling."""
    H, L, P = text["hidden_size"], text["num_hidden_layers"], text["hidden_size_per_layer_input"]
    yield "embed_tokens.weight", (text["vocab_size"], H)
    if P:
        yield "embed_tokens_per_layer.weight", (text["vocab_size_per_layer_input"], L * P)
        yield "per_layer_model_projection.weight", (L * P, H)
        yield "per_layer_projection_norm.weight", (P,)
    for index in range(L):
        for name, shape in _layer_tensors(text, index):
            yield f"layers.{index}.{name}", shape
    yield "norm.weight", (H,)


def _layer_tensors(text: dict, index: int) -> Iterator[tuple[str, Shape]]:
    H, P = text["hidden_size"], text["hidden_size_per_layer_input"]
    shared = index >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    wide = shared and text["use_double_wide_mlp"]
    I = text["intermediate_size"] * (2 if wide else 1)  # noqa: E741
    yield from _attention_tensors(text, text["layer_types"][index], owns_kv=not shared)
    yield "mlp.gate_proj.weight", (I, H)
    yield "mlp.up_proj.weight", (I, H)
    yield "mlp.down_proj.weight", (H, I)
    yield "input_layernorm.weight", (H,)
    yield "post_attention_layernorm.weight", (H,)
    yield "pre_feedforward_layernorm.weight", (H,)
    yield "post_feedforward_layernorm.weight", (H,)
    yield "layer_scalar", (1,)
    if text["enable_moe_block"]:
        yield from _moe_tensors(text)
    if P:
        yield "per_layer_input_gate.weight", (P, H)
        yield "per_layer_projection.weight", (H, P)
        yield "post_per_layer_input_norm.weight", (H,)


def _attention_tensors(text: dict, layer_type: str, owns_kv: bool) -> Iterator[tuple[str, Shape]]:
    H, full = text["hidden_size"], layer_type == "full_attention"
    k_eq_v = full and text["attention_k_eq_v"]
    kv_heads, dim = kv_shape(text, layer_type)
    yield "self_attn.q_proj.weight", (text["num_attention_heads"] * dim, H)
    yield "self_attn.o_proj.weight", (H, text["num_attention_heads"] * dim)
    yield "self_attn.q_norm.weight", (dim,)
    if owns_kv:
        yield "self_attn.k_proj.weight", (kv_heads * dim, H)
        yield "self_attn.k_norm.weight", (dim,)
    if owns_kv and not k_eq_v:
        yield "self_attn.v_proj.weight", (kv_heads * dim, H)


def _moe_tensors(text: dict) -> Iterator[tuple[str, Shape]]:
    H, E, I = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]  # noqa: E741
    yield "router.proj.weight", (E, H)
    yield "router.scale", (H,)
    yield "router.per_expert_scale", (E,)
    yield "experts.gate_up_proj", (E, 2 * I, H)  # gate rows first
    yield "experts.down_proj", (E, H, I)
    yield "pre_feedforward_layernorm_2.weight", (H,)
    yield "post_feedforward_layernorm_1.weight", (H,)
    yield "post_feedforward_layernorm_2.weight", (H,)


def _moved(name: str, shape: Shape, source: str, prefix: str) -> list[Entry]:
    """A text tensor under its written name; the fused expert tensor becomes two."""
    base, _, last = name.rpartition(".experts.")
    if last == "gate_up_proj":
        experts, rows, hidden = shape
        half = (experts, rows // 2, hidden)
        return [
            Entry(f"{prefix}{base}.experts.switch_glu.{part}.weight", half, source, shape, span)
            for part, span in (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows)))
        ]
    if last == "down_proj":
        name = f"{base}.experts.switch_glu.down_proj.weight"
    return [Entry(prefix + name, shape, source, shape)]


def unused_kv(text: dict, kind: str) -> set[str]:
    """Returns the K/V tensors that E2B and E4B files hold for layers that read another layer's K/V."""
    if kind not in TARGETS:
        return set()
    layers = text["num_hidden_layers"]
    return {
        f"{TARGETS[kind]}layers.{index}.self_attn.{part}.weight"
        for index in range(layers - text["num_kv_shared_layers"], layers)
        for part in ("k_proj", "v_proj", "k_norm")
    }
