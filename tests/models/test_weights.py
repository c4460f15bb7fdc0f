"""Loading is strict, keeps names, honours quantisation by path, and merges only what agrees."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from convert.cli import main as convert
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.models.linear import Linear, Stack

TARGET, DRAFTER = hub.DEMO / "target", hub.DEMO / "drafter"


def edited(folder: Path, source: Path = TARGET, edit=lambda tensors: tensors, **config) -> Path:
    """A copy of a bundled folder with other tensors or config."""
    shutil.copytree(source, folder)
    tensors = edit(dict(mx.load(str(source / "model.safetensors"))))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def without(tensors: dict, name: str) -> dict:
    return {k: v for k, v in tensors.items() if k != name}


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: without(t, NORM), f"lacks tensor '{NORM}'"),
        (lambda t: t | {"language_model.model.extra": mx.zeros(3)}, "unknown tensor 'language_model.model.extra'"),
        (lambda t: t | {NORM: mx.zeros(5)}, f"{NORM} has shape (5,), expected (192,)"),
        (lambda t: t | {"model.language_model.norm.weight": mx.ones(192)}, "which are one tensor"),
        (lambda t: t | {"language_model.model.layers.0.experts.gate_up_proj": mx.zeros(3)}, "experts.gate_up_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, edit, message):
    with pytest.raises(UserError) as error:
        loading.load_target(edited(tmp_path / "model", edit=edit))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_media_tensors_are_left_out(tmp_path):
    media = {"vision_tower.x.weight": mx.zeros(2), "embed_audio.y": mx.zeros(2)}
    loading.load_target(edited(tmp_path / "model", edit=lambda t: t | media))


def test_a_raw_hugging_face_drafter_loads():
    """Its names are those of the bundled one: nothing needs converting."""
    target = loading.load_target(TARGET)
    assert loading.load_drafter(DRAFTER, target.config).norm.weight.shape == (128,)


def test_files_that_are_broken_or_missing_are_named(tmp_path):
    folder = edited(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(UserError, match="a complete safetensors file"):
        loading.load_target(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weight file 'model"):
        loading.load_target(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match=r"no weight file '\.\./\.\./secret"):
        loading.load_target(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        loading.load_target(folder)


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (8, 64), (4, 64)])
def test_quantised_pairs_run_losslessly(tmp_path, bits, group):
    """Convert both to n bits, load, and MTP still gives plain decoding's tokens (float32 arithmetic on the CPU)."""
    for name in ("target", "drafter"):
        source = raw_target(tmp_path) if name == "target" else DRAFTER
        argv = ["--hf-path", source, "--mlx-path", tmp_path / name, "-q", "--q-bits", bits, "--q-group-size", group]
        assert convert([str(a) for a in argv]) == 0
    engine = load(str(tmp_path / "target"), num_draft_tokens=4)
    assert isinstance(engine.target.layers[0].mlp.down_proj, nn.QuantizedLinear)
    assert isinstance(engine.drafter.embed_tokens, nn.QuantizedEmbedding)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompts = ["def fibonacci(n):", "What is a list?"]
    plain = engine.generate(prompts, params, num_draft_tokens=0)
    drafted = engine.generate(prompts, params, num_draft_tokens=3)
    assert [r.tokens for r in plain] == [r.tokens for r in drafted]
    reference = load(num_draft_tokens=4).generate(prompts, params)
    if bits == 8:
        assert plain[0].tokens[:8] == reference[0].tokens[:8]


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_fp_modes_run_in_the_wanted_dtype(tmp_path, mode):
    """MLX looks up bf16 from such a table whatever the rest is in; the stream stays float32."""
    argv = ["--hf-path", raw_target(tmp_path), "--mlx-path", tmp_path / "target", "-q", "--q-mode", mode]
    assert convert([str(a) for a in argv]) == 0
    engine = load(str(tmp_path / "target"), str(DRAFTER), num_draft_tokens=4, dtype="float32")
    assert engine.target.embed(mx.array([5])).dtype == mx.float32
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    plain = engine.generate("def fibonacci(n):", params, num_draft_tokens=0)
    assert engine.generate("def fibonacci(n):", params).tokens == plain.tokens


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_drafter_quantised_while_loading_drafts_losslessly(bits):
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    engine = load(draft_bits=bits, num_draft_tokens=4)
    drafter = engine.drafter
    assert (drafter.embed_tokens.bits, drafter.pre_projection.bits) == (min(bits, 4), bits)
    assert not loading.is_quantized(engine.target)
    drafted = engine.generate("def fibonacci(n):", params, num_draft_tokens=3)
    assert (
        drafted.stats.drafted
        and drafted.tokens == engine.generate("def fibonacci(n):", params, num_draft_tokens=0).tokens
    )


