"""A prompt that is known from another process is read, not computed, and its text is that of a cold run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gemma_mtp import load
from mlx_gemma_mtp.errors import UserError

ROOT = Path(__file__).parents[2]
PAIRS = {"demo": None, "e2b": str(ROOT / "tests" / "data" / "e2b" / "target")}
IDS = [10 + 37 * i % 400 for i in range(700)]  # longer than the windows of both pairs


def in_a_process(model: str | None, folder: Path | None, prompts: list[dict], dtype: str = "float32") -> dict:
    asked = {"model": model, "folder": folder and str(folder), "prompts": prompts, "dtype": dtype}
    command = [sys.executable, "-m", "tests.engine.restarts", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def prompt(tokens: list[int], salt: str | None = None, temperature: float = 0.0) -> dict:
    return {"tokens": tokens, "salt": salt, "temperature": temperature}


@pytest.mark.parametrize("pair", ["demo", pytest.param("e2b", marks=pytest.mark.slow)])
def test_a_restart_serves_what_was_known(tmp_path, pair):
    asked = [prompt(IDS), prompt(IDS[:600] + [7] * 50, temperature=1.0), prompt(IDS, "salt"), prompt(IDS[:300])]
    cold = in_a_process(PAIRS[pair], None, [prompt(**each) for each in asked])
    first = in_a_process(PAIRS[pair], tmp_path, [prompt(IDS)])
    second = in_a_process(PAIRS[pair], tmp_path, asked)
    third = in_a_process(PAIRS[pair], tmp_path, asked[1:3])
    assert first["texts"] == cold["texts"][:1] and first["cached"] == [0]
    assert second["texts"] == cold["texts"] and third["texts"] == cold["texts"][1:3]
    assert second["cached"][0] >= 600 and second["cached"][2] == 0  # another salt's is nothing to it
    assert third["cached"][0] >= 600 and third["cached"][1] >= 600
    assert first["told"] == second["told"] == third["told"] == []


def test_other_bits_are_not_taken(tmp_path):
    """Another dtype's, another model's: each has a key of its own in one folder."""
    assert in_a_process(None, tmp_path, [prompt(IDS)])["cached"] == [0]
    known = sorted(tmp_path.iterdir())
    for model, dtype in ((None, "float16"), (PAIRS["e2b"], "float32")):
        found = in_a_process(model, tmp_path, [prompt(IDS)], dtype)
        assert found["cached"] == [0] and found["told"] == []
    assert set(known) < set(tmp_path.iterdir()) and len({path.name[:23] for path in tmp_path.iterdir()}) == 3


def test_damage_is_computed_anew(tmp_path):
    cold = in_a_process(None, tmp_path, [prompt(IDS)])
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    found = in_a_process(None, tmp_path, [prompt(IDS)])
    assert found["texts"] == cold["texts"] and found["cached"] == [0] and found["told"]
    assert all("is damaged; it is ignored and removed" in line for line in found["told"])
    again = in_a_process(None, tmp_path, [prompt(IDS)])  # and was written anew
    assert again["texts"] == cold["texts"] and again["cached"][0] >= 600 and again["told"] == []


@pytest.mark.parametrize("value", ["", 3, "a\0b", "FILE", "FILE/below"])
def test_what_can_be_no_folder_is_refused_at_once(tmp_path, value):
    (tmp_path / "file").write_text("")
    given = value.replace("FILE", str(tmp_path / "file")) if isinstance(value, str) else value
    with pytest.raises(UserError, match=r"expected a folder|expected one for prefixes") as error:
        load(tmp_path / "no model", prefix_cache=given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "20", True])
def test_limits_are_bytes(tmp_path, limit):
    with pytest.raises(UserError, match="prefix_cache_limit"):
        load(tmp_path / "no model", prefix_cache=tmp_path, prefix_cache_limit=limit)
