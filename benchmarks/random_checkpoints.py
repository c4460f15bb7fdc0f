"""Checkpoints with real names, shapes and formats, and random values: what `real_size.py` converts and runs.

`python -m benchmarks.random_checkpoints e2b|26b FOLDER` writes, block by block, with little memory:

- e2b: gemma-4-E2B-it as published (Hugging Face layout, bf16, one file, the K/V tensors that nobody reads included);
  of vision and audio only a few tensors, since a conversion leaves them out by name.
- 26b: gemma-4-26B-A4B-it-4bit as `convert -q --q-bits 4` lays it out (planned by convert itself: names, formats,
  shards, config.json), its drafter as published, and a tokenizer that has a made-up piece for every token id.

Matrices are uniform (codes) or normal of variance 1 / inputs, so that activations stay of size one. A few token ids
are loud in both tables: target and drafter, both random, choose among them and so agree now and then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert import config as configs
from convert import quantize, writer
from convert.checkpoint import Checkpoint
from convert.names import Entry
from convert.quantize import Format, Recipe
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.folder import INDEX, SINGLE
from mlx_gemma_mtp.files.safetensors import ITEM_BYTES, Tensor, header_bytes
from mlx_gemma_mtp.models.config import TargetConfig

CONFIGS = Path(__file__).parent.parent / "tests" / "data" / "configs"
TARGETS = {"e2b": "gemma-4-E2B-it", "26b": "gemma-4-26B-A4B-it"}
BLOCK_VALUES = 2**24
LOUD, LOUDNESS = 4, 8.0  # token ids from the middle of the vocabulary, and how much longer their rows are
MEDIA = {
    "model.vision_tower.patch_embedder.input_proj.weight": (768, 768),
    "model.embed_vision.embedding_projection.weight": (1536, 768),
    "model.audio_tower.output_proj.weight": (1536, 1024),
    "model.embed_audio.embedding_projection.weight": (1536, 1536),
}
# (mean, deviation) of vectors, the first that matches. The last norm has both signs: with positive weights a tied
# head would only repeat its input; large ones after sub-layers let the context outweigh that input. Small query and key
# norms keep attention from looking at one key alone.
VECTORS = (
    (r"model\.norm\.weight$", 0.0, 1.0),
    (r"[qk]_norm\.weight$", 0.3, 0.03),
    (r"post_(attention|feedforward)_layernorm\.weight$", 8.0, 0.8),
    (r"router\.scale$", 30.0, 3.0),
    (r"", 1.0, 0.1),
)
GENERATION = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "do_sample": True,
              "temperature": 1.0, "top_k": 64, "top_p": 0.95}  # fmt: skip
Draw = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Drawn:
    """A tensor to be written. draw(rng, row numbers, columns) -> [rows, columns], raw items; seed: of its rng."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    draw: Draw
    seed: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def blocks(self) -> Iterator[np.ndarray]:
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(self.seed.encode())))
        rows, step = math.prod(self.shape[:-1]), max(1, BLOCK_VALUES // self.shape[-1])
        for start in range(0, rows, step):
            yield self.draw(rng, np.arange(start, min(start + step, rows)), self.shape[-1])


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, cut off."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def floats(name: str, shape: tuple[int, ...]) -> Drawn:
    """A bf16 tensor of normal values."""
    if len(shape) > 1:
        mean, deviation = 0.0, shape[-1] ** -0.5
    else:
        mean, deviation = next(numbers for pattern, *numbers in VECTORS if re.search(pattern, name))
    gain = loudness(name, shape[0])

    def draw(rng: np.random.Generator, rows: np.ndarray, columns: int) -> np.ndarray:
        values = rng.standard_normal((len(rows), columns), np.float32)
        return bfloat16((values * np.float32(deviation) + np.float32(mean)) * gain(rows))

    return Drawn(name, "BF16", shape, draw, name)


def quantised(entry: Entry, form: Format) -> list[Drawn]:
    """Weight, scales and biases of an affine matrix: uniform codes, centred by the biases."""
    codes = 2**form.bits
    step = (12 / (codes**2 - 1) / entry.shape[-1]) ** 0.5  # variance of uniform codes: (codes^2 - 1) / 12
    gain = loudness(entry.name, entry.shape[0])

    def words(rng: np.random.Generator, rows: np.ndarray, columns: int) -> np.ndarray:
        return rng.integers(0, 2**32, (len(rows), columns), np.uint32)

    def scales(rng: np.random.Generator, rows: np.ndarray, columns: int) -> np.ndarray:
        values = rng.uniform(0.75 * step, 1.25 * step, (len(rows), columns)).astype(np.float32)
        return bfloat16(values * gain(rows))

    def biases(rng: np.random.Generator, rows: np.ndarray, columns: int) -> np.ndarray:
        drawn = (scales(rng, rows, columns).astype(np.uint32) << 16).view(np.float32)  # the same, from the same seed
        return bfloat16(drawn * np.float32((1 - codes) / 2))

    draws: tuple[tuple[Draw, str], ...] = ((words, "weight"), (scales, "scales"), (biases, "scales"))
    parts = writer.parts(entry, "BF16", form)
    return [Drawn(*part, draw, f"{entry.name} {seed}") for part, (draw, seed) in zip(parts, draws, strict=True)]


def loudness(name: str, vocabulary: int) -> Callable[[np.ndarray], np.ndarray]:
    """Row numbers -> factors [rows, 1]; all one except in the tables of token embeddings."""
    first = vocabulary // 2 if name.endswith("embed_tokens.weight") else -LOUD
    return lambda rows: np.where((rows >= first) & (rows < first + LOUD), LOUDNESS, 1.0).astype(np.float32)[:, None]


def published(raw: dict) -> dict[str, list[Drawn]]:
    """One file in the Hugging Face layout, for a target without experts or a drafter."""
    model = Checkpoint.read("", raw, {})
    shapes = {entry.source: entry.source_shape for entry in model.entries}
    if not model.drafter:
        shapes |= unread(model.config, configs.TARGETS[raw["model_type"]]) | MEDIA
    return {SINGLE: [floats(name, shape) for name, shape in sorted(shapes.items())]}


def unread(config: TargetConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """The K/V tensors that published files hold for the layers that read another layer's."""
    shapes = {}
    for index, layer in enumerate(config.layers):
        if not layer.owns_kv:
            path, dim = f"{prefix}layers.{index}.self_attn", layer.kv.head_dim
            shapes |= {f"{path}.{part}_proj.weight": (layer.kv.kv_heads * dim, config.hidden_size) for part in "kv"}
            shapes[f"{path}.k_norm.weight"] = (dim,)
    return shapes


def converted(raw: dict, recipe: Recipe, shard_bytes: int = writer.SHARD_BYTES) -> tuple[dict[str, list[Drawn]], dict]:
    """(files, config.json) of a target as `convert` would write them, planned by its own functions."""
    model = Checkpoint.read("", raw, {})
    formats = recipe.choose_all(model.entries, model.text)
    config = configs.written(raw, model.text, "bfloat16")
    config["quantization"] = config["quantization_config"] = quantize.record(formats, recipe.default)
    sources = {entry.name: Tensor(Path(), "BF16", entry.source_shape, 0, 0) for entry in model.entries}
    jobs = [writer.plan(e, sources[e.name], "bfloat16", formats.get(e.name)) for e in model.entries]
    return {
        file: [t for job in jobs for t in _drawn(job)] for file, jobs in writer.shards(jobs, shard_bytes).items()
    }, config


def _drawn(job: writer.Job) -> list[Drawn]:
    return quantised(job.entry, job.form) if job.form else [floats(name, shape) for name, _, shape in job.outputs]


def write(folder: Path, files: dict[str, list[Drawn]], config: dict) -> int:
    """Writes a folder, with a progress bar on a terminal; returns the bytes of the tensors.

    Raises UserError where the disk has no room for it.
    """
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total:
        raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB free; expected {total / 1e9:.1f} GB; choose another")
    folder.mkdir()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc=folder.name) as progress:
        for file, tensors in files.items():
            _write_file(folder / file, tensors, progress)
    if list(files) != [SINGLE]:
        index = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        put(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    put(folder / "config.json", config)
    put(folder / "generation_config.json", GENERATION)
    return total


def _write_file(path: Path, tensors: list[Drawn], progress: tqdm) -> None:
    """One safetensors file, on the disk and out of the page cache, so that a reader really reads."""
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header, _ = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(block)
                progress.update(block.nbytes)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def put(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer with a word for every token id: text in is not meant to work, ids in and text out do."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(vocabulary)}, "unk_token": "w3"}
    parts = ("truncation", "padding", "normalizer", "post_processor", "decoder")
    put(folder / "tokenizer.json", dict.fromkeys(parts) | {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model
    })  # fmt: skip
    put(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"})


def read_config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def make(kind: str, folder: Path) -> int:
    """Writes what `kind` names into `folder`; returns the bytes of the tensors."""
    target = read_config(TARGETS[kind])
    if kind == "e2b":
        return write(folder / TARGETS[kind], published(target), target)
    return make_pair(target, read_config(f"{TARGETS[kind]}-assistant"), folder / TARGETS[kind])


def make_pair(target: dict, drafter: dict, path: Path) -> int:
    """`path`-4bit and `path`-assistant, where `load` finds them both."""
    folder = path.with_name(f"{path.name}-4bit")
    size = write(folder, *converted(target, Recipe(Format(4, 64))))
    write_tokenizer(folder, target["text_config"]["vocab_size"])
    return size + write(path.with_name(f"{path.name}-assistant"), published(drafter), drafter)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_checkpoints", description=__doc__.splitlines()[0]
    )
    parser.add_argument("kind", choices=TARGETS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    try:
        print(make(args.kind, args.folder))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
