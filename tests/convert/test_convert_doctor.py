"""mlx-model-doctor on what is written: nothing fails, and every warning is one of those that are listed here."""

import json
import subprocess
import sys

import pytest
from test_convert import Checkpoint, make_drafter, make_e2b, make_moe, make_text, make_unified, run

from mlx_gemma_mtp.files import hub

pytest.importorskip("mlx_model_doctor")

MAKERS = {"e2b": make_e2b, "unified": make_unified, "moe": make_moe, "text": make_text, "drafter": make_drafter}
FORMATS = {
    "bfloat16": (),
    "4 bit": ("-q", "--q-group-size", "32"),
    "mxfp4": ("-q", "--q-mode", "mxfp4"),
    "nvfp4": ("-q", "--q-mode", "nvfp4"),
}
FLOATS = "quantization.metadata"  # floats have none: "when the model is quantized", it says itself
BARE = "tokenizer.files"  # a drafter has its target's tokenizer, and so have the checkpoints of these tests none
# The ids of image tokens stay in config.json, so that a run refuses them; by these it is taken for a vision model.
MEDIA = "vlm.image_processor"
# Gemma's templates write turns with tokens that tokenizer_config.json need not name: tokenizer.json has them.
TURNS = "chat_template.special_tokens"


def warnings(folder) -> set[str]:
    """The checks that did not pass and were not skipped. A failure is one of them, named as it is."""
    code = "import sys; from mlx_model_doctor.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "check", "local", str(folder), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    found = {
        ("" if each["status"] == "warn" else f"{each['status']}: ") + each["check_id"]
        for each in report["results"]
        if each["status"] not in ("pass", "skip")
    }
    return {name.replace("text/", "") for name in found}


@pytest.mark.parametrize("flags", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_is_written(tmp_path, make, flags):
    checkpoint: Checkpoint = make(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", *flags) == 0
    assert warnings(tmp_path / "out") <= {BARE, MEDIA} | ({FLOATS} if not flags else set())


def test_the_bundled_pair(tmp_path):
    """As it is converted anew, with its tokenizer and template."""
    from convert.cli import main

    for name, allowed in (("target", {TURNS}), ("drafter", {BARE})):
        assert main(["--hf-path", str(hub.DEMO / name), "--mlx-path", str(tmp_path / name), "-q"]) == 0
        assert warnings(tmp_path / name) <= allowed


def test_the_judge_sees_what_is_wrong(tmp_path):
    """Without its config's group size, or with a shard cut off, a folder does not pass."""
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save()
    assert run(checkpoint, tmp_path / "out", "-q") == 0
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4000])
    assert warnings(tmp_path / "out") - {BARE}
