"""Which files of a model folder count, and what stands in their place when a download went wrong."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks import folders
from convert import check, inspect
from convert.cli import main as convert
from mlx_gemma_mtp import load
from mlx_gemma_mtp.engine.calibration import fingerprint
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import folder as folder_files
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.files import HEAD, instead
from mlx_gemma_mtp.files.folder import INDEX, SINGLE, check_text_files, is_plain, weight_bytes, weight_files
from mlx_gemma_mtp.files.hub import Pair
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.text.encode import Text

TARGET, DRAFTER = hub.DEMO / "target", hub.DEMO / "drafter"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 33384568\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(40)


def cluttered(folder: Path, source: Path = TARGET) -> Path:
    """A bundled folder with what other programs leave in such folders; none of it is a weight of the model."""
    shutil.copytree(source, folder)
    for name in (SINGLE, INDEX, "config.json", "tokenizer.json"):
        (folder / f"._{name}").write_bytes(APPLE_DOUBLE)
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    (folder / "adapters.safetensors").write_bytes(b"broken")
    (folder / "model-00001-of-00002.safetensors").write_bytes(POINTER)  # of a download that was given up
    mx.save_safetensors(str(folder / "consolidated.safetensors"), {"layers.0.w": mx.zeros((1000, 1000))})
    for name in ("original", ".cache/huggingface/download"):
        (folder / name).mkdir(parents=True)
        (folder / name / SINGLE).write_bytes(b"broken")
    (folder / "folder.safetensors").mkdir()
    return folder


@pytest.mark.parametrize("index", [True, False], ids=["index", "one file"])
def test_what_else_lies_in_a_folder_is_no_weight(tmp_path, index):
    folder, drafter = cluttered(tmp_path / "model"), cluttered(tmp_path / "drafter", DRAFTER)
    if not index:
        (folder / INDEX).unlink()
    assert weight_files(folder) == [folder / SINGLE]
    assert weight_bytes(folder) == weight_bytes(TARGET)
    if index:
        assert fingerprint(folder) == fingerprint(TARGET) and fingerprint(drafter) == fingerprint(DRAFTER)
    assert hub.missing_files(folder) == []
    assert load(str(folder), num_draft_tokens=0).drafter is not None
    assert folders.hashes(Pair(folder, drafter, None)) == folders.hashes(Pair(TARGET, DRAFTER, None))
    assert inspect.inspect(str(folder))["bytes"] == inspect.inspect(str(TARGET))["bytes"]
    assert check.check(folder) == check.check(TARGET)
    assert folders._read(folder)[1].keys() == folders._read(TARGET)[1].keys()


def test_an_index_counts_alone(tmp_path):
    """A file of its own beside the shards of an index, as in repositories that hold two layouts."""
    folder, tensors = tmp_path / "model", dict(mx.load(str(TARGET / SINGLE)))
    shutil.copytree(TARGET, folder)
    (folder / SINGLE).write_bytes(POINTER)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "weights 2 (copy).safetensors": names[1::2]}
    for file, some in parts.items():
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in some})
    placed = {name: file for file, some in parts.items() for name in some}
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    assert weight_files(folder) == [folder / file for file in sorted(parts)]
    loading.load_target(folder)
    assert weight_bytes(folder) == weight_bytes(TARGET)
    assert convert(["check", str(folder)]) == 1  # checksums.json names the one file; the tensors themselves are sound


def test_links_are_followed(tmp_path):
    """As in the hub's cache."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in TARGET.iterdir():
        (folder / file.name).symlink_to(file)
    assert weight_bytes(folder) == weight_bytes(TARGET)
    loading.load_target(folder)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a.safetensors", "/a.safetensors", "x/a.safetensors", "._a.safetensors", ".safetensors", "a.bin",
     "a\nb.safetensors", "a\0.safetensors"],
)  # fmt: skip
def test_an_index_names_plain_files_alone(tmp_path, name):
    assert not is_plain(name)
    shutil.copytree(TARGET, tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    for call in (loading.read_tensors, weight_bytes, fingerprint, inspect.inspect):
        refused(lambda call=call: call(tmp_path / "model"), "no weight file", "download the folder again")


def test_weights_that_nothing_names_are_listed(tmp_path):
    shutil.copytree(TARGET, tmp_path / "model")
    (tmp_path / "model" / INDEX).unlink()
    (tmp_path / "model" / SINGLE).rename(tmp_path / "model" / "consolidated.safetensors")
    refused(lambda: weight_files(tmp_path / "model"), f"no weight file '{SINGLE}', but consolidated.safetensors")


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1, error
    for part in parts:
        assert part in str(error.value)


CASES = {
    "pointer": (lambda path: path.write_bytes(POINTER), "is a Git LFS pointer", "git lfs pull"),
    "empty": (lambda path: path.write_bytes(b""), "is empty", "download it again"),
    "blank": (lambda path: path.write_bytes(b" \n"), "is empty", "download it again"),
    "page": (lambda path: path.write_bytes(PAGE), "is a web page (HTML)", "download it again"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "", "download it again"),
    "bytes": (lambda path: path.write_bytes(b"{\xff"), "", "download it again"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "", "download"),
    "link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "", "download"),
}
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    SINGLE,
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("case", CASES)
def test_what_was_not_downloaded_is_named_before_any_weight_is_read(tmp_path, monkeypatch, case, file):
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder)
    spoil, *parts = CASES[case]
    if case == "cut" and file == "chat_template.jinja":
        return  # still a text
    spoil(folder / file)
    monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("weights are read"))
    refused(lambda: load(str(folder), str(DRAFTER)), file, *parts)
    if file in ("config.json", SINGLE) or case not in ("cut", "bytes"):  # what is copied is not parsed
        assert convert(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("case", CASES)
def test_a_drafter_that_was_not_downloaded_is_named_before_any_weight_is_read(tmp_path, monkeypatch, case):
    shutil.copytree(DRAFTER, tmp_path / "drafter")
    spoil, *parts = CASES[case]
    spoil(tmp_path / "drafter" / SINGLE)
    monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("weights are read"))
    refused(lambda: load(str(TARGET), str(tmp_path / "drafter")), str(tmp_path / "drafter"), *parts)


