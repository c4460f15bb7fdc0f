"""Finding model folders: the bundled pair, local folders, the Hugging Face hub; and the drafter of a target."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    constants,
    get_safetensors_metadata,
    hf_hub_url,
    list_repo_files,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from ..errors import UserError, shown
from . import foreign
from .folder import weight_names
from .safetensors import Tensor, header_length, read_object, tensors_of

DEMO = Path(__file__).parents[1] / "demo"
SMALL = ["*.json", "*.jinja"]
PATTERNS = [*SMALL, "*.safetensors"]
IGNORED = ["*/*", ".*", "consolidated*", "adapter*"]  # second layouts and other things that are not read
FULL = (errno.ENOSPC, errno.EDQUOT)
SUFFIXES = ("-mlx", "-bf16", "-4bit", "-5bit", "-6bit", "-8bit", "-mxfp4", "-mxfp8", "-nvfp4")  # of conversions
PUBLISHED = re.compile(r"gemma-4-(?P<size>e2b|e4b|12b|26b-a4b|31b)(?P<it>-it)?(?P<qat>-qat)?(?![a-z0-9])", re.I)
SIZES = {size.lower(): size for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")}


HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
REVISION = re.compile(r"(?!.*\.\.)[^\s\0/][^\s\0]{0,199}")


@dataclass(frozen=True)
class Pair:
    """The local folders of a target and of its drafter. reason: why there is no drafter; None where there is one."""

    target: Path
    drafter: Path | None
    reason: str | None


class NotFound(UserError):
    """The hub has no such model, or none for this login."""


class Gated(NotFound):
    """The hub has the model, but not for this login."""


class Unreachable(UserError):
    """The hub does not answer, or not as a hub does, and its cache does not have what was asked for."""


def find_pair(model: str | None, draft_model: str, revision: str | None = None) -> Pair:
    """Returns the folders of a target and its drafter, downloading what is only on the hub.

    model: a folder, a hub id, or None for the bundled pair; draft_model: a folder, a hub id, 'auto' or 'none';
    revision: of `model` on the hub. 'auto' looks beside the target's folder, in the hub's cache, and, for a target that
    is a hub id, on the hub. Raises UserError where a model that was named cannot be had, or where a base model is given
    the drafter of an instruction-tuned one.
    """
    target = DEMO / "target" if model is None else find(model, revision)
    if draft_model == "none":
        return Pair(target, None, "no drafter was asked for (draft model 'none')")
    if draft_model == "auto":
        return _auto(model, target)
    drafter = find(draft_model)
    for name in _names(model or str(target), target):
        for other in _names(draft_model, drafter):
            _check_kinds(name, other, is_tuned(target))
    return Pair(target, drafter, None)


def find(model: str, revision: str | None = None, converting: bool = False, weights: bool = True) -> Path:
    """Returns the local folder of a model; downloads a hub id that is not cached, with a progress bar.

    converting: formats of others that convert dequantises are downloaded, too; weights: whether its weights are wanted
    here. Raises UserError for a name that is neither, for a model that cannot be had, and, before its weights are
    downloaded, for one in another format.
    """
    if not model:  # as a path it would be the current folder
        raise UserError("the name of a model is empty; expected a model folder or a hub id such as org/name")
    folder = _given(model)
    if os.path.isdir(folder):
        return folder.resolve()
    if os.path.exists(folder):
        raise foreign.file_refusal(folder)
    if os.path.islink(folder):
        raise UserError(f"{model} is a link to {os.readlink(folder)}, where nothing is; expected a model folder")
    if not is_hub_id(model):
        hint = foreign.of_name(model)
        raise NotFound(
            f"there is no model {shown(model, 300)}: no such folder, and no hub id of the form org/name{hint}"
        )
    if revision is not None and not REVISION.fullmatch(revision):
        raise NotFound(f"the revision {shown(revision)} of {model!r} is no name; expected a branch, a tag or a commit")
    try:
        if _cached_folder(model, revision) is None:
            _check_format(model, revision, converting)
        patterns = PATTERNS if weights else SMALL
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED))
    except UserError:
        raise
    except Exception as error:  # the client's errors, and those of what it uses, have no common base
        cached = _cached_folder(model, revision)
        missing = missing_files(cached, weights) if cached else []
        if isinstance(error, ValueError) and cached and not missing:
            return cached  # the client itself goes by its cache where nothing answers, but not where a web page does
        raise refusal(model, error, revision, missing) from None
    if missing := missing_files(folder, weights):  # offline, the hub's client may hand out part of a model
        raise foreign_repo(model, revision) or _unreachable(model, revision, missing, "that is all that the hub gave")
    return folder


def _check_format(model: str, revision: str | None, converting: bool) -> None:
    """Raises UserError for a repository whose config.json tells of a format that is not read. Downloads no more."""
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=["config.json", foreign.MODELOPT]))
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = foreign.of_folder(folder, config)
    if found and not (converting and found.plain) and not _is_converted(model, revision):
        raise found.refusal(model, converting)


def _is_converted(model: str, revision: str | None) -> bool:
    """Whether the headers on the hub show MLX's floats, whatever config.json says."""
    try:
        return foreign.are_mlx_floats(read_headers(model, revision))
    except Exception:  # as in find; the config stands then
        return False


