"""Folders that are something else, in one line: pickles, and the two sides of a pair given in the wrong places."""

import builtins
import pickle
import shutil
from pathlib import Path

import pytest

from mlx_gemma_mtp import generate, load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading

TARGET, DRAFTER = hub.DEMO / "target", hub.DEMO / "drafter"


class Trap:
    """Unpickling it would leave a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return builtins.open, (str(self.mark), "w")


def pickled(folder: Path, source: Path, name: str, index: bool) -> Path:
    """A bundled folder whose weights are a pickle that leaves `folder.mark` if it is loaded."""
    shutil.copytree(source, folder)
    for file in ("model.safetensors", "model.safetensors.index.json"):
        (folder / file).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(folder.with_suffix(".mark"))))
    if index:
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"model.norm.weight": "{name}"}}}}')
    return folder


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    for part in parts:
        assert part in str(error.value)


def refused_by_command(capsys, argv: list, *parts: str) -> None:
    code = generate.main([str(a) for a in ("--prompt", "x", *argv)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("note:", "This is the small"))]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pkl"])
@pytest.mark.parametrize("index", [False, True], ids=["alone", "in an index"])
def test_pickles_are_named_and_never_loaded(tmp_path, monkeypatch, capsys, name, index):
    """The trap is not sprung, and no unpickler is even asked."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle is being loaded")

    folder = pickled(tmp_path / "model", TARGET, name, index)
    drafter = pickled(tmp_path / "drafter", DRAFTER, name, index)
    config = loading.load_target(TARGET).config
    for attribute in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, attribute, forbidden)
    refused(lambda: loading.load_target(folder), str(folder), name)
    refused(lambda: loading.load_drafter(drafter, config), str(drafter), name)
    refused_by_command(capsys, ["--model", folder, "--draft-model", "none"], str(folder), name)
    assert not list(tmp_path.glob("*.mark"))


def test_the_trap_works(tmp_path):
    """So that the test above can fail."""
    folder = pickled(tmp_path / "model", TARGET, "x.bin", False)
    pickle.loads((folder / "x.bin").read_bytes()).close()
    assert (tmp_path / "model.mark").exists()


SWAPPED = {
    "a drafter as target": (DRAFTER, "none", [str(DRAFTER), "is a drafter, expected a target"]),
    "a target as drafter": (TARGET, TARGET, [str(TARGET), "is a target, expected a drafter"]),
    "both": (DRAFTER, TARGET, [str(DRAFTER), str(TARGET), "is a drafter, expected a target"]),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_sides_in_the_wrong_places(monkeypatch, capsys, case):
    """Named before any weights are read."""
    monkeypatch.setattr(loading, "_lazy_tensors", lambda folder: pytest.fail("weights are read"))
    model, draft_model, parts = SWAPPED[case]
    refused(lambda: load(str(model), str(draft_model)), *parts)
    refused_by_command(capsys, ["--model", model, "--draft-model", draft_model], *parts)


def test_the_drafter_of_another_target_is_refused_with_both_sides(tmp_path, monkeypatch, capsys):
    """Before any weights are read: they may be gigabytes."""
    monkeypatch.setattr(loading, "_lazy_tensors", lambda folder: pytest.fail("weights are read"))
    folder = tmp_path / "drafter"
    shutil.copytree(DRAFTER, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"backbone_hidden_size": 192', '"backbone_hidden_size": 2816'))
    parts = [str(TARGET), str(folder), "hidden size is 2816, the target's is 192"]
    refused(lambda: load(str(TARGET), str(folder)), *parts)
    refused_by_command(capsys, ["--model", TARGET, "--draft-model", folder], *parts)
