"""What convert takes as mlx_lm.convert does: --revision, --dequantize, a folder's default name."""

import mlx.core as mx
import pytest
from test_convert import load as load_folder
from test_convert import make_drafter, make_e2b, make_moe, make_text, make_unified, run

from convert import source
from convert.cli import main
from mlx_gemma_mtp.files import hub

MAKERS = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text, "drafter": make_drafter}
FORMATS = {
    "4 bit": ("-q", "--q-group-size", "32"),
    "8 bit": ("-q", "--q-bits", "8"),
    "mxfp4": ("-q", "--q-mode", "mxfp4"),
    "mxfp8": ("-q", "--q-mode", "mxfp8"),
    "nvfp4": ("-q", "--q-mode", "nvfp4"),
}


@pytest.mark.parametrize("flags", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_dequantised_weights_are_what_codes_stand_for(tmp_path, monkeypatch, make, flags):
    monkeypatch.setattr("convert.blocks.BLOCK_BYTES", 2000)
    checkpoint = make(tmp_path / "hf")
    checkpoint.save()
    few, back = tmp_path / "few", tmp_path / "back"
    assert run(checkpoint, few, *flags) == 0
    assert main(["--hf-path", str(few), "--mlx-path", str(back), "-d", "--dtype", "float32"]) == 0
    packed, config = load_folder(few)
    floats, written = load_folder(back)
    assert not {"quantization", "quantization_config"} & written.keys() and not any(".scales" in n for n in floats)
    table = config["quantization"]
    default = {key: table[key] for key in ("group_size", "bits", "mode")}
    for name, value in floats.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in packed:
            assert mx.array_equal(value, packed[name].astype(value.dtype)), name
            continue
        form = {"mode": "affine", **table[path]} if isinstance(table.get(path), dict) else default
        parts = [packed[f"{path}.{part}"] for part in ("scales", "biases") if f"{path}.{part}" in packed]
        parts = [part.astype(mx.float32) if form["mode"] == "affine" else part for part in parts]
        assert mx.array_equal(value, mx.dequantize(packed[name], *parts, **form, dtype=mx.float32)), name
    assert main(["check", str(back)]) == 0


def test_floats_have_nothing_to_dequantise(tmp_path, capsys):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "-d") == 2
    error = capsys.readouterr().err
    assert f"{checkpoint.folder} has no weights that MLX quantised; leave out --dequantize" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-d", "-q"), "quantising twice loses twice; leave out one"),
        (("--revision", "v1"), "--revision 'v1' is of a repository on the hub"),
        (("--quality", "--adapter-path", "x"), "from which --adapter-path differs on purpose; leave out one"),
    ],
)
def test_options_that_exclude_each_other(tmp_path, capsys, flags, words):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_default_folder(tmp_path, monkeypatch):
    """As mlx_lm.convert's."""
    make_moe(tmp_path / "hf").save()
    monkeypatch.chdir(tmp_path)
    assert main(["--hf-path", "hf"]) == 0
    assert (tmp_path / "mlx_model" / "config.json").is_file()


def test_the_revision_is_the_target_s(tmp_path, monkeypatch):
    """The drafter is another repository, whose revisions have other names."""
    folders = {"org/name": tmp_path / "hf", "org/name-assistant": tmp_path / "drafter"}
    target, drafter = make_moe(folders["org/name"]), make_drafter(folders["org/name-assistant"])
    target.save()
    drafter.config["backbone_hidden_size"] = 64
    for name in ("pre_projection.weight", "post_projection.weight"):
        shape = (64, 128) if name.startswith("pre") else (64, 64)
        drafter.weights[name] = mx.zeros(shape, mx.bfloat16)
    drafter.save()
    asked = []

    def find(model, revision=None, converting=False):
        asked.append((model, revision))
        return folders[model]

    monkeypatch.setattr(hub, "find", find)
    assert source.find("org/name") == folders["org/name"]
    argv = ["--hf-path", "org/name", "--mlx-path", str(tmp_path / "out"), "--revision", "v1", "--pair"]
    main(argv)
    assert asked[1:3] == [("org/name", "v1"), ("org/name-assistant", None)]
