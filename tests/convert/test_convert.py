"""convert: synthetic Hugging Face checkpoints in, MLX folders out, one-line errors, no debris.

The sources are spelled out here, independently of convert/names.py; mlx-lm's strict loader is the
second opinion on what is written.
"""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert import blocks, names, writer
from convert.cli import main
from convert.config import model_config
from mlx_gemma_mtp.files.safetensors import read_header

ROOT = Path(__file__).resolve().parents[2]
S, F = "sliding_attention", "full_attention"
H, V, D, G = 64, 96, 32, 64  # hidden, vocabulary, sliding and full head widths
ROPE = {
    S: {"rope_theta": 10000.0, "rope_type": "default"},
    F: {"rope_theta": 1000000.0, "rope_type": "proportional", "partial_rotary_factor": 0.25},
}
BASE = {
    "attention_k_eq_v": False, "bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": False,
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "global_head_dim": G, "head_dim": D,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": H, "hidden_size_per_layer_input": 0,
    "intermediate_size": 128, "layer_types": [S, F], "max_position_embeddings": 512,
    "model_type": "gemma4_text", "num_attention_heads": 4, "num_global_key_value_heads": None,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "pad_token_id": 0,
    "rms_norm_eps": 1e-6, "rope_parameters": ROPE, "sliding_window": 8, "tie_word_embeddings": True,
    "use_double_wide_mlp": False, "vocab_size": V, "vocab_size_per_layer_input": V,
}  # fmt: skip
E2B = BASE | {
    "expert_intermediate_size": None, "hidden_size_per_layer_input": 32, "num_hidden_layers": 4,
    "layer_types": [S, F, S, F], "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
}  # fmt: skip
UNIFIED = BASE | {
    "attention_k_eq_v": True, "model_type": "gemma4_unified_text", "num_global_key_value_heads": 1,
}  # fmt: skip
MOE = BASE | {
    "attention_k_eq_v": True, "enable_moe_block": True, "moe_intermediate_size": 64,
    "num_experts": 4, "num_global_key_value_heads": 1, "top_k_experts": 2,
}  # fmt: skip
DRAFTER = BASE | {
    "final_logit_softcapping": None, "layer_types": [S, S, S, F], "num_hidden_layers": 4,
    "num_kv_shared_layers": 4, "vocab_size_per_layer_input": 0,
}  # fmt: skip


def layer_shapes(text: dict, i: int) -> dict:
    """Tensors of layer i as the published files name and shape them."""
    full, moe = text["layer_types"][i] == F, text["enable_moe_block"]
    shared = i >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
    d, n = (G if full else D), text["num_attention_heads"]
    k_eq_v = full and text["attention_k_eq_v"]
    kv = 1 if k_eq_v else 2
    inner = text["intermediate_size"] * (2 if shared and text["use_double_wide_mlp"] else 1)
    shapes = {
        "self_attn.q_proj.weight": (n * d, H), "self_attn.o_proj.weight": (H, n * d),
        "self_attn.q_norm.weight": (d,), "mlp.gate_proj.weight": (inner, H),
        "mlp.up_proj.weight": (inner, H), "mlp.down_proj.weight": (H, inner),
        "input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,),
        "pre_feedforward_layernorm.weight": (H,), "post_feedforward_layernorm.weight": (H,),
        "layer_scalar": (1,),
    }  # fmt: skip
    if text["num_kv_shared_layers"] < text["num_hidden_layers"]:  # real E files: shared ones too
        shapes |= {"self_attn.k_proj.weight": (kv * d, H), "self_attn.k_norm.weight": (d,)}
        if not k_eq_v:
            shapes["self_attn.v_proj.weight"] = (kv * d, H)
    if moe:
        shapes |= {
            "experts.gate_up_proj": (4, 128, H), "experts.down_proj": (4, H, 64),
            "router.proj.weight": (4, H), "router.scale": (H,), "router.per_expert_scale": (4,),
            "pre_feedforward_layernorm_2.weight": (H,),
            "post_feedforward_layernorm_1.weight": (H,),
            "post_feedforward_layernorm_2.weight": (H,),
        }  # fmt: skip
    if text["hidden_size_per_layer_input"]:
        shapes |= {
            "per_layer_input_gate.weight": (32, H), "per_layer_projection.weight": (H, 32),
            "post_per_layer_input_norm.weight": (H,),
        }  # fmt: skip
    return {f"layers.{i}.{name}": shape for name, shape in shapes.items()}


