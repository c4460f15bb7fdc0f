"""At real size: `python -m benchmarks.real_size [e2b|26b|all]` makes checkpoints of random values and measures.

- e2b: converts a generated gemma-4-E2B-it (9.3 GB, bf16) with `python -m convert`, then `check`s and `inspect`s what
  was written. It fails where a conversion's peak memory is more than 2 GB above an idle process.
- 26b: `load`s a generated 4-bit gemma-4-26B-A4B-it (14.5 GB) with its bf16 drafter and emits 8 tokens without MTP and 8
  with it, greedily. It fails where they differ.

Random are all weights (random_checkpoints.py); the text means nothing, and drafts are right by chance. Real are names,
shapes, formats, bytes, and everything that runs. Each step is a process of its own. Seconds are wall time; CPU seconds
are its own, the better figure on a shared machine. Peak is its largest resident set less that of an idle process with
the same imports. Read and written are what its calls moved, "from disk" what missed the page cache (/proc, Linux only).
Files are dropped from the page cache before they are first read. Folders are removed at the end, also after a failure,
unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine
from mlx_gemma_mtp.errors import UserError  # nothing large: a child's peak starts with its parent's memory

ROOT = Path(__file__).parent.parent
GB = 10**9
PEAK_LIMIT = 2 * GB  # of a conversion, over an idle process
TOKENS, DRAFTS = 8, 2
PROMPT = [2, *range(3000, 3015)]  # token ids; a random model has no preference
RSS_UNIT = 1 if sys.platform == "darwin" else 1024

MAKE = ["-m", "benchmarks.random_checkpoints"]
CONVERT_IDLE = ["-c", "import convert.cli"]
RUN_IDLE = ["-c", "import mlx_gemma_mtp.engine.engine, mlx_gemma_mtp.text.encode"]
# --formats -> (flags, bytes of the folder that convert writes, at most)
FORMATS = {
    "4bit": (["-q", "--q-bits", "4"], 4 * GB),
    "mxfp4": (["-q", "--q-mode", "mxfp4"], 4 * GB),
    "none": ([], 10 * GB),
}
E2B_BYTES, PAIR_BYTES, PAIR_MEMORY = int(9.4 * GB), int(15.5 * GB), int(19.5 * GB)


@dataclass(frozen=True)
class Usage:
    """What one process took. Bytes; None where the system does not say. peak: of its resident memory."""

    seconds: float
    cpu_seconds: float
    peak: int
    read: int | None
    written: int | None
    from_disk: int | None


@dataclass(frozen=True)
class Step:
    """One line of the report. peak_over_idle: bytes."""

    name: str
    usage: Usage
    peak_over_idle: int
    details: dict[str, Any]


class Failed(Exception):
    """A step did not do what it must; the message says what."""


def measure(arguments: list[str], show: bool = False) -> tuple[str, Usage]:
    """Runs `python ARGUMENTS` to its end: (what it printed, what it took). Raises Failed for an exit code but 0."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        output = process.stdout.read()
        counted = _io(process.pid)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    seconds = time.perf_counter() - start
    if show:
        tqdm.write(output.rstrip())
    if process.returncode:
        raise Failed(f"python {' '.join(arguments)} ended with {process.returncode}: {output.strip()[-500:]}")
    io = (counted.get(key) for key in ("rchar", "wchar", "read_bytes"))
    return output, Usage(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * RSS_UNIT, *io)


def _io(pid: int) -> dict[str, int]:
    """A child's counters at its end, which its /proc entry keeps until it is waited for; {} where there is none."""
    if sys.platform != "linux":
        return {}
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


