"""The 26B's pair in its real size: `python -m benchmarks.gpu.size SYSTEM FOLDER OUT SECONDS`.

SYSTEM: `ours`, plain and with drafts that are right at stated rates (simulated.py); `mlx-lm` and `mlx-vlm`, plain, on
the same folder. FOLDER: of the target, from made.py. A line of JSON for each cell (rows, context, drafts, rate), in the
order in which they are wanted, until the seconds are over. Prompts are random ids; those of one context share all but
their last TAIL tokens, and are prefilled once.

`tps`: tokens a second of all rows, between the moment at which every row has its first token and that at which the
first row has its last. Greedy texts of such weights part at near-ties, as texts in few bits do on a GPU; behind such a
place no draft is right, and `kept`, the rate that came out, falls below the one that was stated. Texts at temperature
NOISE are drawn by the seed's noise almost alone, so that they do not part; their rounds pay for drawing.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.simulated import NAME, Kept, Script

CONTEXTS = tuple(map(int, os.environ.get("GPU_CONTEXTS", "1024 16384").split()))  # shorter in a rehearsal
ROWS = tuple(map(int, os.environ.get("GPU_ROWS", "1 4 8 2").split()))
TOKENS = int(os.environ.get("GPU_SIZE_TOKENS", "96"))
TAIL = 64
RATES = (0.8, 0.6, 0.7, 0.9)
DRAFTS = (3, 1, 5)
NOISE = 1000.0
DRAFT_BITS = 4
CHUNK = 1024  # prompt tokens of a forward
SYSTEMS = ("ours", "mlx-lm", "mlx-vlm")


@dataclass(frozen=True)
class Cell:
    """One measurement. drafts: 0 decodes plainly. rate: of drafts that are right."""

    rows: int
    context: int
    temperature: float
    drafts: int = 0
    rate: float | None = None


def cells() -> list[list[Cell]]:
    """Returns groups of cells in their order; a group's first is plain decoding, whose texts its others are to say."""
    groups = []
    for context in CONTEXTS:
        for rows in ROWS:
            for temperature in (0.0, NOISE):
                rates = RATES if temperature else RATES[:1]
                more = [Cell(rows, context, temperature, drafts, rate) for rate in rates for drafts in DRAFTS]
                groups.append([Cell(rows, context, temperature), *more])
    return groups


def prompts(rows: int, context: int, vocabulary: int) -> list[list[int]]:
    """Returns ids: one beginning, and a tail for each row."""
    shared = random.Random(context).choices(range(100, vocabulary), k=context - TAIL)
    return [shared + random.Random(f"{context} {row}").choices(range(100, vocabulary), k=TAIL) for row in range(rows)]


class Window:
    """The time in which all rows decode, and what they emit in it."""

    def __init__(self, rows: int):
        self.waiting, self.ended = set(range(rows)), False
        self.began = self.end = 0.0
        self.tokens = self.rounds = 0
        self.kept = Kept()

    def saw(self, row: int, tokens: int, drafted: int, accepted: int, last: bool, now: float) -> None:
        """Adds a chunk. Behind the first row's last one nothing counts."""
        if self.ended:
            return
        if self.waiting:
            self.waiting.discard(row)
            self.began = self.end = now
            return
        self.ended = last
        if not last:  # that may be cut off
            self.tokens, self.rounds, self.end = self.tokens + tokens, self.rounds + (row == 0), now
            self.kept.count(drafted, accepted)

    def figures(self) -> dict[str, Any]:
        """Returns tokens a second, milliseconds of a round, and the rate at which drafts were kept."""
        seconds = max(self.end - self.began, 1e-9)
        return {
            "tps": round(self.tokens / seconds, 1),
            "rounds": self.rounds,
            "round_ms": round(1e3 * seconds / max(1, self.rounds), 3),
            "kept": None if self.kept.rate is None else round(self.kept.rate, 3),
            "looked": self.kept.looked,
        }


