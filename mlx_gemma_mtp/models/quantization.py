"""MLX's formats of quantised weights, and which of them config.json gives to which module.

What config.json leaves open is decided by the shapes of what is stored: for a known number of inputs no two formats
of MLX have the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, shown
from ..files import foreign
from ..files.safetensors import Tensor
from .raw_config import Reader

# MLX's quantisation modes: group sizes and bits.
MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
USUAL = {
    "affine": (64, 4),
    **{mode: (groups[0], bits[0]) for mode, (groups, bits) in MODES.items() if mode != "affine"},
}
KEYS = {"group_size", "bits", "mode"}
FLOATS = ("BF16", "F16", "F32")
ROOTS = re.compile(r"^(?:(?:model|language_model|text_model|base_model|module|_orig_mod)\.)+")  # also of wrappers
# What may be quantised, under its name without the text model's prefix: also what some layers of some models lack.
MATRIX = re.compile(
    r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|router\.proj"
    r"|experts\.switch_glu\.(gate|up|down)_proj|per_layer_input_gate|per_layer_projection)"
    r"|embed_tokens|embed_tokens_per_layer|per_layer_model_projection|lm_head"
    r"|pre_projection|post_projection|masked_embedding\.centroids"
)
MEDIA = re.compile(r"vision|audio|multi_modal|image|video")


def plain(name: str) -> str:
    """Returns the name of a tensor or a module without the text model's prefix, which each writer spells his way:
    `model.language_model.layers.0` and `language_model.model.layers.0` are both `layers.0`.
    """
    return ROOTS.sub("", name)


@dataclass(frozen=True)
class Format:
    """MLX quantisation: `group_size` weights of a row share one scale (and, in affine mode, one bias)."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"

    @property
    def setting(self) -> dict[str, Any]:
        """Returns the keyword arguments of mx.quantize and mx.dequantize."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def biased(self) -> bool:
        return self.mode == "affine"

    def parts(self, name: str, shape: tuple[int, ...], dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Returns (name, dtype, shape) of each array that stands for the matrix `name` whose floats are `dtype`."""
        *rows, columns = shape
        path, groups = name.removesuffix("weight"), (*rows, columns // self.group_size)
        weight = (name, "U32", (*rows, columns * self.bits // 32))
        if not self.biased:
            return [weight, (path + "scales", "U8", groups)]
        return [weight, (path + "scales", dtype, groups), (path + "biases", dtype, groups)]

    def fits(self, name: str, shape: tuple[int, ...], found: Mapping[str, Tensor]) -> bool:
        """Returns whether the matrix `name` of this shape is stored in this format. found: tensors by plain names."""
        if shape[-1] % self.group_size or self.biased != (f"{name.removesuffix('weight')}biases" in found):
            return False
        return all(
            part in found
            and found[part].shape == its
            and (found[part].dtype in FLOATS if dtype in FLOATS else found[part].dtype == dtype)
            for part, dtype, its in self.parts(name, shape, FLOATS[0])
        )


@dataclass(frozen=True)
class Override:
    """What config.json says of one module. key: the module as config.json spells it; formats: those that its words may
    mean, the likeliest first; none where the module is left in float.
    """

    key: str
    formats: tuple[Format, ...]


@dataclass(frozen=True)
class QuantizationSpec:
    """MLX quantisation of a checkpoint: the default, and overrides by plain module path."""

    default: Format
    overrides: dict[str, Override]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> QuantizationSpec | None:
        """Reads the table in config.json; None where nothing is quantised.

        The table stands under `quantization`, under `quantization_config`, or under both, of which the first counts. A
        table of another library is none. Raises UserError for what MLX does not know, and for two spellings of a module
        that say different things.
        """
        key = next((key for key in ("quantization", "quantization_config") if raw.get(key) not in (None, {})), None)
        if key is None or (key == "quantization_config" and not foreign.is_mlx(raw[key])):
            return None
        table = Reader(raw[key], f"config.json, {key}")
        for size in ("group_size", "bits"):
            table.int(size)
        default, *_ = _formats(table, None)
        overrides: dict[str, Override] = {}
        for name, value in table.raw.items():
            setting = value.keys() & KEYS if isinstance(value, dict) else ()
            if setting:
                override = Override(name, _formats(Reader(value, f"{table.where}: {name!r}"), default))
            elif value is False:
                override = Override(name, ())
            else:
                continue
            known = overrides.setdefault(plain(name).removesuffix(".weight"), override)
            if known.formats != override.formats:
                raise UserError(
                    f"{table.where}: {known.key!r} and {name!r} are one module but differ; expected one of the two; "
                    "correct the JSON file"
                )
        return cls(default, overrides)

    def best(self, path: str, shape: tuple[int, ...], found: Mapping[str, Tensor]) -> Format | None:
        """Returns the format that config.json gives to the matrix of this shape at a plain path: the one that fits what
        is stored, the likeliest where none does, None where the matrix is left in float.

        found: the tensors by plain names.
        """
        override = self.overrides.get(path)
        formats = (self.default,) if override is None else override.formats
        fitting = (form for form in formats if form.fits(f"{path}.weight", shape, found))
        return next(fitting, next(iter(formats), None))

    def of(self, path: str, shape: tuple[int, ...], found: Mapping[str, Tensor], stored: str, where: str) -> Format:
        """Returns the format in which the matrix at a plain path is stored.

        stored: the module's name in the files; the others as `best` takes them. Raises UserError where config.json's
        words do not fit what is stored.
        """
        form, override = self.best(path, shape, found), self.overrides.get(path)
        if form is None:
            raise UserError(
                f"{where}: {stored} is quantised but config.json's 'quantization' has false for it; correct the file"
            )
        if not form.fits(f"{path}.weight", shape, found):
            said = f"by its {override.key!r}" if override else "by its default"
            raise UserError(f"{where}: {_misfit(form, path, shape, found, stored)} {said}; convert the original again")
        return form

    def check_keys(self, layers: int, where: str) -> None:
        """Raises UserError for an override that names no module of a model with so many layers. Those of towers for
        images and sound, which are not read, are passed over; so is `false`.
        """
        for path, override in self.overrides.items():
            layer = re.match(r"layers\.(\d+)\.", path)
            known = MATRIX.fullmatch(path) and (layer is None or int(layer[1]) < layers)
            if override.formats and not known and not MEDIA.search(path):
                raise UserError(
                    f"{where}: config.json's 'quantization' has {shown(override.key)}, which is no module of this "
                    "model; expected names such as 'language_model.model.layers.0.mlp.gate_proj'; correct the file"
                )


def _formats(reader: Reader, default: Format | None) -> tuple[Format, ...]:
    """The formats of MLX that a setting may mean. What it leaves out is the default's, or else what MLX takes.

    An override without a mode is affine, as mlx-lm takes it, or of the default's mode, as others do.
    """
    given = {key: value for key, value in reader.raw.items() if value is not None}
    if "mode" in given and (not isinstance(given["mode"], str) or given["mode"] not in MODES):
        raise UserError(
            f"{reader.where}: mode is {shown(given['mode'])}, expected one of {', '.join(MODES)}; convert the original "
            "again"
        )
    for size in {"group_size", "bits"} & given.keys():
        Reader(given, reader.where).int(size)
    modes = [given["mode"]] if "mode" in given else ["affine", *([default.mode] if default else [])]
    found: list[Format] = []
    for mode in modes:
        group, bits = USUAL[mode]
        groups = [given["group_size"]] if "group_size" in given else [default.group_size, group]
        widths = [given["bits"]] if "bits" in given else [default.bits, bits]
        found += [Format(b, g, mode) for g in groups for b in widths if g in MODES[mode][0] and b in MODES[mode][1]]
    if not found:
        said = " and ".join(f"{key} {shown(value)}" for key, value in given.items() if key in KEYS - {"mode"})
        raise UserError(
            f"{reader.where}: {said}, mode {modes[0]}, is no format of MLX; expected bits and groups of "
            f"{', '.join(MODES)}; convert the original again"
        )
    return tuple(dict.fromkeys(found))


def _misfit(form: Format, path: str, shape: tuple[int, ...], found: Mapping[str, Tensor], stored: str) -> str:
    """What of a stored matrix does not fit a format, as a sentence that ends with config.json's table."""
    table = "config.json's 'quantization'"
    if shape[-1] % form.group_size:
        return f"{stored} has rows of {shape[-1]}, but groups of {form.group_size} in {table}"
    if not form.biased and f"{path}.biases" in found:
        return f"{stored} has biases, but is {form}, which has none, in {table}"
    for name, dtype, its in form.parts(f"{path}.weight", shape, FLOATS[0]):
        part = f"{stored}{name.removeprefix(path)}"
        if name not in found:
            return f"{part} is missing, but {form} has it, as in {table}"
        if found[name].shape != its:
            return f"{part} has shape {found[name].shape}, expected {its}, {form}, in {table}"
        if found[name].dtype != dtype and not (dtype in FLOATS and found[name].dtype in FLOATS):
            return f"{part} is of {found[name].dtype}, expected {dtype}, {form}, in {table}"
    raise AssertionError(f"{path} fits {form}")