class Report:
    """The steps so far: each runs when it is asked for, and prints its line when it has ended."""

    def __init__(self, steps: int):
        self.steps: list[Step] = []
        self._idle: dict[str, int] = {}
        self._bar = tqdm(total=steps, unit="step", disable=None)

    def step(
        self, name: str, arguments: list[str], idle: list[str], parse: Callable[[str], dict] = lambda output: {}
    ) -> Step:
        """parse: what the process printed -> details."""
        self._bar.set_description(name)
        if (key := " ".join(idle)) not in self._idle:
            self._idle[key] = measure(idle)[1].peak
        output, usage = measure(arguments)
        step = Step(name, usage, max(0, usage.peak - self._idle[key]), parse(output))
        self.steps.append(step)
        tqdm.write(_row(step))
        self._bar.update()
        return step

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": machine.facts() | machine.versions(),
            "idle_peak": self._idle,
            "steps": [asdict(step) for step in self.steps],
        }


TABLE = (
    "| step | seconds | CPU seconds | peak over idle, GB | read, GB | from disk, GB | written, GB | |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _row(step: Step) -> str:
    used = step.usage
    sizes = (step.peak_over_idle, used.read, used.from_disk, used.written)
    times = (f"{used.seconds:.1f}", f"{used.cpu_seconds:.1f}")
    cells = (step.name, *times, *("-" if n is None else f"{n / GB:.2f}" for n in sizes))
    details = ", ".join(f"{key} {value}" for key, value in step.details.items() if not isinstance(value, (list, dict)))
    return f"| {' | '.join(cells)} | {details} |"


def run_e2b(work: Path, formats: list[str], report: Report) -> None:
    """Makes it, and for each format converts, checks and inspects."""
    source = work / "gemma-4-E2B-it"
    report.step("e2b: make", [*MAKE, "e2b", str(work)], CONVERT_IDLE)
    for name in formats:
        out, flags = work / f"{source.name}-{name}", FORMATS[name][0]
        forget(source)
        paths = ["--hf-path", str(source), "--mlx-path", str(out)]
        step = report.step(f"e2b: convert, {name}", ["-m", "convert", *paths, *flags], CONVERT_IDLE)
        if step.peak_over_idle > PEAK_LIMIT:
            raise Failed(f"convert took {step.peak_over_idle / GB:.2f} GB over idle; expected at most 2")
        report.step(f"e2b: check, {name}", ["-m", "convert", "check", str(out)], CONVERT_IDLE)
        inspected = ["-m", "convert", "inspect", str(out), "--json"]
        report.step(f"e2b: inspect, {name}", inspected, CONVERT_IDLE, _inspected)
        shutil.rmtree(out)


def _inspected(output: str) -> dict[str, Any]:
    found = json.loads(output)
    return {"parameters": found["parameters"], "bytes": found["bytes"]}


def run_26b(work: Path, report: Report) -> None:
    """Makes the pair, has convert judge the target's layout, loads both and emits tokens."""
    target = work / "gemma-4-26B-A4B-it-4bit"
    report.step("26b: make", [*MAKE, "26b", str(work)], CONVERT_IDLE)
    report.step("26b: inspect", ["-m", "convert", "inspect", str(target), "--json"], CONVERT_IDLE, _inspected)
    report.step("26b: check", ["-m", "convert", "check", str(target)], CONVERT_IDLE)
    forget(work)
    arguments = ["-m", "benchmarks.real_size", "--emit", str(target)]
    step = report.step("26b: load and emit", arguments, RUN_IDLE, json.loads)
    plain, drafted = step.details["plain"], step.details["mtp"]
    if plain["tokens"] != drafted["tokens"] or len(plain["tokens"]) != TOKENS:
        raise Failed(f"with MTP {drafted['tokens']}; without {plain['tokens']}")


def emit(folder: str) -> dict[str, Any]:
    """Loads a pair and emits TOKENS tokens plainly and with MTP: seconds, bytes as MLX counts them, the tokens."""
    import mlx.core as mx

    from mlx_gemma_mtp import load
    from mlx_gemma_mtp.files.folder import weight_files

    start = _clock()
    with tqdm(disable=None, desc="load") as bar:
        engine = load(folder, num_draft_tokens=DRAFTS, progress=lambda done, total: bar.update())
    taken, weights, peak = _since(start), mx.get_active_memory(), mx.get_peak_memory()
    if engine.drafter is None:
        raise UserError(f"{folder} has no drafter beside it; make the pair with benchmarks.random_checkpoints")
    return {
        "load": taken,
        "file_bytes": sum(file.stat().st_size for each in _pair(folder) for file in weight_files(each)),
        "weight_bytes": weights,
        "load_peak_over_weights": peak - weights,
        "load_peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        "plain": _emitted(engine, 0),
        "mtp": _emitted(engine, DRAFTS),
    }


def _emitted(engine: Any, drafts: int) -> dict[str, Any]:
    import mlx.core as mx

    from mlx_gemma_mtp import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, seed=0, ignore_eos=True)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    chunks, result, start = [], None, _clock()
    for chunk in engine.stream(PROMPT, params, num_draft_tokens=drafts):
        chunks.append(_since(start) | {"tokens": len(chunk.tokens)})
        result = chunk.result or result
    stats = result.stats
    return {
        "tokens": result.tokens,
        **_since(start),
        "chunks": chunks,  # the first ends the prefill; then one a round
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "blas": stats.blas,
        "peak_over_weights": mx.get_peak_memory() - before,
    }


