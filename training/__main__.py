"""The whole recipe: `python -m training --out FOLDER`. Run again after a kill, it goes on where it was."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from training import corpus, data, drafter, export, report, selfgen, target, tokenizer
from training.cli import command, positive
from training.kinds import KINDS, TINY, Kind


def run(kind: Kind, out: Path, target_plan: target.Plan, drafter_plan: drafter.Plan) -> dict:
    """Corpus, target, its replies, drafter, export and report below `out`. Returns the report."""
    source, pair = out / "data", out / "export"
    if not (source / "train.npy").exists():
        text = corpus.read(limit=kind.modules)
        made = tokenizer.train((module.text for module in text.modules), kind.target["vocab_size"])
        data.prepare(source, text, made)
    trained = {name: out / name / "hf" for name in ("target", "drafter")}
    if not (trained["target"] / "config.json").exists():
        target.fit(kind, source, out / "target", target_plan)
    replies = selfgen.replies(trained["target"], source, out / "replies", kind.replies)
    if not (trained["drafter"] / "config.json").exists():
        drafter.fit(kind, trained["target"], source, replies, out / "drafter", drafter_plan)
    if not (pair / "drafter").exists():
        export.export(trained["target"], trained["drafter"], source, pair)
    figures = report.report(pair, source, report.marked_prompts())
    (pair / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train a small Gemma 4 pair from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; a run in it is resumed")
    parser.add_argument("--kind", choices=KINDS, default="moe")
    parser.add_argument("--tiny", action="store_true", help="a toy of two minutes, to see that all parts work")
    parser.add_argument("--threads", type=positive, help="of torch; default: its own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = TINY if args.tiny else KINDS[args.kind]
    plans = target.Plan(kind.target_steps), drafter.Plan(kind.drafter_steps, kind.drafter_rows)
    print(json.dumps(run(kind, args.out, *plans), indent=1))


if __name__ == "__main__":
    sys.exit(main())
