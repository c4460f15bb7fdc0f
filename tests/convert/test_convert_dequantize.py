"""convert makes floats of what others quantised: every value is that of the format's own formula, in numpy."""

import json

import mlx.core as mx
import numpy as np
import pytest
from packed import fp8, fp8_values, packed
from test_convert import Checkpoint, expected, load, make_drafter, make_e2b, make_moe, make_unified, run, watched_blocks

from convert import blocks
from convert.cli import main
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.safetensors import header_bytes


def save(checkpoint: Checkpoint, codes: dict[str, tuple[str, np.ndarray]]) -> Checkpoint:
    """Saves a checkpoint with further tensors of types that MLX does not write: name -> (dtype, bytes)."""
    spelled = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8"}
    held = {}
    for name, value in checkpoint.weights.items():
        raw = np.array(value.view(mx.uint8)) if value.ndim else np.array(value.reshape(1).view(mx.uint8))
        held[name] = (spelled[str(value.dtype).rpartition(".")[2]], value.shape, raw.tobytes())
    held |= {name: (dtype, value.shape, value.tobytes()) for name, (dtype, value) in codes.items()}
    outputs = sorted(((name, dtype, shape) for name, (dtype, shape, _) in held.items()), key=lambda o: o[0])
    header, _ = header_bytes(outputs)
    checkpoint.folder.mkdir(exist_ok=True)
    checkpoint.put_config(checkpoint.config)
    data = b"".join(held[name][2] for name, _, _ in outputs)
    (checkpoint.folder / "model.safetensors").write_bytes(header + data)
    return checkpoint


def matrices(checkpoint: Checkpoint) -> list[str]:
    """The tensors that quantisers take: linears of the text model, not its table."""
    return [
        name
        for name, value in checkpoint.weights.items()
        if value.ndim > 1 and ".layers." in name and "router" not in name and "language_model" in name
    ]


def as_fp8(checkpoint: Checkpoint, block: tuple[int, int] | None, end: str, shape=None, dtype=mx.float32) -> Checkpoint:
    """A saved folder with FP8 matrices; its `weights` become the float64 values. block: None for the whole matrix."""
    codes, values = {}, {}
    for name in matrices(checkpoint):
        weight = np.array(checkpoint.weights.pop(name).astype(mx.float32), np.float64)
        made, scales, values[name] = fp8(weight, block or weight.shape[-2:], dtype)
        codes[name] = ("F8_E4M3", made)
        checkpoint.weights[name + end] = scales if shape is None else scales.reshape(shape(scales))
        if name.endswith(".weight"):
            checkpoint.weights[name.removesuffix("weight") + "input_scale"] = mx.array([2.0])
    save(checkpoint, codes)
    checkpoint.weights |= values
    return checkpoint


def test_the_formulas_know_e4m3():
    values = fp8_values()
    assert (
        np.nanmax(values) == 448 and values[0x38] == 1 and values[1] == 2**-9 and np.isnan(values[[0x7F, 0xFF]]).all()
    )


def compare(checkpoint: Checkpoint, folder, names: list[str]) -> None:
    """The written float32 tensors are the values, rounded once."""
    written, config = load(folder)
    assert "quantization_config" not in config and "compression_config" not in config
    float_values = {name: np.asarray(value) for name, value in checkpoint.weights.items() if name in names}
    assert len(float_values) == len(names) > 0
    made = expected(Checkpoint(checkpoint.folder, checkpoint.config, float_values))
    for name, value in made.items():
        assert written[name].dtype == mx.float32
        np.testing.assert_array_equal(np.array(written[name]), value.astype(np.float32), err_msg=name)


FP8 = {
    "blocks": ((32, 16), "_scale_inv", None),
    "blocks that end outside": ((48, 40), "_scale_inv", None),
    "rows": ((1, 10**6), "_scale", None),
    "rows, one axis": ((1, 10**6), "_scale", lambda scales: scales.shape[:-1]),
    "groups": ((1, 16), "_scale", None),
    "tensors": (None, "_scale", lambda scales: scales.shape[:-2]),
    "tensors, one axis": (None, "_scale", lambda scales: (scales.size,)),
}


