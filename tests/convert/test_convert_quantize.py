"""Quantisation modes and recipes: what is written, what it stands for, and who opens it."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from test_convert import Checkpoint, expected, load, make_drafter, make_e2b, make_moe, make_unified, run

from convert import blocks
from convert.quantize import MODES, Q4_0, RECIPES, Format
from mlx_gemma_mtp.models import loading

TEXT = [2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41]  # more than a window of 8
LAYER = "language_model.model.layers.0."


def saved(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.save()
    return checkpoint


def table(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization"]


def overrides(folder) -> dict[str, int]:
    """path -> bits, of the first layer and of what is in no layer."""
    return {
        path.removeprefix("language_model.model."): value and value["bits"]
        for path, value in table(folder).items()
        if "." in path and (".layers." not in path or ".layers.0." in path)
    }


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_quantising_the_whole_tensor(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)  # a few rows at a time
    checkpoint = saved(make_unified(tmp_path / "hf"))
    assert run(checkpoint, tmp_path / "out", "-q", "--q-mode", mode) == 0
    held, config = load(tmp_path / "out")
    form = MODES[mode]
    assert config["quantization"] == {"bits": form.bits, "group_size": form.group_size, "mode": mode}
    for name, value in expected(checkpoint).items():
        if value.ndim > 1:
            codes, scales = mx.quantize(value, mode=mode)
            path = name.removesuffix(".weight")
            assert mx.array_equal(held[name], codes) and mx.array_equal(held[path + ".scales"], scales), name
            assert path + ".biases" not in held


@pytest.mark.parametrize("make", [make_e2b, make_unified, make_moe])
@pytest.mark.parametrize("mode", MODES)
def test_mlx_lm_and_this_package_agree_on_every_mode(tmp_path, monkeypatch, make, mode):
    from mlx_lm.utils import load_model

    checkpoint = saved(make(tmp_path / "hf"))
    assert run(checkpoint, tmp_path / "out", "-q", "--q-mode", mode, "--dtype", "float32") == 0
    ours = loading.load_target(tmp_path / "out", mx.float32)
    logits, _, _ = reference.forward(ours, TEXT)
    assert np.isfinite(logits).all() and logits.std() > 0
    look_up = nn.QuantizedEmbedding.__call__  # MLX returns bfloat16 in these modes, and all that follows is rounded
    monkeypatch.setattr(nn.QuantizedEmbedding, "__call__", lambda *args: look_up(*args).astype(mx.float32))
    theirs = load_model(tmp_path / "out", lazy=True)[0](mx.array([TEXT]))[0]
    np.testing.assert_allclose(reference.forward(ours, TEXT)[0], np.array(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_exceptions_to_a_mode_name_their_own(tmp_path, mode):
    assert run(saved(make_moe(tmp_path / "hf")), tmp_path / "out", "-q", "--q-mode", mode) == 0
    group = 64  # affine has no groups of 16
    eight = {"bits": 8, "group_size": group, "mode": "affine"}
    assert table(tmp_path / "out")[LAYER + "router.proj"] == eight
    assert table(tmp_path / "out").get(LAYER + "mlp.up_proj") == (None if mode == "mxfp8" else eight)


MLP = {f"layers.0.mlp.{part}_proj": 8 for part in ("gate", "up", "down")}
ROUTER = {"layers.0.router.proj": 8}
PER_LAYER = {
    "embed_tokens_per_layer": 8, "per_layer_model_projection": 8, "layers.0.per_layer_input_gate": 8,
    "layers.0.per_layer_projection": 8,
}  # fmt: skip
G32 = ("--q-group-size", "32")
CASES = {
    "default": (make_moe, (), MLP | ROUTER),
    "default by name": (make_moe, ("--quant-predicate", "default"), MLP | ROUTER),
    "8 bits": (make_moe, ("--q-bits", "8", *G32), ROUTER),  # groups of 64, as published
    "uniform": (make_moe, ("--quant-predicate", "uniform"), ROUTER),
    "E models are safe": (make_e2b, G32, PER_LAYER),
    "ple-safe": (make_e2b, (*G32, "--quant-predicate", "ple-safe"), PER_LAYER),
    "E models, not safe": (make_e2b, (*G32, "--quant-predicate", "default"), {}),
    "E models, 8 bits": (make_e2b, (*G32, "--q-bits", "8"), {}),
    "ple-safe beside experts": (make_moe, ("--quant-predicate", "ple-safe"), MLP | ROUTER),
    "qat": (make_moe, ("--quant-predicate", "qat-q4_0"), ROUTER),
}


@pytest.mark.parametrize("case", CASES)
def test_recipes(tmp_path, case):
    make, flags, want = CASES[case]
    assert run(saved(make(tmp_path / "hf")), tmp_path / "out", "-q", *flags) == 0
    assert overrides(tmp_path / "out") == want


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "drafter"])
def test_every_recipe_opens(tmp_path, name):
    for make in (make_e2b, make_moe):
        out = tmp_path / make.__name__
        checkpoint = saved(make(tmp_path / f"hf-{make.__name__}"))
        assert run(checkpoint, out, "-q", "--quant-predicate", name, "--dtype", "float32") == 0
        logits, _, _ = reference.forward(loading.load_target(out, mx.float32), TEXT)
        assert np.isfinite(logits).all() and logits.std() > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("-q", "--q-mode", "mxfp4", "--q-bits", "8"), "--q-mode mxfp4 is 4-bit mxfp4, groups of 32, but 8-bit"),
        (("-q", "--q-mode", "nvfp4", "--q-group-size", "32"), "groups of 16, but 4-bit nvfp4, groups of 32"),
        (("-q", "--q-mode", "mxfp8", "--quant-predicate", "qat-q4_0"), "qat-q4_0 is 4-bit affine"),
        (("-q", "--q-bits", "8", "--quant-predicate", "qat-q4_0"), "but 8-bit affine"),
        (("--q-mode", "mxfp4"), "add -q"),
        (("--quant-predicate", "uniform"), "add -q"),
    ],
)
def test_contradicting_flags(tmp_path, capsys, flags, says):
    assert run(saved(make_moe(tmp_path / "hf")), tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_flags_that_agree_with_the_mode(tmp_path):
    flags = ("-q", "--q-mode", "mxfp8", "--q-bits", "8", *G32)
    assert run(saved(make_drafter(tmp_path / "hf")), tmp_path / "out", *flags) == 0


# ---- Q4_0: w = d * code, d a float16, code -8..7, and -8 is the value of largest magnitude -----------------------


def q4_0_values(shape, scales, dtype=mx.float32, seed=0) -> mx.array:
    """What llama.cpp's quantiser leaves: each group of 32 has its extreme at code -8; d has either sign, or is 0."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(-8, 8, (*shape[:-1], shape[-1] // 32, 32))
    codes[..., generator.integers(32)] = -8
    d = mx.array(generator.normal(size=(*codes.shape[:-1], 1)) * 0.02).astype(scales).astype(mx.float32)
    d[0] = 0
    return (mx.array(codes, dtype=mx.float32) * d).reshape(shape).astype(dtype)


