"""Finding models and their drafters; memory is checked first."""

import shutil

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tiny import target_dict

from mlx_gemma_mtp import hub, memory
from mlx_gemma_mtp.config import KVSpec, TargetConfig
from mlx_gemma_mtp.engine import load
from mlx_gemma_mtp.errors import UserError


def folders(root, *names):
    for name in names:
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
    return root / names[0]


def test_the_bundled_pair_is_the_default():
    pair = hub.find_pair(None, "auto")
    assert (pair.target, pair.drafter, pair.reason) == (hub.DEMO / "target", hub.DEMO / "drafter", None)
    assert "none" in hub.find_pair(None, "none").reason


@pytest.mark.parametrize("sibling", ["m-4bit-assistant", "m-assistant", "m-assistant-bf16", "drafter"])
def test_a_drafter_beside_its_target_is_found(tmp_path, sibling):
    target = folders(tmp_path, "m-4bit", sibling)
    assert hub.find_pair(str(target), "auto").drafter == tmp_path / sibling


def test_no_drafter_gives_the_reason(tmp_path):
    pair = hub.find_pair(str(folders(tmp_path, "m")), "auto")
    assert pair.drafter is None and "m-assistant" in pair.reason


def test_hub_ids_are_downloaded_and_their_drafters_found_by_name(tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        if "4bit-assistant" in name:
            raise LocalEntryNotFoundError("not there")
        return str(folders(tmp_path, name.replace("/", "-")))

    monkeypatch.setattr(hub, "snapshot_download", download)
    pair = hub.find_pair("org/gemma-it-4bit", "auto", "main")
    assert pair.drafter == tmp_path / "org-gemma-it-assistant"
    assert asked[0] == ("org/gemma-it-4bit", "main") and ("org/gemma-it-assistant", None) in asked


@pytest.mark.parametrize(
    "error, message",
    [
        (LocalEntryNotFoundError("offline"), "the hub cannot be reached for it (offline)"),
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
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="neither a folder nor a repository"):
        hub.find("org/name")


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(hub.DEMO / "target", folder)
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs 0\.\d GB, this machine has 0\.0 GB for it; convert it with -q"):
        load(str(folder))


def test_cache_bytes():
    """Rings hold window + block - 1 positions at most, full layers all of them."""
    config = TargetConfig.from_dict(target_dict("moe"))
    rows, tokens, block = 2, 1000, 16
    rings = 4 * 2 * (8 + block - 1) * 2 * 8
    full = 2 * 2 * tokens * 1 * 16
    assert memory.kv_bytes(config, tokens, rows, block, 4) == rows * (rings + full) * 4
    assert config.kv[0] == KVSpec(2, 8, 8)
