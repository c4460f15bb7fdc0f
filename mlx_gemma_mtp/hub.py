"""Finding model folders: the bundled pair, local folders, the Hugging Face hub; and the drafter of a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import UserError

DEMO = Path(__file__).parent / "demo"
PATTERNS = ["*.json", "*.jinja", "*.safetensors"]


@dataclass(frozen=True)
class Pair:
    """Local folders of a target and its drafter; `reason` says why there is no drafter."""

    target: Path
    drafter: Path | None
    reason: str | None


def find_pair(model: str | None, draft_model: str, revision: str | None = None) -> Pair:
    """model: a folder, a hub id, or None for the bundled pair; draft_model: a folder, a hub id, 'auto' or 'none'.

    Raises UserError where a model that was named cannot be had.
    """
    target = DEMO / "target" if model is None else find(model, revision)
    if draft_model == "none":
        return Pair(target, None, "no drafter was asked for (draft model 'none')")
    if draft_model != "auto":
        return Pair(target, find(draft_model), None)
    drafter = _beside(target) or _by_name(model)
    looked = ", ".join([str(folder) for folder in _siblings(target)] + _names(model))
    return Pair(target, drafter, None if drafter else f"no drafter was found (looked for {looked})")


def find(model: str, revision: str | None = None) -> Path:
    """The local folder of a model; downloads it (with a progress bar) if it is a hub id that is not cached."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise UserError(f"{model} is a file; expected a model folder (with config.json) or a hub id such as org/name")
    if not _is_hub_id(model):
        raise UserError(f"there is no model {model!r}: no such folder, and no hub id of the form org/name")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=PATTERNS))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"there is no model {model!r}: neither a folder nor a repository on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{model!r} is no folder, and the hub cannot be reached for it ({reason}); check the name or the network"
        ) from None


def _is_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~"))


def _stem(name: str) -> list[str]:
    """A model's name as it is, and without the suffixes that conversions add."""
    base = name
    for suffix in ("-mlx", "-bf16", "-4bit", "-5bit", "-6bit", "-8bit", "-mxfp4", "-mxfp8", "-nvfp4"):
        base = base.removesuffix(suffix)
    return list(dict.fromkeys((name, base)))


def _siblings(target: Path) -> list[Path]:
    names = [f"{stem}-assistant{end}" for stem in _stem(target.name) for end in ("", "-bf16", "-mlx")]
    return [target.parent / name for name in (*names, "drafter")]


def _beside(target: Path) -> Path | None:
    return next((folder for folder in _siblings(target) if (folder / "config.json").is_file()), None)


def _names(model: str | None) -> list[str]:
    """Hub ids under which the drafter of a hub id may be found."""
    if model is None or not _is_hub_id(model) or Path(model).is_dir():
        return []
    owner, name = model.split("/")
    return [f"{owner}/{stem}-assistant{end}" for stem in _stem(name) for end in ("", "-bf16")]


def _by_name(model: str | None) -> Path | None:
    for name in _names(model):
        try:
            return find(name)
        except UserError:
            continue  # the next spelling; if none is there, the reason lists them all
    return None
