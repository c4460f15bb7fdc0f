"""Find a source checkpoint (local folder or hub id) and list its tensors."""

import json
import re
from pathlib import Path

from mlx_gemma_mtp.errors import UserError

from .safetensors_io import Tensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "checksums.json"  # shard name -> sha256, in a folder that convert wrote
SHARD = r"\w[\w.-]*\.safetensors"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(source: str) -> Path:
    """The local folder of SOURCE: a folder as it is, an `org/name` downloaded by the hub client."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(source):
        raise UserError(
            f"{source}: not a folder; expected a checkpoint folder or a hub id such as google/gemma-4-26B-A4B-it"
        )
    return download(source)


def download(repo: str) -> Path:
    """Fetch only what a conversion reads; UserError with the hub client's own first line."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except Exception as error:  # the client's errors have no common base; all mean "no files"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{repo}: not a local folder, and the hub download failed ({reason}); expected a folder"
            " or a reachable hub id; check the name and the connection"
        ) from error


def remote(repo: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the tensors' headers of a hub repository; weight data stays there."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download

    try:
        config = Path(hf_hub_download(repo, "config.json"))
        files = get_safetensors_metadata(repo).files_metadata
    except Exception as error:  # as in download
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{repo}: not a local folder, and the hub cannot be asked ({reason}); check the name"
        ) from error
    return read_json(config), {
        name: Tensor(Path(file), info.dtype, tuple(info.shape), begin, end - begin)
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
        for begin, end in [info.data_offsets]
    }


def read_json(path: Path) -> dict:
    """A JSON object from a file of the source."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a complete checkpoint; download it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; expected JSON; download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {type(value).__name__}; expected a JSON object")
    return value


def tensors(folder: Path) -> dict[str, Tensor]:
    """name -> Tensor over all shards; the index and the shards must agree exactly."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise UserError(
                f"{folder}: neither {SINGLE} nor {INDEX}; expected safetensors weights;"
                " download them (other formats are not read)"
            )
        return read_header(folder / SINGLE)
    weight_map = _weight_map(folder)
    found: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{folder / shard}: tensor {name!r}; expected in {weight_map.get(name)}"
                    f" by {INDEX}; download both again"
                )
            found[name] = tensor
    if missing := sorted(weight_map.keys() - found.keys()):
        raise UserError(
            f"{folder / weight_map[missing[0]]}: no tensor {missing[0]!r}, which {INDEX} puts"
            " there; download both again"
        )
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    """The index, whose file names must be plain names of shards that are there."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: no weight_map; expected tensor name -> file name")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(SHARD, shard):
            raise UserError(f"{folder / INDEX}: file name {shard!r}; expected a plain NAME.safetensors")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: missing shard named by {INDEX}; download it")
    return weight_map
