"""Finding models and their drafters; memory is checked first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from mlx_gemma_mtp import hub
from mlx_gemma_mtp.errors import UserError

NOT_THERE = RepositoryNotFoundError.__new__(RepositoryNotFoundError)


def folders(root, *names):
    for name in names:
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
        (root / name / "model.safetensors").write_bytes(b"")
    return root / names[0]


def test_the_bundled_pair_is_the_default():
    pair = hub.find_pair(None, "auto")
    assert (pair.target, pair.drafter, pair.reason) == (hub.DEMO / "target", hub.DEMO / "drafter", None)
    assert "none" in hub.find_pair(None, "none").reason


@pytest.mark.parametrize("sibling", ["m-4bit-assistant", "m-assistant", "m-assistant-bf16", "drafter"])
def test_a_drafter_beside_its_target_is_found(tmp_path, sibling):
    target = folders(tmp_path, "m-4bit", sibling)
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / sibling


def test_mlx_community_spells_the_two_unlike(tmp_path):
    target = folders(tmp_path, "gemma-4-26b-a4b-it-4bit", "gemma-4-26B-A4B-it-assistant-bf16")
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / "gemma-4-26B-A4B-it-assistant-bf16"


def test_no_drafter_gives_the_reason(tmp_path):
    pair = hub.find_pair(str(folders(tmp_path, "m")), "auto")
    assert pair.drafter is None and "m-assistant" in pair.reason


def test_hub_ids_are_downloaded_and_their_drafters_found_by_name(tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        if "4bit-assistant" in name:
            raise NOT_THERE
        return str(folders(tmp_path, name.replace("/", "-")))

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    pair = hub.find_pair("org/gemma-it-4bit", "auto", "main")
    assert pair.drafter == tmp_path / "org-gemma-it-assistant"
    assert asked[0] == ("org/gemma-it-4bit", "main") and ("org/gemma-it-assistant", None) in asked


@pytest.mark.parametrize(
    "error, message",
    [
        (LocalEntryNotFoundError("down"), "reached (down); check the name, or connect and run: hf download org/name"),
        (OSError("no route\nmore"), "(no route)"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, error, message):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError) as raised:
        hub.find("org/name")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_repository_that_is_not_there(monkeypatch):
    def download(*args, **kwargs):
        raise NOT_THERE

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="neither a folder nor a repository"):
        hub.find("org/name")


def test_a_hub_that_does_not_answer_is_asked_for_one_drafter_only(tmp_path, monkeypatch):
    """The reason says so; decoding goes on plainly."""
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append(name)
        if "assistant" in name:
            raise LocalEntryNotFoundError("no route")
        return str(folders(tmp_path, "target"))

    monkeypatch.setattr(hub, "snapshot_download", download)
    pair = hub.find_pair("org/gemma-4-E2B-it", "auto")
    assert pair.drafter is None and "no route" in pair.reason and len(asked) == 2


@pytest.mark.parametrize(
    "name, ids",
    [
        ("org/mine-4bit", ["org/mine-4bit-assistant", "org/mine-assistant"]),
        (
            "mlx-community/gemma-4-26b-a4b-it-4bit",
            [
                "mlx-community/gemma-4-26b-a4b-it-4bit-assistant",
                "mlx-community/gemma-4-26b-a4b-it-assistant",
                "google/gemma-4-26B-A4B-it-assistant",
                "mlx-community/gemma-4-26B-A4B-it-assistant-bf16",
            ],
        ),
        ("gemma-4-E2B", ["google/gemma-4-E2B-assistant", "mlx-community/gemma-4-E2B-assistant-bf16"]),
        ("gemma-4-E2B-italian", ["google/gemma-4-E2B-assistant", "mlx-community/gemma-4-E2B-assistant-bf16"]),
        (
            "my-gemma-4-12b-it-qat",
            [
                "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant",
                "google/gemma-4-12B-it-assistant",
                "mlx-community/gemma-4-12B-it-assistant-bf16",
            ],
        ),
        ("notes", []),
    ],
)
def test_names_of_drafters(name, ids):
    assert hub._drafter_ids(name) == ids


@pytest.mark.parametrize(
    "target, drafter, refused",
    [
        ("gemma-4-E2B-it-4bit", "gemma-4-E2B-it-assistant", False),
        ("gemma-4-E2B", "gemma-4-E2B-it-assistant", True),
        ("gemma-4-E2B-it", "gemma-4-E2B-assistant", True),
        ("my-finetune", "gemma-4-E2B-it-assistant", False),
    ],
)
def test_a_base_model_takes_no_drafter_of_a_tuned_one(tmp_path, target, drafter, refused):
    folders(tmp_path, target, drafter)
    if not refused:
        assert hub.find_pair(str(tmp_path / target), str(tmp_path / drafter)).drafter == tmp_path / drafter
        return
    with pytest.raises(UserError) as raised:
        hub.find_pair(str(tmp_path / target), str(tmp_path / drafter))
    message = str(raised.value)
    assert f"{target} is" in message and f"{drafter} is the drafter" in message and "\n" not in message


def cached(cache: Path, name: str, lacks: str = "") -> Path:
    """A model as the hub's client keeps it, in two weight files, all empty; `lacks`: a file that is not there."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("config.json", *shards):
        if file != lacks:
            (snapshot / file).write_text("{}")
    return snapshot


FIND = """
import sys
from mlx_gemma_mtp import hub
for model in sys.argv[1:]:
    try:
        print(hub.find_pair(model, "auto"))
    except hub.UserError as error:
        print(error)
"""


def test_offline_the_cache_is_enough_and_what_it_lacks_is_named(tmp_path):
    cache, local = tmp_path / "cache", folders(tmp_path, "gemma-4-E2B-it-4bit")
    target = cached(cache, "org/gemma-4-E2B-it")
    drafter = cached(cache, "google/gemma-4-E2B-it-assistant")
    cached(cache, "org/part", lacks="model-00002-of-00002.safetensors")
    models = ("org/gemma-4-E2B-it", str(target), str(local), "org/part", "org/none")
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    found = subprocess.run([sys.executable, "-c", FIND, *models], env=environment, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert lines[:3] == [str(hub.Pair(folder, drafter, None)) for folder in (target, target, local)], found
    assert lines[3] == (
        "'org/part' is in the hub's cache without model-00002-of-00002.safetensors, and HF_HUB_OFFLINE is set; "
        "check the name, or connect and run: hf download org/part"
    )
    assert lines[4].startswith("'org/none' is no folder, nor in the hub's cache, and HF_HUB_OFFLINE is set;")
