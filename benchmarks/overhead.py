"""Where a round's time goes: `python -m benchmarks.overhead`.

Three views of the same texts: the loop as it is, its time split into what Python builds, dispatches and waits for;
each stage evaluated by itself, which is what it costs where nothing overlaps; and the primitives of each stage with
the host syncs of a round (trace.py: on this backend, not launches). Then the top of a profile. With a model this small
and a fast BLAS (found by itself; MLX_GEMMA_MTP_BLAS=off keeps MLX's own) the CPU imitates a machine whose arithmetic
is cheap.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import machine, prompts
from benchmarks.command import command
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine import blas


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.overhead", description=__doc__.splitlines()[0])
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto)")
    p.add_argument("--num-draft-tokens", type=int, default=4, metavar="N", help="0 is plain decoding (default: 4)")
    p.add_argument("--batch", type=int, default=1, help="rows (default: 1)")
    p.add_argument("--max-tokens", type=int, default=96, help="of each text, whatever comes (default: 96)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--top", type=int, default=15, help="lines of the profile (default: 15)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON")
    return p


def run(args: argparse.Namespace) -> int:
    least = {"--num-draft-tokens": (args.num_draft_tokens, 0), "--max-tokens": (args.max_tokens, 8),
             "--repeats": (args.repeats, 1), "--batch": (args.batch, 1), "--top": (args.top, 1)}  # fmt: skip
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"{name} is {value}, expected at least {smallest}")
    if args.batch > prompts.EACH:
        raise UserError(f"--batch is {args.batch}, expected at most {prompts.EACH}")
    if args.json:
        check_file("--json", args.json)
    blas.preload()
    from benchmarks import terminal
    from benchmarks.phases import Load, measure, profile  # after the BLAS: these import MLX
    from mlx_gemma_mtp import load

    engine = load(args.model, args.draft_model, notice=terminal.note)
    if engine.drafter is None and args.num_draft_tokens:
        raise UserError("there is no drafter; name one with --draft-model, or give --num-draft-tokens 0")
    work = Load(engine, prompts.of("code")[: args.batch], args.num_draft_tokens, args.max_tokens)
    before = machine.load()
    found = measure(work, args.repeats) | {"profile": profile(work, args.top)}
    about = {
        "kind": "overhead",
        "model": Path(args.model).name if args.model else "bundled",
        "computes": engine.description,
        "drafts": args.num_draft_tokens,
        "batch": args.batch,
        "load_before": before,
        "load_after": machine.load(),
        "machine": machine.facts(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    terminal.out.print(*shown(found, f"{args.num_draft_tokens} drafts, {args.batch} rows; {engine.description}"))
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(about | found) + "\n")
    return 0


def shown(found: dict[str, Any], title: str) -> list[Any]:
    """The tables: parts of a round, and the profile."""
    from rich.table import Table

    parts = Table("part", "in the loop, ms", "alone, ms", "primitives", title=title)
    for part in dict.fromkeys((*found["loop_ms"], *found["primitives"])):
        columns = (found[key].get(part) for key in ("loop_ms", "alone_ms", "primitives"))
        parts.add_row(part, *("" if value is None else f"{value:g}" for value in columns))
    whole = f"{found['round_ms']:g} (measured apart)"
    parts.add_row("a round", whole, f"{sum(found['alone_ms'].values()):.3f}", f"{found['primitives_per_round']:g}")
    parts.caption = (
        f"{found['tokens_per_round']:g} tokens a round, {found['host_syncs_per_round']:g} host syncs a round, "
        f"{found['rounds']} rounds"
    )
    top = Table("function", "own ms/round", "calls/round", title="profile (slower than the loop), prefill included")
    for line in found["profile"]:
        top.add_row(line["function"], f"{line['own_ms']:g}", f"{line['calls']:g}")
    return [parts, top]


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
