"""What the tensors of a Gemma 4 checkpoint are called in the published files and in the written folder.

Which there are, and their shapes, is said by mlx_gemma_mtp.models.contents; the written names are mlx-lm's and
mlx-vlm's.
"""

import re
from dataclasses import dataclass, replace

from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.contents import HEADS, Contents, fused, shapes_of
from mlx_gemma_mtp.models.quantization import plain

from .config import TARGETS

Shape = tuple[int, ...]
MLX_PREFIX = "language_model.model."


@dataclass(frozen=True)
class Entry:
    """One written tensor: the rows start:stop of axis -2 of a source tensor, or all of it where they are None."""

    name: str
    shape: Shape
    source: str
    source_shape: Shape
    rows: tuple[int, int] | None = None


def entries(model: TargetConfig | DrafterConfig, kind: str) -> list[Entry]:
    """Returns the written tensors of a model of model_type `kind`, from what Google's files hold.

    A drafter's names are the same in both.
    """
    made = []
    for name, shape in shapes_of(model).items():
        if isinstance(model, DrafterConfig):
            written = name if name.startswith(HEADS) else f"model.{name}"
            made.append(Entry(written, shape, written, shape))
        else:
            source, source_shape, rows = fused(name, shape) or (name, shape, None)
            made.append(Entry(MLX_PREFIX + name, shape, TARGETS[kind] + source, source_shape, rows))
    return made


def found(entry: Entry, contents: Contents) -> Entry:
    """Returns `entry` with the source that a folder has for it, whatever it is called there."""
    place = contents.places[plain(entry.name)]
    whole = entry.source_shape if place.rows else entry.shape
    return replace(entry, source=place.name, rows=place.rows, source_shape=whole)


def kind(name: str) -> str:
    """Returns what a tensor is, whichever its layer: `self_attn.q_proj`, `input_layernorm`, `embed_tokens`."""
    name = re.sub(r"^(language_model\.)?model\.(language_model\.)?(layers\.\d+\.)?", "", name)
    return name.removesuffix(".weight")


def group(entry: Entry) -> str:
    """Returns the kind of module that holds a matrix, as people call it; vectors are one group."""
    if len(entry.shape) == 1 and not is_integer(entry.name):
        return "norms and scalars"
    return kind(entry.name).split(".")[0]


def is_integer(name: str) -> bool:
    """Returns whether a tensor is the one of token ids (a drafter's); all others are floats, or quantised."""
    return name.endswith(".token_ordering")
