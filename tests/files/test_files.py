"""Files that are written whole, and what stands where a file was expected."""

import os
import threading
from pathlib import Path

import pytest

from mlx_gemma_mtp.cli.command import check_file, written
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.files import content, whole
from mlx_gemma_mtp.files.folder import SINGLE, weight_files
from mlx_gemma_mtp.files.safetensors import read_object

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n"


def put(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text)


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("real/file")
    for text in ("first", "second"):  # where nothing is yet, and where a file is
        put(tmp_path / "a", text)
        assert (tmp_path / "real" / "file").read_text() == text and (tmp_path / "a").is_symlink()
    (tmp_path / "real" / "file").chmod(0o600)
    put(tmp_path / "a", "third")
    assert (tmp_path / "real" / "file").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file"]


@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_written_into(tmp_path, link):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    check_file("--json", tmp_path / "link" if link else pipe)
    with written(tmp_path / "link" if link else pipe) as part:
        part.write_text("text")
    reader.join(10)
    assert got == ["text"] and pipe.is_fifo()


def test_a_descriptor_is_written_into():
    read, write = os.pipe()
    path = Path(f"/dev/fd/{write}")
    check_file("--json", path)
    put(path, "text")
    os.close(write)
    assert os.read(read, 10) == b"text"
    os.close(read)


def test_a_name_of_the_greatest_length(tmp_path):
    put(tmp_path / ("n" * 250), "text")
    assert (tmp_path / ("n" * 250)).read_text() == "text"


def test_what_cannot_be_written_is_refused_before(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "astray").symlink_to("nowhere/file")
    for name in ("loop", "astray", "a\0b", "nowhere/file", "."):
        with pytest.raises(UserError, match="--json"):
            check_file("--json", tmp_path / name)


KINDS = {
    "pointer": ("is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download it again"),
    "page": "is a web page (HTML), not the file itself; download it again",
    "empty": "is empty; download it again",
    "pipe": "is a named pipe; expected a file of a model folder; download it again",
    "folder": "is a folder; expected a file of a model folder; download it again",
    "astray": "is a link to nowhere, where nothing is; expected a file of a model folder; download it again",
    "loop": "is a link that leads back to itself; expected a file of a model folder; download it again",
}


def lay(path: Path, kind: str) -> None:
    """Puts at a path what is no file of a model."""
    texts = {"pointer": POINTER, "page": b"<!DOCTYPE html>", "empty": b" \n"}
    if kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "astray" else path.name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_place_of_a_file_is_said_once(tmp_path, kind):
    path = tmp_path / "config.json"
    lay(path, kind)
    for read in (read_object, content):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value) == f"{path} {KINDS[kind]}"


@pytest.mark.parametrize("kind", ["pipe", "folder", "astray", "loop"])
def test_what_stands_in_place_of_weights_is_named(tmp_path, kind):
    lay(tmp_path / SINGLE, kind)
    with pytest.raises(UserError) as error:
        weight_files(tmp_path)
    says = KINDS[kind].partition(";")[0]
    assert str(error.value).startswith(f"{tmp_path} has no weight file '{SINGLE}': it {says}; expected a file")
