"""The server from outside: `python -m benchmarks.server PART`.

cost: what HTTP takes from an engine of 20 ms rounds with 8 streams, and CPU for a token. peers: 8 clients at once
against the servers of mlx-vlm and mlx-lm on the same files. soak: many clients for minutes, with cancels, broken and
oversized requests among them; every text against its lone one, and memory.

Exit code 1 where a whole interval, or a count, misses what the part is to show.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import decode, machine
from benchmarks.command import command
from benchmarks.server import cost, peers, soak
from benchmarks.serving.__main__ import Shown, table
from benchmarks.serving.intervals import Interval, of_median
from benchmarks.workers import Failed
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError

THROUGHPUT, OVER_PEERS = 0.98, 2.0  # of the engine's own; times as fast as the better server

Found = tuple[dict[str, Any], list[Shown]]


def cost_part(args: argparse.Namespace, note: Callable[[str], None]) -> Found:
    pairs = cost.measure(args.clients, args.round_ms / 1e3, args.max_tokens, args.repeats, note)
    kept = of_median([pair["own"]["seconds"] / pair["http"]["seconds"] for pair in pairs])
    shown = [Shown.at_least("throughput over HTTP, of the engine's own", kept, THROUGHPUT)]
    for name, what in (("own", "read by coroutines"), ("http", "over HTTP")):
        spent = of_median([pair[name]["cpu_ms_per_token"] for pair in pairs])
        shown.append(Shown(f"CPU milliseconds a token, {what}", str(spent)))
    return {"pairs": pairs, "throughput": kept.as_list()}, shown


def peers_part(args: argparse.Namespace, note: Callable[[str], None]) -> Found:
    from benchmarks.prompts import MARKED
    from mlx_gemma_mtp.files.folder import read_config
    from mlx_gemma_mtp.models.config import TargetConfig
    from mlx_gemma_mtp.text.encode import Text

    prompts = [entry["prompt"] for entry in json.loads(MARKED.read_text())]
    some: list[peers.Way] = []
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        args.hf_path = args.hf_draft_path = None
        _, pair = decode.folders_for(args, ["mlx-vlm"], Path(folder))
        text = Text(pair.target, TargetConfig.from_dict(read_config(pair.target)).vocab_size)
        try:
            some = peers.started(peers.ways(pair, args.mlx_vlm_drafts, args.clients), args.blas, note)
            asked = list(islice(cycle(prompts), args.clients))
            left = peers.measure(some, asked, args.max_tokens, args.repeats, note)
        finally:
            for way in some:
                way.server.close()
    found = peers.judged(left, text.spelled)
    shown = [
        Shown(f"{line['server']}: tokens/s", str(Interval(*line["tokens_per_s"])),
              f"{line['equal_texts']} of {args.clients} texts equal")
        for line in found["servers"]
    ]  # fmt: skip
    for name, ratio in found["ratios"].items():
        over = Interval(*ratio)
        what = f"times as fast as {name}"
        shown.append(Shown.at_least(what, over, OVER_PEERS) if name == found["better"] else Shown(what, str(over)))
    return found, shown


def soak_part(args: argparse.Namespace, note: Callable[[str], None]) -> Found:
    found = soak.measure(args.soak_clients, args.seconds, note)
    shown = [
        Shown("good requests", str(found["good"])),
        Shown("others", ", ".join(f"{count} {kind}" for kind, count in sorted(found["others"].items()))),
        Shown.at_most("good requests that failed", found["failed"], 0),
        Shown.at_most("texts that are not their lone ones", found["wrong"], 0),
        Shown.at_most("answers with a fault of the server", found["faults"], 0),
    ]
    for key, what in soak.FIGURES.items():
        if key in soak.STEADY:
            slope = Interval(*found[f"{key}_slope"])
            rises = slope.low > soak.GROWTH
            shown.append(Shown(f"{what}: bytes a second, after the first third", str(slope), "no slope", rises))
        shown.append(Shown(f"{what}: MB, after the first third and at the end", found[key]))
    shown.append(Shown("resident: MB, once the allocator has given back what it can", found["trimmed"]))
    return found, shown


PARTS = {"cost": cost_part, "peers": peers_part, "soak": soak_part}


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=(*PARTS, "all"), help="what to measure")
    p.add_argument("--model", help="of `peers`: a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="its drafter (default: auto)")
    p.add_argument("--blas", choices=("openblas", "stock"), default="openblas", help="on Linux (default: openblas)")
    p.add_argument("--repeats", type=int, default=8)
    p.add_argument("--clients", type=int, default=8, help="of `cost` and `peers` (default: 8)")
    p.add_argument("--max-tokens", type=int, default=192, help="of a text (default: 192)")
    p.add_argument("--round-ms", type=float, default=20.0, help="of the scripted engine (default: 20)")
    p.add_argument("--mlx-vlm-drafts", type=decode.numbers, default=[1, 3], help="that are tried (default: 1,3)")
    p.add_argument("--soak-clients", type=int, default=64, help="(default: 64)")
    p.add_argument("--seconds", type=float, default=300.0, help="of `soak` (default: 300)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a line of JSON for each part")
    return p


def run(args: argparse.Namespace) -> int:
    from benchmarks import terminal

    for name in ("repeats", "clients", "max_tokens", "soak_clients"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if args.json:
        check_file("--json", args.json)
    missed = False
    for name in [name for name in PARTS if args.part in (name, "all")]:
        try:
            found, shown = PARTS[name](args, terminal.note)
        except Failed as error:
            terminal.note(f"failed: {name}: {error}")
            missed = True
            continue
        missed |= any(each.missed for each in shown)
        facts = machine.facts()
        terminal.out.print(table(shown, f"{name}: {facts['cpu']}, load {machine.load()}"))
        if args.json:
            record = {"kind": "server", "part": name, "machine": facts, "versions": machine.versions(), "found": found}
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return int(missed)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where something is surely missed, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
