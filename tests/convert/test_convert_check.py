"""check: sound conversions pass, every kind of damage is found, differences to the source are measured."""

import json
import math

import mlx.core as mx
import pytest
from test_convert import Checkpoint, H, load, make_drafter, make_e2b, make_moe, make_text, make_unified, run

from convert import blocks
from convert.cli import main

MAKERS = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text, "drafter": make_drafter}
FORMATS = {
    "bfloat16": (),
    "float16": ("--dtype", "float16"),
    "4 bit": ("-q", "--q-group-size", "32"),
    "2 bit": ("-q", "--q-bits", "2"),
    "mxfp4": ("-q", "--q-mode", "mxfp4"),
    "mxfp8": ("-q", "--q-mode", "mxfp8"),
    "nvfp4": ("-q", "--q-mode", "nvfp4"),
    "qat": ("-q", "--quant-predicate", "qat-q4_0"),
}
NORM = "language_model.model.norm.weight"
GATE = "language_model.model.layers.0.experts.switch_glu.gate_proj"
SHARD = "model.safetensors"


def converted(tmp_path, make=make_moe, *flags: str) -> Checkpoint:
    """A source, and its conversion at tmp_path / "out"."""
    checkpoint = make(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    return checkpoint


@pytest.mark.parametrize("flags", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_sound_folders(tmp_path, capsys, monkeypatch, make, flags):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1500)  # a few rows at a time
    checkpoint = converted(tmp_path, make, *flags)
    capsys.readouterr()
    out = tmp_path / "out"
    assert main(["check", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: sound\n"
    assert main(["check", str(out), "--against", str(checkpoint.folder)]) == 0
    text = capsys.readouterr().out
    assert text.endswith("sound\n") and "input_layernorm: " in text
    assert ("worst: " in text) == (flags != ())  # the sources are bfloat16


def test_differences_are_those_of_the_whole_tensors(tmp_path, capsys):
    checkpoint = converted(tmp_path, make_moe, "-q")
    weights, _ = load(tmp_path / "out")
    setting = {"bits": 4, "group_size": 64}
    scales, biases = (weights[f"{GATE}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    restored = mx.dequantize(weights[f"{GATE}.weight"], scales, biases, **setting)
    fused = checkpoint.weights["model.language_model.layers.0.experts.gate_up_proj"]
    want = mx.abs(restored - fused[:, : fused.shape[1] // 2].astype(mx.float32)).max().item()
    assert main(["check", str(tmp_path / "out"), "--against", str(checkpoint.folder)]) == 0
    assert f"worst: {GATE}.weight {want:.6g}\n" in capsys.readouterr().out


def rewrite(folder, edit, keep_checksums=False) -> None:
    """Edit the one shard of a folder, and forget its checksums."""
    tensors = dict(mx.load(str(folder / SHARD)))
    edit(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / SHARD), tensors)
    index = {"weight_map": dict.fromkeys(tensors, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not keep_checksums:
        (folder / "checksums.json").unlink()


def fill(name, value, at=slice(None)):
    def edit(tensors):
        tensors[name][at] = value

    return edit


DAMAGE = {
    "missing": (lambda t: t.pop(NORM), f"tensor {NORM!r} is missing"),
    "extra": (lambda t: t.update(x=mx.ones(2)), "tensor 'x' is unknown"),
    "shape": (lambda t: t.update({NORM: mx.ones(3, mx.bfloat16)}), f"{NORM!r} is BF16 [3], expected BF16 [{H}]"),
    "dtype": (lambda t: t.update({NORM: mx.ones(H)}), f"{NORM!r} is F32"),
    "no scales": (lambda t: t.pop(f"{GATE}.scales"), f"'{GATE}.scales' is missing"),
    "biases": (lambda t: t.update({f"{GATE}.biases": mx.ones((4, 64, 2), mx.bfloat16)}), "BF16 [4, 64, 2], expected"),
    "NaN norm": (fill(NORM, math.nan, 3), f"{NORM!r} holds NaN or infinity"),
    "infinite scale": (fill(f"{GATE}.scales", math.inf, (3, 5)), f"'{GATE}.weight' holds NaN or infinity"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(tmp_path, capsys, case):
    edit, says = DAMAGE[case]
    converted(tmp_path, make_moe, "-q")
    rewrite(tmp_path / "out", edit)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert says in out and out.endswith("1 findings\n"), out


@pytest.mark.parametrize(("mode", "nan"), [("mxfp4", 255), ("mxfp8", 255), ("nvfp4", 127)])
def test_not_a_number_in_a_scale_of_eight_bits(tmp_path, capsys, mode, nan):
    converted(tmp_path, make_moe, "-q", "--q-mode", mode)
    rewrite(tmp_path / "out", fill(f"{GATE}.scales", nan, (1, 2, 0)))
    assert main(["check", str(tmp_path / "out")]) == 1
    assert f"'{GATE}.weight' holds NaN or infinity" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("-q", "--q-bits", "8"), ("-q", "--q-mode", "mxfp4")])
def test_a_changed_value_is_found(tmp_path, capsys, flags):
    checkpoint = converted(tmp_path, make_moe, *flags)
    out = tmp_path / "out"
    rewrite(out, lambda t: t.update({f"{GATE}.weight": t[f"{GATE}.weight"][::-1]}), keep_checksums=True)
    assert main(["check", str(out)]) == 1  # by the checksum alone
    assert "it was changed after the conversion" in capsys.readouterr().out
    (out / "checksums.json").unlink()
    assert main(["check", str(out)]) == 0
    assert main(["check", str(out), "--against", str(checkpoint.folder)]) == 1
    assert f"'{GATE}.weight' differs from the source by more" in capsys.readouterr().out


def test_token_ordering_must_be_a_permutation(tmp_path, capsys):
    converted(tmp_path, make_drafter)
    rewrite(tmp_path / "out", fill("masked_embedding.token_ordering", 3))
    assert main(["check", str(tmp_path / "out")]) == 1
    assert "is no permutation of the token ids" in capsys.readouterr().out


def test_checksums_name_files_of_the_folder_only(tmp_path, capsys):
    converted(tmp_path)
    (tmp_path / "out" / "checksums.json").write_text('{"../hf/model.safetensors": "0"}')
    assert main(["check", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert (
        "'../hf/model.safetensors', which is not there" in out and "model.safetensors is not in checksums.json" in out
    )


def test_what_cannot_be_checked_is_an_error(tmp_path, capsys):
    checkpoint = converted(tmp_path)
    other = make_unified(tmp_path / "other")
    other.save()
    quantised = tmp_path / "quantised"
    assert run(checkpoint, quantised, "-q") == 0
    capsys.readouterr()
    out = str(tmp_path / "out")
    for argv, says in (
        ([str(tmp_path / "nowhere")], "not a folder"),
        ([str(checkpoint.folder)], "convert it first"),
        ([out, "--against", str(other.folder)], "is another model"),
        ([out, "--against", str(quantised)], "is quantised already"),
    ):
        assert main(["check", *argv]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_vision_and_audio_tensors_of_other_conversions_are_no_findings(tmp_path, capsys):
    """mlx-vlm keeps them; it also names no override for what it left in float."""
    converted(tmp_path, make_e2b, "-q", "--q-group-size", "64")
    out = tmp_path / "out"
    rewrite(out, lambda t: t.update({"vision_tower.std_bias": mx.ones(3), "embed_audio.x.weight": mx.ones((2, 2))}))
    table = json.loads((out / "config.json").read_text())["quantization"]
    assert False in table.values()
    edit_config(out, quantization={path: value for path, value in table.items() if value is not False})
    assert main(["check", str(out)]) == 0


@pytest.mark.parametrize("table", [{"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 64, "mode": "mxfp4"}, [4]])
def test_a_quantisation_that_mlx_has_not_is_an_error(tmp_path, capsys, table):
    converted(tmp_path, make_moe, "-q")
    edit_config(tmp_path / "out", quantization=table)
    assert main(["check", str(tmp_path / "out")]) == 2
    assert "quantization" in capsys.readouterr().err


def test_folders_without_a_dtype_are_checked_by_the_tensors(tmp_path):
    converted(tmp_path, make_moe, "-q", "--dtype", "float16")
    for dtype in (None, ["bfloat16"], {}):
        edit_config(tmp_path / "out", dtype=dtype)
        assert main(["check", str(tmp_path / "out")]) == 0


def test_one_code_of_8_bits_that_is_8_steps_off_is_found(tmp_path, capsys):
    checkpoint = converted(tmp_path, make_moe, "-q", "--q-bits", "8")

    def flip(tensors):
        tensors[f"{GATE}.weight"][1, 2, 3] ^= 8

    rewrite(tmp_path / "out", flip)
    assert main(["check", str(tmp_path / "out"), "--against", str(checkpoint.folder)]) == 1
    assert f"'{GATE}.weight' differs from the source by more" in capsys.readouterr().out
