"""Plan the written tensors, then stream them: row block by row block, to offsets known before.

Rows are quantised independently of each other, so a block's result is the whole tensor's; memory
stays at a few blocks whatever the model's size.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import INDEX, SINGLE
from mlx_gemma_mtp.files.safetensors import ITEM_BYTES, header_bytes

from . import blocks
from .adapters import Delta
from .blocks import DTYPES, MLX, Source
from .names import Entry, is_integer
from .quantize import Format
from .source import CHECKSUMS

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Job:
    """One source tensor (or half of one), and (name, dtype, shape) of the arrays that it becomes.

    delta: what an adapter adds to it.
    """

    entry: Entry
    tensor: Source
    dtype: str
    form: Format | None
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    delta: Delta | None = None

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.outputs)


def plan(entry: Entry, tensor: Source, dtype: str, form: Format | None, delta: Delta | None = None) -> Job:
    """Returns what will be written for `entry`, with an adapter's `delta` added.

    Raises UserError if the stored dtype cannot become it.
    """
    readable = ("I64", "I32") if is_integer(entry.name) else tuple(DTYPES.values())
    if tensor.dtype not in readable:
        raise UserError(
            f"tensor {entry.source!r} has dtype {tensor.dtype}; expected {' or '.join(readable)};"
            " convert the original checkpoint"
        )
    outputs = parts(entry, DTYPES[dtype], form)
    return Job(entry, tensor, "I32" if is_integer(entry.name) else DTYPES[dtype], form, tuple(outputs), delta)


def parts(entry: Entry, dtype: str, form: Format | None) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns (name, dtype, shape) of what is written for `entry`. dtype: of floats, as safetensors spells it."""
    if form:
        return form.parts(entry.name, entry.shape, dtype)
    return [(entry.name, "I32" if is_integer(entry.name) else dtype, entry.shape)]


def shards(jobs: list[Job], limit: int) -> dict[str, list[Job]]:
    """Returns file name -> its jobs, in order. A file has at most `limit` bytes unless one job is larger."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if groups[-1] and size + job.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    total = len(groups)
    return {f"model-{i:05}-of-{total:05}.safetensors": group for i, group in enumerate(groups, 1)}


@dataclass(frozen=True)
class Weights:
    """The weights of a folder, from a source that is here. room: bytes of disk that they need."""

    jobs: list[Job]
    folder: Path

    @property
    def room(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    def write(self) -> None:
        """Writes all shards and the index, with a progress bar on a terminal."""
        files = shards(self.jobs, SHARD_BYTES)
        with bar(self.jobs) as progress:
            for name, jobs in files.items():
                write_jobs(self.folder / name, jobs, jobs, progress)
        finish(files, self.folder)


def bar(jobs: list[Job]) -> tqdm:
    """Returns the progress bar of some jobs, which counts the bytes of their sources."""
    return tqdm(total=sum(map(_source_bytes, jobs)), unit="B", unit_scale=True, disable=None, desc="convert")


def finish(files: dict[str, list[Job]], folder: Path) -> None:
    """Writes what tells of shards that are there: their index and their checksums."""
    weight_map = {output: name for name, jobs in files.items() for job in jobs for output, _, _ in job.outputs}
    size = sum(job.nbytes for jobs in files.values() for job in jobs)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    checksums = {name: blocks.sha256(folder / name) for name in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")


def write_jobs(path: Path, shard: list[Job], jobs: list[Job], progress: tqdm) -> None:
    """Writes some of a shard's jobs to where they belong in its file; what was written to others' places stays."""
    outputs = [output for job in shard for output in job.outputs]
    outputs.sort(key=lambda output: -ITEM_BYTES[output[1]])  # wide items first: all are aligned
    header, begins = header_bytes(outputs)
    offsets = {output[0]: begin for output, begin in zip(outputs, begins, strict=True)}
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(header)
        for job in jobs:
            row = 0
            for block in blocks.source_rows(job.entry, job.tensor):
                for (name, _, _), part in zip(job.outputs, _converted(job, block, row), strict=True):
                    data = np.asarray(part.view(mx.uint8))
                    file.seek(offsets[name] + row * data.shape[-1])
                    file.write(data)
                row += block.shape[0]
                progress.update(block.size * ITEM_BYTES[job.tensor.dtype])
        file.flush()
        os.fsync(file.fileno())  # a full disk may tell only now; and no rename overtakes the data


def _converted(job: Job, block: mx.array, row: int) -> tuple[mx.array, ...]:
    """[rows, columns] as read, which begin at `row` -> the arrays of job.outputs for these rows."""
    if is_integer(job.entry.name):
        _check_ids(job, block)
    if job.delta:
        added = job.delta.rows(row, row + block.shape[0])
        if not mx.isfinite(added).all().item():
            raise UserError(
                f"{job.delta.pair.a.path}: tensor {job.delta.pair.name!r} or its counterpart holds NaN or infinity; "
                "expected finite values; download the adapter again"
            )
        block = block.astype(mx.float32) + added
    block = block.astype(MLX[job.dtype])
    if not mx.isfinite(block).all().item():
        raise UserError(
            f"tensor {job.entry.source!r} holds NaN or infinity as {job.dtype}; expected finite"
            " values; download the weights again, or choose --dtype bfloat16"
        )
    return job.form.quantize(block) if job.form else (block,)


def _check_ids(job: Job, ids: mx.array) -> None:
    limit = job.entry.shape[0]
    if mx.min(ids).item() < 0 or mx.max(ids).item() >= limit:
        raise UserError(
            f"tensor {job.entry.source!r} holds token ids outside 0..{limit - 1}; download the weights again"
        )


def _source_bytes(job: Job) -> int:
    return math.prod(job.entry.shape) * ITEM_BYTES[job.tensor.dtype]
