"""benchmarks/real_size.py and random_checkpoints.py at tiny size: the layouts, the measuring, the cleaning up."""

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import random_checkpoints, real_size
from convert.check import check
from convert.inspect import inspect
from convert.quantize import Format, Recipe
from convert.run import convert
from mlx_gemma_mtp.errors import UserError

SMALL = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 64, "sliding_window": 8, "vocab_size": 3200,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
E2B = SMALL | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 3200}
MOE = SMALL | {"num_global_key_value_heads": 1, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
DRAFTER = SMALL | {"hidden_size": 64, "num_kv_shared_layers": 4, "num_global_key_value_heads": 1}


def small(name: str, text: dict, **top: int) -> dict:
    raw = random_checkpoints.read_config(name)
    return raw | {"text_config": raw["text_config"] | text} | top


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    drafter = small("gemma-4-26B-A4B-it-assistant", DRAFTER, backbone_hidden_size=128)
    random_checkpoints.make_pair(small("gemma-4-26B-A4B-it", MOE), drafter, folder / "gemma")
    return folder


def test_the_published_sizes_come_out():
    """Parameters of the language model, of its layers' scalars, and of the K/V that nobody reads (checkpoints.md)."""
    (tensors,) = random_checkpoints.published(random_checkpoints.read_config("gemma-4-E2B-it")).values()
    text = [tensor for tensor in tensors if tensor.name.startswith("model.language_model.")]
    assert sum(math.prod(tensor.shape) for tensor in text) == 4_628_569_344 + 35 + 18_880_512
    (tensors,) = random_checkpoints.published(random_checkpoints.read_config("gemma-4-26B-A4B-it-assistant")).values()
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 419_711_232 + 4


def test_a_published_layout_converts_and_is_sound(tmp_path):
    raw = small("gemma-4-E2B-it", E2B)
    source, out = tmp_path / "source", tmp_path / "out"
    size = random_checkpoints.write(source, random_checkpoints.published(raw), raw)
    assert (source / "model.safetensors").stat().st_size > size > 2 * inspect(str(source))["parameters"]
    convert(str(source), out, Recipe(Format(4, 64)))
    assert check(out, str(source))[0] == []


def test_a_generated_conversion_is_what_convert_checks(pair):
    findings, _ = check(pair / "gemma-4bit")
    assert findings == []
    formats = {(module["kind"], module["format"]) for module in inspect(str(pair / "gemma-4bit"))["modules"]}
    assert ("mlp", "8-bit affine, groups of 64") in formats
    assert ("experts", "4-bit affine, groups of 64") in formats


def test_a_generated_conversion_in_shards(tmp_path):
    files, config = random_checkpoints.converted(small("gemma-4-26B-A4B-it", MOE), Recipe(Format(4, 64)), 500_000)
    random_checkpoints.write(tmp_path / "out", files, config)
    assert len(files) > 1
    assert check(tmp_path / "out")[0] == []


def test_the_pair_emits_the_same_tokens_with_and_without_drafts(pair):
    found = real_size.emit(str(pair / "gemma-4bit"))
    assert found["plain"]["tokens"] == found["mtp"]["tokens"]
    assert len(found["plain"]["tokens"]) == real_size.TOKENS
    assert len(set(found["plain"]["tokens"])) > 1  # a constant text would prove little
    assert (found["plain"]["drafted"], found["mtp"]["drafted"] > 0) == (0, True)
    assert found["weight_bytes"] > found["file_bytes"]  # what is not quantised, scales too, is float32 in memory


def test_a_process_is_measured(tmp_path):
    """It allocates 300 MB, reads 20 MB and writes 10. Measured by a small process, as a child's peak starts with its
    parent's."""
    program = (
        "with open('/dev/zero', 'rb') as zero: kept = zero.read(20_000_000) * 15\n"
        f"with open({str(tmp_path / 'out')!r}, 'wb', buffering=0) as file: file.write(kept[:10_000_000])"
    )
    measuring = "import sys; from benchmarks.real_size import *; print(json.dumps(asdict(measure(sys.argv[1:])[1])))"

    def measured(code: str) -> dict:
        output, _ = real_size.measure(["-c", measuring, "-c", code])
        return json.loads(output)

    idle, usage = measured("pass"), measured(program)
    assert 0.29e9 < usage["peak"] - idle["peak"] < 0.37e9
    if sys.platform == "linux":
        assert 20e6 <= usage["read"] - idle["read"] < 21e6
        assert 10e6 <= usage["written"] - idle["written"] < 11e6


def test_a_process_that_fails_is_named():
    with pytest.raises(real_size.Failed, match=r"ended with 3: half done"):
        real_size.measure(["-c", "print('half done'); raise SystemExit(3)"])


@pytest.mark.parametrize("error", [real_size.Failed("broken"), KeyboardInterrupt()])
def test_folders_go_whatever_happens(tmp_path, monkeypatch, capsys, error):
    def fail(folder: Path, formats: list[str], report: real_size.Report) -> None:
        (folder / "large").mkdir()
        raise error

    monkeypatch.setattr(real_size, "run_e2b", fail)
    monkeypatch.setattr(real_size, "refuse", lambda *needed: None)
    assert real_size.main(["e2b", "--work", str(tmp_path)]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert list(tmp_path.iterdir()) == []
    real_size.main(["e2b", "--work", str(tmp_path), "--keep"])
    assert [path.name for kept in tmp_path.iterdir() for path in kept.iterdir()] == ["large"]


def test_too_little_disk_or_memory_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"GB free; expected 1000000\.0 GB"):
        real_size.refuse(tmp_path, 10**15, 0)
    monkeypatch.setattr(real_size, "available_memory", lambda: 10**9)
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**12}))
    assert real_size.main(["26b", "--work", str(tmp_path)]) == 2
    assert "error: 1.0 GB of memory are available; expected" in capsys.readouterr().err
    assert real_size.main(["26b", "--work", str(tmp_path / "none")]) == 2
