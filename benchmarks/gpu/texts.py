"""Texts with drafts against plain decoding, on this machine and against texts that a CPU recorded.

    python -m benchmarks.gpu.texts record FILE                       on a CPU, in float32
    python -m benchmarks.gpu.texts compare PAIR FORMAT OUT SECONDS   on a GPU; MLX_GEMMA_MTP_METAL=0: by plain MLX

`compare` appends a line of JSON to OUT for every cell (temperature, rows, drafts): how many texts are equal to plain
decoding of one row, and where the others part from it, by how much. Cells come in a mixed order, so that what SECONDS
allow is a fair sample of all.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.pairs import PAIRS, loaded

if TYPE_CHECKING:
    from mlx_gemma_mtp import SamplingParams
    from mlx_gemma_mtp.checks.equality import Divergence

RECORD = Path(__file__).with_name("texts.json")
TOKENS = int(os.environ.get("GPU_TOKENS", "40"))  # fewer in a rehearsal
TEMPERATURES = (0.0, 1.0)
ROWS = (1, 2, 4, 8)
DRAFTS = range(8)
FIRST = ((1, 3), (4, 3), (8, 7), (1, 7))  # rows, drafts: before all others, greedy and sampled
ALONE = 4  # prompts of the cells of one row
# Scores that are no further apart than this are a near-tie, which another order of additions may turn. What bfloat16
# weights and logits change in a gap of the bundled pair, against float32 on a CPU: 0.05 (root mean square), 0.22 at the
# 99th percentile, 0.46 at most, of 640.
NEAR = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25, "8bit": 0.25, "4bit": 0.25}


def settings() -> dict[float, Any]:
    from mlx_gemma_mtp import SamplingParams

    base = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=7)
    return {temperature: replace(base, temperature=temperature) for temperature in TEMPERATURES}


def prompts() -> list[str]:
    from mlx_gemma_mtp.cli.prompts import PROMPTS

    return list(PROMPTS)


def record(file: Path) -> None:
    """Writes the tokens of plain decoding in float32: pair -> temperature -> a list for each prompt."""
    found = {}
    for pair in PAIRS:
        engine = loaded(pair, "float32")
        found[pair] = {
            str(t): [engine.generate(prompt, params).tokens for prompt in prompts()] for t, params in settings().items()
        }
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")


def compare(pair: str, form: str, out: Path, seconds: float) -> None:
    """Appends what was found to `out`, until the seconds are over."""
    from mlx_gemma_mtp.checks.equality import divergence

    end = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:

        def say(**line: Any) -> None:
            print(json.dumps({"pair": pair, "format": form} | line), file=file, flush=True)

        engine, given, every = loaded(pair, form), prompts(), settings()
        say(what="engine", description=engine.description)
        plain, recorded = {}, json.loads(RECORD.read_text(encoding="utf-8"))[pair]
        for t, params in every.items():
            began = time.monotonic()
            plain[t] = [engine.generate(prompt, params).tokens for prompt in given]
            equal = [a == b for a, b in zip(plain[t], recorded[str(t)], strict=True)]
            tps = sum(map(len, plain[t])) / (time.monotonic() - began)
            parted = [_first_difference(a, b) for a, b in zip(plain[t], recorded[str(t)], strict=True)]
            say(what="plain", temperature=t, as_cpu=sum(equal), of=len(equal), parted=parted, tps=round(tps, 1))
        left = cells()
        for number, (t, rows, drafts) in enumerate(left):
            if time.monotonic() > end:
                say(what="skipped", cells=len(left) - number, of=len(left))
                break
            some = given[:ALONE] if rows == 1 else given
            began, results = time.monotonic(), []
            try:
                for start in range(0, len(some), rows):
                    results += engine.generate(some[start : start + rows], every[t], num_draft_tokens=drafts)
            except RuntimeError as raised:
                say(what="raised", temperature=t, rows=rows, drafts=drafts, error=str(raised)[:500])
                continue
            took = time.monotonic() - began
            texts = [result.tokens for result in results]
            parted = [divergence(engine, i, some[i], plain[t][i], tokens) for i, tokens in enumerate(texts)]
            parted = [each for each in parted if each is not None]
            margins = [margin(each, every[t], len(engine.text.encode(some[each.prompt]))) for each in parted]
            rounds, accepted = (sum(getattr(r.stats, name) for r in results) for name in ("rounds", "accepted"))
            say(
                what="cell", temperature=t, rows=rows, drafts=drafts, texts=len(some), differ=len(parted),
                far=sum(abs(each) > NEAR[form] for each in margins), margins=[round(each, 6) for each in margins],
                places=[(e.prompt, e.position, e.plain_token, e.mtp_token) for e in parted],
                tokens_per_round=round(1 + accepted / max(1, rounds), 3), seconds=round(took, 3),
                round_ms=round(1e3 * took / max(1, rounds / rows), 3),
                errors=[result.error for result in results if result.error],
            )  # fmt: skip


def margin(parted: Divergence, params: SamplingParams, prompt: int) -> float:
    """Returns by how much the plain text's token has the larger score where a text parts from it, negative where the
    other's is larger. A score is what the draw compares: the logit over the temperature, and the noise of the seed.

    prompt: its length in tokens. Of a greedy text it is the gap of the logits.
    """
    if not params.temperature:
        return parted.gap
    import mlx.core as mx

    from mlx_gemma_mtp.sampling.noise import gumbel

    keys = mx.array([[params.seed & 0xFFFFFFFF, params.seed >> 32]], mx.uint32)
    tokens = mx.array([[[parted.plain_token, parted.mtp_token]]])
    plain, other = gumbel(keys, mx.array([[prompt + parted.position]]), tokens)[0, 0].tolist()
    return parted.gap / params.temperature + plain - other


def cells() -> list[tuple[float, int, int]]:
    """Returns every (temperature, rows, drafts), FIRST's first, the others in a fixed mixed order."""
    first = [(t, *cell) for cell in FIRST for t in TEMPERATURES]
    rest = [(t, rows, drafts) for rows in ROWS for drafts in DRAFTS for t in TEMPERATURES]
    rest = [cell for cell in rest if cell not in first and cell[1:] != (1, 0)]
    random.Random(0).shuffle(rest)
    return first + rest


def _first_difference(a: list[int], b: list[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None if len(a) == len(b) else -1)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        compare(sys.argv[2], sys.argv[3], Path(sys.argv[4]), float(sys.argv[5]))
