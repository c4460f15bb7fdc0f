"""config.json as people bring it, read into the one form that Google publishes.

What differs from writer to writer ends here: the text model alone or in a wrapper, `per_layer_config`, keys that are
left out because transformers has a default for them. Loading, converting and inspecting all read through `text_fields`.
Source: transformers 5.23, `Gemma4TextConfig` and `Gemma4UnifiedTextConfig`.
"""

from __future__ import annotations

from typing import Any

from ..errors import UserError, shown

TARGET_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")
DRAFTER_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
LARGEST = 1 << 24  # of any size in a config: products of two that make a dimension stay within MLX's 32 bits
SLIDING, FULL = "sliding_attention", "full_attention"
# What a text model means that does not say. The five sizes that tell one model from another are not in it: transformers
# has defaults for them, too, but of a model that was never published.
DEFAULTS = {
    "vocab_size": 262144,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": False,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
UNIFIED = {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}
DRAFTER = {"hidden_size_per_layer_input": 0}
# What full layers have of their own -> what it stands for in a layer.
GLOBAL = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
PATTERN = 6  # where layer_types is not given, every sixth layer and the last have full attention
NULL_IS_UNSET = {
    "rope_parameters", "layer_types", "per_layer_config", "num_kv_shared_layers", "attention_k_eq_v",
    "use_double_wide_mlp", "enable_moe_block", "vocab_size_per_layer_input", "tie_word_embeddings", "attention_bias",
    "hidden_activation", "moe_intermediate_size",
}  # fmt: skip
OLDER = {"expert_intermediate_size": "moe_intermediate_size"}  # as in the published E2B, E4B and 31B, where it is null


class Reader:
    """Reads required keys of a JSON object, with errors that name the key and the value."""

    def __init__(self, raw: Any, where: str):
        if not isinstance(raw, dict):
            raise UserError(f"{where} is {type(raw).__name__}, expected a JSON object")
        self.raw, self.where = raw, where

    def _wrong(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.where}: {key} is {shown(value)}, expected {expected}")

    def get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        """Returns the value of a key. Raises UserError where it is missing or of another type."""
        if key not in self.raw:
            raise UserError(f"{self.where} has no {key!r}; expected {expected}. Is this a complete Gemma 4 folder?")
        value = self.raw[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self._wrong(key, value, expected)
        return value

    def int(self, key: str, minimum: int = 1, maximum: int = LARGEST) -> int:
        expected = f"an integer of at least {minimum} and at most {maximum}"
        value = self.get(key, (int,), expected)
        if not minimum <= value <= maximum:
            raise self._wrong(key, value, expected)
        return value

    def float(self, key: str, minimum: float = 0.0, maximum: float = 1e30) -> float:
        expected = f"a number of at least {minimum:g} and at most {maximum:g}"
        value = self.get(key, (int, float), expected)
        if not minimum <= value <= maximum:
            raise self._wrong(key, value, expected)
        return float(value)

    def optional_float(self, key: str, minimum: float = 0.0) -> float | None:
        value = self.get(key, (int, float, type(None)), "a number or null")
        return None if value is None else self.float(key, minimum)

    def bool(self, key: str) -> bool:
        return self.get(key, (bool,), "true or false")

    def object(self, key: str) -> dict[str, Any]:
        return self.get(key, (dict,), "a JSON object")


def text_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the text model's fields under the published keys, complete, in a new dict. Of what they hold, only what
    is needed to bring them into that form is checked.

    raw: config.json of a target or a drafter. Raises UserError.
    """
    drafter = raw.get("model_type") in DRAFTER_TYPES
    where = "the drafter's config.json, text_config" if drafter else "config.json"
    text = raw
    if drafter or is_wrapper(raw):
        text = Reader(raw.get("text_config", {}), where if drafter else f"{where}, text_config").raw
    text = {key: value for key, value in text.items() if key not in ("architectures", "transformers_version")}
    text = {key: value for key, value in text.items() if value is not None or key not in NULL_IS_UNSET}
    text = {OLDER[key]: text[key] for key in OLDER.keys() & text.keys() if text[key] is not None} | text
    if text.get("hidden_size_per_layer_input", 0) is None:
        text["hidden_size_per_layer_input"] = 0  # null is none of them; that the key is missing means the default
    unified = str(raw.get("model_type")).startswith("gemma4_unified")
    defaults = DEFAULTS | (UNIFIED if unified else {}) | (DRAFTER if drafter else {})
    reader = Reader(text, where)
    if "layer_types" not in text:
        text["layer_types"] = _usual_layers(reader.int("num_hidden_layers", maximum=10_000))
    if "per_layer_config" in text:
        without = {key: value for key, value in defaults.items() if key not in GLOBAL}
        text |= _global_keys(Reader(without | text, where), text.pop("per_layer_config"))
    text = defaults | text
    if drafter and not text["num_kv_shared_layers"]:
        text["num_kv_shared_layers"] = text.get("num_hidden_layers")
    return text


def is_wrapper(raw: dict[str, Any]) -> bool:
    """Returns whether the text model's fields stand under text_config. Of a text model alone that is null, or not
    there.
    """
    return "text_config" in raw and (raw["text_config"] is not None or "num_hidden_layers" not in raw)


def layer_types(text: Reader) -> list[str]:
    """Returns the attention of each layer. Raises UserError for a list of anything else, or of another length."""
    types = text.get("layer_types", (list,), f"a list of {SLIDING} / {FULL}")
    unknown = [kind for kind in types if kind not in (SLIDING, FULL)]
    count = text.int("num_hidden_layers")
    if unknown or len(types) != count:
        raise UserError(
            f"{text.where}: layer_types has {len(types)} entries (unknown: {shown(unknown[:3])}), "
            f"expected {count} of {SLIDING} / {FULL}"
        )
    return types


def _usual_layers(count: int) -> list[str]:
    return [FULL if (i + 1) % PATTERN == 0 or i + 1 == count else SLIDING for i in range(count)]


def _global_keys(text: Reader, per_layer: Any) -> dict[str, Any]:
    """Returns the two keys that say what all layers with full attention have, from `per_layer_config`, which replaces
    them in what transformers 5.15 and later save. Where they are there, too, it goes before them.
    """
    types = layer_types(text)
    usual = {"head_dim": text.int("head_dim"), "num_key_value_heads": text.int("num_key_value_heads")}
    overrides = _overrides(text, per_layer)
    told = {key: text.raw[name] for name, key in GLOBAL.items() if text.raw.get(name) is not None}
    layers = [usual | (told if kind == FULL else {}) | overrides.pop(i, {}) for i, kind in enumerate(types)]
    full = [layer for layer, kind in zip(layers, types, strict=True) if kind == FULL]
    sliding = [layer for layer, kind in zip(layers, types, strict=True) if kind == SLIDING]
    shared = full[0] if full else usual
    own_heads = shared["num_key_value_heads"] != usual["num_key_value_heads"]
    plain = all(layer == usual for layer in sliding) and all(layer == shared for layer in full)
    known = shared.keys() == usual.keys() and (text.bool("attention_k_eq_v") or not own_heads)
    if overrides or not plain or not known:
        raise UserError(
            f"{text.where}: per_layer_config is not a Gemma 4 one; expected the same head_dim and num_key_value_heads "
            f"on every layer with {FULL} and nothing else"
        )
    heads = shared["num_key_value_heads"] if own_heads else None
    return {"global_head_dim": shared["head_dim"], "num_global_key_value_heads": heads}


def _overrides(text: Reader, per_layer: Any) -> dict[int, dict[str, Any]]:
    """Layer -> what per_layer_config says of it, without what config.json says of all layers. It is an object by the
    number of the layer, or a list.
    """
    try:
        pairs = enumerate(per_layer) if isinstance(per_layer, list) else per_layer.items()
        given = {int(index): dict(values or {}) for index, values in pairs}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"{text.where}: per_layer_config is {shown(per_layer)}, expected settings by the number of the layer"
        ) from None
    own = ("head_dim", "num_key_value_heads")
    return {
        index: {key: value for key, value in values.items() if key in own or value != text.raw.get(key, ...)}
        for index, values in given.items()
    }
