"""Everything that a GPU is asked, in one go and a given time: `python -m benchmarks.gpu.run OUT [--seconds 280]`.

First whether results are right, several processes beside each other; then the times, each alone. A step is a process
with a limit, so that what crashes or hangs ends itself alone; what the time no longer holds is skipped, and the summary
says so. OUT gets `gpu_results.jsonl` (every finding, as it comes), `gpu_log.txt` and `gpu_summary.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.pairs import MADE, ROOT

PYTHON = sys.executable
BESIDE = 6  # processes beside each other
TAIL = 30_000  # bytes of a step's output that are kept
OFF = {"MLX_GEMMA_MTP_METAL": "0"}
TESTS = ("tests/msl", "tests/models/test_layers.py")
TYPES = ("tests/models/test_metal_types.py",)  # of all formats: long
SANITIZER = (
    "s=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer | head -1); "
    "$s --tool {tool} --kernel-name kernel_substring=custom_kernel --print-limit 20 --error-exitcode 9 "
    "{python} -m benchmarks.gpu.kernels {out} 40 small"
)


@dataclass
class Step:
    """A process. command: for a file that gets its findings and the seconds it may take. after: steps that must have
    ended.
    """

    name: str
    command: Callable[[Path, float], Sequence[str]]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    process: subprocess.Popen | None = None
    began: float = 0.0
    read: int = 0
    state: str = "waiting"
    seconds: float = 0.0


def module(name: str, *arguments: str) -> Callable[[Path, float], list[str]]:
    return lambda out, seconds: [PYTHON, "-m", f"benchmarks.gpu.{name}", *arguments, str(out), f"{seconds:.0f}"]


def texts(pair: str, form: str, ours: bool = True) -> Step:
    name = f"texts {pair} {form}" + ("" if ours else ", without our kernels")
    command = module("texts", "compare", pair, form)
    return Step(name, command, 55, {} if ours else OFF, ("quantise", "compile") if form.endswith("bit") else ())


def steps(made: Path) -> tuple[list[Step], list[Step]]:
    """Returns the steps that run beside each other, by value, and those that run alone."""
    pytest = [PYTHON, "-m", "pytest", "-m", "metal", "-v", "--tb=short", "-rfEs", "-p", "no:cacheprovider"]
    shell = lambda tool: lambda out, seconds: [  # noqa: E731
        "bash", "-c", SANITIZER.format(tool=tool, python=PYTHON, out=out)
    ]  # fmt: skip
    beside = [
        Step("kernels", module("kernels"), 75),
        Step("compile", lambda out, seconds: [PYTHON, "-m", "benchmarks.gpu.compiled"], 60),
        Step("quantise", lambda out, seconds: [PYTHON, "-m", "benchmarks.gpu.pairs", str(made)], 60),
        texts("bundled", "float32"),
        texts("e2b", "float32"),
        Step("tests", lambda out, seconds: [*pytest, *TESTS], 110),
        texts("bundled", "bfloat16"),
        texts("bundled", "4bit"),
        texts("bundled", "bfloat16", False),
        texts("bundled", "4bit", False),
        texts("e2b", "bfloat16"),
        texts("bundled", "8bit"),
        Step("memcheck", shell("memcheck"), 60),
        texts("bundled", "float32", False),
        texts("e2b", "4bit"),
        texts("bundled", "8bit", False),
        texts("e2b", "8bit"),
        Step("widths", module("widths"), 40),
        Step("racecheck", shell("racecheck"), 60),
        Step("types", lambda out, seconds: [*pytest, *TYPES], 60),
    ]
    doctor = [PYTHON, "-m", "mlx_gemma_mtp.doctor", "--repeats", "5"]
    alone = [
        Step("times", module("times"), 45),
        Step("rounds", lambda out, seconds: [PYTHON, "-m", "benchmarks.gpu.rounds", str(out)], 45),
        Step("doctor", lambda out, seconds: doctor, 45),
    ]
    return beside, alone


class Run:
    """The steps of a run, their files and the time that is left."""

    def __init__(self, out: Path, work: Path, seconds: float):
        self.out, self.work, self.end = out, work, time.monotonic() + seconds
        self.began, self.done, self.found = time.monotonic(), [], defaultdict(list)
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        self.results = (out / "gpu_results.jsonl").open("a", encoding="utf-8")
        self.log = (out / "gpu_log.txt").open("a", encoding="utf-8")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} {line}", flush=True)
        print(f"{time.monotonic() - self.began:6.1f} {line}", file=self.log, flush=True)

    def take(self, steps: list[Step], beside: int, kept: float) -> None:
        """Runs steps, `beside` at a time, until all ended or only `kept` seconds are left."""
        waiting, running = list(steps), []
        while waiting or running:
            ended = {step.name for step in self.done}
            while waiting and len(running) < beside and self.left - kept > 15:
                ready = next((step for step in waiting if ended.issuperset(step.after)), None)
                if ready is None:
                    break
                waiting.remove(ready)
                running.append(ready)
                self._start(ready, min(ready.limit, self.left - kept))
            if not running and self.left - kept <= 15:
                break
            time.sleep(0.3)
            for step in list(running):
                self._read(step)
                if step.process.poll() is not None or time.monotonic() > step.began + step.limit + 10:
                    running.remove(step)
                    self._end(step)
        for step in waiting:
            step.state = "skipped: no time left"
            self.say(f"{step.name}: {step.state}")
            self.done.append(step)
        self.summarise()

    def _file(self, step: Step, end: str) -> Path:
        return self.work / ("".join(c if c.isalnum() else "_" for c in step.name) + end)

    def _start(self, step: Step, limit: float) -> None:
        step.began, step.limit, step.state = time.monotonic(), limit, "running"
        self._file(step, ".jsonl").touch()
        with self._file(step, ".log").open("wb") as log:
            step.process = subprocess.Popen(
                step.command(self._file(step, ".jsonl"), max(5.0, limit - 5)),
                cwd=ROOT, env=os.environ | step.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.say(f"{step.name}: begins, {limit:.0f} s")

    def _read(self, step: Step) -> None:
        """Takes over what a step wrote since."""
        data = self._file(step, ".jsonl").read_bytes()
        end = data.rfind(b"\n") + 1
        for line in data[step.read : end].splitlines():
            found = json.loads(line)
            self.found[step.name].append(found)
            print(json.dumps({"step": step.name} | found), file=self.results, flush=True)
        step.read = max(step.read, end)

    def _end(self, step: Step) -> None:
        if step.process.poll() is None:
            os.killpg(step.process.pid, signal.SIGKILL)  # a group of its own
            step.process.wait()
            step.state = "stopped at its limit"
        else:
            step.state = f"ended with {step.process.returncode}"
        self._read(step)
        step.seconds = round(time.monotonic() - step.began, 1)
        self.done.append(step)
        text = self._file(step, ".log").read_bytes()[-TAIL:].decode(errors="replace")
        print(f"---------- {step.name}\n{text}\n----------", file=self.log, flush=True)
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.say(f"{step.name}: {step.state} after {step.seconds} s; {last[:200]}")
        self.summarise()

    def summarise(self) -> None:
        """Writes the summary anew."""
        states = {step.name: {"state": step.state, "seconds": step.seconds} for step in self.done}
        data = {"seconds": round(time.monotonic() - self.began, 1), "steps": states, "short": short(self.found)}
        (self.out / "gpu_summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def short(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns what a reader asks first: cases that are not as they should be, and texts that differ."""
    short: dict[str, Any] = {}
    for step, lines in found.items():
        if step in ("kernels", "memcheck", "racecheck"):
            bad = [line for line in lines if not line["ok"]]
            short[step] = {"cases": len(lines), "bad": len(bad), "first bad": bad[:6]}
        elif step.startswith("texts"):
            cells = [line for line in lines if line["what"] == "cell"]
            gaps = sorted((gap for line in cells for gap in line["gaps"]), key=abs)
            short[step] = {
                "as_cpu": [f"{line['as_cpu']}/{line['of']}" for line in lines if line["what"] == "plain"],
                "cells": len(cells),
                "texts": sum(line["texts"] for line in cells),
                "differ": sum(line["differ"] for line in cells),
                "largest gap": gaps[-1] if gaps else None,
                "errors": [error for line in cells for error in line["errors"]][:2],
            }
        else:
            short[step] = len(lines)
    return short


