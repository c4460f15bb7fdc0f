"""Replays the first tokens of a process on recorded traces: `python -m benchmarks.starts [--traces FILE.npz]`.

A first start of an unknown pair has a short measurement of one row and knows nothing of acceptance. A second start has
the acceptance that other texts of the same kind left behind. Compared is the time of the first 128 tokens of each row
with that of the best fixed length and of plain decoding, for 1, 2, 4 and 8 rows, over several beginnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlx_gemma_mtp.speculative.costs import CostTable
from mlx_gemma_mtp.speculative.depth import Depth, DraftRow

from .replay import FREE, NOISY, Clock, Trace

TOKENS = 128  # of each row
HEAD = 64  # tokens of a prompt
QUICK = (0, 1, 4)  # widths that a first start measures


def read_texts(path: Path) -> dict[str, list[Trace]]:
    """Returns the recorded texts of each class."""
    arrays, found = np.load(path), {}
    for name in [key.removesuffix("_starts") for key in arrays if key.endswith("_starts")]:
        cuts = arrays[f"{name}_starts"][1:]
        parts = (np.split(arrays[f"{name}_{each}"], cuts) for each in ("accepted", "confidences"))
        found[name] = [Trace(*each) for each in zip(*parts, strict=True)]
    return found


def quick(truth: CostTable, clock: Clock, draws: np.random.Generator) -> CostTable:
    """Returns what the short measurement of a first start makes of a machine: the best of three noisy times a width."""
    first = truth.contexts[0]
    least = lambda seconds: min(clock.observe(seconds, draws, i) for i in range(3))  # noqa: E731
    whole = {width: least(truth.rounds_at(1, first)[width]) for width in QUICK}
    alone = {width: least(truth.verify_at(1, first)[width]) for width in QUICK}
    draft = max(float(np.median([(whole[w] - alone[w]) / w for w in QUICK if w])), 1e-3 * min(whole.values()))
    return CostTable.of({(1, first, w): max(s - w * draft, 1e-3 * s) for w, s in whole.items()}, {1: draft})


def begun(
    texts: Sequence[Trace],
    truth: CostTable,
    depth: Depth,
    drafts: int | str,
    tokens: int = TOKENS,
    clock: Clock = NOISY,
    seed: int = 0,
    sampled: bool = False,
) -> float:
    """Returns the seconds in which rows that begin together emit so many tokens each on average.

    texts: of each row. drafts: a number, or AUTO, then by `depth`. Rounds take what `truth` says, and are observed by a
    clock.
    """
    draws, count = np.random.default_rng(seed), len(texts)
    at, took = [0] * count, 0.0
    rows = [DraftRow(row, drafts, FREE, sampled) for row in range(count)]
    made = max(depth.draft(rows, HEAD))
    for rounds in range(10**6):
        if sum(at) >= tokens * count:
            break
        places = [place % len(text.accepted) for place, text in zip(at, texts, strict=True)]
        sure = [text.confidences[at, :made].astype(float).tolist() for at, text in zip(places, texts, strict=True)]
        context = HEAD + max(at)
        width = depth.verify(rows, context, sure, [made] * count)
        width = made if width is None else width
        kept = [min(width, int(text.accepted[at])) for at, text in zip(places, texts, strict=True)]
        seconds = truth.verify_at(count, context)[width] + made * truth.draft_at(count)
        took += seconds
        made = max(depth.draft(rows, context))
        depth.timed(clock.observe(seconds, draws, rounds))
        depth.observe(dict(enumerate(kept)))
        at = [place + each + 1 for place, each in zip(at, kept, strict=True)]
    depth.forget(range(count))
    return took * tokens * count / sum(at)


def batches(texts: Sequence[Trace], rows: int, count: int, seed: int) -> Iterator[list[Trace]]:
    """Yields batches of pieces of these texts."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        some = []
        for _ in range(rows):
            text = texts[draws.integers(len(texts))]
            start = int(draws.integers(max(len(text.accepted) - TOKENS, 1)))
            some.append(text[start:])
        yield some
