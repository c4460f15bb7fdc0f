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
    return joined(folder, {file: read_header(file) for file in weight_files(folder)})


def joined(folder: Path, headers: dict[Path, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns name -> Tensor over the headers of a folder's weight files, which need not lie in it.

    Raises UserError unless the index, where there is one, and the files agree exactly.
    """
    placed, found = read_index(folder), {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if placed and placed.get(name) != file.name:
                by_index = f"expected in {placed[name]} by {INDEX}" if name in placed else f"{INDEX} has no such tensor"
                raise UserError(f"{file}: tensor {name!r}; {by_index}; {AGAIN}")
            if name in found:
                raise UserError(f"{file}: tensor {name!r} is in {found[name].path.name}, too; download both again")
            found[name] = tensor
    if missing := sorted(placed.keys() - found.keys()):
        raise UserError(f"{folder / placed[missing[0]]}: no tensor {missing[0]!r}, which {INDEX} puts there; {AGAIN}")
    return found