def ours(folder: str, end: float) -> Iterator[dict[str, Any]]:
    """Yields what our cells found."""
    from mlx_gemma_mtp import SamplingParams, load
    from mlx_gemma_mtp.machine import memory

    script = Script()
    script.enter()
    began = time.monotonic()
    options = {"draft_bits": DRAFT_BITS, "prefill_chunk": CHUNK, "prefix_memory": memory.total_bytes() // 3}
    engine = script.engine = load(
        folder, num_draft_tokens=0, draft_sources=NAME, max_rows=max(ROWS), notice=print, **options
    )
    yield {"what": "loaded", "seconds": round(time.monotonic() - began, 1), "description": engine.description}
    for group in cells():
        given, texts = prompts(group[0].rows, group[0].context, engine.target.config.vocab_size), []
        for cell in group:
            if time.monotonic() > end:
                yield {"what": "skipped"} | vars(cell)
                return
            temperature = cell.temperature
            params = SamplingParams(
                max_tokens=TOKENS, ignore_eos=True, temperature=temperature, seed=7, top_k=-1, top_p=1.0, min_p=0.0
            )
            script.tell(given, texts if cell.drafts else [[]] * len(given), cell.rate or 0.0)
            if not cell.drafts:
                engine.generate(given, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))  # prefills
            window, said, stats = decoded(engine, given, params, cell.drafts)
            texts = texts or said
            parted = sum(a != b for a, b in zip(texts, said, strict=True))
            read = {"target_bytes": stats.target_step_bytes, "draft_bytes": stats.draft_step_bytes}
            errors = [text for text in said if len(text) != TOKENS]
            yield {"what": "cell"} | vars(cell) | window.figures() | {"parted": parted, "short": len(errors)} | read


def decoded(engine: Any, given: Sequence[Sequence[int]], params: Any, drafts: int) -> tuple[Window, list[Any], Any]:
    """Returns the window, the texts, and one row's stats of a call."""
    window, texts, stats = Window(len(given)), [[] for _ in given], None
    for chunk in engine.stream(given, params, num_draft_tokens=drafts):
        last = chunk.result is not None
        window.saw(chunk.index, len(chunk.tokens), chunk.drafted, chunk.accepted, last, time.perf_counter())
        if last:
            texts[chunk.index], stats = chunk.result.tokens, chunk.result.stats
    return window, texts, stats


def peer(system: str, folder: str, end: float) -> Iterator[dict[str, Any]]:
    """Yields what plain decoding of another system takes: its own call's times, less its prefill."""
    from benchmarks.systems.__main__ import load
    from benchmarks.systems.call import Request

    began = time.monotonic()
    made = load(system, folder, "", max(ROWS))
    yield {"what": "loaded", "seconds": round(time.monotonic() - began, 1), "description": str(made.about())[:500]}
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["text_config"]["vocab_size"]
    for context in CONTEXTS:
        for rows in ROWS:
            if time.monotonic() > end:
                yield {"what": "skipped", "rows": rows, "context": context}
                return
            request, about = Request(prompts(rows, context, vocabulary), 0, TOKENS), vars(Cell(rows, context, 0.0))
            try:
                if context == CONTEXTS[0]:
                    made.call(Request(request.prompts, 0, 4))  # compiles
                yield {"what": "cell"} | about | _figures(made.call(request))
            except Exception as raised:  # the next cell may do
                yield {"what": "raised", "error": f"{rows} rows, context {context}: {raised}"[:400]}


def _figures(timing: Any) -> dict[str, Any]:
    """Returns tokens a second and milliseconds of a pass behind the prefill."""
    tokens = sum(map(len, timing.tokens)) - len(timing.tokens)
    seconds = max(timing.seconds - timing.prefill_seconds, 1e-9)
    return {
        "prefill_seconds": round(timing.prefill_seconds, 2),
        "tps": round(tokens / seconds, 1),
        "round_ms": round(1e3 * seconds / max(1, timing.passes), 3),
        "short": sum(len(each) != TOKENS for each in timing.tokens),
    }


def main(system: str, folder: str, out: Path, seconds: float) -> int:
    """Appends a line to `out` for each finding; what raises is one, too. Returns the exit code."""
    end = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:
        try:
            for each in ours(folder, end) if system == "ours" else peer(system, folder, end):
                print(json.dumps({"system": system} | each), file=file, flush=True)
        except Exception as raised:  # a peer may raise whatever it likes, which is what is reported
            error = f"{type(raised).__name__}: {raised}"[:600]
            print(json.dumps({"system": system, "what": "raised", "error": error}), file=file, flush=True)
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])))