def test_a_drafter_that_lacks_a_tensor_is_named_before_any_weight_is_read(tmp_path, monkeypatch):
    shutil.copytree(DRAFTER, tmp_path / "drafter")
    tensors = dict(mx.load(str(DRAFTER / SINGLE)))
    tensors.pop("model.norm.weight")
    (tmp_path / "drafter" / INDEX).unlink()
    mx.save_safetensors(str(tmp_path / "drafter" / SINGLE), tensors)
    monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("weights are read"))
    refused(lambda: load(str(TARGET), str(tmp_path / "drafter")), "lacks tensor 'model.norm.weight'")


TOKENIZERS = {
    "missing": (None, "has no tokenizer.json"),
    "no object": (b"[]", "cannot be read as JSON"),
    "no model": (b"{}", "has no 'model' with a 'vocab'"),
    "no vocabulary": (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no 'model' with a 'vocab'"),
    "unknown model": (b'{"model": {"type": "X", "vocab": {"a": 0}}}', "cannot be used"),
    "no version": (b'{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}', "cannot be used"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_one_line(tmp_path, case):
    data, part = TOKENIZERS[case]
    shutil.copytree(TARGET, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    if data is not None:
        (tmp_path / "model" / "tokenizer.json").write_bytes(data)
    refused(lambda: Text(tmp_path / "model", ()), part, "download")


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-5], lambda data: data[: len(data) // 2], lambda data: b"[" + data]
)
def test_a_large_tokenizer_is_checked_without_parsing_it(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(folder_files, "LARGE", 1000)
    shutil.copytree(TARGET, tmp_path / "model")
    check_text_files(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_bytes(spoil(path.read_bytes()))
    refused(lambda: check_text_files(tmp_path / "model"), "tokenizer.json cannot be read as JSON", "download")
    path.write_bytes(POINTER)
    monkeypatch.setattr(folder_files, "LARGE", 10)
    refused(lambda: check_text_files(tmp_path / "model"), "is a Git LFS pointer")


def test_a_pointer_is_not_copied_into_a_conversion(tmp_path, capsys):
    """Seen before the weights are converted, not after."""
    shutil.copytree(DRAFTER, tmp_path / "raw")
    (tmp_path / "raw" / "tokenizer.model").write_bytes(POINTER)
    assert convert(["--hf-path", str(tmp_path / "raw"), "--mlx-path", str(tmp_path / "out")]) == 2
    assert "tokenizer.model is a Git LFS pointer" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_speaks_against_a_file():
    for path in (*TARGET.iterdir(), *DRAFTER.iterdir()):
        assert instead(path.read_bytes()[:HEAD]) is None, path


def numbered(folder: Path, count: int) -> Path:
    """The bundled target in files that count themselves, without an index."""
    shutil.copytree(TARGET, folder)
    tensors = dict(mx.load(str(folder / SINGLE)))
    for number in range(1, count + 1):
        some = {name: tensors[name] for name in sorted(tensors)[number - 1 :: count]}
        mx.save_safetensors(str(folder / f"model-{number:05}-of-{count:05}.safetensors"), some)
    for name in (SINGLE, INDEX):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_files_that_count_themselves_need_no_index(tmp_path, count):
    folder = numbered(tmp_path / "model", count)
    assert len(weight_files(folder)) == count and hub.missing_files(folder) == []
    loading.load_target(folder)
    assert inspect.inspect(str(folder))["bytes"] == inspect.inspect(str(TARGET))["bytes"]


def test_a_lost_file_of_those_that_count_themselves_is_named(tmp_path):
    folder = numbered(tmp_path / "model", 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert hub.missing_files(folder) == ["model-00002-of-00003.safetensors"]
    with pytest.raises(UserError, match=r"no weight file 'model-00002-of-00003\.safetensors'; expected"):
        weight_files(folder)


def test_a_tensor_in_two_files_is_named(tmp_path):
    folder = numbered(tmp_path / "model", 2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"is in model-00001-of-00002\.safetensors, too"):
        loading.open_target(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda placed: placed.pop("language_model.model.norm.weight"), "has no such tensor"),
        (lambda placed: placed.update({"lm_head.weight": SINGLE}), "which model.safetensors.index.json puts there"),
        (lambda placed: placed.update(dict.fromkeys(placed, "model-00001-of-00002.safetensors")), "or remove"),
    ],
    ids=["lacks a tensor", "one too many", "of other files"],
)
def test_an_index_of_something_else_can_be_removed(tmp_path, change, says):
    """What the refusal advises opens the folder."""
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder)
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    change(placed)
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UserError, match=says) as error:
        loading.open_target(folder)
    assert "None" not in str(error.value) and "remove" in str(error.value)
    (folder / INDEX).unlink()
    loading.open_target(folder)


def test_a_byte_order_mark_is_no_harm(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TARGET, folder)
    for name in ("config.json", INDEX, "tokenizer_config.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    load(str(folder), num_draft_tokens=0, draft_model="none")
