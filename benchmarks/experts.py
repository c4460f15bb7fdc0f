"""A layer's routed experts, timed in this process: `python -m benchmarks.experts`.

- layer: experts of the size of Gemma 4 26B-A4B (2816 / 704 / 128 / 8, random 4-bit weights, float32 inputs) here and in
  mlx-lm, the same weights, at several numbers of tokens. Ratios are this package's time over mlx-lm's.
- bundled: the first layer of the bundled pair in float32, with the choices it makes on a real prompt: this package's
  experts, and pairs, sorted pairs and all experts densely. Ratios are over `pairs`.

Calls take turns, so that other load falls on all alike, and each turn starts with another. Printed are medians, and of
the ratios within a turn the quartiles, of wall time and of CPU seconds (the better figure on a shared machine). Results
must agree: exit code 1 where they differ. MLX_GEMMA_MTP_BLAS chooses the BLAS, as for the package's commands.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine
from mlx_gemma_mtp.cli.command import check_file
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine import blas
from mlx_gemma_mtp.models.config import TargetConfig

DATA = Path(__file__).parent.parent / "tests" / "data"
CONFIG = DATA / "configs" / "gemma-4-26B-A4B-it.json"
TOLERANCE = 1e-4  # of the largest value of a result


@dataclass
class Times:
    """Of one path at one number of tokens: seconds of every call."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def call(self, function: Callable[[], object]) -> None:
        start = time.perf_counter(), time.process_time()
        function()
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        self.wall.append(wall)
        self.cpu.append(cpu)


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Every call once a turn, each turn beginning with the next one."""
    times = {name: Times() for name in calls}
    names = list(calls)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].call(calls[name])
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)"""
    if len(values) == 1:
        return (values[0],) * 3
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def report(times: dict[str, Times], reference: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record a path: medians in ms, and quartiles of its time over the reference's in the same turn."""
    base = times[reference]
    for path, own in times.items():
        yield about | {
            "path": path,
            "wall_ms": 1e3 * statistics.median(own.wall),
            "cpu_ms": 1e3 * statistics.median(own.cpu),
            "over": reference,
            "wall_ratio": quartiles([a / b for a, b in zip(own.wall, base.wall, strict=True)]),
            "cpu_ratio": quartiles([a / b for a, b in zip(own.cpu, base.cpu, strict=True)]),
            "repeats": len(own.wall),
        }


def measure(
    paths: dict[str, Callable], inputs: tuple, reference: str, repeats: int, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Times paths on inputs, after a call of each whose results are compared with the reference's."""
    import mlx.core as mx

    expected = paths[reference](*inputs)
    for path, function in paths.items():
        error = (mx.abs(function(*inputs) - expected).max() / mx.abs(expected).max()).item()
        if not error < TOLERANCE:
            raise Differs(f"{about['part']}, {about['tokens']} tokens: {path} is {error:.1e} off {reference}")
    calls = {path: (lambda function=function: mx.eval(function(*inputs))) for path, function in paths.items()}
    yield from report(interleaved(calls, repeats), reference, about)


class Differs(Exception):
    """Two paths gave different results; the message says which."""


def of_layer(tokens: list[int], repeats: int, bits: int) -> Iterator[dict[str, Any]]:
    """The 26B's experts, here and in mlx-lm."""
    from benchmarks import expert_paths

    config = TargetConfig.from_dict(json.loads(CONFIG.read_text(encoding="utf-8")))
    paths = expert_paths.layers(config.hidden_size, config.moe, bits)
    for count in tokens:
        inputs = expert_paths.random_inputs(count, config.hidden_size, config.moe)
        about = {"part": "layer", "tokens": count, "distinct": len(set(inputs[1].reshape(-1).tolist()))}
        yield from measure(paths, inputs, expert_paths.THEIRS, repeats, about)


def of_bundled(tokens: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """The bundled pair's experts in float32: what the package does, and pairs, sorted and dense."""
    from benchmarks import expert_paths
    from mlx_gemma_mtp import load

    engine = load(draft_model="none", dtype="float32")
    prompts = [entry["prompt"] for entry in json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))]
    prompt = max(prompts, key=len)
    paths = expert_paths.bundled(engine)
    for count in tokens:
        inputs = expert_paths.recorded_inputs(engine, prompt, count)
        about = {"part": "bundled", "tokens": count, "distinct": len(set(inputs[1].reshape(-1).tolist()))}
        yield from measure(paths, inputs, "pairs", repeats, about)


HEADER = (
    "| part | tokens | distinct experts | path | ms | CPU ms | over | ratio [quartiles] | CPU ratio [quartiles] |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(record: dict[str, Any]) -> str:
    every = (record["wall_ratio"], record["cpu_ratio"])
    ratios = (f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in every)
    cells = (
        record["part"],
        f"{record['tokens']}",
        f"{record['distinct']}",
        record["path"],
        f"{record['wall_ms']:.2f}",
        f"{record['cpu_ms']:.2f}",
        record["over"],
        *ratios,
    )
    return f"| {' | '.join(cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.experts", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("layer", "bundled", "all"), default="all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 5, 8, 16, 32], help="of the layer")
    parser.add_argument("--bundled-tokens", type=int, nargs="+", default=[8, 32], help="of the bundled pair")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="of the layer's weights (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="of the layer; the bundled pair's are 20 times as many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a path to this file")
    return parser


def _check(args: argparse.Namespace) -> None:
    numbers = {"--repeats": [args.repeats], "--tokens": args.tokens, "--bundled-tokens": args.bundled_tokens}
    for flag, values in numbers.items():
        if min(values) < 1:
            raise UserError(f"{flag} is {min(values)}, expected at least 1")
    if args.json:
        check_file("--json", args.json)


def _run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.what in ("layer", "all"):
        yield from of_layer(args.tokens, args.repeats, args.bits)
    if args.what in ("bundled", "all"):
        yield from of_bundled(args.bundled_tokens, 20 * args.repeats)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where paths differ, 2 after a user error, 130 after an interruption."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        blas.preload()
        facts = machine.facts() | machine.versions() | {"blas": blas.name(), "load": round(os.getloadavg()[0], 1)}
        print(", ".join(f"{key} {value}" for key, value in facts.items()), HEADER, sep="\n\n")
        for record in tqdm(_run(args), unit="path", disable=None):
            tqdm.write(row(record))
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    print(json.dumps(record | facts), file=file)
    except (UserError, Differs) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
