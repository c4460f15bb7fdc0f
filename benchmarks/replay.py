"""Replays rules for the draft length on recorded traces: `python -m benchmarks.replay [--plot FILE.png]`.

A trace (benchmarks/traces.py) tells at every token of a text how many drafts would have been kept; a table of costs
(tests/data/costs: two measured on a CPU, two predicted for a Mac) tells what a round takes. Together they give the
exact course of a text under any rule. Compared are every fixed length, the controller of this package, and an oracle
that knows all the future (the shortest way through the text).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from mlx_gemma_mtp.costs import MAX_DRAFTS, CostTable
from mlx_gemma_mtp.depth import Auto, Fixed
from mlx_gemma_mtp.plots import fitted, spread

DATA = Path(__file__).parent.parent / "tests" / "data"
CONTEXT = 512
SEGMENT = 400  # tokens of one class in the mixture
FAST = 1e9  # room for drafts: no limit


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
    return CostTable.of(verified, dict(data["draft"]))


def replay(trace: Trace, table: CostTable, depth: Fixed | Auto) -> Run:
    """One row's text under a rule, in the order in which the scheduler asks it."""
    verify, draft = table.verify_at(1, CONTEXT), table.draft_at(1)
    at, rounds = 0, []
    made = depth.draft([0], CONTEXT, [FAST])
    while at < len(trace.accepted):
        sure = trace.confidences[at, :made].astype(float).tolist()
        width = depth.verify([0], CONTEXT, [FAST], [sure])
        width = made if width is None else width
        kept = min(width, int(trace.accepted[at]))
        rounds.append(Step(at, at + kept + 1, made, width, verify[width] + made * draft))
        made = depth.draft([0], CONTEXT, [FAST])
        depth.observe({0: kept})
        at += kept + 1
    return Run(rounds)


def oracle(trace: Trace, table: CostTable) -> float:
    """Tokens a second of the best choices, all the future known: the shortest way, from the end."""
    cost = table.rounds_at(1, CONTEXT)
    count = len(trace.accepted)
    left = np.zeros(count + MAX_DRAFTS + 1)
    for at in range(count - 1, -1, -1):
        most = int(trace.accepted[at])
        left[at] = min(cost[drafts] + left[at + drafts + 1] for drafts in range(most + 1))
    return count / left[0]


def fixed_rates(trace: Trace, table: CostTable) -> list[float]:
    """Tokens a second of K = 0..MAX_DRAFTS."""
    return [replay(trace, table, Fixed(drafts)).rate for drafts in range(MAX_DRAFTS + 1)]


def rounds_to_adapt(trace: Trace, run: Run, table: CostTable, good: float = 0.95, window: int = 16) -> list[int]:
    """After each change of class: rounds until, over the next `window` rounds, the text is made at `good` or more of
    the rate at which the best fixed length of the new class makes the same piece of it.
    """
    found = []
    for change, end in pairwise((*trace.changes, len(trace.accepted))):
        best = int(np.argmax(fixed_rates(trace[change:end], table)))
        inside = [each for each in run.rounds if change <= each.start < end]
        for i in range(len(inside)):
            some = inside[i : i + window]
            piece = trace[some[0].start : some[-1].end]
            if sum(each.seconds for each in some) * good <= replay(piece, table, Fixed(best)).seconds:
                break
        found.append(i)
    return found


def report(traces: dict[str, Trace], tables: dict[str, CostTable]) -> list[dict[str, object]]:
    """A line for each table and class."""
    lines = []
    for machine, table in tables.items():
        for name, trace in traces.items():
            fixed = fixed_rates(trace, table)
            run = replay(trace, table, Auto(table))
            best = int(np.argmax(fixed))
            lines.append(
                {
                    "table": machine,
                    "text": name,
                    "fixed": [rate / fixed[0] for rate in fixed],
                    "best": best,
                    "auto": run.rate / fixed[0],
                    "of_best": run.rate / fixed[best],
                    "oracle": oracle(trace, table) / fixed[0],
                    "adapted": rounds_to_adapt(trace, run, table),
                }
            )
    return lines


def plot(lines: Sequence[dict], path: Path) -> None:
    """A panel for each table: every fixed length, the controller and the oracle over plain decoding, by class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = list(dict.fromkeys(line["table"] for line in lines))
    figure, panels = plt.subplots(2, -(-len(tables) // 2), figsize=(11, 8), layout="constrained", squeeze=False)
    for panel, table in zip(panels.flat, tables, strict=False):
        some = [line for line in lines if line["table"] == table]
        for i, line in enumerate(some):
            color = f"C{i}"
            panel.plot(range(MAX_DRAFTS + 1), line["fixed"], color=color, marker=".", label=line["text"])
            panel.plot([MAX_DRAFTS + 1], [line["auto"]], color=color, marker="D")
            panel.plot([MAX_DRAFTS + 2], [line["oracle"]], color=color, marker="*", markersize=10)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xticks(range(MAX_DRAFTS + 3), [*map(str, range(MAX_DRAFTS + 1)), "auto", "oracle"])
        panel.set(xlabel="drafts a round", ylabel="tokens/s over plain decoding")
        panel.set_title(fitted(figure, table, 10, 0.85 / panels.shape[1]), fontsize=10)
        spread(panel)
    panels.flat[0].legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.replay", description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=DATA / "traces.npz")
    parser.add_argument("--costs", type=Path, nargs="+", default=sorted((DATA / "costs").glob("*.json")))
    parser.add_argument("--plot", type=Path, help="a PNG")
    args = parser.parse_args(argv)
    lines = report(read_traces(args.traces), {path.stem: read_table(path) for path in args.costs})
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
