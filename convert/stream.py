"""`--stream`: the weight files of a source on the hub are downloaded, converted and dropped one after the other.

So source and result need not both have room on the disk, and a conversion that was stopped goes on where it was: the
folder that is made lists, while it is made, which of the source's files are in it.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_gemma_mtp._version import __version__
from mlx_gemma_mtp.cli.command import tell
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.files import whole
from mlx_gemma_mtp.files.safetensors import read_object

from . import blocks, writer
from .checkpoint import Repeat
from .conversion import Conversion
from .writer import Job

PLACE = ".source"  # what is downloaded, in the folder that is made
JOURNAL = ".stream.json"


@dataclass
class Part:
    """What can be done once a weight file of the source is here, with others that came before.

    file: its path; needs: all files that are read for it.
    """

    file: Path
    needs: set[Path] = field(default_factory=set)
    jobs: list[Job] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)


class Streamed:
    """A conversion whose source comes file by file.

    done: names of the source's files whose parts are written, in this run or in one that was stopped.
    """

    def __init__(self, conversion: Conversion, folder: Path):
        """Goes on with what `folder` holds of the same conversion. What it holds of another one is removed."""
        self.conversion, self.folder, self.remote = conversion, folder, conversion.remote
        self.files = writer.shards(conversion.jobs, writer.SHARD_BYTES)
        self.parts = _parts(conversion)
        self.plan = _digest(conversion)
        self.done = self._read()
        if self.done is None:
            self.done = []
            _clear(folder)

    @property
    def left(self) -> list[Part]:
        return [part for part in self.parts if part.file.name not in self.done]

    @property
    def room(self) -> int:
        """Returns the bytes of disk for what is left: its result, and the most of the source that is here at once."""
        left, here, most = self.left, set(), 0
        for number, part in enumerate(left, 1):
            here |= part.needs
            most = max(most, self.remote.nbytes(here))
            here &= _needed(left[number:])
        return most + sum(job.nbytes for part in left for job in part.jobs)

    def write(self) -> None:
        """Writes the weights. Raises UserError where a file cannot be had; what is done by then is kept."""
        self.remote.keep(_needed(self.left))
        with writer.bar([job for part in self.left for job in part.jobs]) as progress:
            for part in self.left:
                for path in sorted(part.needs):
                    self.remote.fetch(path)
                for repeat in part.repeats:
                    repeat.check()
                names = {job.entry.name for job in part.jobs}
                for file, jobs in self.files.items():
                    if mine := [job for job in jobs if job.entry.name in names]:
                        writer.write_jobs(self.folder / file, jobs, mine, progress)
                self._add(part)
                self.remote.keep(_needed(self.left))
        writer.finish(self.files, self.folder)

    def _add(self, part: Part) -> None:
        """Takes down that a part is written, and is on the disk."""
        self.done.append(part.file.name)
        with whole(self.folder / JOURNAL) as file:
            file.write_text(json.dumps({"plan": self.plan, "done": self.done}), encoding="utf-8")

    def _read(self) -> list[str] | None:
        """What an earlier run of the same conversion took down; None where there is none that can be gone on with."""
        if not (self.folder / JOURNAL).exists():
            return [] if not any(self.folder.glob("*.safetensors")) else None
        try:
            journal = read_object(self.folder / JOURNAL)
        except UserError:
            return None
        done = journal.get("done", [])
        names = {job.entry.name for part in self.parts if part.file.name in done for job in part.jobs}
        files = [file for file, jobs in self.files.items() if any(job.entry.name in names for job in jobs)]
        if journal.get("plan") != self.plan or not all((self.folder / file).is_file() for file in files):
            return None
        return done


def tidy(folder: Path) -> None:
    """Removes what a folder that is whole has no use for."""
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder / PLACE, ignore_errors=True)


def _parts(conversion: Conversion) -> list[Part]:
    """The work, in the order of the source's files: each tensor comes with the last file that it needs."""
    order = {path: number for number, path in enumerate(conversion.remote.headers)}
    parts = {path: Part(path) for path in order}
    for job in conversion.jobs:
        needs = blocks.files_of(job.tensor)
        part = parts[max(needs, key=order.__getitem__)]
        part.needs |= needs
        part.jobs.append(job)
    for repeat in conversion.repeats:
        needs = {tensor.path for tensor in repeat.tensors.values()}
        part = parts[max(needs, key=order.__getitem__)]
        part.needs |= needs
        part.repeats.append(repeat)
    return [part for part in parts.values() if part.needs]


def _needed(parts: list[Part]) -> set[Path]:
    return set().union(*(part.needs for part in parts))


def _digest(conversion: Conversion) -> str:
    """What decides every byte that is written: a conversion goes on only where it was the same one."""
    deltas = [job.delta for job in conversion.jobs if job.delta]
    adapters = {tensor.path for delta in deltas for tensor in (delta.pair.a, delta.pair.b)}
    parts = [
        (__version__, mx.__version__, conversion.remote.repo, conversion.remote.folder.name),
        json.dumps(conversion.config, sort_keys=True),
        [(job.entry, job.dtype, job.form, job.outputs, job.delta and job.delta.scale) for job in conversion.jobs],
        sorted(map(blocks.sha256, adapters)),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _clear(folder: Path) -> None:
    """Removes what another conversion to the same place left."""
    tell(f"{folder} holds a part of another conversion, which is removed")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