def _pair(folder: str) -> list[Path]:
    """The folders of a target and of the drafter that is found for it."""
    from mlx_gemma_mtp.files.hub import find_pair

    pair = find_pair(folder, "auto")
    return [each for each in (pair.target, pair.drafter) if each is not None]


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> dict[str, float]:
    seconds, cpu_seconds = (round(now - then, 2) for now, then in zip(_clock(), start, strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def forget(folder: Path) -> None:
    """Drops the files below `folder` from the page cache, where the system can."""
    for path in folder.rglob("*.safetensors") if sys.platform == "linux" else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def refuse(work: Path, disk: int, memory: int) -> None:
    """UserError unless that much disk and memory is free."""
    free = shutil.disk_usage(work).free
    if free < disk:
        raise UserError(f"{work} has {free / GB:.1f} GB free; expected {disk / GB:.1f} GB; give another --work")
    available = available_memory()
    if available < memory:
        raise UserError(f"{available / GB:.1f} GB of memory are available; expected {memory / GB:.1f} GB; close others")


def available_memory() -> int:
    """What can be had without swapping on Linux; all there is elsewhere."""
    if sys.platform == "linux":
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_size", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("e2b", "26b", "all"), default="all")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["4bit"], help="e2b's; default 4bit")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="an existing folder with room")
    parser.add_argument("--keep", action="store_true", help="leave the folders, and say where")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--emit", metavar="FOLDER", help="only load that pair and emit tokens; prints JSON")
    return parser


def _run(args: argparse.Namespace) -> None:
    """The chosen parts, one after the other, each in a folder of its own that is removed."""
    e2b, pair = args.what in ("e2b", "all"), args.what in ("26b", "all")
    if not args.work.is_dir():
        raise UserError(f"{args.work} is no folder; expected one with room for the checkpoints; create it")
    largest = max(FORMATS[name][1] for name in args.formats)
    refuse(
        args.work, max(e2b * (E2B_BYTES + largest), pair * PAIR_BYTES), max(e2b * 2 * PEAK_LIMIT, pair * PAIR_MEMORY)
    )
    report = Report(e2b * (1 + 3 * len(args.formats)) + pair * 4)
    tqdm.write(TABLE)
    try:
        for wanted, run in ((e2b, lambda f: run_e2b(f, args.formats, report)), (pair, lambda f: run_26b(f, report))):
            if wanted:
                _in_folder(args.work, args.keep, run)
    finally:
        if args.json:
            args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")


def _in_folder(work: Path, keep: bool, run: Callable[[Path], None]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="real-size-", dir=work))
    try:
        run(folder)
    finally:
        if keep:
            tqdm.write(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 where something measured is not as it must be, 2 after a user error, 130 after an interruption."""
    args = _parser().parse_args(argv)
    try:
        if args.emit:
            print(json.dumps(emit(args.emit)))
        else:
            _run(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "error: interrupted; " + ("the folders are kept" if args.keep else "the folders were removed"),
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then the folders go
    raise SystemExit(main())
