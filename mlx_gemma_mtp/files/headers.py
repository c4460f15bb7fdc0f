"""The tensors of a model folder, from the headers of its files alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .folder import INDEX, read_index, weight_files
from .safetensors import Tensor, read_header


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Returns name -> Tensor over all weight files of a folder.

    Raises UserError for broken files, and unless the index, where there is one, and the files agree exactly.
    """
    placed, found = read_index(folder), {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if placed and placed.get(name) != file.name:
                raise UserError(
                    f"{file}: tensor {name!r}; expected in {placed.get(name)} by {INDEX}; download both again"
                )
            found[name] = tensor
    if missing := sorted(placed.keys() - found.keys()):
        raise UserError(
            f"{folder / placed[missing[0]]}: no tensor {missing[0]!r}, which {INDEX} puts there; download both again"
        )
    return found
