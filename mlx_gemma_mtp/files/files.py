"""Files that are not what they should be, files that are written whole or not at all, and the cache folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
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
    """Returns what a file holds instead of a model's data, with the fix, as the end of a sentence; None for neither.

    head: the file's first HEAD bytes.
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
    """Returns the bytes of a file of a model folder.

    Raises UserError where the file is missing, unreadable, no regular file, or was not downloaded.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; expected a complete model folder; download it again")
    if other := no_file(path):  # what would block or not end is not read either
        raise UserError(f"{path} {other}; expected a file of a model folder; download it again")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    if other := instead(data[:HEAD]):
        raise UserError(f"{path} {other}")
    return data


def no_file(path: Path) -> str | None:
    """Returns what stands at a path in place of a regular file, as the end of a sentence; None for a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads back to itself"
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, where nothing is"
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a NUL in the name
        return "is no name of a file"
    kinds = {stat.S_IFREG: None, stat.S_IFDIR: "is a folder", stat.S_IFIFO: "is a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "is a device or a socket")


def text(path: Path) -> str:
    """Returns the text of a UTF-8 file of a model folder. Raises UserError where it cannot be read as such."""
    try:
        return content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); download it again") from None


def cache_folder() -> Path:
    """Returns the folder for what is kept between runs: MLX_GEMMA_MTP_CACHE, or one in the user's cache folder.

    It may not exist.
    """
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


def is_stream(path: Path) -> bool:
    """Returns whether a path leads to something that is no regular file, or to a descriptor that is open already.

    Raises OSError for a path that cannot be followed, such as a link that leads back to itself.
    """
    if os.fspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):  # may be a regular file, open at its end
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write into, which replaces `path` when the block ends and is removed if it raises.

    Links are followed: the file that they lead to is replaced, and the links stay. What is no regular file (a pipe, a
    device, an open descriptor in /dev/fd) cannot be replaced: then `path` itself is yielded. Raises OSError.
    """
    if is_stream(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    part = path.with_name(f"{path.name[:50]}.{os.getpid()}.part")  # a name of a name's greatest length has room
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
