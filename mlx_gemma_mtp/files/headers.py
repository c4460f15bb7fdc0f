"""The tensors of a model folder, from the headers of its files alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .folder import INDEX, read_index, weight_files
from .safetensors import Tensor, read_header

AGAIN = "download both again; if that changes nothing, remove the index: the files themselves say what they hold"


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Returns name -> Tensor over all weight files of a folder.

    Raises UserError for broken files, and unless the index, where there is one, and the files agree exactly.
    """
    placed, found = read_index(folder), {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if placed and placed.get(name) != file.name:
                by_index = f"expected in {placed[name]} by {INDEX}" if name in placed else f"{INDEX} has no such tensor"
                raise UserError(f"{file}: tensor {name!r}; {by_index}; {AGAIN}")
            if name in found:
                raise UserError(f"{file}: tensor {name!r} is in {found[name].path.name}, too; download both again")
            found[name] = tensor
    if missing := sorted(placed.keys() - found.keys()):
        raise UserError(f"{folder / placed[missing[0]]}: no tensor {missing[0]!r}, which {INDEX} puts there; {AGAIN}")
    return found
