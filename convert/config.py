"""config.json of the source: what kind of model it is, and the config that is written for it."""

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig

# model_type -> prefix of the text tensors in the source files
TARGETS = {
    "gemma4": "model.language_model.",
    "gemma4_unified": "model.language_model.",
    "gemma4_text": "model.",
    "gemma4_unified_text": "model.",
}
DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
LAYER_TYPES = ("sliding_attention", "full_attention")

SIZES = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim",
    "num_key_value_heads", "vocab_size", "global_head_dim", "sliding_window",
)  # fmt: skip
MOE_SIZES = ("num_experts", "top_k_experts", "moe_intermediate_size")
COUNTS = ("num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input")
FLAGS = ("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp", "tie_word_embeddings")
GIVEN = ("rope_parameters", "rms_norm_eps", "hidden_activation", "final_logit_softcapping")
TOP_LEVEL = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size")


def is_drafter(config: dict) -> bool:
    """Returns True for an MTP drafter and False for a target. Raises UserError for anything else."""
    kind = config.get("model_type")
    if kind not in (*TARGETS, *DRAFTERS):
        raise UserError(
            f"model_type {kind!r} in config.json; expected one of "
            f"{', '.join((*TARGETS, *DRAFTERS))}; convert a Gemma 4 checkpoint"
        )
    return kind in DRAFTERS


def refuse_quantised(config: dict) -> None:
    """Raises UserError for a source that cannot be converted because it is quantised already."""
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise UserError(
                f"{key} in config.json: the source is quantised already; expected bfloat16,"
                " float16 or float32 weights; convert the original (or unquantized) checkpoint"
            )


def text_config(config: dict) -> dict:
    """Returns the text model's fields, checked, with the published keys, in a new dict. Raises UserError.

    Source of `per_layer_config`: transformers >= 5.23 save_pretrained, which drops
    global_head_dim and num_global_key_value_heads; mlx-lm and mlx-vlm read only those.
    """
    nested = config["model_type"] not in ("gemma4_text", "gemma4_unified_text")
    text = config.get("text_config") if nested else config
    if not isinstance(text, dict):
        raise UserError(f"text_config {text!r} in config.json; expected a JSON object")
    text = {k: v for k, v in text.items() if k not in ("architectures", "transformers_version")}
    layers = text.get("layer_types")
    if not isinstance(layers, list) or not layers or any(layer not in LAYER_TYPES for layer in layers):
        raise UserError(f"layer_types {layers!r} in config.json; expected {' / '.join(LAYER_TYPES)}")
    if "per_layer_config" in text:
        text |= _global_keys(text.pop("per_layer_config"), layers, text.get("head_dim"))
    text.setdefault("num_global_key_value_heads", None)
    _check(text)
    return text | {"model_type": "gemma4_text"}


def written(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted checkpoint: `config` with the checked `text` fields and the written dtype."""
    return written_drafter(config, text, dtype) if is_drafter(config) else written_target(config, text, dtype)


def written_target(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted target: text only, readable by mlx-lm, mlx-vlm and this package.

    `vision_config` is {} because null crashes mlx-vlm; mlx-lm needs vocab_size at the top.
    """
    nested = "text_config" in config
    top = dict(config) if nested else {k: text[k] for k in TOP_LEVEL if k in text}
    top |= {k: text[k] for k in TOP_LEVEL if k in text and k not in top}
    return top | {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": dtype,
        "text_config": text | {"dtype": dtype},
        "vision_config": {},
        "audio_config": None,
        "vocab_size": text["vocab_size"],
        "tie_word_embeddings": True,
    }


def written_drafter(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted drafter: the source's own, with the dtype that was written."""
    text = text | {"dtype": dtype, "model_type": config["text_config"].get("model_type")}
    return config | {"dtype": dtype, "text_config": text}


def loadable(config: dict, text: dict) -> TargetConfig:
    """Returns what mlx_gemma_mtp reads from the written config. Raises UserError for what it would refuse.

    A drafter is judged beside a target that fits: its own text model, as wide as its backbone, sharing no K/V.
    """
    config = {key: value for key, value in config.items() if key != "quantization"}  # quantize.recorded reads it
    if not is_drafter(config):
        return TargetConfig.from_dict(written_target(config, text, "bfloat16"))
    backbone = config.get("backbone_hidden_size")
    _expect(config, "backbone_hidden_size", type(backbone) is int and backbone > 0, "a positive integer")
    target = TargetConfig.from_dict(text | {"num_kv_shared_layers": 0, "hidden_size": backbone})
    DrafterConfig.from_dict(written_drafter(config, text, "bfloat16"), target)
    return target


def _global_keys(per_layer: object, layers: list[str], head_dim: object) -> dict:
    """per_layer_config -> the two keys that hold what all full-attention layers share."""
    try:
        overrides = {int(index): dict(values) for index, values in per_layer.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"per_layer_config {per_layer!r} in config.json; expected layer index -> overrides") from error
    full = [overrides.pop(i, {}) for i, kind in enumerate(layers) if kind == "full_attention"]
    first = full[0] if full else {}
    known = first.keys() <= {"head_dim", "num_key_value_heads"}
    if overrides or not known or any(values != first for values in full):
        raise UserError(
            "per_layer_config in config.json is not a Gemma 4 one; expected the same head_dim and"
            " num_key_value_heads on every full_attention layer and nothing else"
        )
    return {
        "global_head_dim": first.get("head_dim", head_dim),
        "num_global_key_value_heads": first.get("num_key_value_heads"),
    }


def _check(text: dict) -> None:
    """Every key that shapes depend on, of the right type; keys the readers need, present."""
    moe = MOE_SIZES if text.get("enable_moe_block") else ()
    for key in (*SIZES, *moe):
        _expect(text, key, type(text.get(key)) is int and text[key] > 0, "a positive integer")
    for key in COUNTS:
        _expect(text, key, type(text.get(key)) is int and text[key] >= 0, "an integer >= 0")
    for key in FLAGS:
        _expect(text, key, type(text.get(key)) is bool, "true or false")
    for key in GIVEN:
        _expect(text, key, key in text, "to be given")
    heads = text["num_global_key_value_heads"]
    valid = heads is None or (type(heads) is int and heads > 0)
    _expect(text, "num_global_key_value_heads", valid, "null or a positive integer")
    layers, count = text["num_hidden_layers"], len(text["layer_types"])
    _expect(text, "num_hidden_layers", layers == count, f"{count}, the length of layer_types")
    shared = text["num_kv_shared_layers"]
    _expect(text, "num_kv_shared_layers", shared <= layers, f"at most {layers}")
    _expect(text, "tie_word_embeddings", text["tie_word_embeddings"], "true")


def _expect(text: dict, key: str, valid: bool, expected: str) -> None:
    if not valid:
        value = repr(text[key]) if key in text else "is missing"
        raise UserError(
            f"{key} {value} in config.json; expected {expected}; take config.json from the original checkpoint"
        )
