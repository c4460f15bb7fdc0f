"""`--upload-repo`: a converted folder becomes a repository on the hub, with a model card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlx_gemma_mtp._version import __version__
from mlx_gemma_mtp.errors import UserError, shown

from . import config as configs
from . import names, source
from .conversion import Conversion
from .interruption import Interruption

LICENSE = ("license", "license_name", "license_link")


def check(repos: list[str]) -> None:
    """Raises UserError unless this login may write to `repos`.

    It is asked before a conversion of an hour, not after it.
    """
    if not repos:
        return
    from huggingface_hub import HfApi

    from mlx_gemma_mtp.files import hub  # as in source.find

    for repo in repos:
        if not hub.is_hub_id(repo):
            raise UserError(f"--upload-repo {shown(repo)}; expected org/name, a valid name on the hub")
    try:
        me = HfApi().whoami()
    except Exception as error:  # the client's errors have no common base; all mean "no login"
        raise UserError(
            f"--upload-repo {repos[0]}: the hub knows no login ({_reason(error)}); run: hf auth login"
        ) from error
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"--upload-repo {repos[0]}: the token can only read; expected one that writes; run: hf auth login"
        )
    owners = [me["name"], *(org["name"] for org in me.get("orgs", []))]
    owner = repos[0].split("/")[0]
    if owner.lower() not in map(str.lower, owners):
        raise UserError(f"--upload-repo {repos[0]}: {owner!r} is not yours; expected one of {', '.join(owners)}")


def upload(folders: dict[Path, str]) -> list[str]:
    """Uploads folder -> repository, in this order; returns a line for each.

    Raises UserError or KeyboardInterrupt, which say what uploads the rest: the folders stay.
    """
    if not folders:
        return []
    from huggingface_hub import HfApi

    api, left = HfApi(), dict(folders)
    with Interruption():
        try:
            for folder, repo in folders.items():
                api.create_repo(repo, exist_ok=True)
                api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Converted to MLX")
                del left[folder]
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the conversion is complete; upload it with: {_again(left)}"
            ) from None
        except Exception as error:  # as in check
            raise UserError(
                f"the conversion is complete, but not its upload ({_reason(error)}); upload it with: {_again(left)}"
            ) from error
    return [f"{folder}: uploaded to https://huggingface.co/{repo}" for folder, repo in folders.items()]


def write_card(folder: Path, conversion: Conversion, hf_path: str, repos: list[str], index: int) -> None:
    """Writes README.md for `repos[index]` into a folder; repos[1] holds the drafter of repos[0].

    A local source is not named.
    """
    from huggingface_hub import ModelCardData

    drafter = configs.is_drafter(conversion.config)
    base = hf_path.rstrip("/") + ("-assistant" if index else "")
    base = base if source.is_hub_id(base) else None
    quantised = any(job.form for job in conversion.jobs)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "gemma4", *(["speculative-decoding"] if drafter else [])],
        base_model=base,
        base_model_relation="quantized" if base and quantised and not conversion.fused else None,
        **_license(base),
    )
    text = "\n".join(_lines(conversion, base, repos, index))
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _lines(conversion: Conversion, base: str | None, repos: list[str], index: int) -> Iterator[str]:
    """The card's text."""
    origin = f" from [{base}](https://huggingface.co/{base})" if base else ""
    kind = "MTP drafter" if configs.is_drafter(conversion.config) else "text model"
    yield f"# {repos[index]}\n"
    adapter = ", with a LoRA adapter fused in" if conversion.fused else ""
    yield f"The {kind}, converted to MLX{origin} by mlx-gemma-mtp {__version__}{adapter}.\n"
    yield "| tensors | format |\n|---|---|"
    forms: dict[str, set[str]] = {}
    for job in conversion.jobs:
        forms.setdefault(str(job.form or job.outputs[0][1]), set()).add(names.group(job.entry))
    yield from (f"| {', '.join(sorted(kinds))} | {form} |" for form, kinds in forms.items())
    target = repos[0] if not configs.is_drafter(conversion.config) or index else "TARGET"
    found = "" if target == repos[0] else f" --draft-model {repos[index]}"
    yield "\n## Run\n"
    yield f'    python -m mlx_gemma_mtp.generate --model {target}{found} --prompt "Write a quicksort." --stats'
    if len(repos) > 1:
        yield f"\nDrafter: [{repos[1]}](https://huggingface.co/{repos[1]}), found by its name."


def _license(base: str | None) -> dict[str, str]:
    """The licence fields of the source's own card, where the hub has one."""
    from huggingface_hub import ModelCard

    if base is None:
        return {}
    try:
        data = ModelCard.load(base).data.to_dict()
    except Exception:  # no card, or none that can be read: a licence is not guessed
        return {}
    return {key: data[key] for key in LICENSE if key in data}


def _again(left: dict[Path, str]) -> str:
    return " && ".join(shlex.join(["hf", "upload", repo, str(folder)]) for folder, repo in left.items())


def _reason(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
