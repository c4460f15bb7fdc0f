"""Tensors as row blocks: read at known offsets, so that memory stays at a few blocks whatever the model's size."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.safetensors import Tensor

from .names import Entry

BLOCK_BYTES = 16 * 2**20  # MLX needs up to 35 times as much to quantise one (nvfp4 on a CPU)

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "I32": mx.int32}
NUMPY = {  # FP8 is read as its codes
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "I32": np.int32, "I64": np.int64,
    "U32": np.uint32, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Computed(ABC):
    """A tensor of float32 that is computed from stored ones, rows at a time.

    stored: what these are, as people call it; parts: they themselves, or what is computed from them.
    """

    shape: tuple[int, ...]
    stored: str
    parts: "tuple[Source, ...]"

    @property
    def nbytes(self) -> int:
        """Returns the bytes of what is stored."""
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> str:
        return "F32"

    @abstractmethod
    def rows(self, start: int, stop: int) -> mx.array:
        """Returns the rows start:stop of the tensor seen as [all leading axes, columns], in float32."""


Source = Tensor | Computed


def stored_as(tensor: Source) -> str:
    """Returns how a tensor's values are stored: a dtype of safetensors, or codes with scales."""
    return tensor.stored if isinstance(tensor, Computed) else tensor.dtype


def files_of(tensor: Source) -> set[Path]:
    """Returns the files that hold what a tensor is made from."""
    if isinstance(tensor, Computed):
        return set().union(*map(files_of, tensor.parts))
    return {tensor.path}


def source_rows(entry: Entry, tensor: Source) -> Iterator[mx.array]:
    """Yields the rows of a source tensor that belong to `entry`, as [rows, columns] blocks of at most BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // row_bytes(tensor))
    for first, last in row_ranges(entry):
        for start in range(first, last, step):
            yield read(tensor, start, min(start + step, last))


def row_ranges(entry: Entry) -> list[tuple[int, int]]:
    """Returns the row ranges of `entry` in the source seen as [all leading axes, columns]."""
    rows = row_count(entry.source_shape)
    if entry.rows is None:
        return [(0, rows)]
    inner, (start, stop) = entry.source_shape[-2], entry.rows
    return [(first + start, first + stop) for first in range(0, rows, inner)]


def row_count(shape: tuple[int, ...]) -> int:
    """Returns the number of rows of a tensor seen as [all leading axes, columns]."""
    return int(np.prod(shape[:-1], dtype=np.int64))


def row_bytes(tensor: Source) -> int:
    """Returns the bytes of a row in memory."""
    return tensor.shape[-1] * 4 if isinstance(tensor, Computed) else tensor.nbytes // row_count(tensor.shape)


def read(tensor: Source, start: int, stop: int) -> mx.array:
    """Returns the rows start:stop of a tensor seen as [all leading axes, columns], in its own dtype.

    Token ids are int64.
    """
    if isinstance(tensor, Computed):
        return tensor.rows(start, stop)
    size = row_bytes(tensor)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + start * size)
        data = file.read((stop - start) * size)
    if len(data) != (stop - start) * size:
        raise UserError(f"{tensor.path}: ended early; expected {(stop - start) * size} bytes; download it again")
    array = mx.array(np.frombuffer(data, NUMPY[tensor.dtype]))
    array = array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
    return array.reshape(-1, tensor.shape[-1])


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file, in hexadecimal. The file is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
