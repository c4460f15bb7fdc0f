"""inspect: what the headers say, without a byte of weight data."""

import json
import math

import pytest
from test_convert import Checkpoint, V, expected, make_drafter, make_e2b, make_moe, make_text, make_unified, run

from convert import blocks
from convert.cli import main
from mlx_gemma_mtp.cache.spec import row_bytes, with_bits
from mlx_gemma_mtp.models.config import TargetConfig

TARGETS = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Reading weight data fails."""
    monkeypatch.setattr("mlx.core.load", lambda *args, **kwargs: pytest.fail("weights were read"))


def saved(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.save()
    return checkpoint


def inspected(where, capsys) -> dict:
    capsys.readouterr()
    assert main(["inspect", str(where), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def count(checkpoint: Checkpoint) -> int:
    return sum(value.size for name, value in expected(checkpoint).items() if not name.endswith("layer_scalar"))


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_source_and_conversion_say_the_same(tmp_path, capsys, monkeypatch, make):
    checkpoint = saved(make(tmp_path / "hf"))
    assert run(checkpoint, tmp_path / "out") == 0
    monkeypatch.setattr(blocks, "read", lambda *args: pytest.fail("weights were read"))
    before, after = (inspected(tmp_path / name, capsys) for name in ("hf", "out"))
    assert (before["layout"], after["layout"]) == ("hugging face", "mlx")
    assert before["parameters"] == after["parameters"] == count(checkpoint)
    assert before["bytes"] == after["bytes"] == sum(value.nbytes for value in expected(checkpoint).values())
    assert before["modules"] == after["modules"] and before["memory"] == after["memory"]
    assert sum(module["bytes"] for module in after["modules"]) == after["bytes"]
    media = [
        v.nbytes
        for n, v in checkpoint.weights.items()
        if n.split(".")[1].startswith(("vision", "audio", "embed_v", "embed_a"))
    ]
    assert before["left_out"] == {"tensors": len(media), "bytes": sum(media)}
    assert before["drafter"] == str(tmp_path / "hf-assistant")
    target = TargetConfig.from_dict(json.loads((tmp_path / "out" / "config.json").read_text()))
    contexts = (4096, 32768, 131072)
    assert before["memory"]["kv"] == {str(n): row_bytes(target.kv, n, 256, 2) for n in contexts}
    few = {bits: with_bits(target.kv, bits) for bits in (8, 4)}
    assert before["memory"]["kv_bits"] == {
        str(bits): {str(n): row_bytes(specs, n, 256, 2) for n in contexts} for bits, specs in few.items()
    }


def test_quantisation_by_kind_of_module(tmp_path, capsys):
    checkpoint = saved(make_moe(tmp_path / "hf"))
    assert run(checkpoint, tmp_path / "out", "-q") == 0
    report = inspected(tmp_path / "out", capsys)
    formats = {module["kind"]: module["format"] for module in report["modules"]}
    four, eight = (f"{bits}-bit affine, groups of 64" for bits in (4, 8))
    assert formats == {
        "embed_tokens": four, "self_attn": four, "experts": four, "mlp": eight, "router": eight,
        "norms and scalars": "BF16",
    }  # fmt: skip
    experts = next(module for module in report["modules"] if module["kind"] == "experts")
    assert experts["parameters"] == 2 * 3 * 4 * 64 * 64
    assert experts["bytes"] == experts["parameters"] * 4.5 / 8  # two bfloat16 for 64 weights
    assert report["parameters"] == count(checkpoint)
    assert report["architecture"]["experts_per_token"] == 2


def test_drafter(tmp_path, capsys):
    checkpoint = saved(make_drafter(tmp_path / "hf"))
    report = inspected(checkpoint.folder, capsys)
    assert report["role"] == "drafter" and report["drafter"] is None and report["memory"]["kv"] == {}
    assert report["architecture"]["backbone_hidden_size"] == 48
    shapes = {name: value.shape for name, value in checkpoint.weights.items()}
    assert report["parameters"] == sum(math.prod(shape) for shape in shapes.values()) - V - 4


@pytest.mark.parametrize(
    ("name", "drafter"),
    [("gemma-4-31B-it-4bit", "gemma-4-31B-it-assistant"), ("gemma-mxfp4", "gemma-assistant"), ("g", "g-assistant")],
)
def test_name_of_the_drafter(tmp_path, capsys, name, drafter):
    saved(make_moe(tmp_path / name))
    assert inspected(tmp_path / name, capsys)["drafter"] == str(tmp_path / drafter)


def test_for_people(tmp_path, capsys):
    saved(make_moe(tmp_path / "hf"))
    saved(make_drafter(tmp_path / "drafter"))
    assert main(["inspect", str(tmp_path / "hf")]) == 0
    text = capsys.readouterr().out
    assert "hf: target, gemma4, hugging face layout\n" in text and "4 experts, 2 for each token\n" in text
    assert "to run 128k tokens: " in text and f"drafter: {tmp_path / 'hf-assistant'}\n" in text
    assert main(["inspect", str(tmp_path / "drafter")]) == 0
    assert "K/V is the target's" in capsys.readouterr().out


def test_hub_ids_are_asked_for_headers_only(tmp_path, capsys, monkeypatch):
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    checkpoint = saved(make_moe(tmp_path / "hf"))
    names = {str(k): v for k, v in checkpoint.weights.items()}
    infos = {n: TensorInfo("BF16", list(v.shape), (8, 8 + v.nbytes)) for n, v in names.items()}
    file = SafetensorsFileMetadata({}, infos)
    repo = SafetensorsRepoMetadata({}, False, {}, {"model.safetensors": file})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: str(checkpoint.folder / args[1]))
    monkeypatch.setattr("mlx_gemma_mtp.files.hub.get_safetensors_metadata", lambda name, revision=None: repo)
    report, local = inspected("google/gemma-it", capsys), inspected(checkpoint.folder, capsys)
    assert report["drafter"] == "google/gemma-it-assistant"
    assert report["modules"] == local["modules"]


def test_tensors_that_do_not_fit_the_config(tmp_path, capsys):
    """As published and converted: a report of what is not there would be wrong without a word."""
    checkpoint = saved(make_moe(tmp_path / "hf"))
    assert run(checkpoint, tmp_path / "out", "-q") == 0
    text = checkpoint.config["text_config"] | {"intermediate_size": 192}
    for folder in ("hf", "out"):
        path = tmp_path / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": text}))
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert "gate_proj.weight has shape (128, " in error and "expected" in error and error.count("\n") == 1, error
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    assert main(["inspect", str(tmp_path / "out")]) == 2


def test_errors(tmp_path, capsys, monkeypatch):
    def unreachable(*args):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    for where, says in (
        (tmp_path / "nowhere", "no such folder"),
        ("org/name", "the hub cannot be reached (no network)"),
        (tmp_path, "no such file"),
    ):
        assert main(["inspect", str(where)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
