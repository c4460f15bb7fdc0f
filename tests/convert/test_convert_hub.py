"""Hub ids without a hub: a full cache is enough, and what is missing is named with the command that downloads it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled
from test_convert import ROOT, expected, load, make_drafter, make_moe
from test_convert_pair import sources  # noqa: F401

from convert.cli import main

COMMIT = "0123456789" * 4


def cached(root: Path, repo: str, files: Path) -> Path:
    """A repository in the hub's cache, as its client lays it out: snapshots/COMMIT links to blobs."""
    home = root / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "refs", home / "blobs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for file in files.iterdir():
        (home / "blobs" / f"blob-of-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """HF_HUB_OFFLINE=1 and an empty cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_full_cache_is_enough(sources, tmp_path, offline):  # noqa: F811
    (sources[0].folder / "tokenizer.json").write_text("{}")
    cached(offline, "google/gemma-it", sources[0].folder)
    cached(offline, "google/gemma-it-assistant", sources[1].folder)
    out = tmp_path / "out"
    assert main(["--hf-path", "google/gemma-it", "--mlx-path", str(out), "--pair"]) == 0
    assert load(out)[0].keys() == expected(sources[0]).keys() and not (out / "tokenizer.json").is_symlink()
    assert main(["check", str(out), "--against", "google/gemma-it"]) == 0
    assert main(["inspect", "google/gemma-it"]) == 0


def test_the_environment_says_offline(tmp_path):
    """The real variable, in a process of its own."""
    checkpoint = make_drafter(tmp_path / "hf")
    checkpoint.save()
    cached(tmp_path / "cache", "org/name", checkpoint.folder)
    command = [sys.executable, "-m", "convert", "--hf-path", "org/name", "--mlx-path", tmp_path / "out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "out" / "config.json").is_file(), done.stderr


@pytest.mark.parametrize("file", [None, "config.json", "model-2-of-2.safetensors"])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_what_is_missing_is_named(tmp_path, capsys, offline, file, command):
    checkpoint = make_moe(tmp_path / "hf")
    checkpoint.save(2)
    if file:
        (cached(offline, "org/name", checkpoint.folder) / file).unlink()
    flags = (
        ["inspect", "org/name"] if command == "inspect" else ["--hf-path", "org/name", "--mlx-path", f"{tmp_path}/out"]
    )
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "org/name" in error and (file or "nor in the hub's cache") in error and error.count("\n") == 1, error
    assert error.endswith("connect and run: hf download org/name\n")
    assert not (tmp_path / "out").exists()


def test_nothing_hides_the_bars_of_downloads():
    assert not are_progress_bars_disabled()
