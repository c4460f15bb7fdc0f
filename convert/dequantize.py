"""Quantised weights, seen as floats: MLX's own, FP8 with scales, and the integers of compressed-tensors.

A weight is (code - zero) * scale. Scales are shared by blocks of rows and columns: one for a tensor, a row, a group of
a row's columns, or a block of 128 x 128. Layouts: transformers' FineGrainedFP8 (`weight_scale_inv` is multiplied by,
whatever its name says), compressed-tensors (`weight_packed` in int32, lowest bits first, codes offset by half their
range; zero points packed along the rows).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.foreign import Plain
from mlx_gemma_mtp.files.safetensors import Tensor

from .blocks import Computed, Source, read, stored_as
from .quantize import Format

CODES = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_ENDS = ("_scale_inv", "_scale")
BESIDE = (*SCALE_ENDS, "_zero_point")
# What quantisers keep beside the weights: for activations and for K/V caches, which stay floats here.
ACTIVATIONS = re.compile(r"[._](input|output|activation|[qkv]|[kv]_cache)_(scale|zero_point|global_scale)(_inv)?$")
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Packed(Computed):
    """A matrix, or a stack of them, that MLX quantised: its codes, its scales, and in affine mode its biases."""

    form: Format

    @classmethod
    def of(cls, parts: Sequence[Tensor], form: Format) -> "Packed":
        """Returns the matrix that `parts` stand for in a format."""
        *rows, words = parts[0].shape
        return cls((*rows, words * 32 // form.bits), str(form), tuple(parts), form)

    def rows(self, start: int, stop: int) -> mx.array:
        """Returns the rows start:stop as float32."""
        return self.form.dequantize(*(read(part, start, stop) for part in self.parts))


@dataclass(frozen=True)
class Dequantized(Computed):
    """A matrix, or a stack of them, stored as codes with scales.

    codes: [..., rows, columns], or packed with `bits`; scales: [..., rows / block[0], columns / block[1]], seen as
    [all leading axes, columns]; zeros: as the scales, or packed along the rows; groups: the group of each column where
    they are not in order.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    bits: int | None = None
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def rows(self, start: int, stop: int) -> mx.array:
        """Returns the rows start:stop as float32."""
        values = self._values(start, stop)
        if self.zeros is not None:
            values = values - self._spread(self._zeros(start, stop))
        return values * self._spread(self._scale_rows(start, stop))

    def _values(self, start: int, stop: int) -> mx.array:
        """The codes as numbers: of floats their values, of packed integers the codes less half their range."""
        stored = read(self.codes, start, stop)
        if self.bits is None:
            return stored.astype(mx.float32) if self.codes.dtype == "I8" else mx.take(_table(self.codes.dtype), stored)
        codes = _unpacked(stored, self.bits)[:, : self.shape[-1]].astype(mx.float32)
        return codes if self.zeros is not None else codes - 2 ** (self.bits - 1)

    def _spread(self, shared: mx.array) -> mx.array:
        """[rows, groups] -> [rows, columns]."""
        columns = self.shape[-1]
        if self.groups is not None:
            return mx.take(shared, self._group_of_column, axis=1)
        if shared.shape[1] == 1:
            return shared
        return mx.repeat(shared, self.block[1], axis=1)[:, :columns]

    @cached_property
    def _group_of_column(self) -> mx.array:
        groups = read(replace(self.groups, shape=(1, self.shape[-1])), 0, 1)[0]
        if mx.min(groups).item() < 0 or mx.max(groups).item() >= self.scales.shape[-1]:
            raise UserError(
                f"{self.groups.path}: a g_idx of {self.shape[-1]} columns names groups outside"
                f" 0..{self.scales.shape[-1] - 1}; download the weights again"
            )
        return groups

    def _shared_rows(self, start: int, stop: int) -> np.ndarray:
        """The row of the scales that each of the rows start:stop has."""
        high = self.shape[-2]
        plane, row = np.divmod(np.arange(start, stop), high)
        return plane * math.ceil(high / self.block[0]) + row // self.block[0]

    def _scale_rows(self, start: int, stop: int) -> mx.array:
        stored = _picked(self.scales, self._shared_rows(start, stop))
        if self.scales.dtype == "F8_E8M0":
            return mx.power(mx.array(2.0), stored.astype(mx.float32) - 127)
        return stored.astype(mx.float32)

    def _zeros(self, start: int, stop: int) -> mx.array:
        if self.bits is None:
            return _picked(self.zeros, self._shared_rows(start, stop)).astype(mx.float32)
        plane, row = np.divmod(np.arange(start, stop), self.shape[-2])
        each = 32 // self.bits
        words = _picked(self.zeros, plane * math.ceil(self.shape[-2] / each) + row // each).view(mx.uint32)
        shifts = mx.array(row % each * self.bits, mx.uint32)[:, None]
        return ((words >> shifts) & (2**self.bits - 1)).astype(mx.float32)


@dataclass(frozen=True)
class Stacked(Computed):
    """Matrices one above the other, seen as one tensor: the experts of a layer, stored one by one."""

    def rows(self, start: int, stop: int) -> mx.array:
        """Returns the rows start:stop as float32."""
        found, first = [], 0
        for part in self.parts:
            end = first + part.shape[0]
            if first < stop and start < end:
                found.append(read(part, max(start - first, 0), min(stop, end) - first).astype(mx.float32))
            first = end
        return mx.concatenate(found)


def floats(plain: Plain, tensors: dict[str, Tensor], local: bool) -> dict[str, Source]:
    """Returns the tensors of a quantised checkpoint by the names that they would have as floats.

    local: whether values can be read, beside the headers. Raises UserError, naming the tensor, for codes without
    scales, and for shapes that do not fit.
    """
    made: dict[str, Source] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith(".weight_packed") and plain.bits:
            path = name.removesuffix("_packed")
            made[path] = _packed(plain, path, tensors, local)
            used |= {path + end for end in ("_packed", "_shape", "_g_idx", *BESIDE)}
        elif tensor.dtype in CODES and not name.endswith(BESIDE) and not ACTIVATIONS.search(name):
            made[name] = _coded(plain, name, tensors)
            used |= {name} | {name + end for end in BESIDE}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used and not ACTIVATIONS.search(name)}
    return stacked(rest | made)