def text_shapes(text: dict) -> dict:
    shapes = {"embed_tokens.weight": (V, H), "norm.weight": (H,)}
    if text["hidden_size_per_layer_input"]:
        shapes |= {
            "embed_tokens_per_layer.weight": (V, 4 * 32),
            "per_layer_model_projection.weight": (4 * 32, H),
            "per_layer_projection_norm.weight": (32,),
        }
    for i in range(text["num_hidden_layers"]):
        shapes |= layer_shapes(text, i)
    return shapes


def values(shapes: dict, prefix: str, dtype=mx.bfloat16) -> dict:
    """Random weights, distinct for each tensor; vectors near 1 as norms are."""
    mx.random.seed(7)
    made = {}
    for name, shape in shapes.items():
        matrix = len(shape) > 1
        made[prefix + name] = (mx.random.normal(shape) * 0.1 + (not matrix)).astype(dtype)
    return made


@dataclass
class Checkpoint:
    """A folder in the Hugging Face layout, and what is in it."""

    folder: Path
    config: dict
    weights: dict

    def save(self, shards: int = 1) -> None:
        self.folder.mkdir(exist_ok=True)
        self.put_config(self.config)
        names_ = sorted(self.weights)
        if shards == 1:
            mx.save_safetensors(str(self.folder / "model.safetensors"), self.weights)
            return
        parts = {f"model-{i + 1}-of-{shards}.safetensors": names_[i::shards] for i in range(shards)}
        for file, part in parts.items():
            mx.save_safetensors(str(self.folder / file), {n: self.weights[n] for n in part})
        weight_map = {n: file for file, part in parts.items() for n in part}
        self.put_index({"metadata": {}, "weight_map": weight_map})

    def put_config(self, config: dict) -> None:
        (self.folder / "config.json").write_text(json.dumps(config))

    def put_index(self, index: dict) -> None:
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def wrapper(text: dict, kind: str) -> dict:
    """A multimodal config.json around a text config."""
    return {
        "architectures": ["X"], "model_type": kind, "text_config": text, "dtype": "bfloat16",
        "eos_token_id": [1, 5], "vision_config": {"hidden_size": 8}, "audio_config": {"a": 1},
        "image_token_id": 90, "tie_word_embeddings": True,
    }  # fmt: skip


def make_e2b(folder: Path) -> Checkpoint:
    weights = values(text_shapes(E2B), "model.language_model.")
    for name in ("vision_tower.std_bias", "embed_vision.embedding_projection.weight"):
        weights["model." + name] = mx.ones((3, 5), mx.bfloat16)
    weights["model.audio_tower.layers.0.input_max"] = mx.array(1.0)  # 0-d, like the clip bounds
    weights["model.embed_audio.embedding_projection.weight"] = mx.ones((2, 2))
    return Checkpoint(folder, wrapper(E2B, "gemma4"), weights)


def make_unified(folder: Path) -> Checkpoint:
    weights = values(text_shapes(UNIFIED), "model.language_model.")
    for name in ("vision_embedder.patch_ln1.bias", "vision_embedder.pos_embedding"):
        weights["model." + name] = mx.ones((2, 3), mx.bfloat16)
    return Checkpoint(folder, wrapper(UNIFIED, "gemma4_unified"), weights)


def make_moe(folder: Path) -> Checkpoint:
    return Checkpoint(folder, wrapper(MOE, "gemma4"), values(text_shapes(MOE), "model.language_model."))


def make_text(folder: Path) -> Checkpoint:
    """As transformers 5.23 saves a text-only MoE: per_layer_config instead of the global keys."""
    config = {k: v for k, v in MOE.items() if "global" not in k}
    config |= {"per_layer_config": {"01": {"head_dim": G, "num_key_value_heads": 1}}}
    config |= {"architectures": ["Gemma4ForCausalLM"], "eos_token_id": [1, 6]}
    return Checkpoint(folder, config, values(text_shapes(MOE), "model."))


def make_drafter(folder: Path, ordered: bool = True) -> Checkpoint:
    weights = values(text_shapes(DRAFTER), "model.")
    shapes = {"pre_projection.weight": (H, 2 * 48), "post_projection.weight": (48, H)}
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"], "backbone_hidden_size": 48,
        "centroid_intermediate_top_k": 4, "dtype": "bfloat16", "model_type": "gemma4_assistant",
        "num_centroids": 8, "text_config": DRAFTER, "tie_word_embeddings": True,
        "use_ordered_embeddings": ordered,
    }  # fmt: skip
    if ordered:
        shapes["masked_embedding.centroids.weight"] = (8, H)
        weights["masked_embedding.token_ordering"] = mx.array(np.random.permutation(V))
    return Checkpoint(folder, config, weights | values(shapes, ""))


