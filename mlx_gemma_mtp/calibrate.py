"""`python -m mlx_gemma_mtp.calibrate`: what rounds cost on this machine, and from which acceptance drafts pay.

Measures the table that the automatic draft length stands on, keeps it for the pair on this machine, and shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .cli.command import Bar, Parser, check_plot, command, loaded, written
from .cli.flags import add_kv_bits, add_row_invariant
from .cli.plots import dress, heading, panels
from .errors import UserError
from .speculative.choice import break_even
from .speculative.costs import MAX_DRAFTS, ROWS, CostTable


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.calibrate", description="Measure what drafts cost on this machine.")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="the drafter (default: auto)")
    p.add_argument("--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for what is not quantised")
    add_kv_bits(p)
    add_row_invariant(p)
    p.add_argument("--repeats", type=int, default=5, help="of every cell of the table (default: 5)")
    p.add_argument("--show", action="store_true", help="show what was measured before; measure nothing")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table (extra `bench`)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output, instead of text")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected 1 or more")
    if args.draft_model == "none":
        raise UserError(
            "--draft-model is none, but it is drafts whose cost is measured; name a drafter, or leave it out"
        )
    if args.plot:
        check_plot(args.plot)
    bits = {"draft_bits": args.draft_bits, "kv_bits": args.kv_bits, "kv_bits_rings": args.kv_bits_rings}
    engine = loaded(args.model, args.draft_model, dtype=args.dtype, row_invariant=args.row_invariant, **bits)
    if engine.drafter is None:
        raise UserError("there is no drafter, so nothing to choose; name one with --draft-model")
    if args.show:
        tables = {kind: table for kind, costs in engine.costs.items() if (table := costs.kept())}
        if not tables:
            where = engine.costs["greedy"].where
            raise UserError(f"nothing was measured before (there is no {where}); leave --show out to measure it")
    else:
        tables = engine.calibrate(args.repeats, Bar("measuring"))
    if args.plot:
        with written(args.plot) as part:
            plot(tables, engine.description, part, args.plot.suffix[1:])
    if args.json:
        print(json.dumps({"measured": engine.description} | {kind: record(t) for kind, t in tables.items()}))
        return 0
    print(f"measured: {engine.description}")
    print("milliseconds of a round, by drafts; below, the acceptance at every position from which it pays")
    for kind, table in tables.items():
        print(f"\n{kind} text (kept in {engine.costs[kind].where})\n{text(table)}")
    return 0


def cells(table: CostTable) -> Iterator[tuple[int, int, list[float], list[float | None]]]:
    """Yields (context, rows, seconds, break-even) for each cell of a table.

    seconds: of rounds with 0 to MAX_DRAFTS drafts; break-even: the acceptance from which 1 to MAX_DRAFTS drafts pay,
    None where they never do.
    """
    for context in table.contexts:
        for rows in ROWS:
            yield context, rows, table.rounds_at(rows, context), break_even(table, rows, context)


def record(table: CostTable) -> list[dict[str, Any]]:
    """Returns a table's cells as dictionaries, for JSON."""
    names = ("context", "rows", "seconds", "break_even")
    return [dict(zip(names, cell, strict=True)) for cell in cells(table)]


def text(table: CostTable) -> str:
    """Returns a table as text: milliseconds of rounds by drafts, and below them the break-even acceptance."""
    lines = ["context  rows " + "".join(f"{drafts:8}" for drafts in range(MAX_DRAFTS + 1))]
    for context, rows, seconds, even in cells(table):
        lines.append(f"{context:7} {rows:5} " + "".join(f"{1e3 * each:8.2f}" for each in seconds))
        lines.append(" " * 22 + "".join("   never" if rate is None else f"{rate:8.2f}" for rate in even))
    return "\n".join(lines)


def plot(tables: Mapping[str, CostTable], description: str, path: Path, kind: str = "png") -> None:
    """Draws a table: above, the cost of a round over that of a plain one; below, the break-even acceptance.

    There is a column for each kind of text and context, and a line for each number of rows. kind: 'png', 'svg', 'pdf'.
    """
    columns = [(kind, table, context) for kind, table in tables.items() for context in table.contexts]
    figure, axes = panels(2, len(columns), 4.5 * len(columns), 7)
    drafts = range(MAX_DRAFTS + 1)
    for (above, below), (text_kind, table, context) in zip(axes.T, columns, strict=True):
        for rows in ROWS:
            seconds, even = table.rounds_at(rows, context), break_even(table, rows, context)
            label = "1 row" if rows == 1 else f"{rows} rows"
            above.plot(drafts, [each / seconds[0] for each in seconds], marker=".", label=label)
            below.plot(drafts[1:], [rate or float("nan") for rate in even], marker=".")
        above.set(title=f"{text_kind}, after {context} tokens", xlabel="drafts a round", ylabel="round, in plain steps")
        below.set(xlabel="drafts a round", ylabel="break-even acceptance", ylim=(0, 1))
        dress(above)
        dress(below, legend="")
    heading(figure, "", description)
    figure.savefig(path, format=kind)


if __name__ == "__main__":
    sys.exit(main())
