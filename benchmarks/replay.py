"""Replays rules for the draft length on recorded traces: `python -m benchmarks.replay [--plot FILE.png]`.

A trace (benchmarks/traces.py) tells at every token of a text how many drafts would have been kept; a table of costs
(tests/data/costs: two measured on a CPU, two predicted for a Mac, these also after a long text) tells what a round
takes. Together they give the exact course of a text under any rule. Compared are every fixed length, the controller of
this package, and an oracle that knows all the future (the shortest way through the text).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma_mtp.cli.plots import dress, fitted, panels, spread
from mlx_gemma_mtp.speculative.costs import CONTEXTS, MAX_DRAFTS, ROWS, UNKNOWN, WIDEST, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow

DATA = Path(__file__).parent.parent / "tests" / "data"
CONTEXT, LONG = 512, CONTEXTS[-1]
SEGMENT = 400  # tokens of one class in the mixture
START = 64  # rounds in which a controller may still lose a little
FREE = 10**9  # room for drafts: no limit


@dataclass(frozen=True)
class Trace:
    """accepted: [n] drafts that agree at each token; confidences: [n, MAX_DRAFTS]; changes: where the class changes."""

    accepted: np.ndarray
    confidences: np.ndarray
    changes: tuple[int, ...] = ()

    def __getitem__(self, part: slice) -> Trace:
        return Trace(self.accepted[part], self.confidences[part])


@dataclass(frozen=True)
class Step:
    """One round: the tokens [start, end) of the text, drafts made and verified for it, seconds by the table."""

    start: int
    end: int
    made: int
    verified: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """A text under a rule."""

    rounds: list[Step]

    @property
    def tokens(self) -> int:
        return self.rounds[-1].end

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.rounds)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def read_traces(path: Path = DATA / "traces.npz") -> dict[str, Trace]:
    """The recorded classes, and a mixture that changes between them."""
    arrays = np.load(path)
    names = [key.removesuffix("_accepted") for key in arrays if key.endswith("_accepted")]
    traces = {name: Trace(arrays[f"{name}_accepted"], arrays[f"{name}_confidences"]) for name in names}
    parts, changes = [], []
    for start in range(0, min(len(t.accepted) for t in traces.values()) - SEGMENT + 1, SEGMENT):
        for name in names:
            changes.append(sum(len(part.accepted) for part in parts))
            parts.append(traces[name][start : start + SEGMENT])
    mixed = Trace(
        np.concatenate([part.accepted for part in parts]),
        np.concatenate([part.confidences for part in parts]),
        tuple(changes[1:]),
    )
    return traces | {"mixture": mixed}


def read_table(path: Path) -> CostTable:
    data = json.loads(path.read_text())
    verified = {(rows, context, width): seconds for rows, context, width, seconds in data["verify"]}
    first = min(context for _, context, _ in verified)
    return CostTable.of(verified, {(rows, first): seconds for rows, seconds in data["draft"]})


def after_long_texts(tables: Mapping[str, CostTable]) -> dict[str, CostTable]:
    """Returns the tables of the large model as they may be after long texts: each query of a verify, and not each
    verify, reads all K/V.
    """
    found = {}
    for name, table in tables.items():
        if "26b" not in name:
            continue
        cells = cells_of(table, lambda r, c, w, table=table: table.verify_at(r, c)[w])
        for rows in ROWS:
            short, long = table.verify_at(rows, CONTEXT), table.verify_at(rows, LONG)
            read = long[0] - short[0]
            cells |= {(rows, LONG, width): short[width] + (width + 1) * read for width in range(WIDEST + 1)}
        found[f"{name}, long"] = CostTable.of(cells, drafts_of(table))
    return found


@dataclass(frozen=True)
class Clock:
    """What times look like when they are observed: a lognormal factor of this sigma, now and then an outlier, and a
    machine that is slow for some rounds and fast for as many.
    """

    sigma: float = 0.0
    outliers: float = 0.0  # share of rounds
    longer: float = 4.0  # times, an outlier
    slow: float = 1.0  # times, while the machine is slow
    phase: int = 1  # rounds until that changes

    def observe(self, seconds: float, draws: np.random.Generator, rounds: int) -> float:
        late = self.longer if draws.random() < self.outliers else 1.0
        pace = self.slow if rounds // self.phase % 2 else 1.0
        return seconds * late * pace * math.exp(self.sigma * draws.standard_normal())


EXACT = Clock()
NOISY = Clock(0.1, 0.05)


def replay(
    trace: Trace,
    table: CostTable,
    drafts: int | str,
    clock: Clock = EXACT,
    seed: int = 0,
    chooser: Depth | None = None,
    context: int = CONTEXT,
) -> Run:
    """One row's text under a rule, in the order in which a batch asks it.

    drafts: a number, or 'auto', then by this table unless the chooser has another. context: tokens before each round.
    """
    draws, depth = np.random.default_rng(seed), chooser or by(table)
    verify, draft = table.verify_at(1, context), table.draft_at(1, context)
    at, rounds, rows = 0, [], [DraftRow(0, drafts, FREE, False)]
    [made] = depth.draft(rows, context)
    while at < len(trace.accepted):
        sure = trace.confidences[at, :made].astype(float).tolist()
        width = depth.verify(rows, context, [sure], [made])
        width = made if width is None else width
        kept = min(width, int(trace.accepted[at]))
        rounds.append(Step(at, at + kept + 1, made, width, verify[width] + made * draft))
        [made] = depth.draft(rows, context)
        depth.timed(clock.observe(verify[width] + made * draft, draws, len(rounds)))
        depth.observe({0: kept})
        at += kept + 1
    return Run(rounds)


def against_plain(
    trace: Trace,
    truth: CostTable,
    drafts: int | str,
    table: CostTable,
    rows: int,
    rounds: int,
    clock: Clock = NOISY,
    seed: int = 0,
    start: int = 64,
) -> list[tuple[float, float]]:
    """For each of `rounds` rounds, the seconds that plain decoding takes for its tokens, and those of the round.

    drafts: a number, or 'auto', then by any table. rows: parts of the text from different places, in one batch; start:
    tokens before the first. Rounds take what `truth` says, and are observed by a clock.
    """
    depth = by(table)
    draws, count = np.random.default_rng(seed), len(trace.accepted)
    at = [int(place) for place in draws.integers(0, count, rows)]
    batch, context, found = [DraftRow(row, drafts, FREE, False) for row in range(rows)], start, []
    made = max(depth.draft(batch, context))
    for _ in range(rounds):
        sure = [trace.confidences[place % count, :made].astype(float).tolist() for place in at]
        width = depth.verify(batch, context, sure, [made] * rows)
        width = made if width is None else width
        kept = [min(width, int(trace.accepted[place % count])) for place in at]
        verify, draft = truth.verify_at(rows, context), truth.draft_at(rows, context)
        found.append((verify[0] * (1 + sum(kept) / rows), verify[width] + made * draft))
        made = max(depth.draft(batch, context))
        depth.timed(clock.observe(verify[width] + made * draft, draws, len(found)))
        depth.observe(dict(enumerate(kept)))
        at = [place + each + 1 for place, each in zip(at, kept, strict=True)]
        context = start + int(sum(each[0] / verify[0] for each in found))
    return found


def by(table: CostTable) -> Depth:
    """Returns a chooser of its own, by this table."""
    return Depth(lambda kind, rows: table)


def oracle(trace: Trace, table: CostTable, context: int = CONTEXT) -> float:
    """Tokens a second of the best choices, all the future known: the shortest way, from the end."""
    cost = table.rounds_at(1, context)
    count = len(trace.accepted)
    left = np.zeros(count + MAX_DRAFTS + 1)
    for at in range(count - 1, -1, -1):
        most = int(trace.accepted[at])
        left[at] = min(cost[drafts] + left[at + drafts + 1] for drafts in range(most + 1))
    return count / left[0]


def fixed_rates(trace: Trace, table: CostTable, context: int = CONTEXT) -> list[float]:
    """Tokens a second of K = 0..MAX_DRAFTS."""
    return [replay(trace, table, drafts, context=context).rate for drafts in range(MAX_DRAFTS + 1)]


def rounds_to_adapt(
    trace: Trace, run: Run, table: CostTable, context: int = CONTEXT, good: float = 0.95, window: int = 16
) -> list[int]:
    """After each change of class: rounds until, over the next `window` rounds, the text is made at `good` or more of
    the rate at which the best fixed length of the new class makes the same piece of it.
    """
    found = []
    for change, end in pairwise((*trace.changes, len(trace.accepted))):
        best = int(np.argmax(fixed_rates(trace[change:end], table, context)))
        inside = [each for each in run.rounds if change <= each.start < end]
        for i in range(len(inside)):
            some = inside[i : i + window]
            piece = trace[some[0].start : some[-1].end]
            if sum(each.seconds for each in some) * good <= replay(piece, table, best, context=context).seconds:
                break
        found.append(i)
    return found


def report(traces: dict[str, Trace], tables: dict[str, CostTable], context: int = CONTEXT) -> list[dict[str, object]]:
    """A line for each table and class."""
    lines = []
    for machine, table in tables.items():
        for name, trace in traces.items():
            fixed = fixed_rates(trace, table, context)
            run = replay(trace, table, AUTO, context=context)
            best = int(np.argmax(fixed))
            lines.append(
                {
                    "table": machine,
                    "text": name,
                    "fixed": [rate / fixed[0] for rate in fixed],
                    "best": best,
                    "auto": run.rate / fixed[0],
                    "of_best": run.rate / fixed[best],
                    "oracle": oracle(trace, table, context) / fixed[0],
                    "adapted": rounds_to_adapt(trace, run, table, context),
                }
            )
    return lines


# Tables that are wrong, made of one that is right.


def cells_of(table: CostTable, of: Callable[[int, int, int], float]) -> dict[tuple[int, int, int], float]:
    return {(r, c, w): of(r, c, w) for r in ROWS for c in table.contexts for w in range(MAX_DRAFTS + 1)}


def drafts_of(table: CostTable, of: Callable[[int], float] = lambda rows: 1.0) -> dict[tuple[int, int], float]:
    """The table's drafts after a short text, times a factor of each number of rows."""
    first = table.contexts[0]
    return {(rows, first): table.draft_at(rows, first) * of(rows) for rows in ROWS}


