"""Folders as public conversions have them, at toy size: what differs from ours in config.json, names and formats.

Made from the checkpoints of checkpoints.py. Nothing of `convert` takes part: names and formats are spelled out here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from checkpoints import Checkpoint, V, drafter, target

Tensors = dict[str, mx.array]
MLX, GOOGLE = "language_model.model.", "model.language_model."
FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}
EIGHT = {"group_size": 64, "bits": 8}
NARROW = {"group_size": 32, "bits": 4}
BITS = {"bits": 8}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}  # fmt: skip
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Shape:
    """A folder, and what is to become of it.

    table: the default format, None for bf16; every_layer, once: overrides of modules in each layer, and outside of
    them; really: the format that the modules of these names have, where it is not what the table says; spelled: how
    override keys begin; edit: changes config and tensors at last; says: parts of the refusal; mlx_lm: whether mlx-lm
    reads the folder and writes the same.
    """

    kind: str
    table: dict[str, Any] | None = None
    every_layer: dict[str, Any] = field(default_factory=dict)
    once: dict[str, Any] = field(default_factory=dict)
    really: dict[str, dict[str, Any]] = field(default_factory=dict)
    spelled: str = MLX
    prefix: str = MLX
    edit: Callable[[dict[str, Any], Tensors], None] | None = None
    says: tuple[str, ...] = ()
    mlx_lm: bool = False

    def write(self, folder: Path) -> Path:
        """Makes the folder."""
        source = target(self.kind)
        config = copy.deepcopy(source.config) | {"vocab_size": V}
        tensors = dict(plain_tensors(source))
        layers = range(config["text_config"]["num_hidden_layers"])
        overrides = {f"layers.{i}.{name}": form for i in layers for name, form in self.every_layer.items()} | self.once
        if self.table is not None:
            tensors = quantised(tensors, self.table, overrides, self.really)
            config["quantization"] = self.table | {self.spelled + name: form for name, form in overrides.items()}
            config["quantization_config"] = config["quantization"]
        tensors = {self.prefix + name: value for name, value in tensors.items()}
        if self.edit:
            self.edit(config, tensors)
        return replace(source, config=config, tensors=tensors).save(folder)


def plain_tensors(source: Checkpoint) -> Iterator[tuple[str, mx.array]]:
    """The text model's tensors without a prefix, experts as MLX has them."""
    for name, value in source.tensors.items():
        if not name.startswith(GOOGLE):
            continue
        name = name.removeprefix(GOOGLE)
        if name.endswith("experts.gate_up_proj"):
            half = value.shape[1] // 2
            base = name.removesuffix("gate_up_proj") + "switch_glu."
            yield f"{base}gate_proj.weight", mx.contiguous(value[:, :half])
            yield f"{base}up_proj.weight", mx.contiguous(value[:, half:])
        elif name.endswith("experts.down_proj"):
            yield name.replace("down_proj", "switch_glu.down_proj.weight"), value
        else:
            yield name, value


def quantised(tensors: Tensors, table: dict, overrides: dict, really: dict) -> Tensors:
    """Matrices in the formats that overrides, or else the table, give them; False leaves one as it is."""
    made: Tensors = {}
    default = {key: table[key] for key in ("group_size", "bits", "mode")}
    for name, value in tensors.items():
        path = name.removesuffix(".weight")
        form = next((f for end, f in really.items() if path.endswith(end)), overrides.get(path, default))
        if value.ndim < 2 or form is False:
            made[name] = value
            continue
        form = {key: form[key] for key in ("group_size", "bits", "mode") if key in form}
        weight, scales, *biases = mx.quantize(value, **form)
        made |= {name: weight, f"{path}.scales": scales} | ({f"{path}.biases": biases[0]} if biases else {})
    return made


# ---- edits ---------------------------------------------------------------------------------------------------------


def both(*edits: Callable) -> Callable:
    return lambda config, tensors: [edit(config, tensors) for edit in edits] and None


def text(**changes: Any) -> Callable:
    """Keys of the text model; `...` leaves one out."""

    def edit(config: dict, _: Tensors) -> None:
        fields = config.get("text_config", config)
        for key, value in changes.items():
            fields.pop(key, None) if value is ... else fields.__setitem__(key, value)

    return edit


