"""Side by side with mlx-lm and mlx-vlm on the same files: `python -m benchmarks.peers`.

Float32, greedy. Each system is one process that loads once (`peer_workers.py`); one call at a time
goes round all of them, prompt by prompt, so that other load on the machine falls on all alike. A
case is a system, a number of drafts and a number of rows. Reported for each: the median over the
repeats of generated tokens a second (whole calls, prefill included; and decoding alone, after the
first tokens), tokens a round, and for how many prompts the tokens equal mlx-lm's.

On Linux MLX's wheel multiplies with the reference BLAS, whose time grows with the number of rows: a
verify of five tokens costs almost five steps. `--blas openblas` preloads OpenBLAS, one thread, into
every system.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.peer_workers import OPENBLAS, ROOT, Worker, WorkerFailed

DEMO = ROOT / "mlx_gemma_mtp" / "demo"
PROMPTS = ROOT / "tests" / "data" / "prompts.json"
PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "mlx-gemma-mtp")
# mlx-vlm counts a block of one more; its 4 drafts are a ceiling, it begins with 3.
DRAFTS = {"mlx-lm": (0,), "mlx-vlm": (0, 2, 3, 4), "mlx_gemma_mtp": (0, 1, 2, 3, 4)}
SINGLE_ROW = ("mlx-lm",)
BLAS_CHOICES = ("reference", "openblas")


@dataclass
class Case:
    """One line of the table; the lists have an entry a repeat."""

    worker: Worker
    drafts: int
    rows: int
    tokens: list[list[list[int]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    accepted: int = 0

    def call(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        return self.worker.ask(prompts=prompts, drafts=self.drafts, max_tokens=max_tokens)

    def new_repeat(self) -> None:
        self.tokens.append([])
        self.seconds.append(0.0)
        self.prefill_seconds.append(0.0)

    def measure(self, prompts: list[list[int]], max_tokens: int, end: set[int]) -> None:
        timing = self.call(prompts, max_tokens)
        # Some systems return the end token and some do not; it is no text, so it counts for nobody.
        self.tokens[-1] += [row[:-1] if row and row[-1] in end else row for row in timing["tokens"]]
        self.seconds[-1] += timing["seconds"]
        self.prefill_seconds[-1] += timing["prefill_seconds"]
        self.rounds += timing["rounds"]
        self.accepted += timing["accepted"]

    def report(self, reference: Case) -> dict[str, Any]:
        counts = [sum(map(len, tokens)) for tokens in self.tokens]
        pairs = zip(counts, self.seconds, self.prefill_seconds, strict=True)
        decode = [(n - len(self.tokens[0])) / (whole - prefill) for n, whole, prefill in pairs]
        speeds = [count / seconds for count, seconds in zip(counts, self.seconds, strict=True)]
        expected = reference.tokens[0]
        same = [all(repeat[i] == row for repeat in self.tokens) for i, row in enumerate(expected)]
        return {
            "system": self.worker.system, "drafts": self.drafts, "rows": self.rows,
            "tokens_per_s": round(statistics.median(speeds), 1),
            "tokens_per_s_all": [round(speed, 1) for speed in speeds],
            "decode_tokens_per_s": round(statistics.median(decode), 1),
            "tokens_per_round": round(1 + self.accepted / max(self.rounds, 1), 2),
            "tokens": counts[0], "equal": sum(same), "prompts": len(expected),
            "compared_with": reference.worker.system, **self.worker.about,
        }  # fmt: skip


def float32_copy(source: Path, folder: Path) -> Path:
    """Copy an MLX folder, its weights as float32: MLX's CPU has no bfloat16 expert product."""
    import mlx.core as mx

    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    weights: dict[str, mx.array] = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= mx.load(str(path))
    for key, value in weights.items():
        if mx.issubdtype(value.dtype, mx.floating):
            weights[key] = value.astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((source / "config.json").read_text())
    for section in (config, config.get("text_config", {})):
        if "dtype" in section:
            section["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def read_prompts(target: Path, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    marked = [entry["prompt"] for entry in json.loads(PROMPTS.read_text()) if entry["acceptance"]][:count]
    turns = [[{"role": "user", "content": text}] for text in marked]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


def end_tokens(target: Path) -> set[int]:
    end = json.loads((target / "config.json").read_text())["eos_token_id"]
    return set(end if isinstance(end, list) else [end])


def openblas_found() -> bool:
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        return False
    return sys.platform == "linux"


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "checkout" if package == PACKAGES[-1] else "missing"
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def start_workers(systems: Sequence[str], folders: tuple[Path, Path], blas: str, logs: Path) -> list[Worker]:
    workers = []
    for system in systems:
        try:
            workers.append(Worker(system, folders, blas, logs / f"{blas}-{system}.log"))
        except WorkerFailed as error:
            print(f"left out: {error}", file=sys.stderr)
    return workers


def run_cases(workers: list[Worker], args: argparse.Namespace, prompts: list[list[int]], end: set[int]) -> list[Case]:
    """Warm every case, then go round all of them `repeats` times, one call each in turn."""
    cases = [
        Case(worker, drafts, rows)
        for rows in dict.fromkeys((1, args.batch))
        for worker in workers
        for drafts in DRAFTS[worker.system]
        if rows == 1 or worker.system not in SINGLE_ROW
    ]
    for case in cases:
        case.call(prompts[: case.rows], 16)
    for repeat in range(args.repeats):
        for case in cases:
            case.new_repeat()
        for rows in dict.fromkeys(case.rows for case in cases):
            for start in range(0, len(prompts), rows):
                for case in cases:
                    if case.rows == rows:
                        case.measure(prompts[start : start + rows], args.max_tokens, end)
        load = os.getloadavg()[0]
        print(f"repeat {repeat + 1} of {args.repeats} done, load {load:.1f}", file=sys.stderr)
    return cases


def table(reports: list[dict[str, Any]]) -> str:
    lines = [
        "| system | drafts | rows | tokens/s | repeats | decoding only | tokens a round | equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        cells = (
            report["system"],
            report["drafts"] or "plain",
            report["rows"],
            f"{report['tokens_per_s']:.1f}",
            " ".join(f"{speed:.0f}" for speed in report["tokens_per_s_all"]),
            f"{report['decode_tokens_per_s']:.1f}",
            f"{report['tokens_per_round']:.2f}",
            f"{report['equal']}/{report['prompts']}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def compare(args: argparse.Namespace, blas: str, temporary: Path, facts: dict[str, Any]) -> None:
    folders = (temporary / "target", temporary / "drafter")
    workers = start_workers(args.systems, folders, blas, temporary)
    if not workers:
        raise SystemExit("no system could be started; the messages above say why")
    prompts = read_prompts(folders[0], args.prompts)
    try:
        cases = run_cases(workers, args, prompts, end_tokens(folders[0]))
    except WorkerFailed as error:
        raise SystemExit(f"stopped: {error}") from None
    finally:
        for worker in workers:
            worker.close()
    reports = [case.report(cases[0]) for case in cases]
    title = f"{blas} BLAS, {len(prompts)} prompts, at most {args.max_tokens} tokens, float32"
    print(f"\n{title}, equal to {cases[0].worker.system}\n\n{table(reports)}", flush=True)
    if args.json:
        settings = {
            "blas": blas,
            "max_tokens": args.max_tokens,
            "repeats": args.repeats,
            "model": args.model.name,
        }
        with args.json.open("a") as file:
            file.writelines(json.dumps({**report, **settings, **facts}) + "\n" for report in reports)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare mlx_gemma_mtp with mlx-lm and mlx-vlm on the same files.")
    parser.add_argument("--model", type=Path, default=DEMO / "target", help="converted target (default: the demo)")
    parser.add_argument("--draft-model", type=Path, default=DEMO / "drafter", help="its drafter (default: the demo)")
    parser.add_argument("--systems", nargs="+", choices=DRAFTS, default=list(DRAFTS))
    parser.add_argument("--blas", choices=(*BLAS_CHOICES, "both"), default="reference")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the marked prompts (default 8)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the batched cases, 1 for none (default 8)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append one JSON line a case to this file")
    args = parser.parse_args(argv)
    for folder in (args.model, args.draft_model):
        if not (folder / "config.json").exists():
            parser.error(f"{folder} has no config.json, expected a folder written by python -m convert")
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        float32_copy(args.model, temporary / "target")
        float32_copy(args.draft_model, temporary / "drafter")
        for blas in BLAS_CHOICES if args.blas == "both" else (args.blas,):
            if blas == "openblas" and not openblas_found():
                print(f"openblas skipped: {OPENBLAS} not found (Debian: apt install libopenblas0)")
                continue
            compare(args, blas, temporary, facts)


if __name__ == "__main__":
    main()