def scattered(table: CostTable, seed: int, factor: float = 2.0) -> CostTable:
    """Each entry off by a factor of its own, between 1 / factor and factor."""
    draws, scale = random.Random(seed), math.log(factor)
    off = lambda: math.exp(draws.uniform(-scale, scale))  # noqa: E731
    cells = cells_of(table, lambda r, c, w: table.verify_at(r, c)[w] * off())
    return CostTable.of(cells, drafts_of(table, lambda rows: off()))


def wrong_shapes(table: CostTable) -> dict[str, CostTable]:
    """Tables whose shape is not the machine's."""
    at, first = table.verify_at, table.contexts[0]
    drafts = drafts_of(table)
    one = drafts[1, first]
    one_row = {(1, first, w): at(1, first)[w] for w in (0, 1, 4)}
    return {
        "right": table,
        "flat drafts": CostTable.of(cells_of(table, lambda r, c, w: at(r, c)[min(w, 1)]), drafts),
        "free drafts": CostTable.of(
            cells_of(table, lambda r, c, w: at(r, c)[0]), {place: each / 10 for place, each in drafts.items()}
        ),
        "steep drafts": CostTable.of(cells_of(table, lambda r, c, w: 2 * at(r, c)[w] - at(r, c)[0]), drafts),
        "flat rows": CostTable.of(cells_of(table, lambda r, c, w: at(1, c)[w]), dict.fromkeys(drafts, one)),
        "steep rows": CostTable.of(
            cells_of(table, lambda r, c, w: at(1, c)[w] * r), {place: one * place[0] for place in drafts}
        ),
        "one context": CostTable.of(
            {(r, first, w): at(r, first)[w] for r in ROWS for w in range(MAX_DRAFTS + 1)}, drafts
        ),
        "one row": CostTable.of(one_row, {(1, first): one}),
        "a busy plain round": CostTable.of(cells_of(table, lambda r, c, w: at(r, c)[w] * (1.0 if w else 2.0)), drafts),
        "no table": UNKNOWN,
    }


