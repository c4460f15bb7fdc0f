"""`check OUT [--against SOURCE]`: is a converted folder what config.json says, sound, and close to its source?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_gemma_mtp.cli.command import Parser
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import is_plain
from mlx_gemma_mtp.files.safetensors import read_object

from . import blocks, names, source
from .blocks import DTYPES, MLX
from .checkpoint import Checkpoint
from .names import Entry, is_integer
from .quantize import Format
from .writer import parts

WORST = 10


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference between a written tensor and its source."""

    name: str
    form: str
    largest: float


def check_command(argv: list[str]) -> int:
    """Runs `check`; returns the exit code: 0, or 1 where something was found."""
    parser = Parser(prog="mlx-gemma-mtp-convert check", description=__doc__)
    parser.add_argument("folder", metavar="OUT", help="a converted folder")
    parser.add_argument("--against", metavar="SOURCE", help="the folder or hub id that it was converted from")
    args = parser.parse_args(argv)
    findings, differences = check(Path(args.folder).expanduser(), args.against)
    for line in _table(differences):
        print(line)
    for finding in findings:
        print(f"finding: {finding}")
    print(f"{args.folder}: {len(findings)} findings" if findings else f"{args.folder}: sound")
    return 1 if findings else 0


def check(folder: Path, against: str | None = None) -> tuple[list[str], list[Difference]]:
    """Checks a converted folder; returns (what is wrong, a sentence each; differences to `against`, one a tensor).

    Raises UserError for what cannot be checked: no model, broken headers, a source of another model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; expected the --mlx-path of a conversion")
    model = Checkpoint.open(folder)
    if not model.converted and model.config.quantization:
        raise UserError(f"{folder} was not written by convert; expected its --mlx-path; inspect it instead")
    if not model.converted:
        raise UserError(f"{folder} has Hugging Face tensor names; expected a converted folder; convert it first")
    sources = _sources(model, against) if against else {}
    files = {tensor.path.name for tensor in model.tensors.values()}
    findings = [*_checksums(folder, files), *_extra(model)]
    differences = []
    for entry in model.entries:
        wrong = list(headers(model, entry))
        findings += wrong
        if not wrong:
            found, difference = _values(model, entry, sources.get(entry.name))
            findings += found
            differences += [difference] if difference else []
    return findings, differences


def _sources(model: Checkpoint, against: str) -> dict:
    """written name -> (source entry, source tensor); UserError unless `against` is an original of this model."""
    original = Checkpoint.open(source.find(against))
    sources = {entry.name: (entry, original.tensors[entry.source]) for entry in original.sources()}
    if {e.name: e.shape for e in model.entries} != {e.name: e.shape for e in original.entries}:
        raise UserError(f"{against} is another model than {model.where}; expected the source of the conversion")
    return sources


def _checksums(folder: Path, files: set[str]) -> Iterator[str]:
    """Findings about checksums.json, if there is one; files: the names of the weight files."""
    if not (folder / source.CHECKSUMS).is_file():
        return
    expected = read_object(folder / source.CHECKSUMS)
    for name in sorted(files - expected.keys()):
        yield f"{name} is not in {source.CHECKSUMS}"
    for name, digest in expected.items():
        if not is_plain(name) or not (folder / name).is_file():
            yield f"{source.CHECKSUMS} names {name!r}, which is not there"
        elif (found := blocks.sha256(folder / name)) != digest:
            yield f"{name} has sha256 {found}, expected {digest!r}: it was changed after the conversion"


def _extra(model: Checkpoint) -> list[str]:
    expected = {name for entry in model.entries for name, _, _ in _expected(model, entry)}
    extra = model.tensors.keys() - expected - set(model.media())
    return [f"tensor {name!r} is unknown" for name in sorted(extra)]


def _expected(model: Checkpoint, entry: Entry) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape); floats have the dtype of config.json, or else that of the tensor itself."""
    dtype = next((stored for name, stored in DTYPES.items() if name == model.raw.get("dtype")), None)
    if dtype is None:
        tensor = model.tensors.get(entry.name.removesuffix("weight") + "scales") or model.tensors.get(entry.name)
        dtype = tensor.dtype if tensor and tensor.dtype in MLX else "BF16"
    return parts(entry, dtype, model.format(entry))


def headers(model: Checkpoint, entry: Entry) -> Iterator[str]:
    """Name, dtype and shape of each part of one tensor (weight, scales, biases)."""
    for name, dtype, shape in _expected(model, entry):
        tensor = model.tensors.get(name)
        if tensor is None:
            yield f"tensor {name!r} is missing"
        elif (tensor.dtype, tensor.shape) != (dtype, shape):
            yield f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"


def _values(model: Checkpoint, entry: Entry, original: tuple | None) -> tuple[list[str], Difference | None]:
    """Streams one tensor, beside its source if there is one."""
    form, largest, found = model.format(entry), 0.0, set()
    tensors = [model.tensors[name] for name, _, _ in _expected(model, entry)]
    start, stop = 0, 0
    pieces = blocks.source_rows(*original) if original else _unpaired(entry)
    for piece in pieces:
        start, stop = stop, stop + (piece.shape[0] if original else piece)
        block = _restored([blocks.read(tensor, start, stop) for tensor in tensors], form)
        if not mx.isfinite(block).all().item():
            found.add(f"tensor {entry.name!r} holds NaN or infinity")
        elif is_integer(entry.name) and not _is_order(block):
            found.add(f"tensor {entry.name!r} is no permutation of the token ids")
        elif original:
            error = mx.abs(block - piece.astype(block.dtype))
            largest = max(largest, mx.max(error).item())
            if not _explained(error, block, piece, form, tensors[0].dtype):
                found.add(f"tensor {entry.name!r} differs from the source by more than its format explains")
    difference = Difference(entry.name, str(form or tensors[0].dtype), largest) if original else None
    return sorted(found), difference


def _unpaired(entry: Entry) -> Iterator[int]:
    """The numbers of rows to read at a time where no source gives them."""
    rows, step = blocks.row_count(entry.shape), max(1, blocks.BLOCK_BYTES // (4 * entry.shape[-1]))
    yield from (min(step, rows - row) for row in range(0, rows, step))


def _restored(arrays: list[mx.array], form: Format | None) -> mx.array:
    if form:
        return form.dequantize(*arrays)
    return arrays[0] if arrays[0].dtype == mx.int32 else arrays[0].astype(mx.float32)


def _is_order(ids: mx.array) -> bool:
    return mx.array_equal(mx.sort(ids.flatten()), mx.arange(ids.size)).item()


def _explained(error: mx.array, block: mx.array, piece: mx.array, form: Format | None, dtype: str) -> bool:
    """True if rounding to the written format explains [rows, columns] of differences."""
    if form is None:
        return mx.array_equal(block, piece.astype(MLX[dtype]).astype(block.dtype)).item()
    groups = (error.shape[0], -1, form.group_size)
    largest = mx.abs(piece.astype(mx.float32)).reshape(groups).max(axis=-1)
    return (error.reshape(groups).max(axis=-1) <= form.tolerance(largest)).all().item()


def _table(differences: list[Difference]) -> Iterator[str]:
    """A line for each kind of tensor and format, then the worst tensors."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for each in differences:
        kinds.setdefault((names.kind(each.name), each.form), []).append(each.largest)
    for (kind, form), found in kinds.items():
        yield f"{kind}: {len(found)} x {form}, largest difference {max(found):.3g}"
    worst = sorted((each for each in differences if each.largest > 0), key=lambda each: -each.largest)[:WORST]
    for each in worst:
        yield f"worst: {each.name} {each.largest:.6g}"
