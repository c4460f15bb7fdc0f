"""Safetensors: which files hold a folder's weights; headers, read strictly and written first, so that tensors stream.

Format: https://github.com/huggingface/safetensors#format: 8 bytes header length (little endian),
a JSON object name -> {dtype, shape, data_offsets}, then the bytes, without holes or overlaps.
"""

import json
import math
import struct
from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .files import HEAD, content, instead

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `offset` counts from the start of the file, in bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns name -> Tensor of one file. Raises UserError if any byte of the file would be unaccounted for."""
    try:
        size, raw = _read_header(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    return tensors_of(path, raw, size)


def header_of(path: Path, data: memoryview) -> dict[str, Tensor]:
    """Returns what `read_header` does, of a file's bytes. path: where they are from."""
    length = header_length(path, bytes(data[:8]), len(data))
    return tensors_of(path, bytes(data[8 : 8 + length]), len(data))


def header_length(path: Path, head: bytes, size: int) -> int:
    """Returns the bytes of a file's header, which follows the first 8. head: how the file begins; size: its bytes.

    Raises UserError where that cannot be.
    """
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise _broken(path, f"header length {length} in a file of {size} bytes")
    return length


def tensors_of(path: Path, raw: bytes, size: int) -> dict[str, Tensor]:
    """Returns name -> Tensor of a file of `size` bytes by its header.

    Raises UserError if any byte of the file would be unaccounted for.
    """
    length = len(raw)
    try:
        header = parse_object(raw)
    except ValueError as error:
        raise _broken(path, f"header is no JSON object ({error})") from error
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ does not map names to texts")
    tensors = {n: _tensor(path, n, entry, 8 + length) for n, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _read_header(path: Path) -> tuple[int, bytes]:
    """(how many bytes the file has, those of its header)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
        if other := instead(head):
            raise UserError(f"{path} {other}")
        length = header_length(path, head, size)
        file.seek(8)
        return size, file.read(length)


def read_object(path: Path) -> dict:
    """Returns the JSON object in a file of a model folder, which may begin with a byte order mark, as some editors
    write. Raises UserError, with the fix, for anything else.
    """
    data = content(path).removeprefix(BOM_UTF8)  # outside of the try: a UserError is a ValueError
    try:
        return parse_object(data)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); expected a JSON object; download it again") from None


def parse_object(raw: bytes) -> dict:
    """Returns a JSON object in UTF-8.

    Raises ValueError for anything else, for keys that occur twice, for NaN and Infinity.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"this is a {type(value).__name__}")
    return value


def header_bytes(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Returns (the header of a file that holds tensors in this order, the offset of each in the file, in bytes).

    tensors: (name, dtype, shape) of each.
    """
    header: dict = {"__metadata__": {"format": "mlx"}}
    end, begins = 0, []
    for name, dtype, shape in tensors:
        begins.append(end)
        end += math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[-1], end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts aligned
    prefix = struct.pack("<Q", len(raw)) + raw
    return prefix, [len(prefix) + begin for begin in begins]


def _tensor(path: Path, name: str, entry: object, start: int) -> Tensor:
    """One header entry, checked: known dtype, whole sizes, offsets that fit dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"entry {name!r} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has shape {shape!r}, data_offsets {offsets!r}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _broken(path, f"tensor {name!r}: {dtype} {shape} needs {nbytes} bytes, not {offsets}")
    return Tensor(path, dtype, tuple(shape), start + offsets[0], nbytes)


def _check_layout(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    """The tensors must tile the rest of the file: no hole, no overlap, no missing tail."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise _broken(path, f"tensor {name!r} starts at byte {tensor.offset}, not {end}")
        end += tensor.nbytes
    if end != size:
        raise _broken(path, f"header describes {end} bytes, the file has {size}")


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is no finite number")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; expected a complete safetensors file; download it again")
