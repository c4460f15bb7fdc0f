"""`python -m mlx_gemma_mtp.calibrate`: what rounds cost on this machine, and from which acceptance drafts pay.

Measures the table that the automatic draft length stands on, keeps it for the pair on this machine, and shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import blas
from .costs import MAX_DRAFTS, ROWS, CostTable
from .depth import break_even
from .errors import UserError
from .generate import Bar, Parser

if TYPE_CHECKING:
    from .calibration import Costs


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.calibrate", description="Measure what drafts cost on this machine.")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="the drafter (default: auto)")
    p.add_argument("--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for what is not quantised")
    p.add_argument("--repeats", type=int, default=5, help="of every cell of the table (default: 5)")
    p.add_argument("--show", action="store_true", help="show what was measured before; measure nothing")
    p.add_argument("--plot", metavar="FILE", help="a PNG of the table (needs matplotlib)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output, instead of text")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        return run(parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected 1 or more")
    if args.draft_model == "none":
        raise UserError(
            "--draft-model is none, but it is drafts whose cost is measured; name a drafter, or leave it out"
        )
    if args.plot:
        _matplotlib(args.plot)
    blas.preload()
    from .engine import load

    engine = load(
        args.model,
        args.draft_model,
        dtype=args.dtype,
        draft_bits=args.draft_bits,
        notice=lambda message: print(f"note: {message}", file=sys.stderr),
        progress=Bar("loading"),
    )
    if engine.drafter is None:
        raise UserError("there is no drafter, so nothing to choose; name one with --draft-model")
    if args.show:
        table = engine.costs.kept()
        if table is None:
            raise UserError(f"nothing was measured before ({engine.costs.where}); leave --show out to measure it")
    else:
        table = engine.calibrate(args.repeats, Bar("measuring"))
    if args.plot:
        plot(table, engine.description, Path(args.plot))
    show(table, engine.description, engine.costs, args.json)
    return 0


def show(table: CostTable, description: str, costs: Costs, as_json: bool) -> None:
    """The rounds' milliseconds, and the acceptance from which they beat plain decoding."""
    even = {(rows, context): break_even(table, rows, context) for context in table.contexts for rows in ROWS}
    if as_json:
        cells = [{"rows": rows, "context": context, "break_even": each} for (rows, context), each in even.items()]
        print(json.dumps({"measured": description, "file": costs.where, "table": asdict(table), "cells": cells}))
        return
    print(f"measured: {description}\nkept in: {costs.where}")
    print("milliseconds of a round, by drafts; below, the acceptance at every position from which it pays")
    print("context  rows " + "".join(f"{drafts:8}" for drafts in range(MAX_DRAFTS + 1)))
    for (rows, context), each in even.items():
        times = "".join(f"{1e3 * seconds:8.2f}" for seconds in table.rounds_at(rows, context))
        marks = "".join("   never" if rate is None else f"{rate:8.2f}" for rate in each)
        print(f"{context:7} {rows:5} {times}\n{'':22}{marks}")


def plot(table: CostTable, description: str, path: Path) -> None:
    """Left the rounds over a plain one, right the break-even acceptance; a line for each number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, len(table.contexts), figsize=(5 * len(table.contexts), 7), layout="constrained", squeeze=False
    )
    for (above, below), context in zip(panels.T, table.contexts, strict=True):
        for rows in ROWS:
            seconds = table.rounds_at(rows, context)
            above.plot(range(MAX_DRAFTS + 1), [s / seconds[0] for s in seconds], marker=".", label=f"{rows} rows")
            drafts = range(1, MAX_DRAFTS + 1)
            below.plot(drafts, [rate or float("nan") for rate in break_even(table, rows, context)], marker=".")
        above.set(title=f"after {context} tokens", xlabel="drafts a round", ylabel="round, in plain steps")
        below.set(xlabel="drafts a round", ylabel="break-even acceptance", ylim=(0, 1))
        above.legend()
    figure.suptitle(description, fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)


def _matplotlib(path: str) -> None:
    """Refuses a plot that could not be drawn, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"--plot {path} needs matplotlib; pip install 'mlx-gemma-mtp[bench]'") from None
    if not Path(path).parent.is_dir() or Path(path).suffix != ".png":
        raise UserError(f"--plot is {path}, expected a .png file in a folder that exists")


if __name__ == "__main__":
    sys.exit(main())