def top(**changes: Any) -> Callable:
    """Keys of config.json; `...` leaves one out."""

    def edit(config: dict, _: Tensors) -> None:
        for key, value in changes.items():
            config.pop(key, None) if value is ... else config.__setitem__(key, value)

    return edit


def per_layer_config(form: str = "{:02}") -> Callable:
    """As transformers 5.15 and later save: the full layers' own settings instead of the two global keys."""

    def edit(config: dict, _: Tensors) -> None:
        fields = config.get("text_config", config)
        own = {"head_dim": fields.pop("global_head_dim")}
        if heads := fields.pop("num_global_key_value_heads"):
            own["num_key_value_heads"] = heads
        full = [i for i, kind in enumerate(fields["layer_types"]) if kind == "full_attention"]
        fields["per_layer_config"] = {form.format(i): own for i in full}

    return edit


def kept_globals(config: dict, tensors: Tensors) -> None:
    """per_layer_config without taking the two keys away."""
    fields = config["text_config"]
    kept = {key: fields[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    per_layer_config()(config, tensors)
    fields |= kept


def each_layer(change: Callable[[dict, dict], Any]) -> Callable:
    """Changes what per_layer_config says of each layer, which it gets beside the text model's fields."""

    def edit(config: dict, _: Tensors) -> None:
        fields = config["text_config"]
        fields["per_layer_config"] = {key: dict(own) for key, own in fields["per_layer_config"].items()}
        for own in fields["per_layer_config"].values():
            change(own, fields)

    return edit


def listed(config: dict, _: Tensors) -> None:
    fields = config["text_config"]
    fields["per_layer_config"] = [fields["per_layer_config"].get(f"{i:02}") for i in range(fields["num_hidden_layers"])]


def older(config: dict, _: Tensors) -> None:
    fields = config["text_config"]
    fields["expert_intermediate_size"] = fields.pop("moe_intermediate_size")


def flat(config: dict, _: Tensors) -> None:
    """The text model's config alone."""
    fields = config.pop("text_config") | {"eos_token_id": 1, "architectures": ["Gemma4ForCausalLM"]}
    fields |= {key: config[key] for key in ("quantization", "quantization_config") if key in config}
    config.clear()
    config.update(fields)


def fuse(_: dict, tensors: Tensors) -> None:
    """Gate and up in one tensor, as Google has them."""
    for name in [name for name in tensors if name.endswith("switch_glu.gate_proj.weight")]:
        base = name.removesuffix("switch_glu.gate_proj.weight")
        halves = [tensors.pop(f"{base}switch_glu.{half}_proj.weight") for half in ("gate", "up")]
        tensors[f"{base}gate_up_proj"] = mx.concatenate(halves, axis=1)
        tensors[f"{base}down_proj"] = tensors.pop(f"{base}switch_glu.down_proj.weight")


def add(make: Callable[[dict, Tensors], Tensors]) -> Callable:
    return lambda config, tensors: tensors.update(make(config, tensors))


def without(pattern: str) -> Callable:
    def edit(_: dict, tensors: Tensors) -> None:
        for name in [name for name in tensors if re.search(pattern, name)]:
            del tensors[name]

    return edit


def cast(pattern: str, dtype: mx.Dtype) -> Callable:
    def edit(_: dict, tensors: Tensors) -> None:
        floats = [n for n, t in tensors.items() if re.search(pattern, n) and mx.issubdtype(t.dtype, mx.floating)]
        tensors.update({name: tensors[name].astype(dtype) for name in floats})

    return edit


def head(spoil: Callable[[mx.array], mx.array] = lambda table: table, name: str = "language_model.lm_head") -> Callable:
    """The tied head saved once more."""

    def made(_: dict, tensors: Tensors) -> Tensors:
        table = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("weight")
        parts = {part: tensors[table + part] for part in ("weight", "scales", "biases") if table + part in tensors}
        return {f"{name}.{part}": spoil(value) for part, value in parts.items()}

    return add(made)


def inv_freq(spoil: float = 1.0, dtype: mx.Dtype = mx.float32, once: bool = False) -> Callable:
    """Inverse frequencies, in each layer or once for the model; zeros where a pair does not turn."""

    def made(config: dict, tensors: Tensors) -> Tensors:
        fields = config.get("text_config", config)
        table = "embed_tokens.weight"
        prefix = next(name for name in tensors if name.endswith(table)).removesuffix(table)
        found: Tensors = {}
        for i, kind in enumerate(fields["layer_types"]):
            rope = fields["rope_parameters"][kind]
            dim = fields["head_dim" if kind == "sliding_attention" else "global_head_dim"]
            pairs = int(rope.get("partial_rotary_factor", 1.0) * dim // 2)
            values = rope["rope_theta"] ** (-mx.arange(0, dim, 2) / dim) * (mx.arange(dim // 2) < pairs)
            name = f"rotary_emb.{kind}_inv_freq" if once else f"layers.{i}.self_attn.rotary_emb.inv_freq"
            found[prefix + name] = (values * spoil).astype(dtype)
        return found

    return add(made)


def scalar(name: str, value: float) -> Callable:
    """A factor beside the text model's tensors."""
    return add(lambda _, tensors: {MLX + name: mx.array(value, mx.bfloat16)})


def global_scales(_: dict, tensors: Tensors) -> None:
    tensors |= {n.replace(".scales", ".global_scale"): mx.array(2.0) for n in list(tensors) if n.endswith(".scales")}


def towers(_: dict, tensors: Tensors) -> None:
    """What mlx-vlm keeps of vision."""
    tensors["vision_tower.std_bias"] = mx.ones(3, mx.bfloat16)
    tensors["embed_vision.embedding_projection.weight"] = mx.ones((4, 4), mx.bfloat16)


def draft(kind: str, edit: Callable | None = None, table: dict | None = None, spelled: str = "model.") -> Checkpoint:
    """A drafter; `spelled`: how override keys of its layers begin."""
    source = drafter(kind)
    config, tensors = copy.deepcopy(source.config), dict(source.tensors)
    if table:
        plain = {name: value for name, value in tensors.items() if not name.startswith("masked_embedding.")}
        overrides = {f"model.layers.{i}.mlp.down_proj": EIGHT for i in range(4)}
        tensors |= quantised(plain, table, overrides, {})
        config["quantization"] = table | {k.replace("model.", spelled, 1): v for k, v in overrides.items()}
    if edit:
        edit(config, tensors)
    return replace(source, config=config, tensors=tensors)


SHARED_KV = r"layers\.(3|4|5)\.self_attn\.(k_proj|v_proj|k_norm)"  # of the small E2B
OPENS = {
    "12B-it-4bit": Shape("12B", FOUR, mlx_lm=True),
    "26b-a4b-it-4bit": Shape("26B-A4B", FOUR, dict.fromkeys((*MLP, "router.proj"), EIGHT), mlx_lm=True),
    "e4b-it-4bit": Shape("E4B", FOUR, once={"per_layer_model_projection": False}, mlx_lm=True),
    "e2b-it-qat-4bit": Shape("E2B", FOUR, edit=without(SHARED_KV), mlx_lm=True),
    "mxfp4, a router without a mode": Shape("26B-A4B", MXFP4, {"router.proj": EIGHT}, mlx_lm=True),
    "mxfp8, a router without a mode": Shape("26B-A4B", MXFP8, {"router.proj": EIGHT}, mlx_lm=True),
    "an override of the default's size without its mode": Shape(
        "26B-A4B", MXFP4, {"mlp.down_proj": NARROW}, really={"mlp.down_proj": MXFP4}
    ),
    "an override of the default's size that is affine": Shape(
        "26B-A4B", MXFP4, {"mlp.down_proj": NARROW}, mlx_lm=True
    ),
    "an override of a mode alone": Shape(
        "12B", FOUR, {"mlp.up_proj": {"mode": "mxfp8"}}, really={"mlp.up_proj": MXFP8}
    ),
    "optiq": Shape(
        "E4B", FOUR, {"self_attn.q_proj": EIGHT, "self_attn.k_proj": {"group_size": 64, "bits": 4},
                      "self_attn.v_proj": EIGHT}, {"per_layer_model_projection": EIGHT}, mlx_lm=True,
    ),
    "groups mixed in a layer": Shape(
        "31B", FOUR, dict.fromkeys(("self_attn.q_proj", "mlp.down_proj"), NARROW), mlx_lm=True
    ),
    "modes mixed": Shape(
        "31B", MXFP4, {f"self_attn.{part}_proj": MXFP8 for part in "qkvo"}, {"embed_tokens": FOUR | {"bits": 6}},
        mlx_lm=True,
    ),
    "a table with other keys": Shape(
        "31B", FOUR | {"quant_method": "mlx", "version": 1, "ignore": ["vision_tower"], "config_groups": {"a": {}}},
        mlx_lm=True,
    ),
    "overrides of bits alone": Shape("12B", FOUR, dict.fromkeys(MLP, BITS), mlx_lm=True),
    "overrides of bits alone, groups of the default": Shape(
        "12B", FOUR | {"group_size": 32}, dict.fromkeys(MLP, BITS),
        really={"mlp.down_proj": {"group_size": 32, "bits": 8}},
    ),
    **{
        f"overrides of {prefix}layers": Shape("12B", FOUR, dict.fromkeys(MLP, EIGHT), spelled=prefix)
        for prefix in (GOOGLE, "model.", "language_model.", "text_model.", "")
    },
    "overrides of weights": Shape("12B", FOUR, edit=lambda config, _: config["quantization"].update(
        {f"{MLX}layers.0.mlp.up_proj.weight": {"group_size": 64, "bits": 4}})),
    "a module of wrappers": Shape(
        "12B", FOUR, dict.fromkeys(MLP, EIGHT), prefix="module._orig_mod.model.language_model.", spelled="module.model."
    ),
    "the text model of a wrapper": Shape("E2B", prefix="model.text_model."),
    "overrides of towers": Shape(
        "12B", FOUR, dict.fromkeys(MLP, EIGHT), edit=both(towers, lambda config, _: config["quantization"].update(
            {"vision_tower.encoder.layers.0.mlp": EIGHT, "model.embed_vision.embedding_projection": False}))
    ),
    "quantization_config alone": Shape("12B", FOUR, dict.fromkeys(MLP, EIGHT), edit=top(quantization=...)),
    **{
        f"a table of MLX with quant_method {method}": Shape(
            "12B", table, edit=both(top(quantization=...), lambda config, _, method=method:
                                    config["quantization_config"].update(quant_method=method)))
        for method, table in (("mlx", FOUR), ("affine", FOUR), ("mxfp4", MXFP4))
    },
    "MLX's table with a quant_method": Shape("12B", MXFP4, edit=lambda config, _: config["quantization"].update(
        {"quant_method": "mxfp4"})),
    **{
        f"MLX's floats beside a table of {name}": Shape(kind, edit=both(towers, top(quantization_config=table)))
        for name, kind, table in (
            ("AWQ", "12B", AWQ), ("FP8", "31B", FP8), ("compressed-tensors", "E2B", PACKED),
            ("bitsandbytes", "26B-A4B", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        )
    },
    "MLX's table beside that of the original": Shape("12B", FOUR, edit=top(quantization_config=AWQ), mlx_lm=True),
    "no tables": Shape("12B", edit=top(quantization_config={}, quantization=None)),
    "quantization alone": Shape("12B", FOUR, edit=top(quantization_config=...), mlx_lm=True),
    "per_layer_config, E4B": Shape("E4B", edit=per_layer_config()),
    "per_layer_config, 26B": Shape("26B-A4B", edit=per_layer_config("{}")),
    "per_layer_config, quantised": Shape("26B-A4B", FOUR, edit=per_layer_config()),
    "per_layer_config beside the two keys": Shape("26B-A4B", edit=kept_globals),
    "per_layer_config of the width, the two keys' heads": Shape(
        "26B-A4B", edit=both(kept_globals, each_layer(lambda own, _: own.pop("num_key_value_heads")))
    ),
    "per_layer_config that is empty": Shape("26B-A4B", edit=text(per_layer_config={})),
    "per_layer_config as a list": Shape("26B-A4B", edit=both(per_layer_config(), listed)),
    "per_layer_config that repeats": Shape(
        "31B", edit=both(per_layer_config(), each_layer(lambda own, text: own.update(
            intermediate_size=text["intermediate_size"])))
    ),
    "nulls": Shape(
        "31B", edit=text(enable_moe_block=None, use_double_wide_mlp=None, hidden_size_per_layer_input=None,
                         vocab_size_per_layer_input=None, tie_word_embeddings=None, attention_bias=None,
                         hidden_activation=None, rope_parameters=None, num_kv_shared_layers=None)
    ),
    "the text model alone, text_config null": Shape("12B", prefix="model.", edit=both(flat, top(text_config=None))),
    "the older name of the experts' width": Shape("26B-A4B", edit=older),
    "per_layer_config, the text model alone": Shape(
        "26B-A4B", FOUR, prefix="model.", spelled="model.", edit=both(per_layer_config(), flat)
    ),
    "the text model alone": Shape(
        "26B-A4B", FOUR, {"router.proj": EIGHT}, prefix="model.", spelled="model.", edit=flat, mlx_lm=True
    ),
    "the text model alone, bf16": Shape("26B-A4B", prefix="model.", edit=flat, mlx_lm=True),
    "the text model without a prefix": Shape("E2B", prefix="", edit=flat),
    "keys with defaults left out": Shape(
        "12B", edit=text(rms_norm_eps=..., rope_parameters=..., attention_bias=..., num_kv_shared_layers=...,
                         use_double_wide_mlp=..., enable_moe_block=..., hidden_size_per_layer_input=...,
                         vocab_size_per_layer_input=..., tie_word_embeddings=..., hidden_activation=...),
    ),
    "vision_config null": Shape("26B-A4B", edit=top(vision_config=None), mlx_lm=True),
    "the head once more": Shape("26B-A4B", edit=head()),
    "the head once more, quantised": Shape("12B", FOUR, edit=head()),
    "the head once more, in float32": Shape("12B", edit=head(lambda table: table.astype(mx.float32), "lm_head")),
    "inverse frequencies": Shape("26B-A4B", edit=inv_freq(), mlx_lm=True),
    "inverse frequencies once, in bf16": Shape("31B", edit=inv_freq(dtype=mx.bfloat16, once=True)),
    "factors": Shape("E2B", edit=both(
        scalar("embed_tokens.embed_scale", 128**0.5), scalar("embed_tokens_per_layer.embed_scale", 8.0),
        scalar("per_layer_input_scale", 2**-0.5))),
    "norms of ones, biases of zeros": Shape("26B-A4B", edit=add(lambda *_: {
        f"{MLX}layers.0.self_attn.v_norm.weight": mx.ones(32), f"{MLX}layers.1.router.norm.weight": mx.ones(128),
        f"{MLX}layers.0.self_attn.q_proj.bias": mx.zeros(128)})),
    "K as V once more": Shape("31B", edit=add(lambda _, tensors: {
        f"{MLX}layers.1.self_attn.v_proj.weight": tensors[f"{MLX}layers.1.self_attn.k_proj.weight"]})),
    "float16": Shape("26B-A4B", edit=both(cast(".", mx.float16), towers)),
    "one bf16 tensor in float16": Shape("26B-A4B", edit=both(cast(".", mx.float16), cast("model.norm", mx.bfloat16))),
    "float16 scales beside bf16": Shape("12B", FOUR, edit=cast("mlp.*(scales|biases)", mx.float16)),
    "towers": Shape("12B", FOUR, edit=towers, mlx_lm=True),
    "Google's names, quantised": Shape("26B-A4B", FOUR, {"router.proj": EIGHT}, prefix=GOOGLE, spelled=GOOGLE),
    "Google's names, quantised, dense": Shape("12B", MXFP4, prefix=GOOGLE),
    "Google's names, switch_glu": Shape("26B-A4B", prefix=GOOGLE),
    "Google's names": Shape("26B-A4B", prefix=GOOGLE, edit=fuse, mlx_lm=True),
    "Google's names, dense": Shape("31B", prefix=GOOGLE, mlx_lm=True),
    "MLX names, fused experts": Shape("26B-A4B", edit=fuse, mlx_lm=True),
    "the text model's names, fused experts": Shape("26B-A4B", prefix="model.", edit=both(fuse, flat), mlx_lm=True),
}  # fmt: skip
REFUSED = {
    "a second scale": Shape("31B", NVFP4, edit=global_scales, says=("global_scale", "second scale")),
    "an override without a mode that fits neither": Shape(
        "26B-A4B", MXFP4, {"mlp.down_proj": NARROW}, really={"mlp.down_proj": EIGHT},
        says=("mlp.down_proj", "by its 'language_model.model.layers.0.mlp.down_proj'"),
    ),
    "an override of nothing": Shape(
        "12B", FOUR, once={"layers.0.mlp.gate": EIGHT}, says=("layers.0.mlp.gate'", "no module of this model")
    ),
    "an override of a layer too many": Shape(
        "12B", FOUR, once={"layers.60.mlp.gate_proj": EIGHT}, says=("layers.60.mlp", "no module of this model")
    ),
    "an override by another name": Shape(
        "12B", FOUR, {"mlp.gate_proj": EIGHT}, spelled="decoder.", says=("'decoder.layers.0", "no module")
    ),
    "two spellings that differ": Shape(
        "12B", FOUR, edit=lambda config, _: config["quantization"].update(
            {f"{MLX}layers.0.mlp.up_proj": EIGHT, "model.layers.0.mlp.up_proj": FOUR}),
        says=("are one module but differ",),
    ),
    "a format that MLX has not": Shape(
        "12B", FOUR, edit=lambda config, _: config["quantization"].update({f"{MLX}layers.0.mlp.up_proj": {"bits": 7}}),
        says=("layers.0.mlp.up_proj", "bits 7, mode affine, is no format of MLX"),
    ),
    "AWQ beside MLX's table": Shape(
        "12B", FOUR, edit=both(without(r"0\.self_attn\.q_proj"), add(lambda *_: {
            f"{MLX}layers.0.self_attn.q_proj.qweight": mx.zeros((128, 16), mx.int32)})),
        says=("holds AWQ weights", "q_proj.qweight"),
    ),
    "no table": Shape("12B", FOUR, edit=top(quantization=..., quantization_config=...), says=("does not say so",)),
    "another default": Shape(
        "12B", FOUR, edit=lambda config, _: config["quantization"].update({"bits": 8}), says=("embed_tokens", "8-bit")
    ),
    "another head": Shape("26B-A4B", edit=head(lambda table: table + 1), says=("lm_head.weight differs",)),
    "another head by one value": Shape(
        "12B", edit=head(lambda table: mx.where(mx.arange(V)[:, None] == V - 1, -table, table).astype(table.dtype)),
        says=("lm_head.weight differs",),
    ),
    "a head in float beside a quantised table": Shape(
        "12B", FOUR, edit=add(lambda *_: {"lm_head.weight": mx.zeros((V, 128))}), says=("lm_head.weight differs",)
    ),
    "other frequencies": Shape("26B-A4B", edit=inv_freq(1.5), says=("inv_freq differs",)),
    "another factor": Shape("12B", edit=scalar("embed_tokens.embed_scale", 1.0), says=("embed_scale differs",)),
    "a norm of the values": Shape("31B", edit=add(lambda *_: {
        f"{MLX}layers.0.self_attn.v_norm.weight": 2 * mx.ones(32)}), says=("v_norm.weight differs",)),
    "a bias": Shape("31B", edit=add(lambda *_: {f"{MLX}layers.0.self_attn.q_proj.bias": mx.ones(128)}),
                    says=("q_proj.bias differs",)),
    "V that is not K": Shape("31B", edit=add(lambda _, tensors: {
        f"{MLX}layers.1.self_attn.v_proj.weight": -tensors[f"{MLX}layers.1.self_attn.k_proj.weight"]}),
        says=("v_proj.weight differs",)),
    "per_layer_config of another kind": Shape(
        "12B", edit=text(per_layer_config={"0": {"head_dim": 16}}), says=("per_layer_config is not a Gemma 4 one",)
    ),
    "a size left out": Shape("12B", edit=text(hidden_size=...), says=("has no 'hidden_size'",)),
    "experts left out": Shape("26B-A4B", edit=text(num_experts=...), says=("has no 'num_experts'",)),
    "diffusion_gemma": Shape("31B", edit=top(model_type="diffusion_gemma"), says=("'diffusion_gemma'",)),
    "gemma3n": Shape("31B", edit=top(model_type="gemma3n"), says=("'gemma3n'",)),
    "a tensor of something else": Shape("31B", edit=add(lambda *_: {f"{MLX}x": mx.ones(3)}), says=(f"'{MLX}x'",)),
    "a tensor that is missing": Shape("31B", edit=without(r"2\.mlp\.up"), says=("layers.2.mlp.up_proj.weight'",)),
}  # fmt: skip
