"""Everything that a GPU is asked, in one go and a given time: `python -m benchmarks.gpu.run OUT [--seconds 360]`.

First whether results are right, several processes beside each other; then the times, each alone. A step is a process
with a limit, so that what crashes or hangs ends itself alone; what the time no longer holds is skipped, and the summary
says so. OUT gets `gpu_results.jsonl` (every finding, as it comes), `gpu_log.txt`, `gpu_summary.json` and the page
`gpu_page.md`. `--dry` prints when each step would begin if every one took its limit, and runs nothing.

--plan: `all` (the default) has the checks that matter most and the 26B in its real size; `checks` has every check, and
none of that; `size` the 26B and products alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import made, page
from benchmarks.gpu.pairs import MADE, ROOT

PYTHON = sys.executable
BESIDE = 8  # processes beside each other
LEAST = 15  # seconds without which a step is not begun
GRACE = 5  # seconds after its limit in which a step may end by itself
KEPT = {"all": 0.68, "checks": 0.45, "size": 1.0}  # of all seconds, at most, for the steps that run alone, by plan
TAIL = 30_000  # bytes of a step's output that are kept
OFF = {"MLX_GEMMA_MTP_METAL": "0"}
MEMORY = Path("/dev/shm")  # written and read faster than a disk
ROOM = 40 << 30  # bytes
SHORT = 50  # seconds of a check, at most, where the 26B is to have its time
MATTER = (
    "compile bundled", "quantise", "kernel checks", "kernels bfloat16", "texts bundled bfloat16", "texts e2b bfloat16",
    "texts bundled 4bit", "texts bundled 8bit", "texts bundled 4bit, without our kernels", "texts e2b 4bit", "memcheck",
)  # fmt: skip
LAYERS = ("--layers", os.environ["GPU_LAYERS"]) if "GPU_LAYERS" in os.environ else ()  # of the 26B, in a rehearsal
HOLLOW = ("--hollow",) if os.environ.get("FAKE_GPU") else ()  # results are zeros there
SANITIZER = (
    "s=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer | head -1); "
    "$s --tool {tool} --kernel-name kernel_substring=custom_kernel --print-limit 20 --error-exitcode 9 "
    "{python} -m benchmarks.gpu.kernels small {out} {seconds:.0f}"
)


Command = Callable[[Path, float], Sequence[str]]


@dataclass(frozen=True)
class Step:
    """A process. command: for a file that gets its findings and the seconds it may take. limit: seconds. after: steps
    that must have ended, in whatever way. nice: how much it lets others go first.
    """

    name: str
    command: Command
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    nice: int = 0


@dataclass
class Running:
    """A step's process and what is known of it. read: bytes of its findings that were taken over."""

    step: Step
    process: subprocess.Popen
    began: float
    read: int = 0


def module(name: str, *arguments: str) -> Command:
    return lambda out, seconds: [PYTHON, "-m", f"benchmarks.gpu.{name}", *arguments, str(out), f"{seconds:.0f}"]


def pytest(*arguments: str) -> Command:
    flags = ["-m", "metal", "-v", "--tb=short", "-rfEs", "-p", "no:cacheprovider", "--durations=8"]
    return lambda out, seconds: [PYTHON, "-m", "pytest", *flags, *arguments]


def sanitizer(tool: str) -> Command:
    return lambda out, seconds: ["bash", "-c", SANITIZER.format(tool=tool, python=PYTHON, out=out, seconds=seconds)]


def texts(pair: str, form: str, limit: float, ours: bool = True) -> Step:
    name = f"texts {pair} {form}" + ("" if ours else ", without our kernels")
    after = ("quantise", "compile bundled") if form.endswith("bit") else ()
    return Step(name, module("texts", "compare", pair, form), limit, {} if ours else OFF, after)


def steps(work: Path, plan: str = "all") -> tuple[list[Step], list[Step]]:
    """Returns a plan's steps that run beside each other, by value, and those that run alone."""
    if plan == "checks":
        return checks(work / "pairs")
    if plan == "size":
        return [], real_size(work, (50, 120, 35, 40, 25, 25, 20))
    beside, _ = checks(work / "pairs")
    first = [replace(step, limit=min(step.limit, SHORT)) for step in beside if step.name in MATTER]
    return first, real_size(work, (35, 70, 20, 20, 18, 18, 18))


