"""One conversion: read the source's headers, plan every byte, write a sibling folder, rename it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_gemma_mtp.errors import UserError

from . import config as configs
from . import quantize, source, writer
from .checkpoint import Checkpoint
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


@dataclass(frozen=True)
class Conversion:
    """One planned conversion: nothing is written yet, and every header was read and checked."""

    source: Path
    out: Path
    config: dict
    jobs: list[writer.Job]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    def __str__(self) -> str:
        return f"{self.out}: {self.config['model_type']}, {len(self.jobs)} tensors, {self.nbytes / 1e9:.3f} GB"


def convert(
    hf_path: str, mlx_path: str | Path, recipe: Recipe | None = None, dtype: str = "bfloat16", pair: bool = False
) -> str:
    """Convert one target or drafter, or a target and its drafter; returns a line for each folder.

    Args: a local folder or hub id; a folder that must not exist yet; the quantisation of matrices (None keeps them in
    `dtype`); bfloat16, float16 or float32 for everything that stays float; pair: `hf_path`-assistant is converted to
    `mlx_path`-assistant too, where quantised at 8 bits with a 4-bit head.
    Raises UserError for anything wrong with the source or the destination; then nothing is left.
    """
    planned = [_planned(hf_path, Path(mlx_path).expanduser(), recipe, dtype)]
    if pair:
        planned.append(_drafter_of(planned[0], hf_path, quantize.DRAFTER if recipe else None, dtype))
    with ExitStack() as stack:  # all folders appear, or none
        needed = sum(conversion.nbytes for conversion in planned)
        folders = [stack.enter_context(_new_folder(conversion.out, needed)) for conversion in planned]
        for conversion, folder in zip(planned, folders, strict=True):
            _write(conversion, folder)
    return "\n".join(map(str, planned))


def _planned(hf_path: str, out: Path, recipe: Recipe | None, dtype: str) -> Conversion:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; expected a new folder; choose another --mlx-path")
    folder = source.find(hf_path)
    model = Checkpoint.open(folder)
    model.check_source()
    written = configs.written(model.raw, model.text, dtype)
    formats = recipe.choose_all(model.entries, model.text) if recipe else {}
    if recipe:
        written["quantization"] = quantize.record(formats, recipe.default)
        written["quantization_config"] = written["quantization"]
    jobs = [writer.plan(e, model.tensors[e.source], dtype, formats.get(e.name)) for e in model.entries]
    return Conversion(folder, out, written, jobs)


def _drafter_of(target: Conversion, hf_path: str, recipe: Recipe | None, dtype: str) -> Conversion:
    if configs.is_drafter(target.config):
        raise UserError(f"{hf_path} is a drafter; expected a target with --pair; leave out --pair")
    path = hf_path.rstrip("/") + "-assistant"
    drafter = _planned(path, target.out.with_name(target.out.name + "-assistant"), recipe, dtype)
    if not configs.is_drafter(drafter.config):
        raise UserError(f"{path} is no drafter; expected the MTP drafter of {hf_path}; download it there")
    wanted, given = target.config["text_config"]["hidden_size"], drafter.config["backbone_hidden_size"]
    if wanted != given:
        raise UserError(
            f"{path} is the drafter of a target of hidden size {given}; expected {wanted} as in {hf_path};"
            " download the matching pair"
        )
    return drafter


def _write(conversion: Conversion, folder: Path) -> None:
    writer.write(writer.shards(conversion.jobs, writer.SHARD_BYTES), folder)
    config_text = json.dumps(conversion.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(config_text, encoding="utf-8")
    for name in COPIED:
        if (conversion.source / name).is_file():
            shutil.copyfile(conversion.source / name, folder / name)


@contextmanager
def _new_folder(out: Path, size: int) -> Iterator[Path]:
    """A sibling of `out` that becomes `out` at the end, or is removed whatever happened."""
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise UserError(
            f"{out.parent} has {free / 1e9:.1f} GB free; expected {size / 1e9:.1f} GB;"
            " free some space or choose another --mlx-path"
        )
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
