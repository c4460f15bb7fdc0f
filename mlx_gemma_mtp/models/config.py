"""What a checkpoint says about itself: frozen, typed, complete.

Every irregularity of `config.json` ends in raw_config.py and in the `from_dict` functions here; nothing after them
looks at a raw dictionary. Sources: the published Gemma 4 configs and transformers' `Gemma4TextConfig` /
`Gemma4AssistantConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..cache.spec import KVSpec
from ..errors import UserError, shown
from .quantization import QuantizationSpec
from .raw_config import DRAFTER_TYPES, FULL, LARGEST, SLIDING, TARGET_TYPES, Reader, layer_types, text_fields

Kind = Literal["sliding", "full"]

MEDIA = ("image", "audio", "video")
# Settings are computed with in float32. Within these limits no combination of them overflows or divides by zero.
MOST = 1e15  # of temperature, penalties and biases
LEAST_TEMPERATURE = 1e-6  # anything lower is greedy
LARGEST_TOP_K = 2**31 - 1  # anything more keeps every token, too
LEAST_TOP_P = 1e-6  # lower than the likeliest token's share in any vocabulary below a million: keeps that token alone
# What a generation_config.json means that does not say.
GENERATION_DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
# What a drafter's config.json means that does not say, by transformers' `Gemma4AssistantConfig`.
ASSISTANT = {"use_ordered_embeddings": False, "num_centroids": 2048, "centroid_intermediate_top_k": 32}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: pair i of (x[i], x[i + head_dim / 2]) turns by position * theta ** (-2 i / head_dim).

    Only the first `pairs` pairs turn (`rope_type: proportional` leaves the rest alone).
    """

    theta: float
    pairs: int
    head_dim: int


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `kv_layer` indexes the cache; a layer that does not own it has no K/V projections."""

    kind: Kind
    heads: int
    kv: KVSpec
    kv_layer: int
    owns_kv: bool
    v_is_k: bool  # attention_k_eq_v: V is the raw K projection
    rope: RopeSpec
    mlp_size: int


@dataclass(frozen=True)
class MoESpec:
    """The experts of a layer: how many there are, how many each token takes, and the width of one."""

    num_experts: int
    top_k: int
    size: int


@dataclass(frozen=True)
class TargetConfig:
    """A target's architecture, checked and complete."""

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    kv: tuple[KVSpec, ...]  # one for each KV-owning layer: what the cache is made of
    eps: float
    softcap: float | None
    moe: MoESpec | None
    per_layer_size: int  # width of the per-layer inputs (E2B, E4B), 0 without
    per_layer_vocab: int
    context: int
    eos_token_ids: tuple[int, ...]
    media_token_ids: tuple[int, ...]  # image, audio and video placeholders, which a text-only run refuses
    quantization: QuantizationSpec | None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TargetConfig:
        """Reads a `config.json` (a multimodal wrapper with `text_config`, or the text model alone).

        Raises UserError where a key that we depend on is missing or has a value that we do not know.
        """
        kind = raw.get("model_type")
        if kind in DRAFTER_TYPES:
            raise UserError(
                f"model_type {shown(kind)} is a drafter, expected a target; give it as --draft-model instead"
            )
        if kind not in TARGET_TYPES:
            raise UserError(
                f"model_type {shown(kind)} is not a Gemma 4 target; expected one of {', '.join(TARGET_TYPES)}"
            )
        text = Reader(text_fields(raw), "config.json")
        first_shared = text.int("num_hidden_layers") - text.int("num_kv_shared_layers", minimum=0)
        layers = tuple(_layers(text, first_shared))
        _check_constants(text)
        config = cls(
            hidden_size=text.int("hidden_size"),
            vocab_size=text.int("vocab_size"),
            layers=layers,
            kv=tuple(layer.kv for layer in layers if layer.owns_kv),
            eps=text.float("rms_norm_eps"),
            softcap=text.optional_float("final_logit_softcapping", minimum=1e-3),
            moe=_moe(text) if text.bool("enable_moe_block") else None,
            per_layer_size=text.int("hidden_size_per_layer_input", minimum=0),
            per_layer_vocab=_per_layer_vocab(text),
            context=text.int("max_position_embeddings"),
            eos_token_ids=_ids(raw if "eos_token_id" in raw else text.raw, "eos_token_id", "config.json"),
            media_token_ids=tuple(token for name in MEDIA for token in _ids(raw, f"{name}_token_id", "config.json")),
            quantization=QuantizationSpec.from_dict(raw),
        )
        _check_vocabulary(config.eos_token_ids, config.vocab_size, "config.json: eos_token_id")
        return config


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter's architecture, paired with its target: layers[i].kv_layer is the target's cache layer that the
    drafter's layer reads.
    """

    hidden_size: int
    backbone_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    eps: float
    centroids: int  # 0: dense head
    centroid_top_k: int
    quantization: QuantizationSpec | None

    @classmethod
    def from_dict(cls, raw: dict[str, Any], target: TargetConfig) -> DrafterConfig:
        """Reads a drafter's `config.json` and pairs it with `target`.

        Raises UserError for another architecture, or for a drafter of another target (hidden size, vocabulary, layer
        kinds, heads).
        """
        kind = raw.get("model_type")
        if kind in TARGET_TYPES:
            raise UserError(
                f"model_type {shown(kind)} is a target, expected a drafter; give its '-assistant', or 'none'"
            )
        if kind not in DRAFTER_TYPES:
            raise UserError(
                f"model_type {shown(kind)} is not a Gemma 4 drafter; expected one of {', '.join(DRAFTER_TYPES)}"
            )
        text = Reader(text_fields(raw), "the drafter's config.json, text_config")
        outer = Reader(ASSISTANT | raw, "the drafter's config.json")
        _check_constants(text)
        ordered = outer.bool("use_ordered_embeddings")
        config = cls(
            hidden_size=text.int("hidden_size"),
            backbone_size=outer.int("backbone_hidden_size"),
            vocab_size=text.int("vocab_size"),
            layers=tuple(_paired_layers(text, target)),
            eps=text.float("rms_norm_eps"),
            centroids=outer.int("num_centroids") if ordered else 0,
            centroid_top_k=outer.int("centroid_intermediate_top_k") if ordered else 0,
            quantization=QuantizationSpec.from_dict(raw),
        )
        _match("hidden size", config.backbone_size, target.hidden_size)
        _match("vocabulary", config.vocab_size, target.vocab_size)
        if ordered and config.vocab_size % config.centroids:
            raise UserError(
                f"num_centroids is {config.centroids}, expected a divisor of the vocabulary of {config.vocab_size}"
            )
        if config.centroid_top_k > config.centroids:
            raise UserError(
                f"centroid_intermediate_top_k is {config.centroid_top_k}, expected at most num_centroids, "
                f"{config.centroids}"
            )
        return config


@dataclass(frozen=True)
class GenerationDefaults:
    """The settings that generation_config.json recommends. Greedy where do_sample is false."""

    temperature: float
    top_p: float
    top_k: int
    eos_token_ids: tuple[int, ...]
    suppress_token_ids: tuple[int, ...]
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> GenerationDefaults:
        """Reads a `generation_config.json`. null is unset, top_k may be 0, -1 or 64.0, flags may be 0 or 1.

        Without do_sample only repetition_penalty and the token ids are read. Other keys never are. Raises UserError,
        naming the key, for a value without a meaning.
        """
        where = "generation_config.json"
        if not isinstance(raw, dict):
            raise UserError(f"{where} is {shown(raw)}, expected a JSON object")
        given = {k: _settled(v) for k, v in raw.items() if v is not None}
        reader = Reader(GENERATION_DEFAULTS | given, where)
        if reader.raw["do_sample"] in (0, 1):
            reader.raw["do_sample"] = bool(reader.raw["do_sample"])
        sampled = reader.bool("do_sample")
        return cls(
            temperature=reader.float("temperature", maximum=MOST) if sampled else 0.0,
            top_p=max(reader.float("top_p", maximum=1.0), LEAST_TOP_P) if sampled else 1.0,
            top_k=_top_k(reader) if sampled else 0,
            eos_token_ids=_ids(raw, "eos_token_id", where),
            suppress_token_ids=_ids(raw, "suppress_tokens", where),
            min_p=reader.float("min_p", maximum=1.0) if sampled else 0.0,
            repetition_penalty=reader.float("repetition_penalty", minimum=1 / MOST, maximum=MOST),
        )

    def check_vocabulary(self, size: int) -> None:
        """Raises UserError for token ids that a vocabulary of this size does not have."""
        for key, ids in (("eos_token_id", self.eos_token_ids), ("suppress_tokens", self.suppress_token_ids)):
            _check_vocabulary(ids, size, f"generation_config.json: {key}")


def _check_constants(text: Reader) -> None:
    """Values that every Gemma 4 shares and that this code relies on."""
    for key, expected in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("tie_word_embeddings", True),
        ("attention_bias", False),
    ):
        if text.raw.get(key, expected) != expected:
            raise UserError(
                f"{text.where}: {key} is {shown(text.raw[key])}, expected {expected!r} as in every published Gemma 4"
            )
    if text.raw.get("use_bidirectional_attention") == "all":
        raise UserError(f"{text.where}: use_bidirectional_attention is 'all', expected a model that writes text")


def _kinds(text: Reader) -> list[Kind]:
    names: dict[str, Kind] = {SLIDING: "sliding", FULL: "full"}
    return [names[each] for each in layer_types(text)]


def _head_dim(text: Reader, kind: Kind) -> int:
    """The width of a layer's heads; full layers have the sliding ones' where theirs is null."""
    own = kind == "full" and text.raw["global_head_dim"] is not None
    return text.int("global_head_dim" if own else "head_dim")


def _kv_heads(text: Reader, kind: Kind) -> int:
    """Full layers have their own number of K/V heads only under attention_k_eq_v (as in transformers)."""
    if kind == "full" and text.bool("attention_k_eq_v") and text.raw["num_global_key_value_heads"] is not None:
        return text.int("num_global_key_value_heads")
    return text.int("num_key_value_heads")


def _rope(text: Reader, kind: Kind, head_dim: int) -> RopeSpec:
    """rope_type `default` turns every pair, `proportional` the first partial_rotary_factor of them. Its older name is
    `type`.
    """
    ropes = Reader(text.object("rope_parameters"), f"{text.where}, rope_parameters")
    rope = Reader(ropes.object(f"{kind}_attention"), f"{ropes.where}.{kind}_attention")
    rope_type = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if rope_type not in ("default", "proportional"):
        raise UserError(f"{rope.where}: rope_type is {shown(rope_type)}, expected 'default' or 'proportional'")
    shares = rope_type == "proportional" and "partial_rotary_factor" in rope.raw
    factor = rope.float("partial_rotary_factor", maximum=1.0) if shares else 1.0
    return RopeSpec(rope.float("rope_theta", minimum=1.0), int(factor * head_dim // 2), head_dim)


def _spec(text: Reader, kind: Kind, kv_layer: int, owns_kv: bool, mlp_size: int) -> LayerSpec:
    head_dim, heads, kv_heads = _head_dim(text, kind), text.int("num_attention_heads"), _kv_heads(text, kind)
    if heads * head_dim > LARGEST:
        raise UserError(
            f"{text.where}: num_attention_heads {heads} of {head_dim} are too large; expected a Gemma 4 config"
        )
    if heads % kv_heads:
        raise UserError(f"{text.where}: num_attention_heads {heads} is no multiple of {kv_heads} key/value heads")
    window = text.int("sliding_window") if kind == "sliding" else None
    v_is_k = text.bool("attention_k_eq_v") and kind == "full"
    kv = KVSpec(kv_heads, head_dim, window)
    return LayerSpec(kind, heads, kv, kv_layer, owns_kv, v_is_k, _rope(text, kind, head_dim), mlp_size)


def _layers(text: Reader, first_shared: int) -> list[LayerSpec]:
    """The target's layers: those from `first_shared` on read the last own K/V of their kind (E2B, E4B)."""
    kinds = _kinds(text)
    source = {kind: i for i, kind in enumerate(kinds[: max(first_shared, 0)])}
    wide = text.bool("use_double_wide_mlp")
    layers = []
    for i, kind in enumerate(kinds):
        owns = i < first_shared
        if not owns and kind not in source:
            raise UserError(
                f"{text.where}: layer {i} shares {kind} K/V but no layer below num_kv_shared_layers owns any"
            )
        size = text.int("intermediate_size") * (2 if wide and not owns else 1)
        layers.append(_spec(text, kind, i if owns else source[kind], owns, size))
    return layers


