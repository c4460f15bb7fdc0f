"""Speed of plain decoding and MTP: `python -m benchmarks.decode [--against mlx-lm,mlx-vlm,transformers]`.

Every system is a process of its own; the calls go round all of them (cases.py). Tokens a second are of whole calls,
prefill included; "decoding" starts when every row has its first token. A round is a pass of the target and the drafts
that it verifies. Primitives and syncs a round: see trace.py; on this backend, not launches. Weight bytes a token: see
records.py. Texts of greedy cases are compared with plain decoding, mlx-lm's where it runs.

--against: mlx-lm, mlx-vlm and this package open one float32 MLX folder, made once from one Hugging Face source;
transformers opens that source. The source is --hf-path, or the bundled pair written in that layout again. A --model
that has none is compared as it is (on a CPU as a float32 copy), without transformers.

On Linux MLX's wheel multiplies with the reference BLAS. `--blas openblas` preloads OpenBLAS, one thread, into every
system.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, prompts, workers
from benchmarks.cases import Axes, Case, Job
from benchmarks.command import command
from benchmarks.records import record
from benchmarks.workers import OURS, PEERS, Setup
from mlx_gemma_mtp.cli.command import Parser, check_file
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.hub import Pair, find_pair

LONGEST_DRAFT = 8
BLAS = ("stock", "openblas", "both")


def numbers(text: str) -> list[int]:
    """'1,4,8' or '0-8' or both."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


