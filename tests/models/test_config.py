"""Configs: the ten published ones to the unit, and everything that is missing, unknown or does not fit."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_gemma_mtp.cache.spec import KVSpec
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.models.config import DrafterConfig, GenerationDefaults, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.raw_config import DEFAULTS
from mlx_gemma_mtp.sampling.params import SamplingParams

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# Language model, the head tied once, layer scalars not counted; drafters without their four layer scalars.
PARAMETERS = {
    "E2B": (4_628_569_344, 77_731_328),
    "E4B": (7_463_013_376, 78_517_760),
    "12B": (11_907_350_272, 422_856_960),
    "26B-A4B": (25_233_141_760, 419_711_232),
    "31B": (30_697_345_280, 469_518_592),
}


def published(name: str) -> dict:
    return json.loads((CONFIGS / f"gemma-4-{name}.json").read_text())


def parameters(model) -> int:
    """Scalars of a model, without layer scalars and token orderings; nothing is evaluated."""
    leaves = tree_flatten(model.parameters())
    return sum(v.size for k, v in leaves if not k.endswith(("layer_scalar", "token_ordering")))


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_pairs_have_their_parameters(size):
    config = TargetConfig.from_dict(published(f"{size}-it"))
    drafter = DrafterConfig.from_dict(published(f"{size}-it-assistant"), config)
    assert (parameters(gemma4.build(config)), parameters(Drafter(drafter))) == PARAMETERS[size]


@pytest.mark.parametrize(
    "size, sliding, full", [("E2B", 13, 14), ("E4B", 22, 23), ("12B", 46, 47), ("26B-A4B", 28, 29)]
)
def test_drafters_read_the_last_own_layer_of_their_kind(size, sliding, full):
    config = TargetConfig.from_dict(published(f"{size}-it"))
    drafter = DrafterConfig.from_dict(published(f"{size}-it-assistant"), config)
    assert [layer.kv_layer for layer in drafter.layers] == [sliding, sliding, sliding, full]


def test_layers_of_e2b():
    """Layers 15 to 34 share K/V of 13 and 14 and have the wide MLP."""
    layers = TargetConfig.from_dict(published("E2B-it")).layers
    assert [layer.owns_kv for layer in layers] == [True] * 15 + [False] * 20
    assert {layer.kv_layer for layer in layers[15:]} == {13, 14}
    assert [layer.mlp_size for layer in layers] == [6144] * 15 + [12288] * 20
    assert layers[0].kv == KVSpec(1, 256, 512) and layers[4].kv == KVSpec(1, 512, None)
    assert (layers[0].rope.theta, layers[0].rope.pairs) == (1e4, 128)
    assert (layers[4].rope.theta, layers[4].rope.pairs) == (1e6, 64)


def test_a_text_config_alone_is_a_target():
    raw = tiny.target_dict("moe")
    alone = raw["text_config"] | {"model_type": "gemma4_text", "eos_token_id": [1]}
    assert TargetConfig.from_dict(alone) == TargetConfig.from_dict(raw)


@pytest.mark.parametrize("kind", ["moe", "dense", "e2b", "e4b"])
def test_a_key_that_is_left_out_means_its_default_or_is_named(kind):
    """The default is transformers'. Without one the error names the key: nothing hides a typo in a size."""
    raw = tiny.target_dict(kind)
    whole = TargetConfig.from_dict(raw)
    for key in raw["text_config"]:
        less, said = copy.deepcopy(raw), copy.deepcopy(raw)
        del less["text_config"][key]
        if key == "layer_types":  # its default is a pattern, compared with transformers' below
            continue
        if key in DEFAULTS:
            said["text_config"][key] = DEFAULTS[key]
            assert outcome(less) == outcome(said), key
            continue
        try:
            assert TargetConfig.from_dict(less) == whole, key
        except UserError as error:
            assert repr(key) in str(error)


def outcome(raw: dict) -> TargetConfig | str:
    """The config, or the error that it gives."""
    try:
        return TargetConfig.from_dict(raw)
    except UserError as error:
        return str(error)


