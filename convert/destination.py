"""Where conversions go: sibling folders that appear under their names together, or never."""

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mlx_gemma_mtp.cli.command import tell
from mlx_gemma_mtp.errors import UserError


@dataclass(frozen=True)
class Destination:
    """The folders that a conversion makes, `outs`, all in one parent.

    Each is written as `.NAME.TOKEN.tmp` beside its place; with `kept`, as `.NAME.stream.tmp`, which stays where a
    conversion is stopped, for one that goes on.

    A process holds locks on its temporary folders: one that can be locked was left by a process that is gone (a process
    id would not tell: containers that share a disk do not share ids).
    """

    outs: tuple[Path, ...]
    kept: bool = False
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    _locks: list[int] = field(default_factory=list)
    _claimed: list[Path] = field(default_factory=list)
    _parents: list[Path] = field(default_factory=list)  # made by us, innermost first

    @property
    def parent(self) -> Path:
        return self.outs[0].parent

    @property
    def folders(self) -> list[Path]:
        """Returns the temporary folders, in the order of `outs`."""
        return [_part(out, "stream" if self.kept else self.token) for out in self.outs]

    @property
    def parts(self) -> list[Path]:
        """Returns the folders of a conversion that was stopped which it leaves for one that goes on."""
        return [folder for folder in self._claimed if self.kept and folder.is_dir() and any(folder.iterdir())]

    @property
    def left(self) -> str:
        """Returns what a conversion that was stopped leaves, in words."""
        return f"what is done is kept in {', '.join(map(str, self.parts))}" if self.parts else "nothing was written"

    def claim(self) -> None:
        """Makes the temporary folders. Raises UserError where there is something already, or nothing can be written."""
        for out in self.outs:
            if out.exists() or out.is_symlink():
                raise UserError(f"{out} exists; expected a new folder; choose another --mlx-path")
        try:
            self._parents.extend(path for path in (self.parent, *self.parent.parents) if not path.exists())
            self.parent.mkdir(parents=True, exist_ok=True)
            for out, folder in zip(self.outs, self.folders, strict=True):
                _remove_stale(out)
                folder.mkdir(exist_ok=self.kept)
                self._lock(out, folder)
        except OSError as error:
            raise UserError(
                f"{self.parent}: {error.strerror}; expected a folder that can be written; choose another --mlx-path"
            ) from error

    def _lock(self, out: Path, folder: Path) -> None:
        try:
            self._locks.append(_lock(folder))
        except BlockingIOError:
            raise UserError(f"another conversion to {out} runs; wait for it, or choose another --mlx-path") from None
        except OSError:
            pass  # on a disk without locks nothing is ever taken for left behind
        self._claimed.append(folder)

    def check_space(self, size: int) -> None:
        """Raises UserError unless `size` bytes are free."""
        free = shutil.disk_usage(self.parent).free
        if free < size:
            raise UserError(
                f"{self.parent} has {free / 1e9:.3f} GB free; expected {size / 1e9:.3f} GB;"
                " free some space or choose another --mlx-path"
            )

    def commit(self) -> None:
        """Renames all, the first last: where it is, the others are. Raises OSError, which leaves none.

        What conversions to the same places kept is removed: there is nothing to go on with any more.
        """
        done = []
        try:
            for folder, out in reversed(list(zip(self.folders, self.outs, strict=True))):
                folder.rename(out)
                done.append((folder, out))
        except OSError:
            for folder, out in done:
                out.rename(folder)
            raise
        for out in self.outs:
            _remove(_part(out, "stream"))

    def discard(self) -> None:
        """Removes what was not committed, however little that is, but for what is kept."""
        for folder in () if self.kept else self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._claimed:
            with suppress(OSError):  # what is kept stays
                folder.rmdir()
        for path in self._parents:
            with suppress(OSError):  # those that hold something stay
                path.rmdir()
        for lock in self._locks:
            os.close(lock)


def _part(out: Path, token: str) -> Path:
    return out.parent / f".{out.name}.{token}.tmp"


def _lock(folder: Path) -> int:
    """A descriptor that locks a folder for as long as it is open, which ends with the process at the latest."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_stale(out: Path) -> None:
    """Removes what conversions to `out` left that were killed."""
    for path in out.parent.iterdir():
        if not re.fullmatch(rf"\.{re.escape(out.name)}\.[0-9a-f]+\.tmp", path.name) or path.is_symlink():
            continue
        if _remove(path):
            tell(f"removed {path}, left by a conversion that was killed")


def _remove(folder: Path) -> bool:
    """Removes a temporary folder, unless it is that of a conversion that runs. Returns whether it is removed."""
    try:
        lock = _lock(folder)
    except OSError:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    return True