def read_headers(model: str, revision: str | None = None) -> dict[str, Tensor]:
    """Returns name -> Tensor of a repository, by its files' headers alone. Raises what the hub's client does."""
    return {
        name: Tensor(Path(file), info.dtype, tuple(info.shape), begin, end - begin)
        for file, metadata in get_safetensors_metadata(model, revision=revision).files_metadata.items()
        for name, info in metadata.tensors.items()
        for begin, end in [info.data_offsets]
    }


def read_header(model: str, file: str, revision: str) -> dict[str, Tensor]:
    """Returns what `safetensors.read_header` does, of a file on the hub: where its tensors will lie once it is here.

    Raises UserError for a broken file, and what the hub's client does.
    """
    path = Path(file)
    head, size = _range(model, file, revision, 0, 8)
    raw, _ = _range(model, file, revision, 8, 8 + header_length(path, head, size))
    return tensors_of(path, raw, size)


def _range(model: str, file: str, revision: str, start: int, stop: int) -> tuple[bytes, int]:
    """(the bytes start:stop of a file on the hub, how many it has)."""
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    answer = get_session().get(hf_hub_url(model, file, revision=revision), headers=headers)
    hf_raise_for_status(answer)
    told = re.fullmatch(rf"bytes {start}-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if not told:
        raise ValueError(f"no part of {file} can be read alone")
    return answer.content, int(told[1])


def foreign_repo(model: str, revision: str | None = None) -> UserError | None:
    """Returns the error for a repository whose files make no model in safetensors: GGUF, an adapter.

    None where the hub does not tell.
    """
    try:
        names = list_repo_files(model, revision=revision)
    except Exception:  # as in find; what is missing was told already
        return None
    return foreign.of_names(names, model)


def missing_files(folder: Path, weights: bool = True) -> list[str]:
    """Returns the files that a model folder lacks, by name: config.json, and where they count files of its weights."""
    try:
        names = weight_names(folder) if weights else []
    except UserError:
        names = []  # the loader will say what is wrong with the index
    return [name for name in ("config.json", *names) if not (folder / name).is_file()]


def refusal(model: str, error: BaseException, revision: str | None = None, missing: Sequence[str] = ()) -> UserError:
    """Returns the UserError for an error of the hub's client: what it means and what helps.

    missing: the files that the part of the model in the hub's cache lacks.
    """
    reason = next(iter(str(error).strip().splitlines()), "").strip() or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not isinstance(error, RepositoryNotFoundError)):
        return Gated(
            f"the hub does not give {model!r} to this login ({reason}); accept its licence at "
            f"{constants.ENDPOINT}/{model} and run: hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{model!r} has no revision {revision!r} on the hub; name a branch, a tag or a commit of it")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return NotFound(
            f"there is no model {model!r}: neither a folder nor a repository on the hub that this login may read; "
            "check the name, or run: hf auth login"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return UserError(
            f"{model!r} cannot be downloaded: the disk of the hub's cache {constants.HF_HUB_CACHE} is full; free some "
            "space, or name another folder with HF_HUB_CACHE"
        )
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return UserError(
            f"{model!r} cannot be downloaded: the hub's cache {constants.HF_HUB_CACHE} cannot be written ({reason}); "
            "name another folder with HF_HUB_CACHE"
        )
    if status == 429:
        return _unreachable(model, revision, missing, "the hub asks to wait (429, too many requests)")
    if status is not None:
        return _unreachable(model, revision, missing, f"the hub answered {status} ({reason})")
    if isinstance(error, ValueError) and not isinstance(error, OSError):  # no JSON: a proxy's or a hotel's page
        return _unreachable(model, revision, missing, f"what {constants.ENDPOINT} answers is not from a hub ({reason})")
    network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    why = "the hub cannot be reached" if network else "the hub's client failed"
    return _unreachable(model, revision, missing, f"{why} ({reason})")


def _unreachable(model: str, revision: str | None, missing: Sequence[str], why: str) -> Unreachable:
    """What exactly cannot be had: the files that a cached part lacks, or all of the model."""
    has = f"is in the hub's cache without {', '.join(missing)}" if missing else "is no folder, nor in the hub's cache"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
    command = shlex.join(["hf", "download", model, *(["--revision", revision] if revision else [])])
    return Unreachable(f"{model!r} {has}, and {why}; check the name, or connect and run: {command}")


def _cached_folder(model: str, revision: str | None = None) -> Path | None:
    """Returns the snapshot of a valid hub id in the hub's cache, complete or not, or None. Needs no network."""
    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _given(model: str) -> Path:
    """A folder by its name as it is given. Where `~` stands for nobody's home, it is a name like any other."""
    return Path(os.path.expanduser(model))


def spellings(folder: Path) -> list[Path]:
    """Returns the absolute paths of a folder: the one as given, one for each link that it leads over, the real one."""
    found = []
    for base in [folder] if folder.is_absolute() else _working_folders():
        place = Path(os.path.normpath(base / folder))
        while place not in found and len(found) < 40:  # what the system follows at most
            found.append(place)
            if place.is_symlink():
                place = Path(os.path.normpath(place.parent / os.readlink(place)))
    return list(dict.fromkeys((*found, folder.resolve())))


def _working_folders() -> list[Path]:
    """The working folder by the name that the shell followed to it (a link, perhaps), and by its own."""
    named, own = os.environ.get("PWD", ""), os.getcwd()
    known = os.path.isabs(named) and os.path.realpath(named) == own
    return [Path(named), Path(own)] if known else [Path(own)]


def assistant(model: str) -> str:
    """Returns the name of a source's drafter, which is the source's with -assistant: a folder beside it, or a hub id.

    The folder may lie beside any of the source's `spellings`.
    """
    names = [model.rstrip("/") or model, *map(str, spellings(_given(model)))]
    return next((f"{name}-assistant" for name in names if os.path.isdir(f"{name}-assistant")), f"{names[0]}-assistant")


def is_hub_id(model: str) -> bool:
    """Returns whether a text is a valid org/name; the hub's client raises errors of its own for any other."""
    if not HUB_ID.fullmatch(model):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _auto(model: str | None, target: Path) -> Pair:
    local = model is None or os.path.isdir(_given(model))
    places = spellings(_given(model)) if model is not None and local else [target]
    tuned = is_tuned(target)
    siblings = list(dict.fromkeys(sibling for place in places for sibling in _siblings(place, tuned)))
    beside = next((folder for folder in siblings if (folder / "config.json").is_file()), None)
    if beside is not None:
        return Pair(target, beside, None)
    names = [] if model is None else _names(model, target)
    ids = list(dict.fromkeys(name for each in names for name in _drafter_ids(each, tuned)))
    for name in ids:
        cached = _cached_folder(name)
        if cached is not None and not missing_files(cached):
            return Pair(target, cached, None)
    looked = f"looked for {', '.join(map(str, siblings))}"
    if ids:
        looked += f"; in the hub's cache for {', '.join(ids)}"
    if local:  # a local folder causes no download
        return Pair(target, None, f"no drafter was found ({looked})")
    denied = ""
    for name in ids:
        try:
            return Pair(target, find(name), None)
        except Gated as error:
            denied = denied or f": {error}"
        except NotFound:
            continue  # the next spelling; if none is there, the reason lists them all
        except UserError as error:
            return Pair(target, None, f"no drafter was found ({looked}): {error}")
    return Pair(target, None, f"no drafter was found ({looked}, and on the hub){denied}")


def _name(model: str, folder: Path) -> str:
    """org/name of a hub id or of its cached snapshot; the name of any other folder."""
    if folder.parent.name == "snapshots":  # models--org--name/snapshots/commit
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return model if is_hub_id(model) and not Path(model).is_dir() else folder.name


def _names(model: str, folder: Path) -> list[str]:
    """What a model is called: its name, and those of the links that lead to it."""
    links = spellings(_given(model)) if os.path.isdir(_given(model)) else []
    return list(dict.fromkeys((_name(model, folder), *(place.name for place in links))))


def _stems(name: str) -> list[str]:
    """A model's name as it is, and without the suffixes that conversions add."""
    base = name
    for suffix in SUFFIXES:
        base = base.removesuffix(suffix)
    return list(dict.fromkeys((name, base)))


def is_tuned(folder: Path) -> bool:
    """Returns whether a folder has a chat template: instruction-tuned targets have one, base models have none."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_object(folder / "tokenizer_config.json").get("chat_template"))
    except UserError:
        return False


def _siblings(target: Path, tuned: bool) -> list[Path]:
    names = [f"{stem}-assistant{end}" for stem in _stems(target.name) for end in ("", "-bf16", "-mlx")]
    names += [name.rpartition("/")[2] for name in _drafter_ids(target.name, tuned)]  # mlx-community spells them unlike
    return [target.parent / name for name in dict.fromkeys((*names, "drafter"))]


def _drafter_ids(name: str, tuned: bool) -> list[str]:
    """Hub ids of the drafter of a target named `name`: its owner's, then Google's and mlx-community's.

    tuned: whether the target is instruction-tuned, whatever its name says: many leave out the `-it`.
    """
    owner, _, base = name.rpartition("/")
    ids = [f"{owner}/{stem}-assistant" for stem in _stems(base)] if owner else []
    if published := PUBLISHED.search(base):
        size, it = SIZES[published["size"].lower()], "-it" if published["it"] or tuned else ""
        if published["qat"]:
            ids.append(f"google/gemma-4-{size}{it}-qat-q4_0-unquantized-assistant")
        ids += [f"google/gemma-4-{size}{it}-assistant", f"mlx-community/gemma-4-{size}{it}-assistant-bf16"]
    return list(dict.fromkeys(filter(is_hub_id, ids)))  # with its end, a long name may be none


def _check_kinds(target: str, drafter: str, tuned: bool) -> None:
    """Refuses the drafter of an instruction-tuned model for a base model: one that is named so and has no template.

    A drafter has no template of its own, and its name may leave out the `-it`.
    """
    theirs, its = PUBLISHED.search(target), PUBLISHED.search(drafter)
    if theirs and its and its["it"] and not theirs["it"] and not tuned:
        raise UserError(
            f"{target} is a base model (it has no chat template), and {drafter} is the drafter of an instruction-tuned "
            "model; give the '-assistant' of the same model, or --draft-model none"
        )