def test_eight_bits_while_loading_are_those_of_convert_pair(tmp_path):
    argv = ["--hf-path", raw_target(tmp_path), "--mlx-path", tmp_path / "m", "-q", "--q-bits", "8", "--pair"]
    shutil.copytree(DRAFTER, tmp_path / "raw-assistant")
    assert convert([str(a) for a in argv]) == 0
    target = loading.load_target(TARGET).config
    converted = loading.load_drafter(tmp_path / "m-assistant", target)
    loaded = loading.load_drafter(DRAFTER, target, bits=8)
    for (path, ours), (_, theirs) in zip(*(tree_flatten(m.parameters()) for m in (loaded, converted)), strict=True):
        assert ours.dtype == theirs.dtype and mx.array_equal(ours, theirs), path


def test_draft_bits_that_cannot_be(tmp_path):
    for settings in ({"draft_bits": 7}, {"draft_bits": 8, "draft_model": "none"}):
        with pytest.raises(UserError, match=r"draft_bits is \d, expected one of \(2, 3, 4, 5, 6, 8\), and a drafter"):
            load(**settings)
    assert convert([str(a) for a in ("--hf-path", DRAFTER, "--mlx-path", tmp_path / "d", "-q", "--q-bits", "8")]) == 0
    with pytest.raises(UserError, match="is quantised already; leave out draft_bits"):
        load(draft_model=str(tmp_path / "d"), draft_bits=8)


def test_a_heavy_drafter_is_reported_and_a_quantised_one_is_not():
    advice = load().advice
    assert re.search(r"\d\d% of a target step's", advice) and "--draft-bits 8" in advice
    assert load(draft_bits=8).advice is None
    assert load(draft_model="none").advice is None


def raw_target(folder: Path) -> Path:
    """The bundled target in Hugging Face names, as the converter reads it."""

    def raw(tensors: dict) -> dict:
        tensors = {k.removeprefix("language_model."): v for k, v in tensors.items()}
        for k in [k for k in tensors if k.endswith("switch_glu.gate_proj.weight")]:
            stem = k.removesuffix("switch_glu.gate_proj.weight")
            halves = [tensors.pop(f"{stem}switch_glu.{half}_proj.weight") for half in ("gate", "up")]
            tensors[f"{stem}gate_up_proj"] = mx.concatenate(halves, axis=1)
            tensors[f"{stem}down_proj"] = tensors.pop(f"{stem}switch_glu.down_proj.weight")
        return tensors

    source = edited(folder / "raw", edit=raw)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config["text_config"] | {"model_type": "gemma4_text"}))
    return source


def test_stacks_merge_neighbours_of_one_format():
    """Three linears, the last one quantised: two products, the same output."""
    mx.random.seed(0)
    linears = {name: Linear(64, 32) for name in "abc"}
    linears["c"] = nn.QuantizedLinear.from_linear(linears["c"], 32, 8)
    stack = Stack(**linears)
    x = mx.random.normal((3, 64))
    before = np.array(stack(x))
    stack.merge()
    for linear in stack.values():
        if isinstance(linear, Linear):
            linear.derive()
    assert list(stack) == ["a_b", "c"] and stack["a_b"].weight.shape == (64, 64)
    np.testing.assert_allclose(np.array(stack(x)), before, atol=1e-6)


def test_merged_models_keep_no_second_copy():
    """Loading ends with the weights alone: no unmerged parts and no second layout stay behind."""
    mx.clear_cache()
    before = mx.get_active_memory()
    model = loading.load_target(TARGET, mx.float32)
    held = mx.get_active_memory() - before
    size = sum(v.nbytes for _, v in nn.utils.tree_flatten(model.parameters()))
    assert held < 1.02 * size + 200_000


def test_tiny_models_merge_too():
    assert list(tiny.target("moe").layers[0].self_attn.qkv) == ["q_proj_k_proj_v_proj"]
    assert list(tiny.target("moe").layers[2].self_attn.qkv) == ["q_proj_k_proj"]
