"""One checkpoint folder seen whole, source or converted: what config.json calls for beside what the headers hold."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_gemma_mtp.errors import UserError

from . import names, quantize, source
from .blocks import DTYPES, Source
from .config import is_drafter, loadable, refuse_quantised, text_config
from .names import MEDIA, Entry
from .quantize import Format
from .writer import parts

MLX_PREFIX = "language_model.model."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config.json and headers were read.

    raw: config.json as it is; text: its checked text fields; entries: what a conversion holds, and from what."""

    where: str
    raw: dict
    text: dict
    entries: list[Entry]
    tensors: dict[str, Source]

    @classmethod
    def read(cls, where: str, config: dict, tensors: dict[str, Source]) -> "Checkpoint":
        """Returns the checkpoint of a config and headers.

        Raises UserError for a config.json that is not a Gemma 4 one, or that the loader would refuse.
        """
        drafter, text = is_drafter(config), text_config(config)
        loadable(config, text)
        entries = names.drafter_entries(config, text) if drafter else names.target_entries(text, config["model_type"])
        return cls(where, config, text, entries, tensors)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Returns the checkpoint of a local folder, from its headers and config.json; weights are not read.

        Raises UserError.
        """
        return cls.read(str(folder), *source.read(folder))

    def check_source(self) -> None:
        """Raises UserError unless this is a complete, unquantised Hugging Face checkpoint."""
        refuse_quantised(self.raw)
        names.check(self.entries, self.tensors, self.text, self.raw["model_type"])

    @cached_property
    def formats(self) -> dict[str, Format | None]:
        """Returns path -> format as config.json records it; "" is the default."""
        return quantize.recorded(self.raw)

    @property
    def drafter(self) -> bool:
        return is_drafter(self.raw)

    @property
    def converted(self) -> bool:
        """Returns whether the tensors have the names of the MLX layout.

        Drafters have the same names in both layouts.
        """
        return self.drafter or any(name.startswith(MLX_PREFIX) for name in self.tensors)

    def name(self, entry: Entry) -> str:
        """Returns the name of `entry` in this folder."""
        return entry.name if self.converted else entry.source

    def check_shapes(self) -> None:
        """Raises UserError unless all tensors are there in their shapes; dtypes are not asked about."""
        if not self.converted:
            self.check_source()
            return
        for entry in self.entries:
            for name, _, shape in parts(entry, "BF16", self.format(entry)):
                found = self.tensors.get(name)
                if found is None or found.shape != shape:
                    has = f"has shape {list(found.shape)}" if found else "is missing"
                    raise UserError(f"{self.where}: tensor {name!r} {has}; expected shape {list(shape)} by config.json")

    def format(self, entry: Entry) -> Format | None:
        """Returns the quantisation that config.json gives to `entry`; None for float weights without scales."""
        path, tensor = entry.name.removesuffix(".weight"), self.tensors.get(self.name(entry))
        plain = tensor is not None and tensor.dtype in DTYPES.values() and f"{path}.scales" not in self.tensors
        if plain or len(entry.shape) < 2:
            return None
        return self.formats.get(path, self.formats.get(""))

    def media(self) -> list[str]:
        """Returns the names of the vision and audio tensors, which a conversion leaves out."""
        return [name for name in self.tensors if name.startswith(MEDIA)]
