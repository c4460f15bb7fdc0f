"""One checkpoint folder seen whole, source or converted: what config.json calls for beside what the headers hold."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import foreign
from mlx_gemma_mtp.files.safetensors import Tensor
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.contents import MEDIA, Contents
from mlx_gemma_mtp.models.extras import Extra, check_extras
from mlx_gemma_mtp.models.quantization import FLOATS, plain

from . import names, source
from .blocks import Source
from .config import is_drafter, model_config, refuse_quantised, text_config
from .dequantize import Packed
from .names import MLX_PREFIX, Entry
from .quantize import Format


@dataclass(frozen=True)
class Repeat:
    """A tensor that must say what something else says; tensors: it, and the one that it repeats, if it is one."""

    where: str
    extra: Extra
    tensors: dict[str, Tensor]

    def check(self) -> None:
        """Raises UserError where it says something else. Reads the tensors, block by block."""
        check_extras((self.extra,), self.tensors, self.where)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config.json and headers were read.

    raw: config.json as it is; text: its text fields, complete; config: what they mean; entries: what a conversion
    holds, and from what as published; local: whether the tensors' bytes are on this machine.
    """

    where: str
    raw: dict
    text: dict
    config: TargetConfig | DrafterConfig
    entries: list[Entry]
    tensors: dict[str, Source]
    local: bool

    @classmethod
    def read(cls, where: str, raw: dict, tensors: dict[str, Source], local: bool = False) -> "Checkpoint":
        """Returns the checkpoint of a config and headers.

        Raises UserError for a config.json that is not a Gemma 4 one, or that the loader would refuse.
        """
        is_drafter(raw)
        config = model_config(raw)
        return cls(where, raw, text_config(raw), config, names.entries(config, raw["model_type"]), tensors, local)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Returns the checkpoint of a local folder, from its headers and config.json; weights are not read.

        Raises UserError.
        """
        return cls.read(str(folder), *source.read(folder), local=True)

    @cached_property
    def contents(self) -> Contents:
        """Returns what the files hold, as the loader sees it. Raises UserError for what the loader would refuse."""
        contents = Contents.of(self.config, self.tensors, self.where)
        if self.local:
            for repeat in self._repeats(contents):
                repeat.check()
        return contents

    def repeats(self) -> list[Repeat]:
        """Returns what must repeat something else. Raises UserError where one of the two is quantised."""
        return self._repeats(self.contents)

    def _repeats(self, contents: Contents) -> list[Repeat]:
        found = []
        for extra in contents.extras:
            tensors = {}
            for name in (name for name in (extra.name, extra.twin) if name in self.tensors):
                if not isinstance(tensor := self.tensors[name], Tensor):
                    raise UserError(
                        f"{self.where}: {extra.name} repeats {extra.meaning}, and one of them is quantised; expected "
                        "floats of both; convert the unquantised original"
                    )
                tensors[name] = tensor
            found.append(Repeat(self.where, extra, tensors))
        return found

    def sources(self) -> list[Entry]:
        """Returns the entries with the tensors that they are made from. Raises UserError unless this is a complete,
        unquantised checkpoint.
        """
        if self.config.quantization is None:
            refuse_quantised(self.raw)
        entries = [names.found(entry, self.contents) for entry in self.entries]
        refuse_quantised(self.raw, "use it as it is, or ")  # the loader takes it: contents would have been refused
        return entries

    def dequantized(self) -> "Checkpoint":
        """Returns the same model with MLX's quantised weights seen as the float32 values that they stand for.

        Raises UserError where there are none.
        """
        if self.config.quantization is None:
            raise UserError(f"{self.where} has no weights that MLX quantised; leave out --dequantize")
        tensors, places = dict(self.tensors), self.contents.places
        for path, form in self.contents.formats.items():
            name = places[f"{path}.weight"].name
            stored = [name, *(places[f"{path}.{part}"].name for part in ("scales", "biases")[: 1 + form.biased])]
            tensors[name] = Packed.of([self.tensors[part] for part in stored], Format(**form.setting))
            for part in stored[1:]:
                tensors.pop(part, None)  # of gate and up in one, once
        raw = {key: value for key, value in foreign.without_table(self.raw).items() if key != "quantization"}
        return Checkpoint.read(self.where, raw, tensors, self.local)

    @property
    def drafter(self) -> bool:
        return isinstance(self.config, DrafterConfig)

    @property
    def converted(self) -> bool:
        """Returns whether the tensors have the names that a conversion writes.

        Drafters have the same names in both layouts.
        """
        return self.drafter or any(name.startswith(MLX_PREFIX) for name in self.tensors)

    @cached_property
    def _plain(self) -> dict[str, Source]:
        return {plain(name): tensor for name, tensor in self.tensors.items()}

    def format(self, entry: Entry) -> Format | None:
        """Returns the quantisation that config.json gives to `entry` in a converted folder; None for float weights
        without scales.
        """
        spec, path, tensor = self.config.quantization, plain(entry.name), self.tensors.get(entry.name)
        scales = f"{path.removesuffix('weight')}scales"
        floats = tensor is not None and tensor.dtype in FLOATS and scales not in self._plain
        if spec is None or floats or len(entry.shape) < 2:
            return None
        form = spec.best(path.removesuffix(".weight"), entry.shape, self._plain)
        return Format(**form.setting) if form else None

    def media(self) -> list[str]:
        """Returns the names of the vision and audio tensors, which a conversion leaves out."""
        return [name for name in self.tensors if plain(name).startswith(MEDIA)]
