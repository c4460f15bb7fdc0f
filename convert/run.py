"""One conversion: read the source's headers, plan every byte, write a sibling folder, rename it."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_gemma_mtp.errors import UserError, shown
from mlx_gemma_mtp.files.files import content
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig

from . import adapters, quality, quantize, source, stream, upload, writer
from . import config as configs
from .checkpoint import Checkpoint
from .conversion import Conversion
from .destination import Destination
from .interruption import Interruption
from .quantize import Recipe
from .remote import Remote
from .stream import Streamed
from .writer import Weights

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


@dataclass(frozen=True)
class Wanted:
    """What is converted, and how: see `convert`."""

    hf_path: str
    recipe: Recipe | None
    dtype: str
    adapter_path: str | None
    revision: str | None
    dequantize: bool
    stream: bool

    def check(self, measured: bool) -> None:
        """Raises UserError for options that exclude each other."""
        if self.dequantize and self.recipe:
            raise UserError("--dequantize and -q exclude each other: quantising twice loses twice; leave out one")
        if measured and self.adapter_path is not None:
            raise UserError(
                "--quality compares with the source, from which --adapter-path differs on purpose; leave out one"
            )
        if self.stream and measured:
            raise UserError("--quality reads the whole source, of which --stream keeps nothing; leave out one")
        if self.stream and not source.is_hub_id(self.hf_path):
            raise UserError(
                f"--stream is for a repository on the hub, {shown(self.hf_path, 300)} is none; leave it out"
            )
        if self.revision is not None and not source.is_hub_id(self.hf_path):
            raise UserError(
                f"--revision {shown(self.revision)} is of a repository on the hub, {self.hf_path} is none; leave it out"
            )


def convert(
    hf_path: str,
    mlx_path: str | Path,
    recipe: Recipe | None = None,
    dtype: str = "bfloat16",
    pair: bool = False,
    upload_repo: str | None = None,
    adapter_path: str | None = None,
    measured: bool = False,
    revision: str | None = None,
    dequantize: bool = False,
    streamed: bool = False,
) -> str:
    """Converts one target or drafter, or a target and its drafter; returns a line for each folder.

    hf_path: a local folder or hub id; mlx_path: a folder that must not exist yet; recipe: the quantisation of matrices
    (None keeps them in `dtype`); dtype: bfloat16, float16 or float32 for everything that stays float; pair:
    `hf_path`-assistant is converted to `mlx_path`-assistant too, where quantised at 8 bits with a 4-bit head;
    upload_repo: the hub repository that the result is uploaded to (the drafter's to `upload_repo`-assistant);
    adapter_path: a LoRA adapter that is fused into `hf_path`'s weights, not into the pair's drafter; measured: what the
    conversion changed is measured (quality.py), told, and written on the card; revision: of `hf_path` on the hub;
    dequantize: MLX's quantised weights are converted, too, as the floats that they stand for; streamed: weight files
    are downloaded, converted and dropped one after the other (stream.py). Raises UserError for anything wrong with the
    source or the destination, KeyboardInterrupt after a signal; then nothing is left, but for an upload that failed,
    which leaves the converted folders, and with `streamed` what is done, hidden, for the same call to go on.
    """
    if not str(mlx_path) or "\0" in str(mlx_path):
        raise UserError(f"--mlx-path is {shown(str(mlx_path))}; expected the name of a folder to be made")
    ends = ("", "-assistant") if pair else ("",)
    out = Path(mlx_path).expanduser()
    repos = [upload_repo + end for end in ends] if upload_repo is not None else []
    upload.check(repos)
    wanted = Wanted(hf_path, recipe, dtype, adapter_path, revision, dequantize, streamed)
    wanted.check(measured)
    planned, found = _converted(wanted, [out.parent / (out.name + end) for end in ends], repos, measured)
    lines = [str(conversion) for conversion in planned] + found
    lines += upload.upload({conversion.out: repo for conversion, repo in zip(planned, repos, strict=False)})
    return "\n".join(lines)


def _converted(
    wanted: Wanted, outs: list[Path], repos: list[str], measured: bool
) -> tuple[list[Conversion], list[str]]:
    """The conversions, done: all folders are there, or none; and what was measured, in lines."""
    destination, needed = Destination(tuple(outs), wanted.stream), 0
    with Interruption() as interruption:
        try:
            destination.claim()
            planned = _planned(wanted, outs, destination.folders)
            weights = [_weights(*each) for each in zip(planned, destination.folders, strict=True)]
            needed = sum(each.room for each in weights)
            destination.check_space(needed)
            for i, (conversion, folder) in enumerate(zip(planned, destination.folders, strict=True)):
                _write(conversion, folder, weights[i])
                if repos:
                    upload.write_card(folder, conversion, wanted.hf_path, repos, i)
            found = _measured(planned, destination.folders) if measured else []
            interruption.hold()
            if interruption.came:  # and was lost in a callback
                raise KeyboardInterrupt
            for folder in destination.folders:
                stream.tidy(folder)
            destination.commit()
        except UserError as error:
            if not destination.parts:
                raise
            raise UserError(f"{error}; {destination.left}, where the same command goes on") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"{destination.parent} is full; expected {needed / 1e9:.3f} GB for the conversion; {destination.left};"
                " free some space or choose another --mlx-path"
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {destination.left}; run the same command again (finished downloads are kept)"
            ) from None
        finally:
            interruption.hold()
            destination.discard()
    if interruption.came:
        raise KeyboardInterrupt(f"interrupted; {', '.join(map(str, outs))}: complete")
    return planned, found


def _measured(planned: list[Conversion], folders: list[Path]) -> list[str]:
    """What the conversion of the target changed, in lines; on its card, too, if there is one."""
    drafters = (planned[1].source, folders[1]) if len(planned) > 1 else None
    found = quality.quality(folders[0], planned[0].source, drafters)
    quality.write_section(folders[0] / "README.md", found)
    return list(quality.lines(found))


def _planned(wanted: Wanted, outs: list[Path], folders: list[Path]) -> list[Conversion]:
    """One conversion, or those of a pair that fits together. folders: where they are written."""
    hf_path = wanted.hf_path
    first = _plan(wanted, outs[0], folders[0])
    if len(outs) == 1:
        return [first]
    if configs.is_drafter(first.config):
        raise UserError(f"{hf_path} is a drafter; expected a target with --pair; leave out --pair")
    from mlx_gemma_mtp.files import hub  # as in source.find

    path = hub.assistant(hf_path)
    recipe = quantize.DRAFTER if wanted.recipe else None
    beside = replace(wanted, hf_path=path, recipe=recipe, adapter_path=None, revision=None)
    second = _plan(beside, outs[1], folders[1])
    if not configs.is_drafter(second.config):
        raise UserError(f"{path} is no drafter; expected the MTP drafter of {hf_path}; download it there")
    try:
        DrafterConfig.from_dict(second.config, TargetConfig.from_dict(first.config))
    except UserError as error:
        raise UserError(f"{path} does not fit {hf_path}: {error}") from error
    return [first, second]


def _plan(wanted: Wanted, out: Path, written_to: Path) -> Conversion:
    recipe, dtype, remote = wanted.recipe, wanted.dtype, None
    if wanted.stream and source.is_hub_id(wanted.hf_path):
        remote = Remote.open(wanted.hf_path, wanted.revision, written_to / stream.PLACE)
        folder, model = remote.folder, Checkpoint.read(wanted.hf_path, *remote.read())
    else:
        folder = source.find(wanted.hf_path, wanted.revision)
        model = Checkpoint.open(folder)
    if wanted.dequantize:
        model = model.dequantized()
    entries = model.sources()
    _check_copied(folder)
    written = configs.written(model.raw, model.text, dtype)
    formats = recipe.choose_all(entries, model.text) if recipe else {}
    if recipe:
        written["quantization"] = quantize.record(formats, recipe.default)
        written["quantization_config"] = written["quantization"]
    deltas, fused = _fused(model, wanted.adapter_path) if wanted.adapter_path is not None else ({}, "")
    jobs = [writer.plan(e, model.tensors[e.source], dtype, formats.get(e.name), deltas.get(e.name)) for e in entries]
    repeats = model.repeats() if remote else []
    return Conversion(folder, out, written, jobs, fused, remote, repeats)


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


def _weights(conversion: Conversion, folder: Path) -> Weights | Streamed:
    return Streamed(conversion, folder) if conversion.remote else Weights(conversion.jobs, folder)


def _write(conversion: Conversion, folder: Path, weights: Weights | Streamed) -> None:
    """Everything of one folder; config.json, without which nothing loads it, comes last."""
    weights.write()
    for name in COPIED:
        if (file := conversion.source / name).is_file():
            shutil.copyfile(file, folder / name)
    config_text = json.dumps(conversion.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(config_text, encoding="utf-8")