def draft_lengths(text: str) -> list[int | str]:
    parts = text.split(",")
    auto = ["auto"] * ("auto" in parts)
    return [*(numbers(",".join(part for part in parts if part != "auto")) if parts != ["auto"] else []), *auto]


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def temperatures(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    p = Parser("benchmarks.decode", description=__doc__.splitlines()[0])
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto|none", help="the drafter (default: auto)")
    p.add_argument("--hf-path", metavar="FOLDER", help="the model's Hugging Face folder, in the place of --model")
    p.add_argument("--hf-draft-path", metavar="FOLDER", help="its drafter (default: FOLDER-assistant, if it is there)")
    p.add_argument("--against", type=words, default=[], metavar="SYSTEMS", help=f"of {','.join(PEERS)}")
    p.add_argument("--batch", type=numbers, default=[1, 2, 4, 8, 16], help="rows (default: 1,2,4,8,16)")
    p.add_argument(
        "--num-draft-tokens", type=draft_lengths, default=[0, 2, 4], metavar="LIST",
        help="0 is plain decoding; lists and ranges, 0-8; auto (default: 0,2,4)",
    )  # fmt: skip
    p.add_argument("--temps", type=temperatures, default=[0.0], help="temperatures (default: 0; 0,1 for both)")
    p.add_argument("--classes", type=words, default=list(prompts.CLASSES), help=f"default: {','.join(prompts.CLASSES)}")
    p.add_argument("--prompts", type=int, default=prompts.EACH, help="of each class (default: 8)")
    p.add_argument("--max-tokens", type=int, default=64, help="of each text (default: 64)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--blas", choices=BLAS, default="stock", help="on Linux (default: stock)")
    p.add_argument("--json", type=Path, metavar="FILE", help="append a line of JSON for each case")
    return p


def check(args: argparse.Namespace) -> None:
    """UserError for what cannot be measured."""
    known = {"--against": (args.against, PEERS), "--classes": (args.classes, prompts.CLASSES)}
    for name, (given, allowed) in known.items():
        if wrong := [word for word in given if word not in allowed]:
            raise UserError(f"{name} has {wrong[0]!r}, expected of {', '.join(allowed)}")
    whole = [n for n in args.num_draft_tokens if n != "auto"]
    if not all(0 <= n <= LONGEST_DRAFT for n in whole):
        raise UserError(f"--num-draft-tokens is {whole}, expected 0 to {LONGEST_DRAFT}, or auto")
    if not all(n >= 1 for n in args.batch):
        raise UserError(f"--batch is {args.batch}, expected 1 or more")
    if not all(t >= 0 for t in args.temps):
        raise UserError(f"--temps is {args.temps}, expected 0 (greedy) or more")
    if not 1 <= args.prompts <= prompts.EACH:
        raise UserError(f"--prompts is {args.prompts}, expected 1 to {prompts.EACH}")
    if args.max_tokens < 2 or args.repeats < 1:
        raise UserError(f"--max-tokens {args.max_tokens}, --repeats {args.repeats}: expected at least 2 and 1")
    if args.hf_path and args.model:
        raise UserError("--model and --hf-path are given, expected one: --hf-path is converted into the model")
    if args.json:
        check_file("--json", args.json)


def setups(args: argparse.Namespace, work: Path, note: Any) -> list[Setup]:
    """The systems that can run, each with its folders, without a BLAS; a note for each that cannot."""
    peers = []
    for peer in args.against:
        line = workers.missing(peer)
        if line is None and peer == "transformers" and args.model:
            line = "transformers is skipped: a converted folder is not for it; give --hf-path instead of --model"
        if line:
            note(line)
        else:
            peers.append(peer)
    source, mlx = folders_for(args, peers, work)
    return [
        Setup(system, source if system == "transformers" else mlx, "stock") for system in dict.fromkeys([OURS, *peers])
    ]


def folders_for(args: argparse.Namespace, peers: Sequence[str], work: Path) -> tuple[Pair | None, Pair]:
    """(the Hugging Face source where there is one, the MLX folders)."""
    from benchmarks import folders
    from mlx_gemma_mtp.machine import device

    if args.hf_path:
        source = Path(args.hf_path)
        beside = Path(args.hf_draft_path or f"{args.hf_path}-assistant")
        for folder in (source, Path(args.hf_draft_path or args.hf_path)):
            if not (folder / "config.json").is_file():
                raise UserError(f"{folder} has no config.json; expected a model's folder in Hugging Face layout")
        hf = Pair(source, beside if beside.is_dir() and args.draft_model != "none" else None, None)
        return hf, folders.converted(hf, work / "mlx")
    pair = find_pair(args.model, args.draft_model)
    if peers and args.model is None:
        hf = folders.hugging_face(pair, work / "hf")
        return hf, folders.converted(hf, work / "mlx")
    if peers and not device.traits().float32_sums:
        return None, folders.float32(pair, work / "mlx")
    return None, pair


def context(args: argparse.Namespace, ready: Sequence[Setup]) -> dict[str, Any]:
    """What all records of a run have in common."""
    from benchmarks.folders import hashes

    known = {setup.pair: hashes(setup.pair) for setup in ready}
    common = {
        "kind": "decode",
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(args.hf_path or args.model).name if args.hf_path or args.model else "bundled",
        "machine": machine.facts(),
        "versions": machine.versions(),
        "folders": {setup.system: known[setup.pair] for setup in ready},
    }
    if commit := machine.commit():
        common["commit"] = commit
    return common


def encoded(folder: Path, texts: Sequence[str], count: int) -> dict[str, list[list[int]]]:
    """The prompts of each class as chat turns in token ids, for all systems the same."""
    from mlx_gemma_mtp.files.folder import read_config
    from mlx_gemma_mtp.models.config import TargetConfig
    from mlx_gemma_mtp.text.encode import Text

    text_of = Text(folder, TargetConfig.from_dict(read_config(folder)).vocab_size)
    return {text: [text_of.encode(prompt) for prompt in prompts.of(text)[:count]] for text in texts}


def blas_choices(choice: str, note: Any) -> list[str]:
    wanted = [name for name in BLAS[:2] if choice in (name, "both")]
    if "openblas" in wanted and not machine.openblas_found():
        note(f"openblas is skipped: {machine.OPENBLAS} was not found (Debian: apt-get install libopenblas0-pthread)")
        wanted.remove("openblas")
    return wanted


def run(args: argparse.Namespace) -> int:
    from benchmarks import terminal

    check(args)
    failed = False
    with tempfile.TemporaryDirectory(prefix="decode-") as work:
        ready = setups(args, Path(work), terminal.note)
        common = context(args, ready)
        ids = encoded(ready[0].pair.target, args.classes, args.prompts)
        axes = Axes(args.num_draft_tokens, args.batch, args.temps, args.classes)
        for blas in blas_choices(args.blas, terminal.note):
            cases = axes.cases([Setup(setup.system, setup.pair, blas) for setup in ready])
            records = measured(cases, ids, args, common)
            title = f"{common['model']}, {blas} BLAS, {common['machine']['cpu']}, load {machine.load()}"
            terminal.out.print(*terminal.tables(records, title))
            for line in (*terminal.remarks(records), *thermal(records)):
                terminal.out.print(line, markup=False, highlight=False)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(each) + "\n" for each in records))
            failed |= any("failed" in each for each in records if each["system"] == OURS)
    return 1 if failed else 0


def thermal(records: Sequence[dict[str, Any]]) -> list[str]:
    """A note on the thermal state, where the system tells it."""
    return [f"thermal state: {note}" for note in {r["thermal_after"] for r in records if "thermal_after" in r}]


def measured(cases: list[Case], ids: dict, args: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of one run of all cases."""
    from benchmarks import terminal

    before = {"load_before": machine.load(), "thermal_before": machine.thermal_note()}
    job = Job(ids, args.max_tokens, args.repeats, lambda case: None, terminal.note)
    with terminal.bar(job.length(cases)) as bar:
        job.tick = lambda case: bar.update(bar.task_ids[0], advance=1, description=case.name())
        about = job.together(cases)
    after = {"load_after": machine.load(), "thermal_after": machine.thermal_note()}
    state = {key: value for key, value in (before | after).items() if value is not None}
    speed = machine.bandwidth(common["machine"])
    return [
        common | state | record(case, cases, job, about.get(OURS, {}), speed)
        | {"about": about.get(case.setup.system, {})}
        for case in cases
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where a case of this package failed, 2 for bad input, 130 after Ctrl-C."""
    return command(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