def _paired_layers(text: Reader, target: TargetConfig) -> list[LayerSpec]:
    """The drafter's layers, each reading the target's last own K/V of the same kind."""
    source = {layer.kind: layer for layer in target.layers if layer.owns_kv}
    layers = []
    for kind in _kinds(text):
        if kind not in source:
            raise UserError(
                f"the drafter has a {kind} attention layer but the target has none; is it the drafter of another model?"
            )
        owner = source[kind]
        spec = _spec(text, kind, owner.kv_layer, owns_kv=False, mlp_size=text.int("intermediate_size"))
        _match(f"{kind} key/value heads", spec.kv.kv_heads, owner.kv.kv_heads)
        _match(f"{kind} head size", spec.kv.head_dim, owner.kv.head_dim)
        _match("sliding window", spec.kv.window, owner.kv.window)
        layers.append(spec)
    return layers


def _match(what: str, drafter: int | None, target: int | None) -> None:
    if drafter != target:
        raise UserError(
            f"the drafter was made for another target: its {what} is {drafter}, the target's is {target}; "
            "give the '-assistant' of the same model, or --draft-model none"
        )


def _moe(text: Reader) -> MoESpec:
    moe = MoESpec(text.int("num_experts"), text.int("top_k_experts"), text.int("moe_intermediate_size"))
    if moe.top_k > moe.num_experts:
        raise UserError(f"{text.where}: top_k_experts is {moe.top_k}, expected at most num_experts, {moe.num_experts}")
    return moe


