"""Plan the written tensors, then stream them: row block by row block, to offsets known before.

Rows are quantised independently of each other, so a block's result is the whole tensor's; memory
stays at a few blocks whatever the model's size.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_gemma_mtp.errors import UserError

from .names import Entry
from .quantize import Affine
from .safetensors_io import ITEM_BYTES, Tensor, header_bytes
from .source import INDEX, SINGLE

SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 64 * 2**20

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "I32": mx.int32}
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64}


@dataclass(frozen=True)
class Job:
    """One source tensor (or half of one) and the arrays it becomes: (name, dtype, shape)."""

    entry: Entry
    tensor: Tensor
    dtype: str
    affine: Affine | None
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in self.outputs)


def plan(entry: Entry, tensor: Tensor, dtype: str, affine: Affine | None) -> Job:
    """What will be written for `entry`; UserError if the stored dtype cannot become it."""
    integer = entry.name.endswith(".token_ordering")
    readable = ("I64", "I32") if integer else ("BF16", "F16", "F32")
    if tensor.dtype not in readable:
        raise UserError(
            f"tensor {entry.source!r} has dtype {tensor.dtype}; expected {' or '.join(readable)};"
            " convert the original checkpoint"
        )
    written = "I32" if integer else DTYPES[dtype]
    outputs = [(entry.name, written, entry.shape)]
    if affine:
        path = entry.name.removesuffix("weight")
        packed, groups = affine.packed_shapes(entry.shape)
        outputs = [(entry.name, "U32", packed)]
        outputs += [(path + part, written, groups) for part in ("scales", "biases")]
    return Job(entry, tensor, written, affine, tuple(outputs))


def shards(jobs: list[Job], limit: int) -> dict[str, list[Job]]:
    """file name -> its jobs, in order, each file at most `limit` bytes unless one job is larger."""
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


def write(files: dict[str, list[Job]], folder: Path) -> None:
    """Write all shards and the index into `folder`, with a progress bar on a terminal."""
    total = sum(_source_bytes(job) for jobs in files.values() for job in jobs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="convert") as progress:
        for name, jobs in files.items():
            _write_shard(folder / name, jobs, progress)
    weight_map = {output: name for name, jobs in files.items() for job in jobs for output, _, _ in job.outputs}
    size = sum(job.nbytes for jobs in files.values() for job in jobs)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, jobs: list[Job], progress: tqdm) -> None:
    outputs = [output for job in jobs for output in job.outputs]
    outputs.sort(key=lambda output: -ITEM_BYTES[output[1]])  # wide items first: all are aligned
    header, begins = header_bytes(outputs)
    offsets = {output[0]: begin for output, begin in zip(outputs, begins, strict=True)}
    with path.open("wb") as file:
        file.write(header)
        for job in jobs:
            row = 0
            for block in _blocks(job):
                for (name, _, _), part in zip(job.outputs, _converted(job, block), strict=True):
                    data = np.asarray(part.view(mx.uint8))
                    file.seek(offsets[name] + row * data.shape[-1])
                    file.write(data)
                row += block.shape[0]
                progress.update(block.size * ITEM_BYTES[job.tensor.dtype])


def _converted(job: Job, block: mx.array) -> tuple[mx.array, ...]:
    """[rows, columns] as read -> the arrays of job.outputs for these rows."""
    block = block.astype(MLX[job.dtype])
    if not mx.isfinite(block).all().item():
        raise UserError(
            f"tensor {job.entry.source!r} holds NaN or infinity as {job.dtype}; expected finite"
            " values; download the weights again, or choose --dtype bfloat16"
        )
    if job.affine is None:
        return (block,)
    return mx.quantize(block, group_size=job.affine.group_size, bits=job.affine.bits)


def _blocks(job: Job) -> Iterator[mx.array]:
    """The job's rows as [rows, columns] arrays of at most BLOCK_BYTES (at least one row)."""
    tensor, columns = job.tensor, job.entry.source_shape[-1]
    row_bytes = columns * ITEM_BYTES[tensor.dtype]
    with tensor.path.open("rb") as file:
        for start, stop in _row_ranges(job.entry):
            step = max(1, BLOCK_BYTES // row_bytes)
            for row in range(start, stop, step):
                size = (min(row + step, stop) - row) * row_bytes
                file.seek(tensor.offset + row * row_bytes)
                data = file.read(size)
                if len(data) != size:
                    raise UserError(f"{tensor.path}: ended early; expected {size} more bytes")
                yield _array(data, tensor.dtype, job).reshape(-1, columns)


def _row_ranges(entry: Entry) -> list[tuple[int, int]]:
    """Row ranges of the source seen as [all leading axes, columns]."""
    rows = math.prod(entry.source_shape[:-1])
    if entry.rows is None:
        return [(0, rows)]
    inner, (start, stop) = entry.source_shape[-2], entry.rows
    return [(first + start, first + stop) for first in range(0, rows, inner)]


def _array(data: bytes, dtype: str, job: Job) -> mx.array:
    values = np.frombuffer(data, NUMPY[dtype])
    if dtype in ("I64", "I32"):
        limit = job.entry.shape[0]
        if values.min() < 0 or values.max() >= limit:
            raise UserError(
                f"tensor {job.entry.source!r} holds token ids outside 0..{limit - 1}; download the weights again"
            )
        values = values.astype(np.int32)
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def _source_bytes(job: Job) -> int:
    return math.prod(job.entry.shape) * ITEM_BYTES[job.tensor.dtype]