def astray(
    trace: Trace, truth: CostTable, name: str, rows: int, scattered_tables: int = 6, rounds: int = 300
) -> list[dict[str, Any]]:
    """The controller with wrong tables and noisy times: a line for each table.

    first, then: plain decoding's time over the controller's, in the first 64 rounds and after them; best: the same of
    the best fixed length after them.
    """

    def share(found: list[tuple[float, float]], start: int, end: int) -> float:
        return sum(plain for plain, _ in found[start:end]) / sum(seconds for _, seconds in found[start:end])

    lengths = [
        against_plain(trace, truth, drafts, truth, rows, rounds, EXACT, rows) for drafts in range(MAX_DRAFTS + 1)
    ]
    best = max(share(each, START, rounds) for each in lengths)
    tables = wrong_shapes(truth) | {f"scattered {i}": scattered(truth, i) for i in range(scattered_tables)}
    lines = []
    for kind, table in tables.items():
        found = against_plain(trace, truth, AUTO, table, rows, rounds, NOISY, sum(map(ord, kind + name)) + rows)
        lines.append(
            {"table": kind, "first": share(found, 0, START), "then": share(found, START, rounds), "best": best}
        )
    return lines


def plot(lines: Sequence[dict], path: Path) -> None:
    """A panel for each table: every fixed length, the controller and the oracle over plain decoding, by class."""
    tables = list(dict.fromkeys(line["table"] for line in lines))
    figure, axes = panels(2, -(-len(tables) // 2), 11, 8)
    for panel, table in zip(axes.flat, tables, strict=False):
        some = [line for line in lines if line["table"] == table]
        for i, line in enumerate(some):
            color = f"C{i}"
            panel.plot(range(MAX_DRAFTS + 1), line["fixed"], color=color, marker=".", label=line["text"])
            panel.plot([MAX_DRAFTS + 1], [line["auto"]], color=color, marker="D")
            panel.plot([MAX_DRAFTS + 2], [line["oracle"]], color=color, marker="*", markersize=10)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xticks(range(MAX_DRAFTS + 3), [*map(str, range(MAX_DRAFTS + 1)), "auto", "oracle"])
        panel.set(xlabel="drafts a round", ylabel="tokens/s over plain decoding")
        panel.set_title(fitted(figure, table, 10, 0.85 / axes.shape[1]), fontsize=10)
        dress(panel, "best" if panel is axes.flat[0] else "")
        spread(panel)
    figure.savefig(path)


def print_astray(traces: dict[str, Trace], tables: dict[str, CostTable]) -> int:
    """The worst and the median of each machine and text, over all wrong tables and numbers of rows."""
    print("machine          text       runs  first 64: worst  median  then: worst  median  of the best: 10 %  median")
    for machine, table in tables.items():
        for text, trace in traces.items():
            lines = [line for rows in ROWS for line in astray(trace, table, machine + text, rows)]
            first, then = (sorted(line[key] for line in lines) for key in ("first", "then"))
            share = sorted(line["then"] / line["best"] for line in lines)
            middle = len(lines) // 2
            print(
                f"{machine:16} {text:9} {len(lines):5} {first[0]:16.3f} {first[middle]:7.3f} {then[0]:12.3f} "
                f"{then[middle]:7.3f} {share[len(lines) // 10]:18.3f} {share[middle]:7.3f}",
                flush=True,
            )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=DATA / "traces.npz")
    parser.add_argument("--costs", type=Path, nargs="+", default=sorted((DATA / "costs").glob("*.json")))
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--wrong", action="store_true", help="the controller with wrong tables and noisy times")
    args = parser.parse_args(argv)
    traces, tables = read_traces(args.traces), {path.stem: read_table(path) for path in args.costs}
    if args.wrong:
        return print_astray(traces, tables)
    lines = report(traces, tables) + report(traces, after_long_texts(tables), LONG)
    print("table            text      best K  auto/plain  auto/best  oracle/plain  rounds to adapt")
    for line in lines:
        print(
            f"{line['table']:16} {line['text']:9} {line['best']:6} {line['auto']:11.3f} {line['of_best']:10.3f} "
            f"{line['oracle']:13.3f}  {' '.join(map(str, line['adapted']))}"
        )
    if args.plot:
        plot(lines, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
