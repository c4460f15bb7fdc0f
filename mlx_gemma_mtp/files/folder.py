"""A model folder: which of its files count, and whether they are what they should be."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import files, foreign
from .files import content
from .safetensors import INDEX, PICKLES, SINGLE, read_header, read_object

TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
NUMBERED = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
SAMPLE = 64  # bytes of a tensor, twice
LARGE = 4_000_000  # bytes of JSON that take a tenth of a second to parse; Gemma's tokenizer has 33 million


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a folder's weights, as `weight_names` has them.

    Raises UserError for a file that is not there, or that an index places elsewhere.
    """
    names = weight_names(folder)
    for name in names:
        if is_plain(name) and os.path.lexists(folder / name) and (other := files.no_file(folder / name)):
            raise UserError(
                f"{folder} has no weight file {name!r}: it {other}; expected a file: download the folder again"
            )
        if not is_plain(name) or not (folder / name).is_file():
            raise UserError(
                f"{folder} has no weight file {name!r}{_others(folder, names)}; expected a plain NAME.safetensors "
                f"beside config.json: download the folder again{_without_index(folder, names)}"
            )
    return [folder / name for name in names]


def weight_names(folder: Path) -> list[str]:
    """Returns the names of the files that hold a folder's weights: those of its index, or model.safetensors, or what
    counts itself (model-00001-of-00002.safetensors).

    Whatever else lies there (hidden files, adapters, consolidated.safetensors, folders) is no weight of the model.
    Raises UserError for a broken index.
    """
    if names := sorted(set(read_index(folder).values())):
        return names
    return [SINGLE] if os.path.lexists(folder / SINGLE) else _numbered(folder) or [SINGLE]


def _numbered(folder: Path) -> list[str]:
    """All names of the one set of files that is numbered; [] where there is none, or more than one."""
    try:
        found = [match for path in folder.iterdir() if (match := NUMBERED.fullmatch(path.name))]
    except OSError:
        return []
    counts = {match["count"] for match in found}
    if len(counts) != 1:
        return []
    (count,) = counts
    return [f"model-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]


def read_index(folder: Path) -> dict[str, str]:
    """Returns tensor name -> file name from a folder's index, {} where there is none.

    Raises UserError for a broken index.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        return {}
    placed = read_object(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise UserError(f"{path} has no 'weight_map' of tensor names to file names; download the folder again")
    return placed


def is_plain(name: str) -> bool:
    """Returns whether `name` is that of a safetensors file in the same folder: no path, nothing hidden."""
    return os.path.basename(name) == name and name.endswith(".safetensors") and name[0] != "." and name.isprintable()


def _without_index(folder: Path, names: list[str]) -> str:
    """What else helps where an index is of other files than those that are there."""
    return f", or remove {INDEX} if {SINGLE} is whole" if names != [SINGLE] and (folder / SINGLE).is_file() else ""


def _others(folder: Path, named: list[str]) -> str:
    """Names what may have been taken for the weights: pickles (loading one runs the code in it), other tensors."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return ""
    if found := [name for name in names if name.endswith(PICKLES)]:
        return f", but {', '.join(found)}: pickles are never loaded"
    found = [name for name in names if name.endswith(".safetensors") and name not in named]
    return f", but {', '.join(found)}, which nothing names" if found else ""


def weight_bytes(folder: Path, widened: bool = False) -> int:
    """Returns the bytes of a folder's tensors.

    widened: counts 16-bit floats, also scales and biases of quantised weights, as float32.
    """
    tensors = [tensor for file in weight_files(folder) for tensor in read_header(file).values()]
    return sum(t.nbytes * (2 if widened and t.dtype in ("BF16", "F16") else 1) for t in tensors)


def fingerprint(folder: Path) -> str:
    """Returns a SHA-256 of a model folder: of its config, of what its weight files hold where, and of some bytes of
    every tensor, so that it takes milliseconds. Raises UserError.
    """
    digest = sha256(content(folder / "config.json"))
    for file in weight_files(folder):
        header = read_header(file)
        digest.update(repr((file.name, [replace(tensor, path=name) for name, tensor in header.items()])).encode())
        with file.open("rb") as opened:
            for tensor in header.values():
                for place in (tensor.offset, tensor.offset + tensor.nbytes // 2):
                    opened.seek(place)
                    digest.update(opened.read(min(SAMPLE, tensor.offset + tensor.nbytes - place)))
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of a model folder.

    Raises UserError where there is none, or none that can be read, and for weights in another program's format.
    """
    config, found = config_and_format(folder)
    if found:
        raise found.refusal(folder)
    if config is None:
        raise UserError(
            f"{folder} is no model folder: it has no config.json; expected a converted Gemma 4 folder "
            f"({foreign.convert_command('SOURCE', 'OUT')})"
        )
    return config


def config_and_format(folder: Path) -> tuple[dict[str, Any] | None, foreign.Foreign | None]:
    """Returns (config.json of a folder, None where there is none; another program's format of its weights).

    A table of another program beside what MLX wrote in floats is left out of the config. Raises UserError for a
    config.json that cannot be read, and where other files tell that the folder holds no safetensors.
    """
    path = folder / "config.json"
    config = read_object(path) if os.path.lexists(path) else None
    if not any(os.path.lexists(folder / name) for name in (INDEX, SINGLE)):
        foreign.check_files(folder)
    found = foreign.of_folder(folder, config)
    if found and config and _is_converted(folder):
        return foreign.without_table(config), None
    return config, found


def _is_converted(folder: Path) -> bool:
    """Whether the headers show MLX's floats; broken ones are told of by whoever reads them next."""
    try:
        headers = [read_header(file) for file in weight_files(folder)]
    except UserError:
        return False
    return foreign.are_mlx_floats({name: tensor for header in headers for name, tensor in header.items()})


def check_text_files(folder: Path) -> None:
    """Raises UserError for a tokenizer or a chat template that is missing, broken or not downloaded.

    It takes milliseconds, so it comes before any weight is read.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        raise UserError(
            f"{folder} has no tokenizer.json; expected it beside config.json: download or convert the folder again"
        )
    if path.is_file() and path.stat().st_size > LARGE:
        _check_ends(path)
    else:
        model = read_object(path).get("model")
        if not isinstance(model, dict) or not model.get("vocab"):
            raise UserError(f"{path} has no 'model' with a 'vocab'; expected a tokenizer; download it again")
    for name in TOKENIZER_EXTRAS:
        if os.path.lexists(folder / name):
            read_object(folder / name)
    template = folder / "chat_template.jinja"
    if os.path.lexists(template):
        files.text(template)


def _check_ends(path: Path) -> None:
    """Of a JSON object that takes long to parse: it begins as one, ends as one, and names a vocabulary."""
    data = files.content(path).strip()
    if not (data.startswith(b"{") and data.endswith(b"}") and b'"vocab"' in data):
        raise UserError(f"{path} cannot be read as JSON (it is cut off); expected a tokenizer; download it again")