def stacked(tensors: dict[str, Source]) -> dict[str, Source]:
    """Returns the tensors with the experts of a layer, where they are stored one by one, as the two that Google has."""
    layers: dict[str, dict[tuple[str, int], str]] = {}
    for name in tensors:
        if found := EXPERT.fullmatch(name):
            layers.setdefault(found["experts"], {})[found["part"], int(found["index"])] = name
    rest = dict(tensors)
    for experts, names in layers.items():
        count = 1 + max(index for _, index in names)
        for whole, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            ordered = [names.get((part, index)) for index in range(count) for part in parts]
            matrices = [tensors[name] for name in ordered if name]
            if len(matrices) < len(ordered) or len({each.shape for each in matrices}) > 1:
                continue  # what is missing is told by its name in the original
            rest[f"{experts}.{whole}"] = _stack(matrices, count)
            for name in ordered:
                rest.pop(name)
    return rest


def _stack(matrices: list[Source], count: int) -> Stacked:
    rows, columns = matrices[0].shape
    shape = (count, rows * len(matrices) // count, columns)
    return Stacked(shape, stored_as(matrices[0]), tuple(matrices))


def _packed(plain: Plain, path: str, tensors: dict[str, Tensor], local: bool) -> Dequantized:
    """The matrix `path` from its parts, packed in int32."""
    codes, scales = tensors[f"{path}_packed"], _scales(path, tensors)
    if codes.dtype != "I32" or len(codes.shape) < 2:
        raise _wrong(f"{path}_packed", codes, "int32 of two axes")
    bits, columns = _width(plain, path, tensors, local)
    shape = (*codes.shape[:-1], columns)
    scales, block = _viewed(path, scales, shape, plain.block)
    if zeros := tensors.get(f"{path}_zero_point"):
        high = math.ceil(shape[-2] * bits / 32)
        expected = (*shape[:-2], high, scales.shape[-1])
        if zeros.shape != expected or zeros.dtype != "I32" or block[0] != 1:
            raise _wrong(f"{path}_zero_point", zeros, f"int32 of shape {list(expected)}")
    groups = tensors.get(f"{path}_g_idx")
    if groups and (groups.shape != (columns,) or groups.dtype != "I32"):
        raise _wrong(f"{path}_g_idx", groups, f"int32 of shape {[columns]}")
    parts = tuple(part for part in (codes, scales, zeros, groups) if part)
    stored = f"{bits}-bit integers, {_blocks(block, shape)}"
    return Dequantized(shape, stored, parts, codes, scales, block, bits, zeros, groups)


def _coded(plain: Plain, name: str, tensors: dict[str, Tensor]) -> Dequantized:
    """The matrix `name`, one code a weight."""
    codes, scales = tensors[name], _scales(name, tensors)
    if len(codes.shape) < 2:
        raise _wrong(name, codes, "a matrix")
    scales, block = _viewed(name, scales, codes.shape, plain.block)
    if zeros := tensors.get(f"{name}_zero_point"):
        if zeros.dtype != "I8" or zeros.shape not in (scales.shape, tensors[f"{name}_scale"].shape):
            raise _wrong(f"{name}_zero_point", zeros, f"int8 of the shape of {name}_scale")
        zeros = replace(zeros, shape=scales.shape)
    parts = tuple(part for part in (codes, scales, zeros) if part)
    stored = f"{codes.dtype}, {_blocks(block, codes.shape)}"
    return Dequantized(codes.shape, stored, parts, codes, scales, block, zeros=zeros)


def _scales(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The scales beside a matrix. Raises UserError where there are none."""
    for end in SCALE_ENDS:
        if found := tensors.get(name + end):
            if found.dtype not in SCALES:
                raise _wrong(name + end, found, " or ".join(SCALES))
            return found
    raise UserError(
        f"tensor {name!r} is quantised, but there is no {name + SCALE_ENDS[-1]!r}; expected its scales; download the"
        " weights again"
    )


def _viewed(
    name: str, scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Scales as [all leading axes, groups], and the rows and columns that share one. Raises UserError."""
    *planes, high, wide = shape
    count = math.prod(planes)
    if scales.shape in ((), (count,), (count, 1), (count, 1, 1)) and math.prod(scales.shape) == count:
        grid = (1, 1)
    elif scales.shape == (*planes, high):
        grid = (high, 1)
    else:
        grid = scales.shape[-2:] if scales.shape[:-2] == tuple(planes) else ()
    shared = len(grid) == 2 and (_share(high, grid[0], block[0]), _share(wide, grid[1], block[1]))
    if not shared or None in shared:
        raise _wrong(
            name, scales, f"one scale for a tensor, a row, a group of columns or a block of {block[0]} x {block[1]}"
            f" of {list(shape)}",
        )  # fmt: skip
    return replace(scales, shape=(count * grid[0], grid[1])), shared


def _share(size: int, parts: int, block: int) -> int | None:
    """How many rows or columns share a scale; None where that cannot be."""
    if parts == math.ceil(size / block) and parts > 1:
        return block
    return size // parts if parts and size % parts == 0 else None


def _width(plain: Plain, path: str, tensors: dict[str, Tensor], local: bool) -> tuple[int, int]:
    """(bits, columns) of a packed matrix: by its `weight_shape`, or by its scales where values cannot be read."""
    codes, told = tensors[f"{path}_packed"], tensors.get(f"{path}_shape")
    words = codes.shape[-1]
    if told and local:
        if len(told.shape) != 1 or told.dtype not in ("I64", "I32") or not told.shape[0]:
            raise _wrong(f"{path}_shape", told, "the sizes of the matrix")
        *rows, columns = (int(size) for size in np.array(read(replace(told, shape=(1, *told.shape)), 0, 1)[0]))
        for bits in plain.bits:
            if tuple(rows) == codes.shape[:-1] and columns > 0 and math.ceil(columns * bits / 32) == words:
                return bits, columns
        raise UserError(
            f"tensor '{path}_packed' has shape {list(codes.shape)}; expected {[*rows, columns]} by"
            f" '{path}_shape', packed with {' or '.join(map(str, plain.bits))} bits; download the weights again"
        )
    groups = _scales(path, tensors).shape[-1:] or (1,)
    for bits in plain.bits:
        columns = words * 32 // bits
        if groups[0] == 1 or (columns % groups[0] == 0 and columns // groups[0] in plain.group_sizes):
            return bits, columns
    raise _wrong(f"{path}_packed", codes, f"words of {' or '.join(map(str, plain.bits))} bits")


def _unpacked(words: mx.array, bits: int) -> mx.array:
    """[rows, words] of int32 -> [rows, codes], lowest bits first."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    codes = (words.view(mx.uint32)[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(words.shape[0], -1)


def _picked(tensor: Tensor, rows: np.ndarray) -> mx.array:
    """The rows of a small tensor, by ascending index."""
    first = int(rows[0])
    return mx.take(read(tensor, first, int(rows[-1]) + 1), mx.array(rows - first), axis=0)


def _table(dtype: str) -> mx.array:
    """The values of all 256 codes of an FP8 type."""
    exponent_bits, fraction_bits, bias = (4, 3, 7) if dtype == "F8_E4M3" else (5, 2, 15)
    codes = np.arange(256)
    exponent, fraction = codes >> fraction_bits & 2**exponent_bits - 1, codes & 2**fraction_bits - 1
    part = fraction / 2**fraction_bits
    size = np.where(exponent == 0, part * 2.0 ** (1 - bias), (1 + part) * 2.0 ** (exponent - bias))
    if dtype == "F8_E4M3":  # without infinities
        size[codes & 127 == 127] = np.nan
    else:
        size[exponent == 31] = np.nan
    return mx.array(np.where(codes > 127, -size, size).astype(np.float32))


def _blocks(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    """What shares a scale, as people call it."""
    high, wide = block[0] >= shape[-2], block[1] >= shape[-1]
    if high and wide:
        return "one scale"
    if wide and block[0] == 1:
        return "a scale a row"
    return f"groups of {block[1]}" if block[0] == 1 else f"blocks of {block[0]} x {block[1]}"


def _wrong(name: str, tensor: Tensor, expected: str) -> UserError:
    return UserError(
        f"tensor {name!r} is {tensor.dtype} of shape {list(tensor.shape)}; expected {expected}; download the weights"
        " again"
    )