def run(checkpoint: Checkpoint, out: Path, *flags: str) -> int:
    return main(["--hf-path", str(checkpoint.folder), "--mlx-path", str(out), *flags])


def watched_blocks(monkeypatch, most: int) -> list[int]:
    """The sizes of the blocks that are read from now on, of which none may be larger than `most` bytes."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", most)
    read, sizes = blocks.read, []

    def measured(tensor, start, stop):
        sizes.append((stop - start) * blocks.row_bytes(tensor))
        return read(tensor, start, stop)

    monkeypatch.setattr(blocks, "read", measured)
    return sizes


def load(folder: Path) -> tuple[dict, dict]:
    """All written tensors, and config.json."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for file in set(weight_map.values()):
        part = mx.load(str(folder / file))
        assert {n for n, f in weight_map.items() if f == file} == part.keys()
        weights |= part
    return weights, json.loads((folder / "config.json").read_text())


def expected(checkpoint: Checkpoint) -> dict:
    """What a float conversion must hold: dropped, renamed, split; written out by hand."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    made = {}
    for name, value in checkpoint.weights.items():
        path = re.sub(r"^model\.(language_model\.)?", "language_model.model.", name)
        if re.match(r"model\.(vision|audio|embed_vision|embed_audio)", name):
            continue
        layer = re.search(r"layers\.(\d+)\.self_attn\.(k_|v_)", name)
        if layer and int(layer[1]) >= first_shared:
            continue
        if path.endswith("experts.gate_up_proj"):
            base = path.replace("gate_up_proj", "switch_glu.")
            half = value.shape[1] // 2
            made[base + "gate_proj.weight"] = value[:, :half]
            made[base + "up_proj.weight"] = value[:, half:]
        elif path.endswith("experts.down_proj"):
            made[path.replace("down_proj", "switch_glu.down_proj.weight")] = value
        else:
            made[path] = value
    return made


TARGETS = {
    "e2b": (make_e2b, 1),
    "unified": (make_unified, 1),
    "moe": (make_moe, 2),
    "text": (make_text, 1),
}


@pytest.fixture(params=TARGETS)
def target(request, tmp_path) -> Checkpoint:
    make, shards = TARGETS[request.param]
    checkpoint = make(tmp_path / "hf")
    checkpoint.save(shards)
    return checkpoint


@pytest.fixture
def moe(tmp_path) -> Checkpoint:
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    return checkpoint


def test_float_target_has_exactly_the_expected_tensors(target, tmp_path):
    assert run(target, tmp_path / "out") == 0
    weights, _ = load(tmp_path / "out")
    want = expected(target)
    assert weights.keys() == want.keys()
    for name, value in want.items():
        assert weights[name].dtype == mx.bfloat16, name
        assert mx.array_equal(weights[name], value), name


def test_target_config(target, tmp_path):
    assert run(target, tmp_path / "out", "--dtype", "float16") == 0
    _, config = load(tmp_path / "out")
    text = config["text_config"]
    source_text = target.config.get("text_config", target.config)
    assert config["model_type"] == "gemma4" and text["model_type"] == "gemma4_text"
    assert "vision_config" not in config and config["audio_config"] is None
    assert config["eos_token_id"] == target.config["eos_token_id"]
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == V
    assert config["dtype"] == text["dtype"] == "float16"
    assert "quantization" not in config and "per_layer_config" not in text
    assert text["global_head_dim"] == G
    assert text["num_global_key_value_heads"] == (1 if source_text["attention_k_eq_v"] else None)
    for key in ("layer_types", "rope_parameters", "num_kv_shared_layers", "sliding_window"):
        assert text[key] == source_text[key]


@pytest.mark.parametrize("flags", [(), ("-q", "--q-bits", "8"), ("-q", "--q-group-size", "32")])
def test_mlx_lm_opens_the_target(target, tmp_path, flags):
    from mlx_lm.utils import load_model

    assert run(target, tmp_path / "out", "--dtype", "float32", *flags) == 0
    model, _ = load_model(tmp_path / "out", lazy=True)  # strict: names and shapes must all match
    logits = model(mx.array([[2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]]))
    assert logits.shape == (1, 11, V)
    assert mx.isfinite(logits).all() and mx.std(logits) > 0


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 32), (4, 64), (5, 32), (6, 64), (8, 32)])
def test_quantised_equals_quantising_the_whole_tensor(moe, tmp_path, monkeypatch, bits, group):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)  # a few rows at a time
    flags = ("-q", "--q-bits", str(bits), "--q-group-size", str(group))
    assert run(moe, tmp_path / "out", *flags) == 0
    weights, config = load(tmp_path / "out")
    table = config["quantization"]
    assert (table["bits"], table["group_size"], table["mode"]) == (bits, group, "affine")
    assert config["quantization_config"] == table
    for name, value in expected(moe).items():
        path = name.removesuffix(".weight")
        if value.ndim == 1:
            assert mx.array_equal(weights[name], value) and path not in table
            continue
        setting = table.get(path, {"bits": bits, "group_size": group})
        parts = mx.quantize(value, **setting)
        for got, want in zip((name, path + ".scales", path + ".biases"), parts, strict=True):
            assert weights[got].dtype == want.dtype and mx.array_equal(weights[got], want), got


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dequantised_is_close_to_the_source(moe, tmp_path, bits):
    assert run(moe, tmp_path / "out", "-q", "--q-bits", str(bits), "--dtype", "float32") == 0
    weights, config = load(tmp_path / "out")
    for name, value in expected(moe).items():
        path = name.removesuffix(".weight")
        if value.ndim > 1:
            setting = config["quantization"].get(path, {"bits": bits, "group_size": 64})
            scales, biases = weights[path + ".scales"], weights[path + ".biases"]
            restored = mx.dequantize(weights[name], scales, biases, **setting)
            error = mx.abs(restored - value).reshape(*scales.shape, -1).max(axis=-1)
            # at most a step in each group: half by rounding, and the smaller end may be clipped
            assert (error <= 1.01 * mx.abs(scales)).all(), name


def test_overrides_of_a_4_bit_moe(moe, tmp_path):
    assert run(moe, tmp_path / "out", "-q") == 0
    table = load(tmp_path / "out")[1]["quantization"]
    overrides = {k: v for k, v in table.items() if "." in k}
    eight = {"bits": 8, "group_size": 64}
    paths = ("router.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert overrides == {f"language_model.model.layers.{i}.{path}": eight for i in range(2) for path in paths}


def test_a_width_that_no_group_divides_stays_float(tmp_path):
    checkpoint = make_e2b(tmp_path / "hf")  # the per-layer width is 32
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "-q", "--q-bits", "8") == 0
    weights, config = load(tmp_path / "out")
    name = "language_model.model.layers.0.per_layer_projection"
    assert config["quantization"][name] is False
    assert weights[name + ".weight"].dtype == mx.bfloat16 and name + ".scales" not in weights
    assert weights["language_model.model.embed_tokens_per_layer.scales"].shape == (V, 2)
    assert "language_model.model.layers.0.mlp.gate_proj" not in config["quantization"]  # not a MoE


@pytest.mark.parametrize("ordered", [True, False])
def test_drafter_keeps_names_and_config(tmp_path, ordered):
    checkpoint = make_drafter(tmp_path / "hf", ordered)
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 0
    weights, config = load(tmp_path / "out")
    assert config == checkpoint.config
    assert weights.keys() == checkpoint.weights.keys()
    for name, value in checkpoint.weights.items():
        assert mx.array_equal(weights[name], value), name
    if ordered:
        assert weights["masked_embedding.token_ordering"].dtype == mx.int32


def test_quantised_drafter_keeps_its_centroids(tmp_path):
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "-q", "--q-group-size", "32") == 0
    weights, config = load(tmp_path / "out")
    overrides = {k: v for k, v in config["quantization"].items() if "." in k}
    assert overrides == {"masked_embedding.centroids": False}
    assert weights["pre_projection.scales"].shape == (H, 3)
    assert weights["model.embed_tokens.weight"].dtype == mx.uint32


def test_drafter_with_per_layer_config(tmp_path):
    checkpoint = make_drafter(tmp_path / "hf", ordered=False)
    text = {k: v for k, v in DRAFTER.items() if "global" not in k}
    text["per_layer_config"] = {"3": {"head_dim": G}}
    checkpoint.config = checkpoint.config | {"text_config": text}
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 0
    written = load(tmp_path / "out")[1]["text_config"]
    assert written == DRAFTER


def test_files_are_copied_and_shards_are_limited(moe, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (moe.folder / name).write_text(f'{{"of": "{name}"}}')
    (moe.folder / "README.md").write_text("not copied")
    monkeypatch.setattr(writer, "SHARD_BYTES", 60_000)
    assert run(moe, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == '{"of": "tokenizer.json"}'
    assert not (out / "README.md").exists()
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        assert (out / file).stat().st_size < 60_000 + 10_000  # the header comes on top
        for tensor in read_header(out / file).values():
            assert tensor.offset % writer.ITEM_BYTES[tensor.dtype] == 0
    weights, _ = load(out)
    assert all(mx.array_equal(weights[n], value) for n, value in expected(moe).items())
    assert mx.load(str(out / files[0]), return_metadata=True)[1] == {"format": "mlx"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_source_dtypes_are_cast(tmp_path, dtype):
    checkpoint = make_text(tmp_path / "hf")
    checkpoint.weights = values(text_shapes(MOE), "model.", dtype)
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 0
    weights, _ = load(tmp_path / "out")
    for name, value in expected(checkpoint).items():
        assert mx.array_equal(weights[name], value.astype(mx.bfloat16)), name


# Parameters, by the published file sizes; drafters include int64 token_ordering and layer scalars.
PUBLISHED = {
    "E2B": (dict(h=1536, i=6144, n=8, kv=1, gkv=None, layers=[S, S, S, S, F] * 7, shared=20,
                 ple=256, wide=True, v_is_k=False), 4_628_569_379),
    "12B": (dict(h=3840, i=15360, n=16, kv=8, gkv=1, layers=[S, S, S, S, S, F] * 8),
            11_907_350_320),
    "26B": (dict(h=2816, i=2112, n=16, kv=8, gkv=2, layers=[S, S, S, S, S, F] * 5,
                 moe=(128, 8, 704)), 25_233_141_790),
    "31B": (dict(h=5376, i=21504, n=32, kv=16, gkv=4, layers=[S, S, S, S, S, F] * 10),
            30_697_345_340),
    "E2B drafter": (dict(h=256, i=2048, n=4, kv=1, gkv=None, layers=[S, S, S, F], shared=4,
                         v_is_k=False, backbone=1536, ordered=True), 77_731_328 + 4 + 262_144),
    "31B drafter": (dict(h=1024, i=8192, n=32, kv=16, gkv=4, layers=[S, S, S, F], shared=4,
                         backbone=5376), 469_518_592 + 4),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameter_counts_of_the_published_models(model):
    m, count = PUBLISHED[model]
    experts, top_k, size = m.get("moe", (None, None, None))
    text = BASE | {
        "hidden_size": m["h"], "intermediate_size": m["i"], "num_attention_heads": m["n"],
        "num_key_value_heads": m["kv"], "num_global_key_value_heads": m["gkv"], "head_dim": 256,
        "global_head_dim": 512, "layer_types": m["layers"], "num_hidden_layers": len(m["layers"]),
        "num_kv_shared_layers": m.get("shared", 0), "attention_k_eq_v": m.get("v_is_k", True),
        "use_double_wide_mlp": m.get("wide", False), "hidden_size_per_layer_input": m.get("ple", 0),
        "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "enable_moe_block": "moe" in m,
        "num_experts": experts, "top_k_experts": top_k, "moe_intermediate_size": size,
    }  # fmt: skip
    kind = "gemma4_assistant" if "backbone" in m else "gemma4"
    config = {"model_type": kind, "text_config": text, "num_centroids": 2048}
    config |= {"backbone_hidden_size": m.get("backbone"), "use_ordered_embeddings": "ordered" in m}
    entries = names.entries(model_config(config), kind)
    assert sum(math.prod(entry.shape) for entry in entries) == count
    assert len({entry.name for entry in entries}) == len(entries)


# ---- errors: exit code 2, one line, nothing left --------------------------------------------


def edit_config(checkpoint: Checkpoint, **changes) -> None:
    text = {k: v for k, v in (MOE | changes).items() if v != "absent"}
    checkpoint.put_config(checkpoint.config | {"text_config": text})


def edit_top(checkpoint: Checkpoint, **changes) -> None:
    checkpoint.put_config(checkpoint.config | changes)


def edit_weights(checkpoint: Checkpoint, edit) -> None:
    edit(checkpoint.weights)
    checkpoint.save()


def edit_bytes(checkpoint: Checkpoint, edit) -> None:
    path = checkpoint.folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))


def edit_header(checkpoint: Checkpoint, edit) -> None:
    """Change the parsed header in place; the tensors' bytes stay."""

    def apply(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        edit(header)
        raw = json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + data[8 + length :]

    edit_bytes(checkpoint, apply)


def sharded(checkpoint: Checkpoint, edit) -> None:
    """Two shards and an index, then `edit(folder, index)`."""
    (checkpoint.folder / "model.safetensors").unlink()
    checkpoint.save(2)
    index = json.loads((checkpoint.folder / "model.safetensors.index.json").read_text())
    edit(checkpoint.folder, index)
    checkpoint.put_index(index)


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def pickled(checkpoint: Checkpoint, name: str) -> None:
    """A pickle in place of the weights, which would make a folder if it were loaded."""
    (checkpoint.folder / "model.safetensors").unlink()
    payload = f"cos\nmkdir\n(S'{checkpoint.folder.parent / 'owned'}'\ntR.".encode()
    (checkpoint.folder / name).write_bytes(payload)


def point_at(index: dict, file: str) -> None:
    index["weight_map"][NORM] = file


def fill(weights: dict, name: str, value: float) -> None:
    weights[name] = mx.full(weights[name].shape, value, weights[name].dtype)


NORM = "model.language_model.norm.weight"
Q = "model.language_model.layers.0.self_attn.q_proj.weight"
SHARD_2 = "model-2-of-2.safetensors"
NO_SHARD = "no weight file 'model-2-of-2.safetensors'"
LAYOUT = "language_model.model.norm.weight"
ERRORS = {
    "no config": (lambda c: (c.folder / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda c: (c.folder / "config.json").write_text("{"), "expected a JSON object"),
    "config a list": (lambda c: (c.folder / "config.json").write_text("[]"), "a JSON object"),
    "unknown model": (lambda c: edit_top(c, model_type="llama"), "model_type 'llama'"),
    "quantised source": (lambda c: edit_top(c, quantization={"bits": 4, "group_size": 64}), "quantised already"),
    "no text_config": (lambda c: edit_top(c, text_config=None), "config.json, text_config is NoneType"),
    "missing key": (lambda c: edit_config(c, hidden_size="absent"), "has no 'hidden_size'"),
    "wrong type": (lambda c: edit_config(c, hidden_size="64"), "hidden_size is '64'"),
    "negative": (lambda c: edit_config(c, num_kv_shared_layers=-1), "num_kv_shared_layers is -1"),
    "not a flag": (lambda c: edit_config(c, attention_k_eq_v=1), "attention_k_eq_v is 1"),
    "layer count": (lambda c: edit_config(c, num_hidden_layers=3), "(unknown: []), expected 3"),
    "layer type": (lambda c: edit_config(c, layer_types=[S, "mamba"]), "'mamba'"),
    "untied": (lambda c: edit_config(c, tie_word_embeddings=False), "tie_word_embeddings is False"),
    "no rope": (lambda c: edit_config(c, rope_parameters=5), "rope_parameters is 5"),
    "expert count": (lambda c: edit_config(c, num_experts=None), "num_experts is None"),
    "per layer": (
        lambda c: edit_config(c, per_layer_config={"0": {"head_dim": 4}}), "is not a Gemma 4 one",
    ),
    "per layer list": (lambda c: edit_config(c, per_layer_config=[1]), "per_layer_config is [1]"),
    "config twice": (
        lambda c: (c.folder / "config.json").write_text('{"model_type": "gemma4", "model_type": "gemma4"}'), "twice",
    ),
    "config with NaN": (lambda c: edit_config(c, rms_norm_eps=math.nan), "NaN is no finite number"),
    "config in UTF-16": (
        lambda c: (c.folder / "config.json").write_text(json.dumps(c.config), encoding="utf-16"), "utf-8",
    ),
    "config that is a pipe": (lambda c: pipe(c.folder / "config.json"), "config.json is a named pipe"),
    "layer types in lists": (lambda c: edit_config(c, layer_types=[[S], [F]]), "2 entries (unknown: [["),
    "eps of no number": (lambda c: edit_config(c, rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    "rope of no kind": (lambda c: edit_config(c, rope_parameters={S: ROPE[S]}), "'full_attention'"),
    "pickles": (lambda c: pickled(c, "pytorch_model.bin"), "but pytorch_model.bin: pickles are never loaded"),
    "pickles of another name": (lambda c: pickled(c, "consolidated.pt"), "but consolidated.pt: pickles are never"),
    "weights that are a pipe": (lambda c: pipe(c.folder / "model.safetensors"), "no weight file 'model.safetensors'"),
    "no weights": (lambda c: (c.folder / "model.safetensors").unlink(), "no weight file 'model.safetensors'"),
    "missing tensor": (lambda c: edit_weights(c, lambda w: w.pop(NORM)), f"lacks tensor {NORM!r}"),
    "extra tensor": (lambda c: edit_weights(c, lambda w: w.update(x=mx.ones(1))), "has an unknown tensor 'x'"),
    "shared K/V of no shared layer": (
        lambda c: edit_weights(
            c, lambda w: w.update({Q.replace("0.self_attn.q", "1.self_attn.v"): mx.ones((64, H))})
        ),
        "layers.1.self_attn.v_proj.weight differs from model.language_model.layers.1.self_attn.k_proj.weight",
    ),
    "wrong shape": (
        lambda c: edit_weights(c, lambda w: w.update({NORM: mx.ones(3)})),
        f"{NORM} has shape (3,), expected (64,)",
    ),
    "wrong dtype": (
        lambda c: edit_weights(c, lambda w: w.update({NORM: mx.ones(H, mx.int32)})),
        f"{NORM} is of I32",
    ),
    "a tensor under two prefixes": (
        lambda c: edit_weights(c, lambda w: w.update({LAYOUT: w[NORM]})), "which are one tensor",
    ),
    "NaN": (lambda c: edit_weights(c, lambda w: fill(w, Q, math.nan)), f"{Q!r} holds NaN"),
    "empty file": (lambda c: edit_bytes(c, lambda data: b""), "is empty; download it again"),
    "truncated data": (lambda c: edit_bytes(c, lambda data: data[:-1]), "header describes"),
    "truncated header": (lambda c: edit_bytes(c, lambda data: data[:99]), "header length"),
    "trailing bytes": (lambda c: edit_bytes(c, lambda data: data + b"x"), "header describes"),
    "huge header": (
        lambda c: edit_bytes(c, lambda data: struct.pack("<Q", 2**63) + data[8:]),
        "header length 9223372036854775808",
    ),
    "header not JSON": (
        lambda c: edit_bytes(c, lambda data: data[:8] + b"#" + data[9:]), "header is no JSON object",
    ),
    "unknown dtype": (
        lambda c: edit_header(c, lambda h: h[NORM].update(dtype="F4")), "unknown dtype 'F4'",
    ),
    "offsets": (
        lambda c: edit_header(c, lambda h: h[NORM]["data_offsets"].reverse()), "needs 128 bytes",
    ),
    "negative offset": (
        lambda c: edit_header(c, lambda h: h[NORM].update(data_offsets=[-128, 0])), "data_offsets",
    ),
    "shape with true": (
        lambda c: edit_header(c, lambda h: h[NORM].update(shape=[H, True])), "has shape [64, True]",
    ),
    "shape beyond all files": (
        lambda c: edit_header(c, lambda h: h[NORM].update(shape=[10**30])), "needs 2" + "0" * 30 + " bytes",
    ),
    "fractional shape": (
        lambda c: edit_header(c, lambda h: h[NORM].update(shape=[64.0])), "has shape [64.0]",
    ),
    "overlap": (
        lambda c: edit_header(c, lambda h: h[NORM].update(data_offsets=[2, 130])), "starts at byte",
    ),
    "header entry": (lambda c: edit_header(c, lambda h: h.update(x=3)), "entry 'x'"),
    "tensor twice": (
        lambda c: edit_bytes(c, lambda data: data.replace(b"feedforward_layernorm_1", b"feedforward_layernorm_2")),
        "a key occurs twice",
    ),
    "metadata of no texts": (
        lambda c: edit_header(c, lambda h: h.update(__metadata__={"a": 1})), "__metadata__ does not map names",
    ),
    "metadata 0": (lambda c: edit_header(c, lambda h: h.update(__metadata__=0)), "__metadata__ does not map names"),
    "missing shard": (
        lambda c: sharded(c, lambda folder, index: (folder / "model-2-of-2.safetensors").unlink()),
        NO_SHARD,
    ),
    "path in the index": (
        lambda c: sharded(c, lambda folder, index: point_at(index, "../model.safetensors")),
        "'../model.safetensors'",
    ),
    "absolute path in the index": (
        lambda c: sharded(c, lambda folder, index: point_at(index, str(folder / "model-1-of-2.safetensors"))),
        "expected a plain NAME.safetensors",
    ),
    "pickle in the index": (
        lambda c: sharded(c, lambda folder, index: point_at(index, "pytorch_model.bin")), "'pytorch_model.bin'",
    ),
    "number in the index": (lambda c: sharded(c, lambda folder, index: point_at(index, 5)), "no 'weight_map'"),
    "shard that links to itself": (
        lambda c: sharded(c, lambda folder, index: link(folder / SHARD_2, SHARD_2)), NO_SHARD,
    ),
    "shard that links to nothing": (
        lambda c: sharded(c, lambda folder, index: link(folder / SHARD_2, "/nowhere")), NO_SHARD,
    ),
    "shard that links to a device": (
        lambda c: sharded(c, lambda folder, index: link(folder / SHARD_2, "/dev/zero")), NO_SHARD,
    ),
    "shard that links to no weights": (
        lambda c: sharded(c, lambda folder, index: link(folder / SHARD_2, __file__)), "header length",
    ),
    "tensor in both shards": (
        lambda c: sharded(c, lambda folder, index: shutil.copy(folder / "model-1-of-2.safetensors", folder / SHARD_2)),
        "expected in model-1-of-2.safetensors",
    ),
    "tokenizer that links elsewhere": (
        lambda c: link(c.folder / "tokenizer.json", "/etc/hostname"), "tokenizer.json is a link to /etc/hostname",
    ),
    "index without a map": (
        lambda c: sharded(c, lambda folder, index: index.pop("weight_map")), "no 'weight_map'",
    ),
    "tensor not in the index": (
        lambda c: sharded(c, lambda folder, index: index["weight_map"].pop(NORM)), repr(NORM),
    ),
    "index names a tensor that is nowhere": (
        lambda c: sharded(
            c, lambda folder, index: index["weight_map"].update(y="model-1-of-2.safetensors")
        ),
        "no tensor 'y'",
    ),
}  # fmt: skip


def assert_fails(capsys, tmp_path, code: int, says: str) -> None:
    """One line on stderr, and neither the output nor its temporary sibling."""
    out, error = capsys.readouterr()
    assert code == 2 and out == ""
    assert re.fullmatch(r"error: [^\n]+\n", error) and says in error, error
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(moe, tmp_path, capsys, case):
    spoil, says = ERRORS[case]
    spoil(moe)
    assert_fails(capsys, tmp_path, run(moe, tmp_path / "out"), says)


def test_source_that_is_no_folder(tmp_path, capsys):
    code = main(["--hf-path", str(tmp_path / "nowhere"), "--mlx-path", str(tmp_path / "out")])
    assert_fails(capsys, tmp_path, code, "nowhere': no such folder")


def test_existing_output_is_kept(moe, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(moe, tmp_path / "out") == 2
    assert "exists; expected a new folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_float16_overflow_names_the_tensor(moe, tmp_path, capsys):
    edit_weights(moe, lambda weights: fill(weights, Q, 1e6))
    assert_fails(capsys, tmp_path, run(moe, tmp_path / "out", "--dtype", "float16"), "as F16")


def test_bits_without_q(moe, tmp_path, capsys):
    assert_fails(capsys, tmp_path, run(moe, tmp_path / "out", "--q-bits", "4"), "add -q")


@pytest.mark.parametrize("ids", [[-1, *range(1, V)], [*range(V - 1), V]])
def test_token_ordering_outside_the_vocabulary(tmp_path, capsys, ids):
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.weights["masked_embedding.token_ordering"] = mx.array(ids)
    checkpoint.save()
    assert_fails(capsys, tmp_path, run(checkpoint, tmp_path / "out"), "outside 0..95")


def test_drafter_without_backbone_size(tmp_path, capsys):
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.config.pop("backbone_hidden_size")
    checkpoint.save()
    assert_fails(capsys, tmp_path, run(checkpoint, tmp_path / "out"), "has no 'backbone_hidden_size'")


def test_full_disk_is_noticed_before_writing(moe, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_fails(capsys, tmp_path, run(moe, tmp_path / "out"), "0.000 GB free")


def test_hub_ids_are_downloaded_and_failures_are_one_line(moe, tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(repo, revision, allow_patterns, **more):
        asked.append((repo, allow_patterns))
        if repo == "org/absent":
            raise OSError("404 not found\nlong explanation")
        return str(moe.folder)

    monkeypatch.setattr("mlx_gemma_mtp.files.hub.snapshot_download", snapshot_download)
    code = main(["--hf-path", "org/absent", "--mlx-path", str(tmp_path / "out")])
    assert_fails(capsys, tmp_path, code, "the hub cannot be reached (404 not found)")
    assert main(["--hf-path", "org/model", "--mlx-path", str(tmp_path / "out")]) == 0
    assert asked[1] == ("org/model", ["config.json", "hf_quant_config.json"])  # tells of other formats
    assert asked[2][0] == "org/model" and "*.safetensors" in asked[2][1]


def test_command_line_of_the_checkout(moe, tmp_path):
    command = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    python = [sys.executable, "-m", "convert"]
    done = command([*python, "--hf-path", str(moe.folder), "--mlx-path", str(tmp_path / "out")])
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar without a terminal
    assert re.search(r"out: gemma4, \d+ tensors, [\d.]+ GB", done.stdout)
    failed = command([*python, "--hf-path", str(tmp_path), "--mlx-path", str(tmp_path / "new")])
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "Traceback" not in failed.stderr
