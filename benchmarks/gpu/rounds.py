"""What a round launches, and where its time goes: `python -m benchmarks.gpu.rounds [FOLDER] OUT SECONDS`, by PyTorch's
profiler. Of the bundled pair, or of the pair in a folder.

Decodes the same text without drafts and with 1, 3 and 7, once as it is, for the time, and once in the profiler, for the
kernels: counts and microseconds by name, a round.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import size
from benchmarks.gpu.pairs import loaded

TOKENS = 64
CASES = ((1, 0), (1, 3), (8, 0), (8, 3), (1, 1), (8, 1), (1, 7), (8, 7))  # rows, drafts
FORMATS = ("bfloat16", "4bit")
CONTEXT = 256  # of a folder's random prompts
DRAFT_BITS = 4
MOST = 25  # names of kernels a case
REPEATS = 3


def main(folder: str | None, out: Path, seconds: float) -> None:
    """Appends a line of JSON to `out` for each case, until the seconds are over."""
    end = time.monotonic() + seconds
    ready()
    from mlx_gemma_mtp import SamplingParams, load
    from mlx_gemma_mtp.cli.prompts import PROMPTS

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with out.open("a", encoding="utf-8") as file:
        for form in (folder,) if folder else FORMATS:
            engine = load(folder, draft_bits=DRAFT_BITS, num_draft_tokens=0) if folder else loaded("bundled", form)
            vocabulary = engine.target.config.vocab_size
            for rows, drafts in CASES:
                if time.monotonic() > end:
                    print(json.dumps({"what": "skipped", "format": form, "rows": rows, "drafts": drafts}), file=file)
                    return
                prompts = size.prompts(rows, CONTEXT, vocabulary) if folder else list(PROMPTS[:rows])

                def decode(prompts: list[str] = prompts, drafts: int = drafts, engine: Any = engine) -> list[Any]:
                    return engine.generate(prompts, params, num_draft_tokens=drafts)

                line = {"format": form, "rows": rows, "drafts": drafts} | plain(decode)
                print(json.dumps(line | profiled(decode)), file=file, flush=True)


def ready() -> None:
    """Starts the profiler in this thread before MLX does anything on the device. Begun later, Kineto complained on an
    H100 of a context that came from another thread than the one in which it was registered; it counted all the same.
    """
    with contextlib.suppress(Exception):  # `profiled` reports what is wrong
        import torch
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]):
            torch.zeros(1, device="cuda")


def plain(decode: Any) -> dict[str, Any]:
    """Returns the fastest of a few: milliseconds of a round, tokens a second."""
    decode()
    best, results = float("inf"), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        results = decode()
        best = min(best, time.perf_counter() - began)
    rounds = max(result.stats.rounds for result in results)
    tokens = sum(len(result.tokens) for result in results)
    return {
        "rounds": rounds,
        "round_ms": round(1e3 * best / rounds, 3),
        "tps": round(tokens / best, 1),
        "syncs": results[0].stats.host_syncs,
    }


def profiled(decode: Any) -> dict[str, Any]:
    """Returns kernels a round by name, and their microseconds; what went wrong where there is no profiler."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            results = decode()
    except Exception as raised:  # whatever the profiler says is a finding
        return {"profiler": f"{type(raised).__name__}: {raised}"[:300]}
    rounds = max(result.stats.rounds for result in results)
    counts, times = Counter(), defaultdict(float)
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            name = event.name[:80]
            counts[name] += 1
            times[name] += event.device_time_total if event.device_time_total else event.time_range.elapsed_us()
    most = sorted(times, key=times.get, reverse=True)[:MOST]
    return {
        "kernels_a_round": round(sum(counts.values()) / rounds, 1),
        "gpu_us_a_round": round(sum(times.values()) / rounds, 1),
        "by_name": {name: [round(counts[name] / rounds, 2), round(times[name] / rounds, 2)] for name in most},
    }


if __name__ == "__main__":
    main(sys.argv[-3] if len(sys.argv) == 4 else None, Path(sys.argv[-2]), float(sys.argv[-1]))
