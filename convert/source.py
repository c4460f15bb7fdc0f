"""Find a source checkpoint (local folder or hub id) and list its tensors, those that others quantised as floats."""

from pathlib import Path

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import foreign
from mlx_gemma_mtp.files.folder import config_and_format
from mlx_gemma_mtp.files.headers import read_headers
from mlx_gemma_mtp.files.safetensors import Tensor, read_object
from mlx_gemma_mtp.models.contents import MEDIA
from mlx_gemma_mtp.models.quantization import plain

from . import dequantize
from .blocks import Source
from .config import is_drafter

CHECKSUMS = "checksums.json"  # shard name -> sha256, in a folder that convert wrote


def is_hub_id(source: str) -> bool:
    """Returns whether SOURCE is a valid `org/name` and no folder is called that."""
    from mlx_gemma_mtp.files import hub  # the hub's client is imported where it is needed

    return hub.is_hub_id(str(source)) and not Path(source).expanduser().is_dir()


def find(source: str, revision: str | None = None) -> Path:
    """Returns the local folder of SOURCE: a folder as it is, an `org/name` from the hub's cache or the hub.

    revision: a branch, tag or commit there. Of a download that was cut off, whole files are kept. Raises UserError that
    says what is missing, and the command that downloads it.
    """
    from mlx_gemma_mtp.files import hub  # as above

    return hub.find(source, revision, converting=True)


def read(folder: Path) -> tuple[dict, dict[str, Source]]:
    """Returns config.json and the tensors of a local folder, from their headers.

    Weights that others quantised are seen as floats, where convert dequantises them; then the config does not tell of
    the quantisation. Raises UserError for all other formats, and for a config.json that is not a Gemma 4 one.
    """
    config, found = config_and_format(folder)
    if found and not found.plain:
        raise found.refusal(folder, converting=True)
    config = read_object(folder / "config.json") if config is None else config  # says that there is none
    is_drafter(config)  # another model is told by its name, not by its files
    return _seen(folder, config, found, read_headers(folder), local=True)


def _seen(
    where: Path | str, config: dict, found: foreign.Foreign | None, held: dict[str, Tensor], local: bool
) -> tuple[dict, dict[str, Source]]:
    """A config and tensors as a conversion sees them. found: the format that the config tells of."""
    if found is None:
        seen = dequantize.stacked(held)
    else:
        config, seen = foreign.without_table(config), dequantize.floats(found.plain, held, local)
    if hidden := foreign.of_tensors(name for name in seen if not plain(name).startswith(MEDIA)):
        raise hidden.refusal(where, converting=True)
    return config, seen


def remote(repo: str) -> tuple[dict, dict[str, Source]]:
    """Returns config.json and the tensors' headers of a hub repository, from its cache where the hub does not answer.

    No weights are downloaded. Raises UserError where neither can be had.
    """
    from huggingface_hub import constants, hf_hub_download

    from mlx_gemma_mtp.files import hub

    try:
        config = Path(hf_hub_download(repo, "config.json"))
        held = hub.read_headers(repo)
    except Exception as error:  # the client's errors have no common base; all mean "no headers"
        if folder := find(repo) if constants.HF_HUB_OFFLINE else _cached(repo):
            return read(folder)
        raise hub.foreign_repo(repo) or hub.refusal(repo, error) from error
    config = read_object(config)
    return of_headers(repo, config, foreign.of_config(config), held)


def of_headers(
    where: str, config: dict, found: foreign.Foreign | None, held: dict[str, Tensor]
) -> tuple[dict, dict[str, Source]]:
    """Returns what `read` does, of headers whose files are elsewhere. found: the format that the folder tells of.

    Raises UserError for formats that convert does not read.
    """
    if found and foreign.are_mlx_floats(held):
        config, found = foreign.without_table(config), None
    if found and not found.plain:
        raise found.refusal(where, converting=True)
    return _seen(where, config, found, held, local=False)


def _cached(repo: str) -> Path | None:
    """The snapshot of a repository in the hub's cache, if it is complete."""
    from huggingface_hub import try_to_load_from_cache

    from mlx_gemma_mtp.files import hub

    config = try_to_load_from_cache(repo, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder and not hub.missing_files(folder) else None


def check_inside(file: Path) -> None:
    """Raises UserError for a link out of the checkpoint's folder: what is copied may be published.

    The hub's cache links from snapshots/COMMIT to blobs beside it.
    """
    root = file.parent.parent.parent if file.parent.parent.name == "snapshots" else file.parent
    if not file.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{file} is a link to {file.resolve()}; expected a file of the checkpoint; copy it there")
