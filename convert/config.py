"""config.json of the source: what kind of model it is, and the config that is written for it."""

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.raw_config import Reader, is_wrapper, text_fields

# model_type -> prefix of the text tensors in the published files
TARGETS = {
    "gemma4": "model.language_model.",
    "gemma4_unified": "model.language_model.",
    "gemma4_text": "model.",
    "gemma4_unified_text": "model.",
}
DRAFTERS = ("gemma4_assistant", "gemma4_unified_assistant")
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


def refuse_quantised(config: dict, instead: str = "") -> None:
    """Raises UserError for a source that cannot be converted because it is quantised already.

    instead: what can be done with it as it is.
    """
    for key in ("quantization", "quantization_config"):
        if config.get(key):
            raise UserError(
                f"{key} in config.json: the source is quantised already; expected bfloat16,"
                f" float16 or float32 weights; {instead}convert the original (or unquantized) checkpoint"
            )


def text_config(config: dict) -> dict:
    """Returns the text model's fields, complete, under the keys that mlx-lm and mlx-vlm read. Raises UserError."""
    return text_fields(config) | {"model_type": "gemma4_text"}


def model_config(config: dict) -> TargetConfig | DrafterConfig:
    """Returns what mlx_gemma_mtp reads from a config.json. Raises UserError for what it would refuse.

    A drafter is judged beside a target that fits: its own text model, as wide as its backbone, sharing no K/V, without
    what no drafter reads.
    """
    if not is_drafter(config):
        return TargetConfig.from_dict(config)
    backbone = Reader(config, "the drafter's config.json").int("backbone_hidden_size")
    unread = {"num_kv_shared_layers": 0, "enable_moe_block": False, "hidden_size_per_layer_input": 0}
    target = text_config(config) | unread | {"hidden_size": backbone}
    return DrafterConfig.from_dict(config, TargetConfig.from_dict(target))


def written(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted checkpoint: `config` with the checked `text` fields and the written dtype."""
    return written_drafter(config, text, dtype) if is_drafter(config) else written_target(config, text, dtype)


def written_target(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted target: text only, readable by mlx-lm, mlx-vlm and this package.

    There is no `vision_config`: by that key alone mlx-vlm's chat and mlx-model-doctor take a folder for a vision model,
    and null crashes mlx-vlm, which takes its defaults where there is none, for MTP too. mlx-lm leaves it out as well,
    and needs vocab_size at the top. The ids of image tokens stay: a text-only run refuses them by these.
    """
    top = dict(config) if is_wrapper(config) else {k: text[k] for k in TOP_LEVEL if k in text}
    top |= {k: text[k] for k in TOP_LEVEL if k in text and k not in top}
    top.pop("vision_config", None)
    return top | {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": dtype,
        "text_config": text | {"dtype": dtype},
        "audio_config": None,
        "vocab_size": text["vocab_size"],
        "tie_word_embeddings": True,
    }


def written_drafter(config: dict, text: dict, dtype: str) -> dict:
    """Returns the config of a converted drafter: the source's own, with the dtype that was written."""
    text = text | {"dtype": dtype, "model_type": config["text_config"].get("model_type")}
    return config | {"dtype": dtype, "text_config": text}
