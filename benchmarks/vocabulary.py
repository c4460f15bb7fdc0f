"""What a vocabulary of real size costs beside the model: `python -m benchmarks.vocabulary`.

Sampling: settings of a request on made-up logits over 262,144 tokens, a few of them likely, as a language model's are.
A place is one position of one row; a round is 8 rows of 5. Each is timed as the loop runs it (sampling/drawing.py, the
check of the sums included for a round), beside an argmax and a softmax over the same logits of one place. Start: see
vocabulary_start.py.

Calls take turns, each turn beginning with the next one, and a ratio is over the reference's call of the same turn.
Printed are medians and quartiles, of wall time and of CPU seconds, which is the better figure on a shared machine. A
limit is what the ratio of CPU seconds may be on a CPU, and of wall time elsewhere; exit code 1 where one is exceeded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.command import command
from benchmarks.experts import interleaved, report
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine import blas

VOCAB, ROWS, POSITIONS, CAP, LIKELY = 262_144, 8, 5, 30.0, 60
LEAST = 1024  # entries: fewer are no vocabulary
ARGMAX, SOFTMAX = "argmax", "softmax"


class Setting(NamedTuple):
    """params: of SamplingParams. over: the reference. limit: of the ratio; None for none."""

    params: dict[str, Any]
    over: str = ARGMAX
    limit: float | None = None


DEFAULT = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
OPEN = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
PLACE = {
    "greedy": Setting({"temperature": 0.0}),
    "default: top-k 64, top-p 0.95": Setting(DEFAULT, limit=3),
    "min-p 0.05": Setting(OPEN | {"min_p": 0.05}, limit=3),
    "bias of 300 tokens": Setting(DEFAULT | {"logit_bias": 300}, limit=3),
    "top-p 0.95": Setting(OPEN | {"top_p": 0.95}, limit=6),
    "no filter": Setting(OPEN, SOFTMAX, 2),
    "penalties after 2,000 tokens": Setting(DEFAULT | {"repetition_penalty": 1.1, "frequency_penalty": 0.1}),
}
ROUND = {"default": Setting(DEFAULT, limit=45), "default, masked": Setting(DEFAULT)} | {
    name: Setting(OPEN | more)
    for name, more in {"min-p": {"min_p": 0.05}, "top-p": {"top_p": 0.95}, "no filter": {}}.items()
}
MASKED = "default, masked"


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.vocabulary", description=__doc__.splitlines()[0])
    p.add_argument("what", nargs="?", choices=("sampling", "start", "all"), default="all")
    p.add_argument(
        "--entries", type=int, default=VOCAB, metavar="N", help=f"of sampling's vocabulary (default: {VOCAB})"
    )
    p.add_argument("--repeats", type=int, default=21, metavar="N", help="turns; a start takes a quarter (default: 21)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a record to this file")
    return p


def run(args: argparse.Namespace) -> int:
    for name, value, least in (("--entries", args.entries, LEAST), ("--repeats", args.repeats, 1)):
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")
    if args.json:
        check_file("--json", args.json)
    blas.preload()
    from benchmarks import terminal, vocabulary_start

    records = []
    if args.what in ("start", "all"):
        records += vocabulary_start.full_start(max(args.repeats // 4, 1))
    if args.what in ("sampling", "all"):
        records += sampling(args.entries, args.repeats)
    about = {"kind": "vocabulary", "entries": args.entries, "load": machine.load(), "machine": machine.facts()}
    about |= {"versions": machine.versions(), "commit": machine.commit()}
    terminal.out.print(shown(records, f"a vocabulary of {args.entries:,}"))
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(about | record) + "\n")
    return 0 if args.entries < VOCAB or all(within(record) for record in records) else 1


def sampling(entries: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a record for each setting, of one place and of a round: see experts.report, and `limit`."""
    import mlx.core as mx

    one, many = made_up(1, 1, entries), made_up(ROWS, POSITIONS, entries)
    references = {
        ARGMAX: lambda: mx.eval(mx.argmax(one, axis=-1)),
        SOFTMAX: lambda: mx.eval(mx.softmax(one, axis=-1, precise=True)),
    }
    of_place = {name: drawing(one, setting, entries) for name, setting in PLACE.items()}
    of_place["log-probabilities"] = log_probabilities(one)
    of_round = {name: drawing(many, setting, entries, name == MASKED) for name, setting in ROUND.items()}
    limits = {name: (setting.over, setting.limit) for name, setting in PLACE.items()}
    limits["log-probabilities"] = (SOFTMAX, 2)
    places = records("one place", references, of_place, limits, repeats)
    limits = {name: (setting.over, setting.limit) for name, setting in ROUND.items()}
    return places + records(f"a round of {ROWS} x {POSITIONS}", references, of_round, limits, max(repeats // 3, 1))


def records(
    part: str,
    references: dict[str, Callable[[], None]],
    calls: dict[str, Callable[[], None]],
    limits: dict[str, tuple[str, float | None]],
    repeats: int,
) -> list[dict[str, Any]]:
    """Times these calls in turns, after one of each."""
    every = references | calls
    for call in every.values():
        call()
    times = interleaved(every, repeats)
    by_reference = {name: list(report(times, name, {"part": part})) for name in references}
    places = {name: place for place, name in enumerate(every)}
    return [
        by_reference[over][places[name]] | {"limit": limit}
        for name, (over, limit) in ({name: (name, None) for name in references} | limits).items()
    ]


def made_up(rows: int, positions: int, entries: int) -> Any:
    """Returns logits, float32 [rows, positions, entries]: normal ones, and LIKELY that are up to 25 above."""
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, positions, entries)).astype(np.float32) * 2.5
    for place in logits.reshape(-1, entries):
        place[rng.choice(entries, LIKELY, replace=False)] += 25 * rng.random(LIKELY)
    array = mx.array(logits)
    mx.eval(array)
    return array