@pytest.mark.parametrize(
    ("make", "case"), [*((make_moe, case) for case in FP8), (make_e2b, "blocks"), (make_unified, "tensors")]
)
def test_fp8(tmp_path, monkeypatch, make, case):
    """Fused experts have a scale's axis more. Blocks of rows are read a few rows at a time."""
    block, end, shape = FP8[case]
    checkpoint = make(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8"}
    if block and block[0] > 1:
        checkpoint.config["quantization_config"]["weight_block_size"] = list(block)
    names = matrices(checkpoint)
    as_fp8(checkpoint, block, end, shape)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    compare(checkpoint, tmp_path / "out", names)


def test_scales_of_powers_of_two(tmp_path):
    """`scale_fmt: ue8m0`, a byte of exponent alone."""
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    codes = np.random.default_rng(0).integers(0, 126, (128, 64)).astype(np.uint8)
    exponents = np.arange(120, 128).reshape(4, 2).astype(np.uint8)
    checkpoint.weights.pop(name)
    save(checkpoint, {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F8_E8M0", exponents)})
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    scales = np.repeat(np.repeat(2.0 ** (exponents.astype(float) - 127), 32, 0), 32, 1)
    written, _ = load(tmp_path / "out")
    found = np.array(written["language_model.model.layers.0.mlp.up_proj.weight"])
    np.testing.assert_array_equal(found, (fp8_values()[codes] * scales).astype(np.float32))


def as_packed(checkpoint: Checkpoint, bits: int, group: int | None, symmetric: bool, **more) -> Checkpoint:
    """A saved folder of compressed-tensors; its `weights` become the values. Experts stay floats."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    checkpoint.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip
    values = {}
    for name in matrices(checkpoint):
        if checkpoint.weights[name].ndim == 2:
            weight = np.array(checkpoint.weights.pop(name).astype(mx.float32), np.float64)
            made, values[name] = packed(weight, bits, group, symmetric, **more)
            checkpoint.weights |= {name.removesuffix("weight") + end: tensor for end, tensor in made.items()}
    checkpoint.save()
    checkpoint.weights |= values
    return checkpoint


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 32), (8, None), (2, 16)])
def test_integers_of_compressed_tensors(tmp_path, monkeypatch, bits, group, symmetric):
    checkpoint = make_e2b(tmp_path / "hf")
    names = matrices(checkpoint)
    as_packed(checkpoint, bits, group, symmetric)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    compare(checkpoint, tmp_path / "out", names)


def test_groups_in_another_order(tmp_path):
    """`weight_g_idx` names each column's group (activation ordering)."""
    checkpoint = make_unified(tmp_path / "hf")
    names = matrices(checkpoint)
    as_packed(checkpoint, 4, 32, True)
    order = np.random.default_rng(1).permutation(64)
    for name in names:
        columns = checkpoint.weights[name].shape[1]
        groups = np.arange(columns) // 32
        groups[:64] = groups[:64][order]
        path = name.removesuffix("weight")
        made = checkpoint.weights.pop(path + "weight_packed")
        codes = np.array(made).view(np.uint32)[:, :, None] >> (4 * np.arange(8)) & 15
        scales = np.array(checkpoint.weights[path + "weight_scale"].astype(mx.float32), np.float64)
        checkpoint.weights |= {path + "weight_packed": made, path + "weight_g_idx": mx.array(groups.astype(np.int32))}
        checkpoint.weights[name] = (codes.reshape(len(codes), -1)[:, :columns] - 8.0) * scales[:, groups]
    values = {name: checkpoint.weights.pop(name) for name in names}
    checkpoint.save()
    checkpoint.weights |= values
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    compare(checkpoint, tmp_path / "out", names)


def test_integers_one_a_byte(tmp_path):
    """int-quantized (W8A8): int8 with a scale a row, and zero points of int8."""
    checkpoint = make_unified(tmp_path / "hf")
    weights = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}
    checkpoint.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    names, values, generator = matrices(checkpoint), {}, np.random.default_rng(2)
    for name in names:
        shape = checkpoint.weights.pop(name).shape
        codes = generator.integers(-128, 128, shape).astype(np.int8)
        scales = generator.random((shape[0], 1)).astype(np.float32)
        zeros = generator.integers(-9, 9, (shape[0], 1)).astype(np.int8)
        for end, made in (("", codes), ("_scale", scales), ("_zero_point", zeros)):
            checkpoint.weights[name + end] = mx.array(made)
        values[name] = (codes.astype(np.float64) - zeros) * scales
    checkpoint.save()
    checkpoint.weights |= values
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    compare(checkpoint, tmp_path / "out", names)


def test_experts_one_by_one(tmp_path, monkeypatch):
    """llm-compressor and ModelOpt store the matrices of each expert for themselves."""
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    values = {}
    for name in [name for name in checkpoint.weights if "experts." in name]:
        whole = checkpoint.weights.pop(name)
        base, _, kind = name.rpartition(".")
        for i in range(whole.shape[0]):
            halves = mx.split(whole[i], 2) if kind == "gate_up_proj" else [whole[i]]
            parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            checkpoint.weights |= {f"{base}.{i}.{p}.weight": half for p, half in zip(parts, halves, strict=True)}
    as_fp8(checkpoint, (32, 32), "_scale_inv")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    written, _ = load(tmp_path / "out")
    for layer in (0, 1):
        base = f"layers.{layer}.experts."
        for part in ("gate_proj", "up_proj", "down_proj"):
            values = [checkpoint.weights[f"model.language_model.{base}{i}.{part}.weight"] for i in range(4)]
            found = np.array(written[f"language_model.model.{base}switch_glu.{part}.weight"])
            np.testing.assert_array_equal(found, np.stack(values).astype(np.float32))


def test_quantised_again_and_inspected(tmp_path, capsys, monkeypatch):
    """-q quantises what bf16 weights of the same values become; inspect tells the stored format without reading it."""
    checkpoint = as_packed(make_unified(tmp_path / "hf"), 4, 32, True)
    assert run(checkpoint, tmp_path / "out", "-q", "--q-bits", "4", "--q-group-size", "32") == 0
    plain = Checkpoint(
        tmp_path / "plain", {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}, {}
    )
    plain.weights = {
        n: mx.array(v, mx.bfloat16) if isinstance(v, np.ndarray) else v for n, v in checkpoint.weights.items()
    }
    plain.weights = {n: v for n, v in plain.weights.items() if not n.rpartition(".")[2].startswith("weight_")}
    plain.save()
    assert run(plain, tmp_path / "same", "-q", "--q-bits", "4", "--q-group-size", "32") == 0
    (first, config), (second, other) = load(tmp_path / "out"), load(tmp_path / "same")
    assert config == other and first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert main(["check", str(tmp_path / "out"), "--against", str(checkpoint.folder)]) == 0
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    capsys.readouterr()
    assert main(["inspect", str(checkpoint.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    formats = {module["kind"]: module["format"] for module in report["modules"]}
    assert formats["mlp"] == "4-bit integers, groups of 32" and formats["embed_tokens"] == "BF16"
    mlp = next(module for module in report["modules"] if module["kind"] == "mlp")
    assert mlp["bytes"] == mlp["parameters"] * (0.5 + 2 / 32)


def test_q4_0_survives(tmp_path):
    """Q4_0's grid, as Google's w4a16 checkpoints hold it, comes back code for code."""
    checkpoint = make_unified(tmp_path / "hf")
    names = matrices(checkpoint)
    as_packed(checkpoint, 4, 32, True, q4_0=True)
    assert run(checkpoint, tmp_path / "out", "-q", "--quant-predicate", "qat-q4_0", "--dtype", "float32") == 0
    written, _ = load(tmp_path / "out")
    for name in names:
        path = name.replace("model.language_model.", "language_model.model.").removesuffix(".weight")
        parts = (written[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
        found = np.array(mx.dequantize(*parts, group_size=32, bits=4))
        np.testing.assert_allclose(found, checkpoint.weights[name].astype(np.float32), atol=1e-6)


def test_a_drafter(tmp_path):
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    name = "model.layers.0.mlp.up_proj.weight"
    weight = np.array(checkpoint.weights.pop(name).astype(mx.float32), np.float64)
    made, scales, values = fp8(weight, (32, 32))
    checkpoint.weights[f"{name}_scale_inv"] = scales
    save(checkpoint, {name: ("F8_E4M3", made)})
    assert run(checkpoint, tmp_path / "out", "--dtype", "float32") == 0
    np.testing.assert_array_equal(np.array(load(tmp_path / "out")[0][name]), values.astype(np.float32))


def break_scale(weights, codes, name):
    weights.pop(f"{name}_scale_inv")


def reshape_scale(weights, codes, name):
    weights[f"{name}_scale_inv"] = mx.ones((3, 7))


def integer_scale(weights, codes, name):
    weights[f"{name}_scale_inv"] = mx.ones((4, 2), mx.int32)


def nan_code(weights, codes, name):
    codes[name][1][0, 0] = 0x7F


FP8_FAULTS = {
    break_scale: "there is no",
    reshape_scale: "one scale for a tensor, a row, a group of columns or a block of 32 x 32",
    integer_scale: "expected F32 or BF16",
    nan_code: "holds NaN or infinity",
}


@pytest.mark.parametrize("fault", FP8_FAULTS, ids=lambda fault: fault.__name__)
def test_broken_fp8(tmp_path, capsys, fault):
    checkpoint = make_unified(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    weight = np.array(checkpoint.weights.pop(name).astype(mx.float32), np.float64)
    made, checkpoint.weights[f"{name}_scale_inv"], _ = fp8(weight, (32, 32))
    codes = {name: ("F8_E4M3", made)}
    fault(checkpoint.weights, codes, name)
    save(checkpoint, codes)
    assert run(checkpoint, tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert FP8_FAULTS[fault] in said and name in said and said.count("\n") == 1, said


@pytest.mark.parametrize("quantised", ["head", "table"])
def test_a_head_of_its_own(tmp_path, capsys, quantised):
    """Beside floats a saved head is compared with the table; what is quantised differs by its nature."""
    checkpoint = make_unified(tmp_path / "hf")
    names = {"table": "model.language_model.embed_tokens.weight", "head": "lm_head.weight"}
    table = checkpoint.weights[names["table"]]
    checkpoint.weights["lm_head.weight"] = table
    as_packed(checkpoint, 4, 32, True)
    stored = {n: v for n, v in checkpoint.weights.items() if not isinstance(v, np.ndarray)}
    checkpoint.weights = stored
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 0
    parts, _ = packed(np.array(table.astype(mx.float32), np.float64), 4, 32, True)
    stored.pop(names[quantised])
    stored |= {names[quantised].removesuffix("weight") + end: value for end, value in parts.items()}
    checkpoint.save()
    capsys.readouterr()
    assert run(checkpoint, tmp_path / "new") == 2
    said = capsys.readouterr().err
    assert "lm_head.weight repeats" in said and "one of them is quantised" in said and said.count("\n") == 1, said


PACKED_FAULTS = {
    "shape": (lambda w, p: w.update({p + "_shape": mx.array([128, 96], mx.int64)}), "by 'model."),
    "no shape's sense": (
        lambda w, p: w.update({p + "_shape": mx.array([[128, 64]], mx.int64)}),
        "the sizes of the matrix",
    ),
    "no scale": (lambda w, p: w.pop(p + "_scale"), "there is no"),
    "zeros": (lambda w, p: w.update({p + "_zero_point": mx.zeros((3, 2), mx.int32)}), "[16, 2]"),
    "order": (lambda w, p: w.update({p + "_g_idx": mx.zeros(7, mx.int32)}), "[64]"),
    "an order outside": (lambda w, p: w.update({p + "_g_idx": mx.full(64, 9, mx.int32)}), "names groups outside 0..1"),
    "type": (lambda w, p: w.update({p + "_packed": mx.zeros((128, 8), mx.float32)}), "int32 of two axes"),
}


@pytest.mark.parametrize("case", PACKED_FAULTS)
def test_broken_integers(tmp_path, capsys, case):
    fault, says = PACKED_FAULTS[case]
    checkpoint = as_packed(make_unified(tmp_path / "hf"), 4, 32, True)
    path = "model.language_model.layers.0.mlp.up_proj.weight"
    fault(checkpoint.weights, path)
    checkpoint.weights = {n: v for n, v in checkpoint.weights.items() if not isinstance(v, np.ndarray)}
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


def test_a_hub_repository_is_inspected_without_its_weights(tmp_path, capsys, monkeypatch):
    """Sizes that only `weight_shape` holds are told by the groups."""
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    checkpoint = as_packed(make_unified(tmp_path / "hf"), 4, 32, False)
    kinds = {mx.bfloat16: "BF16", mx.int32: "I32", mx.int64: "I64", mx.float32: "F32"}
    stored = {n: v for n, v in checkpoint.weights.items() if not isinstance(v, np.ndarray)}
    infos = {n: TensorInfo(kinds[v.dtype], list(v.shape), (8, 8 + v.nbytes)) for n, v in stored.items()}
    file = SafetensorsFileMetadata({}, infos)
    repo = SafetensorsRepoMetadata({}, False, {}, {"model.safetensors": file})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: str(checkpoint.folder / args[1]))
    monkeypatch.setattr("mlx_gemma_mtp.files.hub.get_safetensors_metadata", lambda name, revision=None: repo)
    reports = []
    for where in ("google/gemma-it", str(checkpoint.folder)):
        assert main(["inspect", where, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["modules"] == reports[1]["modules"]
    config = checkpoint.config["quantization_config"]
    config["format"] = "nvfp4-pack-quantized"
    checkpoint.put_config(checkpoint.config)
    assert main(["inspect", "google/gemma-4-12B-it"]) == 2
    assert "nvfp4-pack-quantized" in capsys.readouterr().err


def test_stacks_and_blocks_fit_in_memory(tmp_path, monkeypatch):
    """No more than a block of rows is made floats of at once."""
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    as_fp8(checkpoint, (32, 32), "_scale_inv")
    sizes = watched_blocks(monkeypatch, 1500)
    assert run(checkpoint, tmp_path / "out", "-q") == 0
    assert 1000 < max(sizes) <= 1500


def test_errors_are_users(tmp_path):
    """Whatever is wrong with the tables of a config."""
    from mlx_gemma_mtp.files import foreign

    odd = [None, 1, "x", [], {}, [1, 2], {"a": 1}, True]
    for key in ("format", "config_groups", "sparsity_config", "transform_config", "quantization_status"):
        for value in odd:
            table = {"quant_method": "compressed-tensors", key: value}
            foreign.of_config({"model_type": "gemma4", "quantization_config": table})
    for key in ("num_bits", "type", "group_size", "block_structure", "strategy"):
        for value in odd:
            weights = {"num_bits": 8, "type": "float", key: value}
            table = {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": {"weights": weights}},
            }
            foreign.of_config({"model_type": "gemma4", "quantization_config": table})
    for value in odd:
        for method in ("fp8", "modelopt", "bitsandbytes"):
            table = {"quant_method": method, "weight_block_size": value, "quant_algo": value, "load_in_4bit": value}
            found = foreign.of_config({"model_type": "gemma4", "quantization_config": table})
            assert isinstance(found.refusal("x"), UserError)
