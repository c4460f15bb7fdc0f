"""`python -m mlx_gemma_mtp.calibrate`: what rounds cost on this machine, and from which acceptance drafts pay.

Measures the table that the automatic draft length stands on, keeps it for the pair on this machine, and shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cli.command import Bar, Parser, check_plot, command, loaded, written
from .cli.flags import add_kv_bits, add_row_invariant
from .cli.plots import dress, heading, panels
from .errors import UserError
from .speculative.choice import break_even
from .speculative.costs import MAX_DRAFTS, ROWS, CostTable

COPIES = (8, 11, 15)  # drafts that cost nothing to make, of which text shows the verify


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.calibrate", description="Measure what drafts cost on this machine.")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="the drafter (default: auto)")
    p.add_argument("--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for what is not quantised")
    add_kv_bits(p)
    add_row_invariant(p)
    p.add_argument("--repeats", type=int, default=5, help="of every cell of the table (default: 5)")
    p.add_argument("--full", action="store_true", help="all rows and drafts after long texts, too; takes much longer")
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
        tables = engine.calibrate(args.repeats, Bar("measuring"), args.full)
    if args.plot:
        with written(args.plot) as part:
            plot(tables, engine.description, part, args.plot.suffix[1:])
    if args.json:
        print(json.dumps({"measured": engine.description} | {kind: record(t) for kind, t in tables.items()}))
        return 0
    print(f"measured: {engine.description}")
    print("milliseconds of a round, by drafts; below, the acceptance at every position from which it pays")
    print("+N: of a verify of N copies; ~: not measured, but estimated by the bytes that attention reads")
    for kind, table in tables.items():
        print(f"\n{kind} text (kept in {engine.costs[kind].where})\n{text(table)}")
    return 0


class Cell(NamedTuple):
    """What rounds of some rows cost after some tokens.

    estimated: whether it was not measured. seconds: of rounds with 0 to MAX_DRAFTS drafts. break_even: the acceptance
    from which 1 to MAX_DRAFTS drafts pay, None where they never do. verify: seconds of verifying 0 to WIDEST drafts
    that others than the drafter made.
    """

    context: int
    rows: int
    estimated: bool
    seconds: Sequence[float]
    break_even: list[float | None]
    verify: list[float]


def cells(table: CostTable) -> Iterator[Cell]:
    """Yields the cells of a table."""
    for context in table.contexts:
        estimated = table.estimated and context == table.contexts[-1]
        for rows in ROWS:
            seconds = table.rounds_at(rows, context)[: MAX_DRAFTS + 1]
            even, verify = break_even(table, rows, context), table.verify_at(rows, context)
            yield Cell(context, rows, estimated, seconds, even, verify)


def record(table: CostTable) -> list[dict[str, Any]]:
    """Returns a table's cells as dictionaries, for JSON."""
    return [cell._asdict() for cell in cells(table)]


def text(table: CostTable) -> str:
    """Returns a table as text: milliseconds of rounds by drafts, then of verifies of copies, and below them the
    break-even acceptance.
    """
    copies = "".join(f"{f'+{count}':>8}" for count in COPIES)
    lines = ["context  rows " + "".join(f"{drafts:8}" for drafts in range(MAX_DRAFTS + 1)) + copies]
    for cell in cells(table):
        seconds = (*cell.seconds, *(cell.verify[count] for count in COPIES))
        context = f"{'~' * cell.estimated}{cell.context}"
        lines.append(f"{context:>7} {cell.rows:5} " + "".join(f" {1e3 * each:7.2f}" for each in seconds))
        lines.append(" " * 22 + "".join("   never" if rate is None else f"{rate:8.2f}" for rate in cell.break_even))
    return "\n".join(lines)


def plot(tables: Mapping[str, CostTable], description: str, path: Path, kind: str = "png") -> None:
    """Draws a table: above, the cost of a round over that of a plain one; below, the break-even acceptance.

    There is a column for each kind of text and context, and a line for each number of rows. kind: 'png', 'svg', 'pdf'.
    """
    columns = [
        (kind, context, [cell for cell in cells(table) if cell.context == context])
        for kind, table in tables.items()
        for context in table.contexts
    ]
    figure, axes = panels(2, len(columns), 4.5 * len(columns), 7)
    drafts = range(MAX_DRAFTS + 1)
    for (above, below), (text_kind, context, some) in zip(axes.T, columns, strict=True):
        for cell in some:
            label = "1 row" if cell.rows == 1 else f"{cell.rows} rows"
            above.plot(drafts, [each / cell.seconds[0] for each in cell.seconds], marker=".", label=label)
            below.plot(drafts[1:], [rate or float("nan") for rate in cell.break_even], marker=".")
        about = " (estimated)" if some[0].estimated else ""
        above.set(
            title=f"{text_kind}, after {context} tokens{about}", xlabel="drafts a round", ylabel="round, in plain steps"
        )
        below.set(xlabel="drafts a round", ylabel="break-even acceptance", ylim=(0, 1))
        dress(above)
        dress(below, legend="")
    heading(figure, "", description)
    figure.savefig(path, format=kind)


if __name__ == "__main__":
    sys.exit(main())