def _settled(value: Any) -> Any:
    """64 for 64.0: some writers know no integers."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _top_k(reader: Reader) -> int:
    """Tokens to keep, 0 for all."""
    value = reader.raw["top_k"]
    if isinstance(value, int) and value > LARGEST_TOP_K:
        return LARGEST_TOP_K
    return max(reader.int("top_k", minimum=-1, maximum=LARGEST_TOP_K), 0)


def _ids(raw: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """A token id, a list of them (with nulls), or nothing; each once, in the order of the file."""
    value = raw.get(key)
    values = [_settled(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
    for each in values:
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each <= LARGEST:
            raise UserError(
                f"{where}: {key} has {shown(each)}, expected a token id or a list of token ids; correct the JSON file"
            )
    return tuple(dict.fromkeys(values))


def _check_vocabulary(ids: tuple[int, ...], size: int, what: str) -> None:
    beyond = [each for each in ids if each >= size]
    if beyond:
        raise UserError(f"{what} has {beyond[0]}, expected 0 to {size - 1} by the vocabulary; correct the JSON file")


def _per_layer_vocab(text: Reader) -> int:
    """Returns the rows of the per-layer table. Raises UserError where the vocabulary is larger."""
    size = text.int("vocab_size_per_layer_input", minimum=0)
    if text.int("hidden_size_per_layer_input", minimum=0) and size < text.int("vocab_size"):
        raise UserError(
            f"{text.where}: vocab_size_per_layer_input is {size}, expected at least the vocab_size of "
            f"{text.raw['vocab_size']}: each token is looked up in both tables"
        )
    return size
