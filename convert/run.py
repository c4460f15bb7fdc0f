"""One conversion: read the source's headers, plan every byte, write a sibling folder, rename it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_gemma_mtp.errors import UserError

from . import config as configs
from . import names, quantize, source, writer
from .names import Entry
from .quantize import Affine

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


def convert(hf_path: str, mlx_path: str | Path, affine: Affine | None = None, dtype: str = "bfloat16") -> str:
    """Convert one target or drafter; returns a one-line summary.

    Args: a local folder or hub id; a folder that must not exist yet; the quantisation of matrices
    (None keeps them in `dtype`); bfloat16, float16 or float32 for everything that stays float.
    Raises UserError for anything wrong with the source or the destination; then nothing is left.
    """
    out = Path(mlx_path).expanduser()
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; expected a new folder; choose another --mlx-path")
    folder = source.find(hf_path)
    config = source.read_json(folder / "config.json")
    entries, written, text = _plan(config, dtype)
    found = source.tensors(folder)
    names.check(entries, found, text, config["model_type"])
    formats = {}
    if affine:
        formats = quantize.choose_all(entries, affine, text["enable_moe_block"])
        written["quantization"] = quantize.record(formats, affine)
        written["quantization_config"] = written["quantization"]
    jobs = [writer.plan(e, found[e.source], dtype, formats.get(e.name)) for e in entries]
    size = sum(job.nbytes for job in jobs)
    with _new_folder(out, size) as temporary:
        writer.write(writer.shards(jobs, writer.SHARD_BYTES), temporary)
        config_text = json.dumps(written, indent=2, sort_keys=True) + "\n"
        (temporary / "config.json").write_text(config_text, encoding="utf-8")
        for name in COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
    return f"{out}: {written['model_type']}, {len(entries)} tensors, {size / 1e9:.3f} GB"


def _plan(config: dict, dtype: str) -> tuple[list[Entry], dict, dict]:
    """Source config -> (tensors to write, config to write, checked text fields)."""
    drafter = configs.is_drafter(config)
    text = configs.text_config(config)
    if drafter:
        entries = names.drafter_entries(config, text)
        return entries, configs.written_drafter(config, text, dtype), text
    entries = names.target_entries(text, config["model_type"])
    return entries, configs.written_target(config, text, dtype), text


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
