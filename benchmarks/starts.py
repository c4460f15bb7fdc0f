"""Replays the first tokens of a process on recorded traces: `python -m benchmarks.starts [--half 1]`.

Compared is the time of the first 128 tokens of each row with that of the best fixed length and of plain decoding, for
1, 2, 4 and 8 rows, over several beginnings, on one half of the recorded texts (constants were chosen on half 0):

  first       an unknown pair: a short measurement of so many rows, as long as it takes on this machine, and nothing
              known of acceptance
  second      what a process left that wrote three texts a row, of the other half of the texts
  calibrated  the acceptance of the other half, and costs by `calibrate`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma_mtp.engine import calibration
from mlx_gemma_mtp.engine.calibration import QUICK_REPEATS, QUICK_SECONDS, timed
from mlx_gemma_mtp.speculative.costs import (
    MAX_DRAFTS,
    ROWS,
    Cell,
    CostTable,
    Drafted,
    Place,
    Verified,
    updated,
)
from mlx_gemma_mtp.speculative.depth import AUTO, GREEDY, Depth, DraftRow
from mlx_gemma_mtp.speculative.history import LASTING, Acceptance

from .replay import DATA, FREE, NOISY, Clock, Trace, by, read_table

TOKENS = 128  # of each row
HEAD = 64  # tokens of a prompt
BEFORE = 3  # texts of each row in the process before a second start

Cells = tuple[dict[Cell, float], dict[Place, float]]  # costs.Verified and costs.Drafted


def read_texts(path: Path) -> dict[str, list[Trace]]:
    """Returns the recorded texts of each class."""
    arrays, found = np.load(path), {}
    for name in [key.removesuffix("_starts") for key in arrays if key.endswith("_starts")]:
        cuts = arrays[f"{name}_starts"][1:]
        parts = (np.split(arrays[f"{name}_{each}"], cuts) for each in ("accepted", "confidences"))
        found[name] = [Trace(*each) for each in zip(*parts, strict=True)]
    return found


class Machine:
    """What `calibration.Bench` is to a pair: rounds of so many rows take what `truth` says, as a clock sees them."""

    def __init__(self, truth: CostTable, clock: Clock, draws: np.random.Generator, rows: int, context: int):
        self.truth, self.place, self.done = truth, (rows, context), 0
        self.observed = partial(clock.observe, draws=draws)

    def rounds(self, width: int) -> tuple[list[float], list[float]]:
        whole, alone = self.truth.rounds_at(*self.place)[width], self.truth.verify_at(*self.place)[width]
        seconds = [whole] * (2 if width <= MAX_DRAFTS else 1) + [alone]
        self.done += len(seconds)
        *chained, last = (self.observed(each, rounds=self.done) for each in seconds)
        return chained, [last]


def quick(truth: CostTable, rows: int, clock: Clock, draws: np.random.Generator) -> Cells:
    """Returns what the short measurement of a first start makes of a machine."""
    bench = partial(Machine, truth, clock, draws)
    return timed(bench, calibration.quick(rows), QUICK_REPEATS, QUICK_SECONDS).parts()


def begins(verified: Verified, drafted: Drafted, learned: Iterable[Cell] = ()) -> CostTable:
    """Returns the table of a start that finds this in the file of its pair."""
    return CostTable.of(verified, drafted, learned, timed=verified)


def left(cells: Cells, texts: Sequence[Trace], rows: int, truth: CostTable, seed: int) -> Depth:
    """Returns how a start begins after a process that wrote some of these texts. cells: what that began with."""
    depth = by(begins(*cells))
    for i, batch in enumerate(batches(texts, rows, BEFORE, seed)):
        begun(batch, truth, depth, AUTO, seed=seed + i)
    verified, drafted = depth.learned()[GREEDY]
    table = begins(*updated(*cells, verified, drafted), [cell for cell in verified if cell[2]])
    return Depth(lambda kind, rows: table, priors=depth.accepted())


def calibrated(texts: Sequence[Trace], truth: CostTable) -> Depth:
    """Returns how a start begins whose costs were calibrated, and which knows what these texts kept."""
    known = Acceptance()
    for text in texts:
        for kept, sure in zip(text.accepted.tolist(), text.confidences.astype(float).tolist(), strict=True):
            known = known.after(sure, kept, LASTING)
    cells = frozenset((rows, 0, width) for rows in ROWS for width in range(1, MAX_DRAFTS + 1))
    table = replace(truth, learned=cells, timed=cells)
    return Depth(lambda kind, rows: table, priors={GREEDY: known})


def begun(
    texts: Sequence[Trace],
    truth: CostTable,
    depth: Depth,
    drafts: int | str,
    tokens: int = TOKENS,
    clock: Clock = NOISY,
    seed: int = 0,
) -> float:
    """Returns the seconds in which rows that begin together emit so many tokens each on average.

    texts: of each row. drafts: a number, or AUTO, then by `depth`. Rounds take what `truth` says, and are observed by a
    clock.
    """
    draws, count = np.random.default_rng(seed), len(texts)
    at, took = [0] * count, 0.0
    rows = [DraftRow(row, drafts, FREE, False) for row in range(count)]
    made = max(depth.draft(rows, HEAD))
    for rounds in range(10**6):
        if sum(at) >= tokens * count:
            break
        places = [place % len(text.accepted) for place, text in zip(at, texts, strict=True)]
        sure = [
            text.confidences[place, :made].astype(float).tolist() for place, text in zip(places, texts, strict=True)
        ]
        context = HEAD + max(at)
        width = depth.verify(rows, context, sure, [made] * count)
        width = made if width is None else width
        kept = [min(width, int(text.accepted[place])) for place, text in zip(places, texts, strict=True)]
        verify, draft = truth.verify_at(count, context)[width], truth.draft_at(count, context)
        took += verify + made * draft
        made = max(depth.draft(rows, context))
        depth.timed(clock.observe(verify + made * draft, draws, rounds))  # of the drafts that are made after it
        depth.observe(dict(enumerate(kept)))
        at = [place + each + 1 for place, each in zip(at, kept, strict=True)]
    depth.forget(range(count))
    return took * tokens * count / sum(at)


def batches(texts: Sequence[Trace], rows: int, count: int, seed: int) -> Iterator[list[Trace]]:
    """Yields batches of pieces of these texts."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        some = []
        for _ in range(rows):
            text = texts[draws.integers(len(texts))]
            start = int(draws.integers(max(len(text.accepted) - TOKENS, 1)))
            some.append(text[start:])
        yield some


