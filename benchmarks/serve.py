"""`python -m benchmarks.serve`: 1 to 16 agents with a shared system prompt, on this server and on its peers.

Exit code 1 where the later turns' first texts do not come 3 times sooner than the better peer's, or where tokens do not
come twice as fast at 8 agents. Energy is not told: nothing that these systems offer without more rights tells it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import decode, machine
from benchmarks.command import command
from benchmarks.server import agents, peers
from benchmarks.serving.__main__ import Shown, table
from benchmarks.serving.intervals import Interval
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError

LATER, FASTER, AT = 3.0, 2.0, 8  # times sooner; times as fast, at so many agents


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="its drafter (default: auto)")
    p.add_argument("--blas", choices=("openblas", "stock"), default="openblas", help="on Linux (default: openblas)")
    p.add_argument("--peers-threads", type=int, default=1, metavar="N", help="of the peers' OpenBLAS; ours has one "
                   "and takes a second core by streams (default: 1)")  # fmt: skip
    p.add_argument("--agents", type=decode.numbers, default=[1, 4, 8, 16], help="at once (default: 1,4,8,16)")
    p.add_argument("--turns", type=int, default=4, help="of each agent (default: 4)")
    p.add_argument("--system", type=int, default=6000, metavar="CHARACTERS", help="that are shared (default: 6000)")
    p.add_argument("--turn", type=int, default=600, metavar="CHARACTERS", help="that a turn brings (default: 600)")
    p.add_argument("--max-tokens", type=int, default=48, help="of a reply (default: 48)")
    p.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    p.add_argument("--mlx-vlm-drafts", type=decode.numbers, default=[2], help="that are tried (default: 2)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a line of JSON")
    p.add_argument("--plot", type=Path, metavar="FILE", help="a picture of both figures by agents")
    return p


def run(args: argparse.Namespace) -> int:
    from benchmarks import terminal

    for name in ("repeats", "turns", "max_tokens", "system", "turn", "peers_threads"):
        if (value := getattr(args, name)) < (2 if name == "turns" else 1):
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {2 if name == 'turns' else 1}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_file(flag, path)
    lines = measured(args, terminal.note)
    shown = [each for count in args.agents for each in told([line for line in lines if line["agents"] == count], count)]
    facts = machine.facts()
    terminal.out.print(table(shown, f"agents: {facts['cpu']}, load {machine.load()}"))
    if args.json:
        record = {"kind": "agents", "machine": facts, "versions": machine.versions(), "found": lines}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if args.plot:
        plot(lines, args.plot)
    return int(any(each.missed for each in shown))


def measured(args: argparse.Namespace, note: Any) -> list[dict[str, Any]]:
    """The figures of every server at every number of agents."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="agents-") as folder:
        args.hf_path = args.hf_draft_path = None
        _, pair = decode.folders_for(args, ["mlx-vlm"], Path(folder))
        asked = peers.ways(pair, args.mlx_vlm_drafts, max(args.agents), args.peers_threads)
        some = peers.started(asked, args.blas, note)
        try:
            for count in args.agents:
                trace = agents.Trace(count, args.turns, args.system, args.turn)
                found = agents.measure(some, trace, args.max_tokens, args.repeats, note)
                ours = found[some[0].name]
                lines += [agents.line(name, count, calls, ours) for name, calls in found.items()]
        finally:
            for way in some:
                way.server.close()
    return lines


def told(lines: list[dict[str, Any]], count: int) -> list[Shown]:
    """What is shown of one number of agents."""
    shown = []
    for line in lines:
        where = f"{count} agents: {line['server']}"
        for key, what in (
            ("first_turn_s", "seconds to the first text, first turn"),
            ("later_turns_s", "seconds to the first text, later turns"),
            ("tokens_per_s_a_user", "tokens/s an agent"),
        ):
            shown.append(Shown(f"{where}: {what}", str(Interval(*line[key]))))
        made = ", ".join(map(str, line["tokens"]))
        shown.append(Shown(f"{where}: tokens made", made, f"{line['equal_texts']:.0%} of the texts equal"))
        shown.append(Shown(f"{where}: of the prompts' tokens known", f"{line['prompt_tokens_known']:.0%}"))
    over = agents.ratios(lines)
    if over:
        sooner, faster = (f"{over[name]:.2f}" for name in ("later_turns", "tokens"))
        shown.append(Shown(f"{count} agents: later turns sooner than the better peer's, times", sooner,
                           f"at least {LATER}", over["later_turns"] < LATER))  # fmt: skip
        missed = count == AT and over["tokens"] < FASTER
        shown.append(Shown(f"{count} agents: tokens/s, times the better peer's", faster,
                           f"at least {FASTER}" if count == AT else "", missed))  # fmt: skip
    return shown


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Writes a picture: seconds to a later turn's first text, and tokens a second, by agents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, key, name in zip(
        figure.subplots(1, 2),
        ("later_turns_s", "tokens_per_s"),
        ("seconds to the first text of later turns", "tokens a second, all agents"),
        strict=True,
    ):
        for server in dict.fromkeys(line["server"] for line in lines):
            points = [(line["agents"], line[key][0]) for line in lines if line["server"] == server]
            axes.plot(*zip(*points, strict=True), marker="o", label=server)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("agents")
        axes.set_title(name, fontsize=10)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where something is missed, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
