"""Beginnings of prompts on disk: the K/V of each in a file, in a folder that processes share.

The longest beginning of a prompt that is known is found by the names of the files. A file is written beside and
renamed, and nothing waits for the disk: what a crash, a full disk or a power cut leaves is no file of that name, or one
whose checksum tells.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError, in_a_line
from .background import PATIENCE, Background, Write
from .prefix_file import NAME, HostArray, Image, Layers, Names, layers_of

__all__ = ["HostArray", "Layers", "PrefixStore"]

PART = re.compile(NAME.pattern + r"\.\w+\.part")
LIMIT = 20_000_000_000  # bytes of a folder, where nobody says
LARGEST_QUEUE = 256_000_000  # bytes that wait for the disk; a single entry may be larger
STALE = 600  # seconds after which nobody writes into an unfinished file any more
RETRY = 60  # seconds without writes after one that failed


class PrefixStore:
    """A folder of prefixes with one key, within a limit of bytes that holds for all keys together.

    Any thread may call it. Once it is made, it raises nothing for what the disk does: a file that is damaged, or
    another's, is removed and told in a line, one that vanishes was never there, and what cannot be written is lost.
    Files with names of other kinds are left alone.

    written: entries that were written. dropped: entries that were not, since the disk is slower or refused them.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        limit: int,
        *,
        notice: Callable[[str], None] = lambda message: None,
        fits: Callable[[int, Layers], bool] = lambda tokens, layers: True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Makes the folder where there is none, and removes what writers that were killed left behind.

        key: all that K/V depend on besides tokens and salt. limit: bytes of all files; those that nobody used for the
        longest time go first. notice: called with a sentence that the user should know, in any thread. fits: whether
        layers of so many tokens are such as the key's. clock: of seconds.

        Raises UserError for what can never work (`make_folder`).
        """
        self.folder, self.limit, self.fits, self.clock = folder, limit, fits, clock
        self.written = self.dropped = 0
        self._notice = notice
        self._key = hashlib.sha256(key.encode()).digest()
        self._background = Background(LARGEST_QUEUE)
        self._ignored: set[str] = set()  # files that are not to be read, and could not be removed
        self._failed: float | None = None  # when the last write failed; None where it did not
        self._told: set[str] = set()
        if (error := make_folder(folder)) is not None:
            self._tell_of(error)
        with suppress(OSError):  # a folder that can only be read is read
            self._sweep()

    # What any thread may ask.

    def longest(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Returns how many first tokens of a prompt have a file, 0 for none. The file is not opened."""
        return next((length for length, _ in self._known(tokens, salt)), 0)

    @property
    def bytes(self) -> int:
        """The bytes of the folder's prefixes, those of other keys included."""
        found = 0
        with suppress(OSError):  # a folder that is gone has none
            for _, entry in self._files(NAME):
                with suppress(FileNotFoundError):
                    found += entry.stat(follow_symlinks=False).st_size
        return found

    def read(self, tokens: Sequence[int], salt: str | None = None) -> tuple[int, Layers] | None:
        """Returns the longest beginning of a prompt that a file holds: its number of tokens, and its layers, which are
        views of one buffer. None where there is none. The file is used now: it is among the last ones to be removed.
        """
        for length, path in self._known(tokens, salt):
            if (layers := self._read(path, tokens[:length])) is not None:
                return length, layers
        return None

    def wants(self, tokens: Sequence[int], salt: str | None, bytes: int) -> bool:
        """Returns whether `put` would take an entry of so many bytes in. One that is there already is used now."""
        name = Names(self._key, salt).of(tokens)
        if name not in self._ignored and _touched(self.folder / name):
            return False
        resting = self._failed is not None and self.clock() - self._failed < RETRY
        if bytes <= self.limit and not resting and self._background.has_room(bytes):
            return True
        self.dropped += 1
        return False

    def put(self, tokens: Sequence[int], salt: str | None, layers: Layers) -> bool:
        """Has an entry written, in another thread. Its arrays must not change any more. Returns False where it is not
        wanted.
        """
        image = Image.of(self._key, tokens, layers)
        if not self.wants(tokens, salt, image.bytes):
            return False
        path = self.folder / Names(self._key, salt).of(tokens)
        if self._background.put(Write(lambda: self._write(path, image), image.bytes)):
            return True
        self.dropped += 1
        return False

    def flush(self, patience: float = 60) -> bool:
        """Waits until everything is written, at most so many seconds. Returns whether it is."""
        return self._background.flush(patience)

    def close(self, patience: float = PATIENCE) -> None:
        """Writes what still waits, for so many seconds at most. What is put afterwards is dropped."""
        self._background.close(patience)

    # The folder.

    def _files(self, kind: re.Pattern[str]) -> Iterator[tuple[re.Match[str], os.DirEntry[str]]]:
        """The entries of the folder whose names are of a kind. Raises OSError."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := kind.fullmatch(entry.name):
                    yield match, entry

    def _known(self, tokens: Sequence[int], salt: str | None) -> list[tuple[int, Path]]:
        """(length, file) of each beginning of a prompt, the longest first."""
        names, found = Names(self._key, salt), {}
        with suppress(OSError):  # a folder that is gone has no files
            found = {
                entry.name: int(match["tokens"])
                for match, entry in self._files(NAME)
                if entry.name.startswith(names.beginning) and entry.name not in self._ignored
            }
        lengths = {length for length in found.values() if length <= len(tokens)}
        own = names.beginnings(tokens, lengths)
        return [(length, self.folder / own[length]) for length in sorted(own, reverse=True) if own[length] in found]

    def _read(self, path: Path, tokens: Sequence[int]) -> Layers | None:
        """The layers of a file; None for one that is gone, or that is no such file."""
        try:
            layers = layers_of(path, _content(path, self.limit), self._key, tokens)
            if not self.fits(len(tokens), layers):
                raise ValueError("has other shapes than this model's")
        except FileNotFoundError:
            return None
        except MemoryError:  # the prompt is computed
            return None
        except OSError as error:
            self._refuse(path, f"cannot be read ({error.strerror})", remove=False)
            return None
        except ValueError as error:
            self._refuse(path, in_a_line(error).removeprefix("ValueError: "))
            return None
        _touched(path)
        return layers

    def _refuse(self, path: Path, why: str, remove: bool = True) -> None:
        """Tells of a file that is not to be read, and removes it."""
        self._ignored.add(path.name)
        if remove:
            with suppress(OSError):
                path.unlink()
                self._ignored.discard(path.name)
        self._tell(f"{path} {why}; it is ignored" + ("" if path.name in self._ignored else " and removed"))

    def _tell_of(self, error: OSError) -> None:
        """Tells that nothing can be written, and rests from it."""
        self._failed = self.clock()
        self._tell(f"prefixes are not kept in {self.folder} ({error.strerror}); what is there is read")

    def _tell(self, message: str) -> None:
        """Tells the user, each thing once. What that raises ends neither a write nor a request."""
        if message not in self._told:
            self._told.add(message)
            with suppress(Exception):
                self._notice(message)

    # What follows runs in the thread that writes, but for the sweep of a start.

    def _write(self, path: Path, image: Image) -> None:
        """Writes a file, or tells why not."""
        try:
            if path.name not in self._ignored and _touched(path):  # another process was faster
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_beside(path, image)
        except _GivenUp:
            self.dropped += 1
        except OSError as error:
            self.dropped += 1
            self._tell_of(error)
        except Exception as error:  # the thread goes on
            self.dropped += 1
            self._tell(f"a prefix was not kept: {in_a_line(error)}")
        else:
            self.written += 1
            self._failed = None
            self._ignored.discard(path.name)

    def _write_beside(self, path: Path, image: Image) -> None:
        """Writes a file under a name that no other process has, of mode 0600, then gives it its own. Raises OSError."""
        file, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
        try:
            try:
                os.ftruncate(file, image.bytes)  # so that others, who count now, count all of it
                self._sweep()
                for piece in image.pieces():
                    if self._background.hurried:
                        raise _GivenUp
                    _write_all(file, piece)
            finally:
                os.close(file)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise

    def _sweep(self) -> None:
        """Removes unfinished files that nobody writes any more, then files until the others are within the limit, those
        that were used the longest ago first. Raises OSError.
        """
        total, used = 0, []
        for kind in (NAME, PART):
            for _, entry in self._files(kind):
                with suppress(FileNotFoundError):  # another process removes, too
                    found = entry.stat(follow_symlinks=False)
                    if kind is PART and time.time() - found.st_mtime > STALE:
                        os.unlink(entry.path)
                        continue
                    total += found.st_size
                    if kind is NAME:
                        used.append((found.st_mtime_ns, entry.path, found.st_size))
        for _, path, size in sorted(used):
            if total <= self.limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


def make_folder(folder: Path) -> OSError | None:
    """Makes a folder for prefixes where there is none. Returns why that is not possible now: the disk is full.

    Raises UserError for what can never work: a path that is no folder, or one that is neither there nor can be made, or
    cannot be read.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.scandir(folder).close()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is no folder; expected one for prefixes, which may be new") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        reason = f"{folder} cannot be used for prefixes ({error.strerror})"
        raise UserError(f"{reason}; name a folder that can be read and written") from None
    return None


class _GivenUp(Exception):
    """Ends a write for whose end nobody waits any more."""


def _content(path: Path, limit: int) -> memoryview:
    """All bytes of a regular file. Raises OSError, and ValueError for what is none, or beyond the limit."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    with open(file, "rb", buffering=0) as opened:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no regular file")
        if found.st_size > limit:
            raise ValueError("is larger than all prefixes may be")
        data, done = memoryview(bytearray(found.st_size)), 0
        while count := opened.readinto(data[done:]):
            done += count
    return data[:done]


def _write_all(file: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _touched(path: Path) -> bool:
    """Whether a file is there; it is used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # a folder that can only be read, or not even that
        return os.path.exists(path)  # Path's own may raise
    return True