def drawing(logits: Any, setting: Setting, entries: int, masked: bool = False) -> Callable[[], None]:
    """Returns a call that draws as a round does after these logits."""
    import mlx.core as mx
    import numpy as np

    from mlx_gemma_mtp.ops.topk import total
    from mlx_gemma_mtp.sampling.distribution import Rules
    from mlx_gemma_mtp.sampling.drawing import draw
    from mlx_gemma_mtp.sampling.params import SamplingParams
    from mlx_gemma_mtp.sampling.penalties import TokenCounts

    rows, positions, _ = logits.shape
    rng, settings = np.random.default_rng(1), {"seed": 1, "top_k": -1, "top_p": 1.0} | setting.params
    if biased := settings.pop("logit_bias", 0):
        settings["logit_bias"] = {int(token): 1.0 for token in rng.choice(entries, biased, replace=False)}
    rules = Rules.of([SamplingParams(**settings)] * rows, entries)
    counts = TokenCounts.of([rng.integers(0, entries, 2000).tolist()] * rows, entries) if rules.penalties else None
    bits = rng.integers(0, 2**32, (rows, positions, -(-entries // 32)), np.uint32) if masked else None
    at = mx.broadcast_to(mx.arange(positions), (rows, positions))

    def call() -> None:
        mask = None if bits is None else mx.array(bits)
        found = draw(logits, rules, at, CAP, token_counts=counts, mask=mask)
        mx.eval(found.tokens, *([total(logits)] if positions > 1 else []))

    return call


def log_probabilities(logits: Any) -> Callable[[], None]:
    """Returns a call that makes the report of one place: 20 of the likeliest tokens."""
    import mlx.core as mx

    from mlx_gemma_mtp.sampling.distribution import logprobs

    token = mx.zeros((1, 1), mx.int32)
    return lambda: mx.eval(*logprobs(logits, token, CAP, 20))


def within(record: dict[str, Any]) -> bool:
    """Whether a record keeps its limit."""
    from mlx_gemma_mtp.machine.device import Kind, kind

    ratio = record["cpu_ratio" if kind() is Kind.CPU else "wall_ratio"]
    return record["limit"] is None or ratio[1] <= record["limit"]


def shown(records: list[dict[str, Any]], title: str) -> Any:
    """The table."""
    from rich.table import Table

    table = Table(
        "part", "what", "ms", "CPU ms", "over", "ratio [quartiles]", "CPU ratio [quartiles]", "limit", title=title
    )
    for record in records:
        ratios = (
            f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in (record["wall_ratio"], record["cpu_ratio"])
        )
        limit = "" if record["limit"] is None else f"{record['limit']:g}{'' if within(record) else ' exceeded'}"
        numbers = (f"{record['wall_ms']:.2f}", f"{record['cpu_ms']:.2f}")
        table.add_row(record["part"], record["path"], *numbers, record["over"], *ratios, limit)
    return table


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where a limit is exceeded, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
