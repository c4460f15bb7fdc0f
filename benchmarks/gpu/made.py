"""gemma-4-26B-A4B-it at 4 bit and its drafter, with random weights that are made on the device, in a folder that every
system loads: `python -m benchmarks.gpu.made FOLDER [--layers N]`.

Names, shapes and formats are those that convert writes (benchmarks/random_checkpoints.py plans them); values are drawn
here, since a host's random numbers would take minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import random_checkpoints as planned
from benchmarks.random_checkpoints import Drawn
from convert.quantize import Format, Recipe
from mlx_gemma_mtp.files.folder import INDEX, SINGLE
from mlx_gemma_mtp.files.safetensors import ITEM_BYTES, header_bytes

TARGET = "gemma-4-26B-A4B-it"
GROUP, BITS = 64, 4
KINDS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def raws(layers: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the published configs of target and drafter. layers: of the target; its last ones are left out."""
    target, drafter = (planned.read_config(name) for name in (TARGET, f"{TARGET}-assistant"))
    if layers:
        text = target["text_config"]
        kinds = text["layer_types"][-layers:]  # the last is a full one
        target = target | {"text_config": text | {"num_hidden_layers": layers, "layer_types": kinds}}
    return target, drafter


def make(folder: Path, target: dict[str, Any], drafter: dict[str, Any], hollow: bool = False) -> int:
    """Writes FOLDER-4bit and FOLDER-assistant, where `load` finds both. Returns the bytes of the tensors.

    hollow: all values are zeros, which take neither time nor room on the disk; a rehearsal computes zeros anyhow.
    """
    files, config = planned.converted(target, Recipe(Format(BITS, GROUP)))
    both = folder.with_name(f"{folder.name}-4bit"), folder.with_name(f"{folder.name}-assistant")
    planned_files = (files, config), (planned.published(drafter), drafter)
    size = sum(_write(path, *each, hollow) for path, each in zip(both, planned_files, strict=True))
    planned.write_tokenizer(both[0], target["text_config"]["vocab_size"])
    return size


def _write(folder: Path, files: dict[str, list[Drawn]], config: dict[str, Any], hollow: bool) -> int:
    folder.mkdir(parents=True)
    for file, tensors in files.items():
        if hollow:
            _write_hollow(folder / file, tensors)
            continue
        mx.save_safetensors(str(folder / file), arrays(tensors), {"format": "mlx"})
        mx.clear_cache()
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    if list(files) != [SINGLE]:
        index = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        planned.put(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    planned.put(folder / "config.json", config)
    planned.put(folder / "generation_config.json", planned.GENERATION)
    return total


def _write_hollow(path: Path, tensors: Sequence[Drawn]) -> None:
    """Writes a file's header, and a hole for its values."""
    tensors = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header, _ = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))


def arrays(tensors: Sequence[Drawn]) -> dict[str, mx.array]:
    """Returns the values of planned tensors, of the distributions that random_checkpoints.py draws on the host."""
    made: dict[str, mx.array] = {}
    bits = {}
    for tensor in tensors:
        name, shape = tensor.name, tensor.shape
        if tensor.dtype == "U32":
            made[name] = words(shape)
        elif name.endswith(".scales"):
            inputs = shape[-1] * GROUP
            words_of = next(each for each in tensors if each.name == name.replace(".scales", ".weight"))
            bits[name] = words_of.shape[-1] * 32 // inputs
            step = (12 / (4 ** bits[name] - 1) / inputs) ** 0.5
            values = mx.random.uniform(0.75 * step, 1.25 * step, shape) * _gain(words_of.name, shape)
            made[name] = values.astype(KINDS[tensor.dtype])
        elif not name.endswith(".biases"):
            made[name] = _floats(name, shape).astype(KINDS[tensor.dtype])
    for name, of in bits.items():
        made[name.replace(".scales", ".biases")] = made[name] * ((1 - 2**of) / 2)
    mx.eval(made)
    return made


def words(shape: Sequence[int]) -> mx.array:
    """Returns random words."""
    low, high = (mx.random.randint(0, 1 << 16, shape, mx.uint32) for _ in range(2))
    return low | (high << 16)


def _floats(name: str, shape: Sequence[int]) -> mx.array:
    mean, deviation = 0.0, shape[-1] ** -0.5
    if len(shape) == 1:
        mean, deviation = next(numbers for pattern, *numbers in planned.VECTORS if re.search(pattern, name))
    return (mx.random.normal(shape) * deviation + mean) * _gain(name, shape)


def _gain(name: str, shape: Sequence[int]) -> mx.array:
    """Returns what rows of a table are louder by, [rows, 1, ..]; one number elsewhere."""
    if not name.endswith("embed_tokens.weight"):
        return mx.array(1.0)
    return mx.array(planned.loudness(name, shape[0])(np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.made", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of the target, for a rehearsal")
    parser.add_argument("--hollow", action="store_true", help="write zeros that take no room, for a rehearsal")
    parser.add_argument("--out", type=Path, help="append a line of JSON there")
    args = parser.parse_args(argv)
    began = time.monotonic()
    size = make(args.folder / TARGET, *raws(args.layers), args.hollow)
    line = json.dumps({"what": "made", "bytes": size, "seconds": round(time.monotonic() - began, 1)})
    print(line)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            print(line, file=file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