def real_size(work: Path, limits: Sequence[float]) -> list[Step]:
    """Returns the steps on the 26B in its real size, and on products. limits: seconds of each."""
    folder = (MEMORY if roomy(MEMORY) else work) / "size" / f"{made.TARGET}-4bit"

    def making(out: Path, seconds: float) -> list[str]:
        return [PYTHON, "-m", "benchmarks.gpu.made", str(folder.parent), "--out", str(out), *LAYERS, *HOLLOW]

    commands = {
        "make 26B": making,
        "size ours": module("size", "ours", str(folder)),
        "times": module("times"),
        "products": module("products"),
        "size mlx-lm": module("size", "mlx-lm", str(folder)),
        "size mlx-vlm": module("size", "mlx-vlm", str(folder)),
        "rounds 26B": module("rounds", str(folder)),
    }
    return [
        Step(name, command, limit, after=() if name in ("make 26B", "times", "products") else ("make 26B",))
        for (name, command), limit in zip(commands.items(), limits, strict=True)
    ]


def roomy(folder: Path) -> bool:
    """Returns whether a folder has room for the 26B, and some to spare."""
    return folder.is_dir() and shutil.disk_usage(folder).free > ROOM


def checks(made: Path) -> tuple[list[Step], list[Step]]:
    """Returns all checks, and the times of the small pairs and of single kernels. made: where the pairs go."""
    compiled = ("quantise", "compile bundled")
    beside = [
        Step("compile bundled", module("compiled", "bundled"), 100),
        Step("quantise", lambda out, seconds: [PYTHON, "-m", "benchmarks.gpu.pairs", str(made)], 30),
        Step("kernels bfloat16", module("kernels", "bfloat16"), 80),
        Step("kernel checks", module("kernels", "checks"), 30),
        texts("bundled", "bfloat16", 45),
        Step("tests of kernels", pytest("tests/msl"), 85),
        texts("e2b", "bfloat16", 40),
        Step("memcheck", sanitizer("memcheck"), 50),
        Step("racecheck", sanitizer("racecheck"), 50),
        Step("kernels float16", module("kernels", "float16"), 60),
        texts("bundled", "4bit", 65),
        texts("bundled", "8bit", 65),
        texts("bundled", "4bit", 65, False),
        Step("compile 26B", module("compiled", "26B"), 55, after=("compile bundled",)),
        Step("types", pytest("tests/models/test_metal_types.py"), 75, after=compiled),
        texts("e2b", "4bit", 50),
        texts("e2b", "8bit", 50),
        texts("bundled", "8bit", 45, False),
        Step("widths", module("widths"), 40, after=compiled),
        texts("bundled", "float32", 30),
        texts("e2b", "float32", 30),
        Step("tests of layers", pytest("tests/models/test_layers.py"), 45),
        Step("kernels float32", module("kernels", "float32"), 40),
        texts("bundled", "bfloat16", 30, False),
        texts("bundled", "float32", 25, False),
    ]
    doctor = [PYTHON, "-m", "mlx_gemma_mtp.doctor", "--repeats", "5", "--seconds", "0.1"]
    alone = [
        Step("doctor", lambda out, seconds: doctor, 45, after=("compile 26B",)),
        Step("times", module("times"), 40, after=("compile 26B",)),
        Step("rounds", module("rounds"), 40, after=compiled),
    ]
    # What others wait for goes first: NVRTC keeps all processors busy.
    beside = [step if step.name in compiled else replace(step, nice=10) for step in beside]
    return beside, alone


def chosen(every: Sequence[Step], only: str) -> list[Step]:
    """Returns the steps whose name contains `only`, and those that they come after, in their order."""
    names = {step.name for step in every if only in step.name}
    while more := {name for step in every if step.name in names for name in step.after} - names:
        names |= more
    return [step for step in every if step.name in names]


def kept(alone: Sequence[Step], seconds: float, plan: str = "checks") -> float:
    """Returns the seconds that the steps which run alone need, of all `seconds`."""
    return min(KEPT[plan] * seconds, sum(step.limit + GRACE for step in alone))


def following(waiting: Sequence[Step], running: Sequence[Step], ended: set[str], left: float) -> Step | None:
    """Returns the step that begins next, with the limit that `left` seconds allow; None for none now.

    What a step comes after holds it up only if that is still waiting or running.
    """
    pending = {step.name for step in (*waiting, *running)} - ended
    ready = next((step for step in waiting if pending.isdisjoint(step.after)), None)
    if ready is None or left < LEAST + GRACE:
        return None
    return replace(ready, limit=min(ready.limit, left - GRACE))