def test_defaults_are_those_of_transformers():
    """`Gemma4TextConfig` and `Gemma4UnifiedTextConfig`, as they are installed."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import Gemma4UnifiedTextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    for count in (6, 7, 12):
        for kind, theirs in (("gemma4_text", Gemma4TextConfig), ("gemma4_unified_text", Gemma4UnifiedTextConfig)):
            ours = {"model_type": kind, "num_hidden_layers": count} | sizes
            said = theirs(**ours).to_dict()
            assert {"layer_types", "rope_parameters", "per_layer_config"} <= said.keys()
            assert TargetConfig.from_dict(ours) == TargetConfig.from_dict(
                said
                | {
                    "model_type": kind,
                    "eos_token_id": None,
                    "hidden_size_per_layer_input": said.get("hidden_size_per_layer_input", 0),
                    "enable_moe_block": False,
                }
            )


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("key", ["{}", "0{}", "{:02}"])
def test_what_transformers_saves_means_the_same(size, key):
    """per_layer_config instead of the two global keys: targets, drafters, and the text model alone."""

    def saved(raw: dict) -> dict:
        text = {k: v for k, v in raw["text_config"].items() if "global" not in k}
        own = {"head_dim": raw["text_config"]["global_head_dim"]}
        if heads := raw["text_config"]["num_global_key_value_heads"]:
            own["num_key_value_heads"] = heads
        full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
        return raw | {"text_config": text | {"per_layer_config": {key.format(i): own for i in full}}}

    target, drafter = published(f"{size}-it"), published(f"{size}-it-assistant")
    config = TargetConfig.from_dict(target)
    assert TargetConfig.from_dict(saved(target)) == config
    alone = saved(target)["text_config"] | {"eos_token_id": target["eos_token_id"]}
    assert replace(TargetConfig.from_dict(alone), media_token_ids=config.media_token_ids) == config
    assert DrafterConfig.from_dict(saved(drafter), config) == DrafterConfig.from_dict(drafter, config)


@pytest.mark.parametrize(
    "per_layer",
    [{"0": {"head_dim": 4}}, {"2": {"head_dim": 16}}, {"99": {"head_dim": 8}}, {"2": {"rope": 1}, "5": {"rope": 1}},
     [1], {"x": {}}, {"2": 5}, 7],
    ids=str,
)  # fmt: skip
def test_another_per_layer_config_is_named(per_layer):
    raw = tiny.target_dict("moe")
    raw["text_config"]["per_layer_config"] = per_layer
    for key in ("global_head_dim", "num_global_key_value_heads"):
        del raw["text_config"][key]
    with pytest.raises(UserError, match="per_layer_config is") as error:
        TargetConfig.from_dict(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sliding, full",
    [
        ({"rope_theta": 1e4}, {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}),
        ({"type": "default", "rope_theta": 10000}, {"type": "proportional", "rope_theta": 1e6,
                                                    "partial_rotary_factor": 0.25}),
    ],
)  # fmt: skip
def test_spellings_of_rope_parameters(sliding, full):
    raw = tiny.target_dict("moe")
    said = TargetConfig.from_dict(raw)
    raw["text_config"]["rope_parameters"] = {"sliding_attention": sliding, "full_attention": full}
    assert TargetConfig.from_dict(raw) == said
    raw["text_config"]["rope_parameters"] = None
    assert TargetConfig.from_dict(raw) == said


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": "2816"}, "hidden_size is '2816', expected an integer"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["linear_attention"] * 6}, "unknown: ['linear_attention'"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is no multiple of 2"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"top_k_experts": 9}, "top_k_experts is 9"),
        ({"num_kv_shared_layers": 6}, "owns any"),
        ({"rope_parameters": {}}, "has no 'sliding_attention'"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
    ],
)
def test_values_that_do_not_fit_are_named(changes, message):
    raw = tiny.target_dict("moe")
    raw["text_config"] |= changes
    with pytest.raises(UserError) as error:
        TargetConfig.from_dict(raw)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rope_types_that_are_unknown_are_named():
    raw = tiny.target_dict("moe")
    raw["text_config"]["rope_parameters"] = tiny.ROPES | {"full_attention": {"rope_type": "yarn"}}
    with pytest.raises(UserError, match="rope_type is 'yarn'"):
        TargetConfig.from_dict(raw)


@pytest.mark.parametrize(
    "outer, text, message",
    [
        ({"model_type": "gemma4"}, {}, "is a target, expected a drafter"),
        ({"backbone_hidden_size": 64}, {}, "hidden size is 64, the target's is 32"),
        ({}, {"vocab_size": 98}, "vocabulary is 98, the target's is 97"),
        ({}, {"global_head_dim": 32}, "full head size is 32, the target's is 16"),
        ({}, {"num_key_value_heads": 4}, "sliding key/value heads is 4, the target's is 2"),
        ({}, {"sliding_window": 16}, "sliding window is 16, the target's is 8"),
        ({"use_ordered_embeddings": True, "num_centroids": 10}, {}, "num_centroids is 10"),
    ],
)
def test_a_drafter_of_another_target_is_refused(outer, text, message):
    raw = tiny.drafter_dict("moe") | outer
    raw["text_config"] |= text
    with pytest.raises(UserError, match=message):
        DrafterConfig.from_dict(raw, TargetConfig.from_dict(tiny.target_dict("moe")))


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_drafters_fit_their_own_target_alone(size):
    drafter = published(f"{size}-it-assistant")
    for other in PARAMETERS:
        if other != size:
            with pytest.raises(UserError, match="another target"):
                DrafterConfig.from_dict(drafter, TargetConfig.from_dict(published(f"{other}-it")))


def test_generation_defaults():
    raw = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106, 50]}
    defaults = GenerationDefaults.from_dict(raw | {"suppress_tokens": [258883, 258882]})
    assert defaults == GenerationDefaults(1.0, 0.95, 64, (1, 106, 50), (258883, 258882))
    assert GenerationDefaults.from_dict({"eos_token_id": 1}) == GenerationDefaults(0.0, 1.0, 0, (1,), ())


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 64.0}, {"top_k": 64}),
        ({"top_k": None, "top_p": None, "temperature": None}, {}),
        ({"top_p": 1}, {}),
        ({"top_p": 1.0}, {}),
        ({"top_p": 0.0}, {"top_p": 1e-6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"do_sample": 1}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": 0}, {"temperature": 0.0}),
        ({"do_sample": None}, {"temperature": 0.0}),
        ({"cache_implementation": "hybrid", "pad_token_id": 0, "_from_model_config": True}, {}),
        ({"eos_token_id": [1, 106, 1, None, 106]}, {"eos_token_ids": (1, 106)}),
        ({"eos_token_id": 1.0}, {"eos_token_ids": (1,)}),
        ({"eos_token_id": None, "suppress_tokens": None}, {}),
        ({"suppress_tokens": []}, {}),
        ({"suppress_tokens": [5.0, 5]}, {"suppress_token_ids": (5,)}),
        ({"top_k": 2**31}, {"top_k": 2**31 - 1}),
        ({"top_k": 2**40}, {"top_k": 2**31 - 1}),
        ({"top_k": 2.0**31}, {"top_k": 2**31 - 1}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"min_p": 0.1, "do_sample": False}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": 2, "do_sample": False}, {"temperature": 0.0, "repetition_penalty": 2.0}),
        ({"num_assistant_tokens": "5"}, {}),
        ({"num_assistant_tokens": -1, "num_beams": math.nan, "top_h": []}, {}),
    ],
    ids=str,
)
def test_generation_defaults_take_what_is_meant(given, meant):
    usual = GenerationDefaults(1.0, 1.0, 0, (), ())
    found = GenerationDefaults.from_dict({"do_sample": True} | given)
    assert found == replace(usual, **meant)
    assert SamplingParams().resolved(found).temperature == found.temperature


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": -5},
        {"top_k": 1.5},
        {"top_k": "64"},
        {"top_k": True},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"top_p": "0.9"},
        {"top_p": [0.9]},
        {"temperature": -1},
        {"temperature": 1e39},
        {"temperature": "hot"},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"do_sample": "yes"},
        {"do_sample": math.nan},
        {"do_sample": []},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"top_k": 2.0**31 + 0.5},
        {"top_p": "0" * 5000},
        {"eos_token_id": -1},
        {"eos_token_id": "1"},
        {"eos_token_id": [1, True]},
        {"eos_token_id": [[1]]},
        {"eos_token_id": {"id": 1}},
        {"eos_token_id": 1.5},
        {"eos_token_id": 2**40},
        {"suppress_tokens": [-1]},
        {"suppress_tokens": [False]},
        {"suppress_tokens": "all"},
        {"suppress_tokens": [math.nan]},
    ],
    ids=str,
)
def test_generation_defaults_without_a_meaning_are_named(given):
    with pytest.raises(UserError, match=f"generation_config.json: {next(iter(given))}") as raised:
        GenerationDefaults.from_dict({"do_sample": True} | given)
    assert "expected" in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 250


@pytest.mark.parametrize("key", ["eos_token_id", "suppress_tokens"])
def test_ids_beyond_the_vocabulary_are_named(key):
    GenerationDefaults.from_dict({key: [0, 96]}).check_vocabulary(97)
    for beyond in (97, 5000, 10**7):
        with pytest.raises(UserError, match=f"{key} has {beyond}, expected 0 to 96"):
            GenerationDefaults.from_dict({key: [3, beyond]}).check_vocabulary(97)


@pytest.mark.parametrize("ids", [97, [1, 97], [-1], [True], ["1"], 1.5])
def test_end_tokens_beyond_the_vocabulary_are_named(ids):
    with pytest.raises(UserError, match=r"config\.json: eos_token_id has"):
        TargetConfig.from_dict(tiny.target_dict("moe") | {"eos_token_id": ids})


@pytest.mark.parametrize("name", ["image", "audio", "video"])
@pytest.mark.parametrize("value", [-1, True, "5", 1.5, {}])
def test_media_tokens_are_ids(name, value):
    with pytest.raises(UserError, match=f"config.json: {name}_token_id has"):
        TargetConfig.from_dict(tiny.target_dict("moe") | {f"{name}_token_id": value})


def test_every_token_has_a_row_in_the_per_layer_table():
    raw = tiny.target_dict("e2b")
    raw["text_config"]["vocab_size_per_layer_input"] = 96
    with pytest.raises(UserError, match="vocab_size_per_layer_input is 96, expected at least the vocab_size of 97"):
        TargetConfig.from_dict(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4),
    lambda leaf: st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=4), leaf, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(tiny.target_dict("moe")["text_config"])), value=JSON)
def test_mutated_configs_raise_one_line_or_load(key, value):
    raw = tiny.target_dict("moe")
    raw["text_config"][key] = value
    try:
        TargetConfig.from_dict(raw)
    except UserError as error:
        assert "\n" not in str(error)
