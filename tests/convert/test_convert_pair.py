"""--pair: the target and its drafter, both or none."""

import json

import mlx.core as mx
import numpy as np
import pytest
import reference
from test_convert import DRAFTER, V, edit_bytes, make_drafter, make_moe, run

from convert import writer
from convert.cli import main
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading


@pytest.fixture
def sources(tmp_path):
    return pair(tmp_path)


def pair(tmp_path, ordered: bool = True):
    """A target and, beside it, a drafter of its hidden size, with centroids or with a dense head."""
    target, drafter = make_moe(tmp_path / "hf"), make_drafter(tmp_path / "hf-assistant", ordered)
    text = DRAFTER | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    drafter.config |= {"backbone_hidden_size": 64, "text_config": text}
    mx.random.seed(1)
    drafter.weights["pre_projection.weight"] = mx.random.normal((64, 128)).astype(mx.bfloat16) * 0.1
    drafter.weights["post_projection.weight"] = mx.random.normal((64, 64)).astype(mx.bfloat16) * 0.1
    target.save()
    drafter.save()
    return target, drafter


def test_a_pair_loads_and_drafts(sources, tmp_path, capsys):
    assert run(sources[0], tmp_path / "out", "--pair", "--dtype", "float32") == 0
    assert capsys.readouterr().out.count("\n") == 2
    pair = hub.find_pair(str(tmp_path / "out"), "auto")
    assert pair.drafter == (tmp_path / "out-assistant").resolve()
    target = loading.load_target(pair.target)
    drafter = loading.load_drafter(pair.drafter, target.config)
    tokens, _, carried = reference.draft_steps(target, drafter, [2, 5, 7, 11], 3)
    assert all(0 <= token < V for token in tokens) and np.isfinite(carried).all()


@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "centroids"])
@pytest.mark.parametrize(
    "flags", [("-q",), ("-q", "--q-mode", "mxfp4"), ("-q", "--q-bits", "3", "--q-group-size", "32")]
)
def test_a_quantised_pair_has_a_drafter_of_8_bits(tmp_path, flags, ordered):
    """With a dense head of 4 bits, or a centroid head in float, of which a draft reads little."""
    assert run(pair(tmp_path, ordered)[0], tmp_path / "out", "--pair", *flags) == 0
    table = json.loads((tmp_path / "out-assistant" / "config.json").read_text())["quantization"]
    head = {"model.embed_tokens": False, "masked_embedding.centroids": False}
    head = head if ordered else {"model.embed_tokens": {"bits": 4, "group_size": 64}}
    assert table == {"bits": 8, "group_size": 64, "mode": "affine"} | head
    held = mx.load(str(tmp_path / "out-assistant" / "model.safetensors"))
    assert held["model.norm.weight"].dtype == mx.bfloat16
    assert held["model.embed_tokens.weight"].shape == (V, 64 if ordered else 8)
    assert held["pre_projection.weight"].shape == (64, 32)
    target = loading.load_target(tmp_path / "out", mx.float32)
    drafter = loading.load_drafter(tmp_path / "out-assistant", target.config, mx.float32)
    _, _, carried = reference.draft_steps(target, drafter, [2, 5, 7, 11], 3)
    assert np.isfinite(carried).all()
    for name in ("", "-assistant"):
        assert main(["check", f"{tmp_path / 'out'}{name}", "--against", f"{tmp_path / 'hf'}{name}"]) == 0


def test_a_trailing_slash_names_the_same_drafter(sources, tmp_path):
    assert main(["--hf-path", f"{sources[0].folder}/", "--mlx-path", str(tmp_path / "out"), "--pair"]) == 0
    assert (tmp_path / "out-assistant" / "config.json").is_file()


def another_size(target, drafter, tmp_path):
    drafter.put_config(drafter.config | {"backbone_hidden_size": 48})
    drafter.weights["pre_projection.weight"] = mx.zeros((64, 96), mx.bfloat16)
    drafter.weights["post_projection.weight"] = mx.zeros((48, 64), mx.bfloat16)
    mx.save_safetensors(str(drafter.folder / "model.safetensors"), drafter.weights)


ERRORS = {
    "no drafter": (lambda t, d, tmp: d.folder.rename(tmp / "away"), "hf-assistant': no such folder"),
    "a target": (lambda t, d, tmp: make_moe(d.folder).save(), "is no drafter"),
    "another size": (another_size, "its hidden size is 48, the target's is 64"),
    "broken": (lambda t, d, tmp: edit_bytes(d, lambda data: data[:-1]), "header describes"),
    "existing": (lambda t, d, tmp: (tmp / "out-assistant").mkdir(), "out-assistant exists"),
    "a drafter given": (lambda t, d, tmp: make_drafter(t.folder).save(), "is a drafter; expected a target with --pair"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_neither(sources, tmp_path, capsys, case):
    spoil, says = ERRORS[case]
    spoil(*sources, tmp_path)
    assert run(sources[0], tmp_path / "out", "--pair") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_interruption_in_the_drafter_leaves_neither(sources, tmp_path, monkeypatch):
    written = []
    write_jobs = writer.write_jobs

    def interrupted(path, *args):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_jobs(path, *args)

    monkeypatch.setattr(writer, "write_jobs", interrupted)
    assert run(sources[0], tmp_path / "out", "--pair") == 130
    assert "assistant" in str(written[1]) and {path.name for path in tmp_path.iterdir()} == {"hf", "hf-assistant"}
