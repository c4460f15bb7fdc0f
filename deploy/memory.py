"""`python -m deploy.memory FOLDER`: what models take, by model and context, with the arithmetic of `convert inspect`.

FOLDER has NAME.json, the config.json of each target, as tests/data/configs does. Weights: parameters of the text model
in 16 bits, or in 4 bits with a scale and a bias of 16 bits for each 64. K/V: of one sequence, in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from convert.inspect import CONTEXTS, _kv
from convert.names import entries, is_integer
from mlx_gemma_mtp.models.config import TargetConfig

BITS = {"4 bits": 4 + 2 * 16 / 64, "bf16": 16}


def parameters(config: TargetConfig) -> int:
    """Returns how many numbers a target's text model has."""
    return sum(math.prod(entry.shape) for entry in entries(config, "gemma4") if not is_integer(entry.name))


def rows(folder: Path) -> Iterator[tuple[str, list[float]]]:
    """Yields each target's name and its GB: weights in each format of BITS, then K/V at each of CONTEXTS."""
    for path in sorted(folder.glob("*-it.json")):
        config = TargetConfig.from_dict(json.loads(path.read_text()))
        count = parameters(config)
        sizes = [count * bits / 8 for bits in BITS.values()] + list(_kv(config.kv).values())
        yield path.stem.removeprefix("gemma-4-").removesuffix("-it"), [size / 1e9 for size in sizes]


def table(folder: Path) -> str:
    """Returns the table of docs/deploy.md."""
    contexts = [f"K/V, {tokens // 1024}k" for tokens in CONTEXTS]
    head = ["", *(f"weights, {name}" for name in BITS), *contexts]
    lines = [head, ["---"] * len(head)]
    lines += [
        [name, *(f"{size:.1f}" if size >= 1 else f"{size:.2f}" for size in sizes)] for name, sizes in rows(folder)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gb(size: float) -> str:
    return f"{size:.1f}" if size >= 1 else f"{size:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Prints the table. Returns 0."""
    p = argparse.ArgumentParser(prog="deploy.memory", description=__doc__)
    p.add_argument("folder", type=Path)
    print(table(p.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