def facts(run: Run) -> None:
    """Logs what the machine is, and whether MLX computes on it at all."""
    asks = {
        "card": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,"
                 "clocks.max.memory,utilization.gpu,compute_mode", "--format=csv"],
        "processor": ["bash", "-c", "nproc; uname -rm; free -g | head -2; ls /usr/local/nvidia 2>/dev/null"],
        "mlx": [PYTHON, "-c", "import sys, mlx.core as mx; x = mx.random.normal((512, 512)); mx.eval(x @ x); "
                "print(sys.version, mx.__version__, mx.default_device(), mx.device_info(), mx.metal.is_available())"],
    }  # fmt: skip
    for name, command in asks.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
            said = (done.stdout + done.stderr).strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        run.say(f"{name}: {said[-1500:]}")
        print(json.dumps({"step": "facts", name: said[-1500:]}), file=run.results, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=280)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-run"))
    parser.add_argument("--alone", type=float, default=95, help="seconds kept for the steps that run alone")
    parser.add_argument("--beside", type=int, default=BESIDE)
    parser.add_argument("--only", default="", help="steps whose name contains this")
    args = parser.parse_args()
    run = Run(args.out, args.work, args.seconds)
    os.environ.setdefault(MADE, str(args.work / "pairs"))
    os.environ.setdefault("MLX_GEMMA_MTP_CACHE", str(args.work / "cache"))
    facts(run)
    for some, beside, kept in zip(steps(args.work / "pairs"), (args.beside, 1), (args.alone, 0.0), strict=True):
        run.take([step for step in some if args.only in step.name], beside, kept)
    print(json.dumps(short(run.found), indent=1)[:6000])
    return 0


if __name__ == "__main__":
    sys.exit(main())
