"""Files: those of a model folder that are not what they should be, those that are written whole, the cache folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

CACHE = "MLX_GEMMA_MTP_CACHE"
HEAD = 512  # bytes that tell what a file is
POINTER = b"version https://git-lfs.github.com/spec/"
PAGE = (b"<!doctype", b"<html", b"<?xml")


def instead(head: bytes) -> str | None:
    """What a file holds instead of a model's data, with the fix; None where nothing speaks against it.

    head: its first HEAD bytes.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return "is empty; download it again"
    if start.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download it again"
    if start[:16].lower().startswith(PAGE):
        return "is a web page (HTML), not the file itself; download it again"
    return None


def content(path: Path) -> bytes:
    """The bytes of a file of a model folder. Raises UserError where it is missing, unreadable or was not downloaded."""
    try:
        if not path.is_file():  # one that would block or not end is not read either
            raise UserError(f"{path}: no such file; expected a complete model folder; download it again")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    if other := instead(data[:HEAD]):
        raise UserError(f"{path} {other}")
    return data


def text(path: Path) -> str:
    """Likewise the text of a file in UTF-8."""
    try:
        return content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); download it again") from None


def cache_folder() -> Path:
    """The folder for what is kept between runs: MLX_GEMMA_MTP_CACHE, or the user's cache folder. It may not exist."""
    named = os.environ.get(CACHE, "").strip()
    return _expanded(named) if named else _user_cache() / "mlx_gemma_mtp"


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if sys.platform != "darwin" and os.path.isabs(base):  # a relative one is to be ignored, says its specification
        return Path(base)
    return _expanded("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")


def _expanded(name: str) -> Path:
    """An absolute path. Where `~` stands for nobody's home, the folder lies among the temporary ones."""
    path = Path(os.path.expanduser(name))
    if path.parts[:1] and path.parts[0].startswith("~"):
        path = Path(tempfile.gettempdir(), *path.parts[1:])
    return path.absolute()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes the name when the block ends, and is removed if the block raises.

    Raises OSError.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
