"""What a folder's files hold of a model: which stored tensor each of its parameters is, and in which format.

Names are plain here: those of the text model without a prefix, experts as `switch_glu` (linear.py's containers, which
the files do not know, left out). Loading, converting and inspecting all judge a folder by `Contents.of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError
from ..files.safetensors import Tensor
from .config import DrafterConfig, LayerSpec, TargetConfig
from .extras import Extra, check_extras, extra_of
from .quantization import FLOATS, Format, plain

Shape = tuple[int, ...]
MEDIA = (
    "vision_tower.",
    "vision_embedder.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "multi_modal_projector.",
)
ORDERING = "masked_embedding.token_ordering"
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None)}
HEADS = ("pre_projection.", "post_projection.", "masked_embedding.")  # of a drafter: no `model.` before these


def shapes_of(config: TargetConfig | DrafterConfig) -> dict[str, Shape]:
    """Returns the shapes of a model's tensors by plain name, as they are before any quantisation.

    H hidden, I intermediate, E experts; what follows from a layer is written with its own heads and widths.
    """
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    per_layer = config.per_layer_size if isinstance(config, TargetConfig) else 0
    if per_layer:
        width = len(config.layers) * per_layer
        shapes["embed_tokens_per_layer.weight"] = (config.per_layer_vocab, width)
        shapes["per_layer_model_projection.weight"] = (width, config.hidden_size)
        shapes["per_layer_projection_norm.weight"] = (per_layer,)
    for index, layer in enumerate(config.layers):
        own = _attention(layer, config.hidden_size) | _feed_forward(layer, config.hidden_size)
        if isinstance(config, TargetConfig):
            own |= _experts(config) | _per_layer_inputs(config)
        shapes |= {f"layers.{index}.{name}": shape for name, shape in own.items()}
    shapes["norm.weight"] = (config.hidden_size,)
    return shapes | (_heads(config) if isinstance(config, DrafterConfig) else {})


def _attention(layer: LayerSpec, H: int) -> dict[str, Shape]:
    dim, keys = layer.kv.head_dim, layer.kv.kv_heads * layer.kv.head_dim
    shapes: dict[str, Shape] = {
        "self_attn.q_proj.weight": (layer.heads * dim, H),
        "self_attn.o_proj.weight": (H, layer.heads * dim),
        "self_attn.q_norm.weight": (dim,),
    }
    if layer.owns_kv:
        shapes |= {"self_attn.k_proj.weight": (keys, H), "self_attn.k_norm.weight": (dim,)}
    if layer.owns_kv and not layer.v_is_k:
        shapes["self_attn.v_proj.weight"] = (keys, H)
    return shapes


def _feed_forward(layer: LayerSpec, H: int) -> dict[str, Shape]:
    I = layer.mlp_size  # noqa: E741
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
        **{f"{norm}_layernorm.weight": (H,) for norm in norms},
        "layer_scalar": (1,),
    }


def _experts(config: TargetConfig) -> dict[str, Shape]:
    if not config.moe:
        return {}
    H, E, I = config.hidden_size, config.moe.num_experts, config.moe.size  # noqa: E741
    norms = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
    return {
        "router.proj.weight": (E, H),
        "router.scale": (H,),
        "router.per_expert_scale": (E,),
        "experts.switch_glu.gate_proj.weight": (E, I, H),
        "experts.switch_glu.up_proj.weight": (E, I, H),
        "experts.switch_glu.down_proj.weight": (E, H, I),
        **{f"{norm}.weight": (H,) for norm in norms},
    }


def _per_layer_inputs(config: TargetConfig) -> dict[str, Shape]:
    H, P = config.hidden_size, config.per_layer_size
    if not P:
        return {}
    return {
        "per_layer_input_gate.weight": (P, H),
        "per_layer_projection.weight": (H, P),
        "post_per_layer_input_norm.weight": (H,),
    }


def _heads(config: DrafterConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "pre_projection.weight": (config.hidden_size, 2 * config.backbone_size),
        "post_projection.weight": (config.backbone_size, config.hidden_size),
    }
    if config.centroids:
        shapes["masked_embedding.centroids.weight"] = (config.centroids, config.hidden_size)
        shapes[ORDERING] = (config.vocab_size,)
    return shapes


def fused(name: str, shape: Shape) -> tuple[str, Shape, tuple[int, int] | None] | None:
    """Returns where Google's files hold an expert tensor of plain name: (the name of the tensor there, its shape, the
    rows of axis -2 that are this one's, None for all); None for what is no expert tensor. Gate rows come first.
    """
    base, _, last = name.rpartition(".experts.switch_glu.")
    if not base:
        return None
    whole, half = FUSED[last.removesuffix(".weight")]
    experts, rows, columns = shape
    if half is None:
        return f"{base}.experts.{whole}", shape, None
    return f"{base}.experts.{whole}", (experts, 2 * rows, columns), (half * rows, (half + 1) * rows)


@dataclass(frozen=True)
class Place:
    """Where a parameter is stored: a tensor's name in the files, and its rows of axis -2, None for all of them."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Contents:
    """A folder's tensors, each accounted for.

    places: by plain name, scales and biases too; formats: by plain module path, of what is quantised; media: names of
    tensors for images and sound, which are not read; extras: what repeats something else.
    """

    places: dict[str, Place]
    formats: dict[str, Format]
    media: tuple[str, ...]
    extras: tuple[Extra, ...]

    @classmethod
    def of(cls, config: TargetConfig | DrafterConfig, tensors: Mapping[str, Tensor], where: str) -> Contents:
        """Reads the names, shapes and types of a folder's tensors. where: what the folder is called.

        Raises UserError, naming the tensor, for what is missing, unknown, doubled, or of another shape or type than
        config.json calls for.
        """
        media = {name: None for name in tensors if plain(name).startswith(MEDIA)}
        return _Reading(config, {n: t for n, t in tensors.items() if n not in media}, where).contents(tuple(media))

    def check_extras(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Raises UserError where what should repeat something else differs from it. Reads these tensors, block by
        block.
        """
        check_extras(self.extras, tensors, where)


class _Reading:
    """One pass over the expected tensors: what was found, and what is left."""

    def __init__(self, config: TargetConfig | DrafterConfig, tensors: Mapping[str, Tensor], where: str):
        self.config, self.where = config, where
        self.names: dict[str, str] = {}
        for name in tensors:
            known = self.names.setdefault(plain(name), name)
            if known != name:
                raise UserError(
                    f"{where} holds {known!r} and {name!r}, which are one tensor; expected one of the two; download "
                    "the folder again"
                )
        self.found = {short: tensors[name] for short, name in self.names.items()}
        self.shapes = shapes_of(config)
        self.prefix = next((self.names[n].removesuffix(n) for n in self.shapes if n in self.names), "")
        self.places: dict[str, Place] = {}
        self.formats: dict[str, Format] = {}

    def contents(self, media: tuple[str, ...]) -> Contents:
        if self.config.quantization:
            self.config.quantization.check_keys(len(self.config.layers), self.where)
        missing = [self._stored(name) for name, shape in self.shapes.items() if not self._holds(name, shape)]
        if missing:
            raise UserError(
                f"{self.where} lacks tensor {missing[0]!r}{_more(missing)}; expected by config.json; is it a complete "
                "Gemma 4 folder? Download or convert it again"
            )
        for name, shape in self.shapes.items():
            self._place(name, shape)
        used = {place.name for place in self.places.values()}
        extras, unknown = [], []
        for name in sorted(set(self.names.values()) - used):
            extra = extra_of(plain(name), self.config)
            if extra:
                extras.append(extra.named(name, self._stored))
            elif not self._unread(plain(name)):
                unknown.append(name)
        if unknown:
            raise self._unknown(unknown)
        return Contents(self.places, self.formats, media, tuple(extras))

    def _stored(self, name: str) -> str:
        """The name of a tensor in this folder; of one that is not there, the name that it would have."""
        if name in self.names:
            return self.names[name]
        if isinstance(self.config, DrafterConfig) and name.startswith(HEADS):
            return name
        split = any(".experts.switch_glu." in known for known in self.names)
        source = fused(name, self.shapes[name]) if name in self.shapes and not split else None
        return self.prefix + (source[0] if source else name)

    def _holds(self, name: str, shape: Shape) -> bool:
        source = fused(name, shape)
        return name in self.names or (source is not None and source[0] in self.names)

    def _place(self, name: str, shape: Shape) -> None:
        """Finds the tensors that one parameter is stored in. Raises UserError where they do not fit."""
        path, stored = name.removesuffix(".weight"), self._stored(name)
        if f"{path}.scales" in self.found and len(shape) > 1 and name in self.names:
            self._place_quantised(path, shape, stored)
            return
        source = None if name in self.names else fused(name, shape)
        short, shape, rows = source or (name, shape, None)
        tensor, stored = self.found[short], self.names[short]
        if tensor.shape != shape:
            raise UserError(
                f"{self.where}: {stored} has shape {tensor.shape}, expected {shape} by config.json; is it the "
                "config.json of these weights?"
            )
        types = ("I32", "I64") if name == ORDERING else FLOATS
        if tensor.dtype not in types:
            raise UserError(
                f"{self.where}: {stored} is of {tensor.dtype}, expected one of {', '.join(types)}; download it again"
            )
        self.places[name] = Place(stored, rows)

    def _place_quantised(self, path: str, shape: Shape, stored: str) -> None:
        stored = stored.removesuffix(".weight")
        if self.config.quantization is None:
            raise UserError(
                f"{self.where}: {stored} is quantised but config.json's 'quantization' does not say so; convert the "
                "original again"
            )
        if f"{path}.global_scale" in self.found:
            raise UserError(
                f"{self.where}: {self.names[f'{path}.global_scale']} is a second scale of nvfp4 weights, which MLX's "
                "products do not take; convert the unquantised original with -q --q-mode nvfp4"
            )
        form = self.config.quantization.of(path, shape, self.found, stored, self.where)
        self.formats[path] = form
        self.places |= {part: Place(self.names[part]) for part, _, _ in form.parts(f"{path}.weight", shape, "BF16")}

    def _unread(self, name: str) -> bool:
        """Google's E2B and E4B files also hold K/V projections for layers that read another layer's; nobody reads
        them.
        """
        own = [layer.owns_kv for layer in self.config.layers] if isinstance(self.config, TargetConfig) else []
        prefixes = (f"layers.{i}.self_attn." for i, owns in enumerate(own) if not owns)
        parts = [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
        return any(part.rpartition(".")[0] in ("k_proj", "v_proj", "k_norm") for part in parts)

    def _unknown(self, names: list[str]) -> UserError:
        return UserError(
            f"{self.where} has an unknown tensor {names[0]!r}{_more(names)}; expected only what config.json calls for; "
            "is it the config.json of these weights?"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