def timetable(steps: Sequence[Step], beside: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Returns (begin, end) of each step that `seconds` hold, if every one takes its limit and the grace."""
    now, waiting, running, found = 0.0, list(steps), {}, {}
    while True:
        while len(running) < beside:
            active = [step for step in steps if step.name in running]
            step = following(waiting, active, set(), seconds - now)
            if step is None:
                break
            waiting = [each for each in waiting if each.name != step.name]
            running[step.name] = now + step.limit + GRACE
            found[step.name] = now, running[step.name]
        if not running:
            return found
        now = min(running.values())
        running = {name: end for name, end in running.items() if end > now}


class Run:
    """The steps of a run, their files and the time that is left."""

    def __init__(self, out: Path, work: Path, seconds: float):
        self.out, self.work, self.end = out, work, time.monotonic() + seconds
        self.began, self.states, self.found = time.monotonic(), {}, defaultdict(list)
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, str] = {}
        self.results = (out / "gpu_results.jsonl").open("a", encoding="utf-8")
        self.log = (out / "gpu_log.txt").open("a", encoding="utf-8")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} {line}", flush=True)
        print(f"{time.monotonic() - self.began:6.1f} {line}", file=self.log, flush=True)

    def take(self, steps: Sequence[Step], beside: int, kept: float) -> None:
        """Runs steps, `beside` at a time, until all ended or only `kept` seconds are left."""
        waiting, running = list(steps), []
        while True:
            while len(running) < beside:
                active = [each.step for each in running]
                step = following(waiting, active, set(self.states), self.left - kept)
                if step is None:
                    break
                waiting = [each for each in waiting if each.name != step.name]
                running.append(self._start(step))
            if not running:
                break
            time.sleep(0.3)
            for each in list(running):
                self._read(each)
                if each.process.poll() is not None or time.monotonic() > each.began + each.step.limit + GRACE:
                    running.remove(each)
                    self._end(each)
        for step in waiting:
            self._note(step.name, "skipped: no time left", 0.0)
        self.summarise()

    def _file(self, step: Step, end: str) -> Path:
        return self.work / ("".join(c if c.isalnum() else "_" for c in step.name) + end)

    def _start(self, step: Step) -> Running:
        self._file(step, ".jsonl").touch()
        with self._file(step, ".log").open("wb") as log:
            process = subprocess.Popen(
                ["nice", "-n", str(step.nice), *step.command(self._file(step, ".jsonl"), max(5.0, step.limit - GRACE))],
                cwd=ROOT, env=os.environ | step.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.say(f"{step.name}: begins, {step.limit:.0f} s")
        return Running(step, process, time.monotonic())

    def _read(self, running: Running) -> None:
        """Takes over what a step wrote since."""
        name, data = running.step.name, self._file(running.step, ".jsonl").read_bytes()
        end = data.rfind(b"\n") + 1
        for line in data[running.read : end].splitlines():
            found = json.loads(line)
            self.found[name].append(found)
            print(json.dumps({"step": name} | found), file=self.results, flush=True)
        running.read = max(running.read, end)

    def _end(self, running: Running) -> None:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)  # a group of its own
            running.process.wait()
            state = "stopped at its limit"
        else:
            state = f"ended with {running.process.returncode}"
        self._read(running)
        text = self._file(running.step, ".log").read_bytes()[-TAIL:].decode(errors="replace")
        print(f"---------- {running.step.name}\n{text}\n----------", file=self.log, flush=True)
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self._note(running.step.name, state, round(time.monotonic() - running.began, 1), last[:200])
        self.summarise()

    def _note(self, name: str, state: str, seconds: float, last: str = "") -> None:
        self.states[name] = {"state": state, "seconds": seconds}
        self.say(f"{name}: {state}, {seconds} s{'; ' if last else ''}{last}")

    def summarise(self) -> None:
        """Writes the summary anew."""
        data = {"seconds": round(time.monotonic() - self.began, 1), "steps": self.states, "short": short(self.found)}
        (self.out / "gpu_summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu_page.md").write_text(page.page(self.states, self.found, self.facts), encoding="utf-8")


def short(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns what a reader asks first: cases that are not as they should be, texts that differ and whether by more
    than a near-tie, and whether the device was free for times.
    """
    short: dict[str, Any] = {}
    for step, lines in found.items():
        if step.startswith("kernel") or step in ("memcheck", "racecheck"):
            short[step] = of_cases(lines)
        elif step.startswith("texts"):
            short[step] = of_texts(lines)
        elif step == "times":
            calls = [line["alone_us"] for line in lines if line["what"] == "smallest call"]
            short[step] = {"cases": len(lines), "smallest call, us": calls[0] if calls else None}
        elif step.startswith("compile"):
            seconds = sorted(line["seconds"] for line in lines if not line["ended with"])
            short[step] = {"done": len(seconds), "of": len(lines), "longest": seconds[-1] if seconds else None}
        else:
            short[step] = len(lines)
    return short


def of_cases(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sum of a part of kernels.py: the largest error by type, and what is bad."""
    cases = [line for line in lines if "ok" in line]
    bad, largest = [line for line in cases if not line["ok"]], {}
    for line in cases:
        if "errors" in line:
            largest[line["dtype"]] = max(*line["errors"].values(), largest.get(line["dtype"], 0.0))
    return {
        "cases": len(cases),
        "all": not any(line.get("what") == "skipped" for line in lines),
        "bad": len(bad),
        "largest error": largest,
        "first bad": bad[:6],
    }


def of_texts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sum of texts.py's comparison. far: texts that part from plain decoding by more than a near-tie;
    places: where texts part, each counted once, by the largest margin there.
    """
    cells, places = [line for line in lines if line["what"] == "cell"], {}
    for line in cells:
        for place, margin in zip(line["places"], line["margins"], strict=True):
            place = f"{line['temperature']} {place}"
            places[place] = max(margin, places.get(place, 0.0), key=abs)
    return {
        "as_cpu": [f"{line['as_cpu']}/{line['of']}" for line in lines if line["what"] == "plain"],
        "cells": len(cells),
        "texts": sum(line["texts"] for line in cells),
        "differ": sum(line["differ"] for line in cells),
        "far": sum(line["far"] for line in cells),
        "places": len(places),
        "largest margin": max(places.values(), key=abs, default=None),
        "errors": [error for line in cells for error in line["errors"]][:2]
        + [line["error"] for line in lines if line["what"] == "raised"][:2],
    }


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
        run.facts[name] = said[-1500:]
        print(json.dumps({"step": "facts", name: said[-1500:]}), file=run.results, flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("out", type=Path)
    p.add_argument("--seconds", type=float, default=360)
    p.add_argument("--until", type=float, help="seconds since 1970 at which all ends; what began this counts, too")
    p.add_argument("--work", type=Path, default=Path("/tmp/gpu-run"))
    p.add_argument("--alone", type=float, help="seconds kept for the steps that run alone (default: what they need)")
    p.add_argument("--beside", type=int, default=BESIDE)
    p.add_argument("--plan", choices=("all", "checks", "size"), default="all")
    p.add_argument("--only", default="", help="steps whose name contains this, and what they come after")
    p.add_argument("--dry", action="store_true", help="print the timetable and run nothing")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.until is not None:
        args.seconds = max(0.0, args.until - time.time())
    beside, alone = steps(args.work, args.plan)
    some = chosen([*beside, *alone], args.only)
    beside, alone = ([step for step in each if step in some] for each in (beside, alone))
    reserve = kept(alone, args.seconds, args.plan) if args.alone is None else args.alone
    if args.dry:
        first = args.seconds - reserve
        both = timetable(beside, args.beside, first), timetable(alone, 1, reserve)
        for step, table, start in [*((s, both[0], 0.0) for s in beside), *((s, both[1], first) for s in alone)]:
            times = [start + each for each in table.get(step.name, ())]
            print(f"{step.name:45}" + ("{:6.0f} to {:.0f} s".format(*times) if times else "  no time"))
        return 0
    run = Run(args.out, args.work, args.seconds)
    os.environ.setdefault(MADE, str(args.work / "pairs"))
    os.environ.setdefault("MLX_GEMMA_MTP_CACHE", str(args.work / "cache"))
    facts(run)
    run.take(beside, args.beside, reserve)
    run.take(alone, 1, 0.0)
    print(json.dumps(short(run.found), indent=1)[:6000])
    return 0


if __name__ == "__main__":
    sys.exit(main())