def line(truth: CostTable, texts: Sequence[Trace], others: Sequence[Trace], rows: int, count: int) -> dict[str, Any]:
    """Returns of each kind of start the best fixed length's time, and plain decoding's, over its own, over `count`
    beginnings of these texts. others: the texts before a start.
    """
    some = list(batches(texts, rows, count, rows))
    fixed = [sum(begun(batch, truth, by(truth), drafts) for batch in some) for drafts in range(MAX_DRAFTS + 1)]
    took = dict.fromkeys(("first", "second", "calibrated"), 0.0)
    for i, batch in enumerate(some):
        cells = quick(truth, rows, NOISY, np.random.default_rng(100 + i))
        starts = by(begins(*cells)), left(cells, others, rows, truth, 77 * i + 1), calibrated(others, truth)
        for name, depth in zip(took, starts, strict=True):
            took[name] += begun(batch, truth, depth, AUTO, seed=i)
    shares = {name: (min(fixed) / seconds, fixed[0] / seconds) for name, seconds in took.items()}
    return {"best": int(np.argmin(fixed)), "gain": fixed[0] / min(fixed)} | shares


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.starts", description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=DATA / "traces.npz")
    parser.add_argument("--costs", type=Path, nargs="+", default=sorted((DATA / "costs").glob("*.json")))
    parser.add_argument("--half", type=int, choices=(0, 1), default=1, help="of the texts of each class (default: 1)")
    parser.add_argument("--texts", nargs="+", help="classes (default: all)")
    parser.add_argument("--beginnings", type=int, default=6)
    args = parser.parse_args(argv)
    print("machine        text      rows  best K  best/plain  of the best, of plain: first    second       calibrated")
    for path in args.costs:
        for name, texts in read_texts(args.traces).items():
            if args.texts and name not in args.texts:
                continue
            middle = len(texts) // 2
            halves = texts[:middle], texts[middle:]
            for rows in ROWS:
                found = line(read_table(path), halves[args.half], halves[1 - args.half], rows, args.beginnings)
                shares = "   ".join("{:.3f} {:.3f}".format(*found[each]) for each in ("first", "second", "calibrated"))
                print(
                    f"{path.stem:14} {name:9} {rows:4} {found['best']:7} {found['gain']:11.2f}     {shares}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
