"""Many requests at once: `python -m benchmarks.serving PART`, or `all` parts one after the other.

throughput: requests of mixed lengths that all wait, rows filled as they become free: against mlx-vlm's better of plain
and MTP, and against this package's own fixed batches; rows in use while requests wait. alone: one row against another
checkout (--before). arrival: a short request amid seven streams and a prompt of 4,000 tokens. mixed: a row of 6,000
tokens beside seven of 100: K/V read. prefixes: a beginning of 2,000 tokens that comes again: time to the first token,
prompt tokens computed. slope: memory over 2,000 requests.

Every system is a process of its own; calls go round all of them in turn, so that other load falls on all alike. Ratios
are medians over the repeats with 95 % intervals by bootstrap. Exit code 1 where a whole interval, or a count, misses
what the part is to show: time's noise alone fails nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import decode, machine, workers
from benchmarks.command import command
from benchmarks.serving import alone, arrival, throughput, work
from benchmarks.serving.intervals import Interval, of_median, of_slope
from benchmarks.workers import OURS, Failed, Setup, Worker
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError

LONG, SHORT = 4000, 30  # prompt tokens of the arrivals
BEGINNING, ENDS = 2000, 8  # of the prefixes: tokens that prompts share, and prompts
LONG_ROW, SHORT_ROW, SHORT_ROWS = 6000, 100, 7  # of the mixed batch
SETTLED = 200  # requests, after which memory may not grow
# What a part is to show.
OVER_VLM, OVER_FIXED, OCCUPIED, OVER_BEFORE, READ, GROWTH = 2.0, 1.1, 7.2, 0.97, 1.2, 1000  # GROWTH: bytes a request
OVER_COLD = 5.0  # times as soon the first token comes after a prefix


@dataclass
class Shown:
    """A figure of a part: what it is, what it should be, and whether it surely is not."""

    what: str
    figure: str
    wanted: str = ""
    missed: bool = False

    @classmethod
    def at_least(cls, what: str, found: Interval, least: float) -> Shown:
        return cls(what, str(found), f"at least {least:g}", found.high < least)

    @classmethod
    def at_most(cls, what: str, found: float, most: float) -> Shown:
        return cls(what, f"{found:g}", f"at most {most:g}", found > most)


@dataclass
class Job:
    """What the parts run with. pair: the folders of all systems. prompts: chat turns in token ids."""

    args: argparse.Namespace
    pair: Any
    blas: str
    prompts: list[list[int]]
    note: Callable[[str], None]
    stack: ExitStack

    def start(self, system: str = OURS, **options: Any) -> Worker:
        worker = Setup(system, self.pair, self.blas, **options).start()
        self.stack.callback(worker.close)
        return worker


Found = tuple[dict[str, Any], list[Shown]]


def throughput_part(job: Job) -> Found:
    args = job.args
    limits = work.limits(args.requests, args.least, args.most)
    *others, drafts = args.num_draft_tokens  # `auto` is the last
    backlog = throughput.Backlog(job.prompts[: args.requests], limits, args.rows)
    crew = {OURS: job.start(rows=args.rows)}
    ways = [
        throughput.Way(OURS, throughput.CONTINUOUS, drafts, 1),
        throughput.Way(OURS, throughput.FIXED, drafts, args.rows),
        *(throughput.Way(OURS, throughput.CONTINUOUS, other, 1) for other in others),
    ]
    if line := workers.missing(throughput.VLM):
        job.note(line)
    elif not args.without_mlx_vlm:
        crew[throughput.VLM] = job.start(throughput.VLM)
        ways += throughput.tried(crew, backlog, args.mlx_vlm_drafts, job.note)
    throughput.measure(crew, backlog, ways, args.repeats, job.note)
    found = throughput.judged(ways, backlog)
    asked = {"prompts": backlog.prompts, "limits": limits, "drafts": drafts}
    found |= throughput.occupancy(crew[OURS].ask("occupancy", **asked))
    shown = [Shown(f"{w['system']}, {w['way']}, {w['drafts']} drafts: tokens/s", str(Interval(*w["tokens_per_s"])),
                   f"{w['equal']} of {len(limits)} texts equal") for w in found["ways"]]  # fmt: skip
    if over := throughput.interval_of(found, "over_mlx_vlm"):
        shown.append(Shown.at_least(f"times as fast as {found['better_of_mlx_vlm']}", over, OVER_VLM))
        for way, each in found["others_over_mlx_vlm"].items():
            shown.append(Shown.at_least(f"{way}: times as fast as that", Interval(*each), OVER_VLM))
    over = throughput.interval_of(found, "over_fixed_batches")
    shown.append(Shown.at_least(f"times as fast as our own batches of {args.rows}", over, OVER_FIXED))
    full = OCCUPIED * args.rows / 8
    shown.append(
        Shown("rows in use while requests wait", f"{found['occupancy']:g} in {found['rounds_with_a_queue']} rounds",
              f"at least {full:g} of {args.rows}", found["occupancy"] < full)
    )  # fmt: skip
    return found, shown


def alone_part(job: Job) -> Found:
    args, runs = job.args, []
    for _ in range(args.processes):
        crew = {alone.NOW: job.start(), alone.BEFORE: job.start(root=args.before.resolve())}
        runs.append(alone.measure(crew, job.prompts[:8], args.alone_drafts, args.max_tokens, args.repeats, job.note))
        job.stack.close()
    found, shown = alone.together(runs), []
    for drafts, each in found.items():
        for name in ("whole_calls", "decoding"):
            what = f"{drafts} drafts, {name.replace('_', ' ')}: speed over before ({each['calls']} pairs of calls)"
            shown.append(Shown.at_least(what, Interval(*each[name]), OVER_BEFORE))
        if each["differing_texts"]:
            shown.append(Shown(f"{drafts} drafts: texts that differ", str(each["differing_texts"]), "none"))
        if each["counted"]:
            for key in ("primitives_per_round", "host_syncs_per_round"):
                before, now = (each["counted"][name][key] for name in (alone.BEFORE, alone.NOW))
                shown.append(Shown.at_most(f"{drafts} drafts: {key.replace('_', ' ')}", now, before))
    return found, shown


def arrival_part(job: Job) -> Found:
    ours, prompts = job.start(rows=8), job.prompts
    asked = {"long": work.filled(prompts, LONG), "short": prompts[0][:SHORT], "apart": job.args.apart}
    found: dict[str, Any] = {}
    shown = []
    for drafts in job.args.arrival_drafts:
        runs = [ours.ask("arrival", prompts=prompts[1:8], drafts=drafts, **asked) for _ in range(1 + job.args.repeats)]
        runs = runs[1:]  # the first warms up
        found[str(drafts)] = runs
        sums = [run["summary"] for run in runs]
        rounds = max(each["rounds_to_first_token"] for each in sums)
        gap = max(each["longest_gap_rounds"] for each in sums)
        shown += [
            Shown.at_most(f"{drafts} drafts: rounds to the short one's first token", rounds, sums[0]["rounds_allowed"]),
            Shown.at_most(f"{drafts} drafts: longest gap of a stream, rounds", gap, arrival.LONGEST_GAP),
        ]
        for key in ("first_token_ms", "longest_gap_ms", "median_gap_ms_beside_the_prompt", "median_gap_ms_before",
                    "long_prompt_rounds", "most_prompt_tokens_in_a_round"):  # fmt: skip
            values = sorted(each[key] for each in sums)
            shown.append(Shown(f"{drafts} drafts: {key.replace('_', ' ')}", f"{values[len(values) // 2]:g}"))
    return found, shown


def mixed_part(job: Job) -> Found:
    prompts = job.prompts
    asked = {"long": work.filled(prompts, LONG_ROW), "drafts": 0}
    asked["short"] = [work.filled(prompts[i:], SHORT_ROW) for i in range(SHORT_ROWS)]
    found = job.start(rows=1 + SHORT_ROWS).ask("mixed", **asked)
    together, each = found["together"], found["alone"]
    return found, [
        Shown.at_most("bytes of K/V read a round, over those of each row alone",
                      round(together["bytes"] / each["bytes"], 3), READ),
        Shown.at_most("slots read a round, over those of each row alone",
                      round(together["slots"] / each["slots"], 3), READ),
        Shown.at_most("slots of full layers read, over the tokens they hold",
                      round(together["full_slots"] / each["full_tokens"], 3), READ),
        Shown("read a round, MB", f"{together['bytes'] / 1e6:.1f}"),
    ]  # fmt: skip


def prefixes_part(job: Job) -> Found:
    long, ours = work.filled(job.prompts, BEGINNING), job.start(rows=ENDS)
    ends = [prompt[:SHORT] for prompt in job.prompts[1 : ENDS + 1]]
    asked = {"long": long, "ends": ends, "limit": SHORT}
    runs = [ours.ask("prefixes", **asked) for _ in range(1 + job.args.repeats)][1:]  # the first warms up
    first = lambda each: each["first_token_ms"]  # noqa: E731
    sooner = of_median([
        first(cold) / first(warm)
        for run in runs
        for cold, warm in zip(run["cold"][1:], run["after_the_first"], strict=True)
    ])  # fmt: skip
    together = of_median([first(run["at_once_cold"]) / first(run["at_once"]) for run in runs])
    most = lambda key: max(each["computed"] for run in runs for each in run[key])  # noqa: E731
    beyond = max(turn["computed"] - turn["new"] - turn["chunk"] for run in runs for turn in run["turns"][1:])
    texts = [run["at_once"]["texts"] == run["at_once_cold"]["texts"] for run in runs]
    return {"runs": runs}, [
        Shown.at_least(f"times as soon: the first token after {BEGINNING} tokens that are kept", sooner, OVER_COLD),
        Shown("ms to it, cold and after a prefix",
              f"{_middle(first(e) for r in runs for e in r['cold']):.1f}, "
              f"{_middle(first(e) for r in runs for e in r['after_the_first']):.1f}"),
        Shown.at_most("prompt tokens computed after a prefix", most("after_the_first"), SHORT + _chunk(runs)),
        Shown(f"times as soon: the last first token of {ENDS} at once", str(together)),
        Shown.at_most(f"prompt tokens computed by {ENDS} at once", max(run["at_once"]["computed"] for run in runs),
                      BEGINNING + ENDS * (SHORT + _chunk(runs))),
        Shown.at_most("tokens that a turn computes beyond its own and a chunk", beyond, 0),
        Shown("runs whose texts are the cold ones", f"{sum(texts)} of {len(texts)}"),
    ]  # fmt: skip


def _chunk(runs: list[dict[str, Any]]) -> int:
    return runs[0]["turns"][0]["chunk"]


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def slope_part(job: Job) -> Found:
    args, every = job.args, 50
    sizes = job.start(rows=8).ask("memory", prompts=job.prompts, requests=args.slope_requests, every=every)
    settled = sizes[SETTLED // every :]
    found: dict[str, Any] = {"sizes": sizes, "every": every}
    shown = []
    for key in sizes[0]:
        if key == "batch":  # it grows in steps, up to a bound, with the rows of a length that were there at once
            shown.append(
                Shown(
                    "batch: MB of its buffers, after the first and at the end",
                    f"{sizes[0][key] / 1e6:.1f}, {sizes[-1][key] / 1e6:.1f}",
                )
            )
            continue
        slope = of_slope([each[key] / every for each in settled])
        found[f"{key}_slope"] = slope.as_list()
        shown.append(
            Shown(f"{key}: bytes a request, after the first {SETTLED}", str(slope),
                  "no slope" if key != "cached" else "", key == "arrays" and slope.low > GROWTH)
        )  # fmt: skip
        shown.append(Shown(f"{key}: MB at the end", f"{sizes[-1][key] / 1e6:.1f}"))
    return found, shown


PARTS: dict[str, Callable[[Job], Found]] = {
    "throughput": throughput_part,
    "alone": alone_part,
    "arrival": arrival_part,
    "mixed": mixed_part,
    "prefixes": prefixes_part,
    "slope": slope_part,
}


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=(*PARTS, "all"), help="what to measure")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="its drafter (default: auto)")
    p.add_argument("--blas", choices=decode.BLAS, default="openblas", help="on Linux (default: openblas)")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", type=Path, metavar="FILE", help="append a line of JSON for each part")
    p.add_argument("--plots", type=Path, metavar="FOLDER", help="write pictures of `arrival` and `slope` there")
    g = p.add_argument_group("throughput")
    g.add_argument("--requests", type=int, default=48)
    g.add_argument("--rows", type=int, default=8)
    g.add_argument("--least", type=int, default=20, help="tokens of a text (default: 20)")
    g.add_argument("--most", type=int, default=300, help="tokens of a text (default: 300)")
    g.add_argument("--num-draft-tokens", type=decode.draft_lengths, default=["auto"], metavar="N|auto,...",
                   help="of ours; all but the last are compared with mlx-vlm alone (default: auto)")  # fmt: skip
    g.add_argument("--mlx-vlm-drafts", type=decode.numbers, default=[1, 2, 3], help="that are tried (default: 1,2,3)")
    g.add_argument("--without-mlx-vlm", action="store_true")
    g = p.add_argument_group("alone")
    g.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of this repository")
    g.add_argument("--alone-drafts", type=decode.draft_lengths, default=[0, 2, "auto"], help="(default: 0,2,auto)")
    g.add_argument("--max-tokens", type=int, default=96, help="of each text (default: 96)")
    g.add_argument("--processes", type=int, default=6, help="of each checkout, one after the other (default: 6)")
    g = p.add_argument_group("arrival and slope")
    g.add_argument("--arrival-drafts", type=decode.draft_lengths, default=[0, "auto"], help="(default: 0,auto)")
    g.add_argument("--apart", type=int, default=20, help="rounds between the arrivals (default: 20)")
    g.add_argument("--slope-requests", type=int, default=2000)
    return p


def check(args: argparse.Namespace) -> None:
    """UserError for what cannot be measured."""
    least = {"--repeats": (args.repeats, 1), "--requests": (args.requests, 1), "--rows": (args.rows, 1),
             "--least": (args.least, 1), "--most": (args.most, args.least), "--max-tokens": (args.max_tokens, 2),
             "--apart": (args.apart, 1), "--processes": (args.processes, 1),
             "--slope-requests": (args.slope_requests, SETTLED + 100)}  # fmt: skip
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"{name} is {value}, expected at least {smallest}")
    if args.part == "alone" and args.before is None:
        raise UserError("`alone` compares with another checkout of this repository; name its folder with --before")
    if args.before is not None and not (args.before / "benchmarks" / "systems" / "__main__.py").is_file():
        raise UserError(f"--before {args.before} has no benchmarks/systems, expected a checkout of this repository")
    if args.json:
        check_file("--json", args.json)


def run(args: argparse.Namespace) -> int:
    from benchmarks import terminal

    check(args)
    parts = [name for name in PARTS if args.part in (name, "all")]
    if args.part == "all" and args.before is None:
        terminal.note("`alone` is skipped: name another checkout with --before")
        parts.remove("alone")
    missed = False
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        args.hf_path = args.hf_draft_path = None
        peers = ["mlx-vlm"] if "throughput" in parts and not args.without_mlx_vlm else []
        _, pair = decode.folders_for(args, peers, Path(folder))
        common = decode.context(args, [Setup(OURS, pair, "stock")]) | {"kind": "serving"}
        prompts = encoded(pair.target, max(args.requests, 50))
        for blas in decode.blas_choices(args.blas, terminal.note):
            for name in parts:
                try:
                    with ExitStack() as stack:
                        found, shown = PARTS[name](Job(args, pair, blas, prompts, terminal.note, stack))
                except Failed as error:
                    terminal.note(f"failed: {name}, {blas} BLAS: {error}")
                    missed = True
                    continue
                missed |= any(each.missed for each in shown)
                title = f"{name}: {common['model']}, {blas} BLAS, {common['machine']['cpu']}, load {machine.load()}"
                terminal.out.print(table(shown, title))
                record = common | {"part": name, "blas": blas, "load_after": machine.load(), "found": found}
                if args.json:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                if args.plots:
                    for path in drawn(name, found, args.plots, blas, title):
                        terminal.note(f"written: {path}")
    return int(missed)


def encoded(folder: Path, count: int) -> list[list[int]]:
    """The prompts as token ids, for all systems the same."""
    from mlx_gemma_mtp.files.folder import read_config
    from mlx_gemma_mtp.models.config import TargetConfig
    from mlx_gemma_mtp.text.encode import Text

    text = Text(folder, TargetConfig.from_dict(read_config(folder)).vocab_size)
    return work.prompts(text.encode, count)


def table(shown: list[Shown], title: str) -> Any:
    from rich.table import Table

    made = Table("what", "figure", "wanted", "", title=title)
    for each in shown:
        made.add_row(each.what, each.figure, each.wanted, "MISSED" if each.missed else "")
    return made


def drawn(name: str, found: dict[str, Any], folder: Path, blas: str, title: str) -> list[Path]:
    from benchmarks.serving import pictures

    folder.mkdir(parents=True, exist_ok=True)
    return pictures.draw(name, found, folder, blas, title)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where something is surely missed, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
