"""One conversion: read the source's headers, plan every byte, write a sibling folder, rename it."""

import errno
import json
import os
import shutil
from pathlib import Path

from mlx_gemma_mtp.errors import UserError, shown
from mlx_gemma_mtp.files.files import content
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig

from . import adapters, quantize, source, upload, writer
from . import config as configs
from .checkpoint import Checkpoint
from .conversion import Conversion
from .destination import Destination
from .interruption import Interruption
from .quantize import Recipe

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
FULL = (errno.ENOSPC, errno.EDQUOT)


def convert(
    hf_path: str,
    mlx_path: str | Path,
    recipe: Recipe | None = None,
    dtype: str = "bfloat16",
    pair: bool = False,
    upload_repo: str | None = None,
    adapter_path: str | None = None,
) -> str:
    """Converts one target or drafter, or a target and its drafter; returns a line for each folder.

    hf_path: a local folder or hub id; mlx_path: a folder that must not exist yet; recipe: the quantisation of matrices
    (None keeps them in `dtype`); dtype: bfloat16, float16 or float32 for everything that stays float; pair:
    `hf_path`-assistant is converted to `mlx_path`-assistant too, where quantised at 8 bits with a 4-bit head;
    upload_repo: the hub repository that the result is uploaded to (the drafter's to `upload_repo`-assistant);
    adapter_path: a LoRA adapter that is fused into `hf_path`'s weights, not into the pair's drafter. Raises
    UserError for anything wrong with the source or the destination, KeyboardInterrupt after a signal; then nothing is
    left, but for an upload that failed, which leaves the converted folders.
    """
    if not str(mlx_path) or "\0" in str(mlx_path):
        raise UserError(f"--mlx-path is {shown(str(mlx_path))}; expected the name of a folder to be made")
    ends = ("", "-assistant") if pair else ("",)
    out = Path(mlx_path).expanduser()
    repos = [upload_repo + end for end in ends] if upload_repo is not None else []
    upload.check(repos)
    planned = _converted(hf_path, [out.parent / (out.name + end) for end in ends], recipe, dtype, repos, adapter_path)
    lines = [str(conversion) for conversion in planned]
    lines += upload.upload({conversion.out: repo for conversion, repo in zip(planned, repos, strict=False)})
    return "\n".join(lines)


def _converted(
    hf_path: str, outs: list[Path], recipe: Recipe | None, dtype: str, repos: list[str], adapter_path: str | None
) -> list[Conversion]:
    """The conversions, done: all folders are there, or none."""
    destination, needed = Destination(tuple(outs)), 0
    with Interruption() as interruption:
        try:
            destination.claim()
            planned = _planned(hf_path, outs, recipe, dtype, adapter_path)
            needed = sum(conversion.nbytes for conversion in planned)
            destination.check_space(needed)
            for i, (conversion, folder) in enumerate(zip(planned, destination.folders, strict=True)):
                _write(conversion, folder)
                if repos:
                    upload.write_card(folder, conversion, hf_path, repos, i)
            interruption.hold()
            if interruption.came:  # and was lost in a callback
                raise KeyboardInterrupt
            destination.commit()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"{destination.parent} is full; expected {needed / 1e9:.3f} GB for the conversion; nothing was"
                " written; free some space or choose another --mlx-path"
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; nothing was written; run the same command again (finished downloads are kept)"
            ) from None
        finally:
            interruption.hold()
            destination.discard()
    if interruption.came:
        raise KeyboardInterrupt(f"interrupted; {', '.join(map(str, outs))}: complete")
    return planned


def _planned(
    hf_path: str, outs: list[Path], recipe: Recipe | None, dtype: str, adapter_path: str | None
) -> list[Conversion]:
    """One conversion, or those of a pair that fits together."""
    first = _plan(hf_path, outs[0], recipe, dtype, adapter_path)
    if len(outs) == 1:
        return [first]
    if configs.is_drafter(first.config):
        raise UserError(f"{hf_path} is a drafter; expected a target with --pair; leave out --pair")
    from mlx_gemma_mtp.files import hub  # as in source.find

    path = hub.assistant(hf_path)
    second = _plan(path, outs[1], quantize.DRAFTER if recipe else None, dtype)
    if not configs.is_drafter(second.config):
        raise UserError(f"{path} is no drafter; expected the MTP drafter of {hf_path}; download it there")
    try:
        DrafterConfig.from_dict(second.config, TargetConfig.from_dict(first.config))
    except UserError as error:
        raise UserError(f"{path} does not fit {hf_path}: {error}") from error
    return [first, second]


def _plan(hf_path: str, out: Path, recipe: Recipe | None, dtype: str, adapter_path: str | None = None) -> Conversion:
    folder = source.find(hf_path)
    model = Checkpoint.open(folder)
    entries = model.sources()
    _check_copied(folder)
    written = configs.written(model.raw, model.text, dtype)
    formats = recipe.choose_all(entries, model.text) if recipe else {}
    if recipe:
        written["quantization"] = quantize.record(formats, recipe.default)
        written["quantization_config"] = written["quantization"]
    deltas, fused = _fused(model, adapter_path) if adapter_path is not None else ({}, "")
    jobs = [writer.plan(e, model.tensors[e.source], dtype, formats.get(e.name), deltas.get(e.name)) for e in entries]
    return Conversion(folder, out, written, jobs, fused)


def _fused(model: Checkpoint, adapter_path: str) -> tuple[dict[str, adapters.Delta], str]:
    """(written name -> what an adapter adds to it, what happened in words)."""
    adapter = adapters.read_adapter(adapter_path)
    shared = [] if model.drafter else [i for i, layer in enumerate(model.config.layers) if not layer.owns_kv]
    unused = {f"layers.{i}.self_attn.{part}" for i in shared for part in ("k_proj", "v_proj")}
    deltas, left_out = adapter.deltas(model.entries, unused)
    rest = f" ({left_out} adapters of unused parts left out)" if left_out else ""
    return deltas, f", {adapter.folder} fused into {len(deltas)} matrices{rest}"


def _check_copied(folder: Path) -> None:
    """UserError for what could not be copied in the end: what was not downloaded, and links out of the checkpoint."""
    for file in (folder / name for name in COPIED if os.path.lexists(folder / name)):
        source.check_inside(file)
        content(file)


def _write(conversion: Conversion, folder: Path) -> None:
    """Everything of one folder; config.json, without which nothing loads it, comes last."""
    writer.write(writer.shards(conversion.jobs, writer.SHARD_BYTES), folder)
    for name in COPIED:
        if (file := conversion.source / name).is_file():
            shutil.copyfile(file, folder / name)
    config_text = json.dumps(conversion.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(config_text, encoding="utf-8")