@pytest.mark.parametrize("scales", [mx.float16, mx.bfloat16])
def test_q4_0_survives_bit_exactly(scales):
    """As float32; ordinary 4-bit rounding loses a tenth of these values."""
    values = q4_0_values((64, 256), scales)
    plain = Format(4, 32)
    assert mx.array_equal(Q4_0.dequantize(*Q4_0.quantize(values)), values)
    assert mx.mean(plain.dequantize(*plain.quantize(values)) != values).item() > 0.05


def test_q4_0_survives_in_bfloat16():
    """A bfloat16 tensor rounds d * code; where d is a bfloat16 that rounding is all that differs."""
    values = q4_0_values((64, 256), mx.bfloat16, mx.bfloat16)
    packed, scales, biases = Q4_0.quantize(values)
    assert scales.dtype == biases.dtype == mx.bfloat16
    assert mx.array_equal(Q4_0.dequantize(packed, scales, biases).astype(mx.bfloat16), values)


def test_q4_0_is_never_worse_than_ordinary_rounding_in_any_group():
    values = mx.concatenate([q4_0_values((8, 64), mx.float16), mx.random.normal((56, 64), key=mx.random.key(1))])
    plain = Format(4, 32)
    ours, ordinary = (
        mx.abs(form.dequantize(*form.quantize(values)) - values).reshape(-1, 32).max(axis=-1) for form in (Q4_0, plain)
    )
    assert (ours <= ordinary).all() and (ours[:16] == 0).all() and (ours[16:] > 0).all()


def test_a_qat_checkpoint_survives_conversion(tmp_path):
    checkpoint = make_moe(tmp_path / "hf")
    for seed, (name, value) in enumerate(checkpoint.weights.items()):
        if value.ndim > 1:
            checkpoint.weights[name] = q4_0_values(value.shape, mx.float16, seed=seed)
    checkpoint.save()
    flags = ("-q", "--quant-predicate", "qat-q4_0", "--dtype", "float32")
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    held, config = load(tmp_path / "out")
    assert {k: v for k, v in config["quantization"].items() if "." not in k} == Q4_0.setting
    for name, value in expected(checkpoint).items():
        path = name.removesuffix(".weight")
        if value.ndim > 1 and not path.endswith("router.proj"):
            restored = mx.dequantize(held[name], held[path + ".scales"], held[path + ".biases"], **Q4_0.setting)
            assert mx.array_equal(restored, value), name
