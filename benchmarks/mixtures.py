"""Replays sources of drafts on recorded texts: `python -m benchmarks.mixtures [--record]`.

A recorded text (tests/data/mixtures.npz, by `--record`) has at each token what the drafter drafts and how sure it is.
With a table of costs that gives the exact course of a text by any sources: here the drafter alone, and with copies. A
verify of other drafts than the drafter's, or of fewer, is built anew, which costs REBUILD of a plain round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gemma_mtp.speculative.copies import RowText, agreeing
from mlx_gemma_mtp.speculative.costs import ROWS, WIDEST, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, DraftRow
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.mixture import Chain, Mixture, Pool, leading
from mlx_gemma_mtp.speculative.widening import verified

from .replay import CONTEXT, DATA, FREE, LONG, NOISY, Clock, after_long_texts, by, read_table

FILE = DATA / "mixtures.npz"
ALONE, COPIES = ("mtp",), ("mtp", "copy")
REBUILD = 0.05  # of a plain round


@dataclass(frozen=True)
class Recorded:
    """A text. prompt: token ids. tokens: of the reply, [n + MAX_DRAFTS + 1]. drafts, confidences: [n, MAX_DRAFTS], the
    drafter's after each token of the reply but the last ones.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    drafts: np.ndarray
    confidences: np.ndarray


def texts(engine: Any, count: int, tokens: int) -> Iterator[tuple[str, list[int], list[int], Any]]:
    """Yields (class, prompt, reply, how it is drawn): replies of the target, and edits of benchmarks.sources."""
    from dataclasses import replace

    from . import sources
    from .texts import GREEDY
    from .texts import texts as classes

    for name, some in classes(count).items():
        for prompt, chat, params in some:
            head = engine.text.encode(prompt, chat_template=chat)
            reply = engine.generate(head, replace(params, max_tokens=tokens), num_draft_tokens=0).tokens
            yield name, head, reply, params
    for _, before, after in sources.edits(count):
        reply = engine.text.tokenizer.encode(f"```python\n{after}```", add_special_tokens=False)
        yield "edit", engine.text.encode(sources.ASK.format(before)), reply[:tokens], GREEDY


def record(path: Path, count: int, tokens: int) -> None:
    """Records the drafter on texts of the bundled pair."""
    from mlx_gemma_mtp import load

    from .traces import drafts_along

    arrays: dict[str, np.ndarray] = {}
    with load(num_draft_tokens=0, dtype="float32") as engine:
        for i, (name, head, reply, params) in enumerate(texts(engine, count, tokens)):
            drafts, sure = drafts_along(engine, [*head, *reply], len(head), params)
            parts = {"prompt": head, "tokens": reply, "drafts": drafts, "confidences": sure}
            kinds = {"confidences": np.float16}
            arrays |= {f"{name}/{i}/{key}": np.array(each, kinds.get(key, np.uint16)) for key, each in parts.items()}
            print(f"{name}: {len(reply)} tokens", flush=True)
    np.savez_compressed(path, **arrays)


def read(path: Path = FILE) -> dict[str, list[Recorded]]:
    """Returns the recorded texts of each class."""
    arrays, found = np.load(path), {}
    for key in arrays:
        name, i, part = key.split("/")
        if part == "prompt":
            parts = (arrays[f"{name}/{i}/{each}"] for each in ("prompt", "tokens", "drafts", "confidences"))
            found.setdefault(name, []).append(Recorded(*parts))
    return found


def run(
    some: Sequence[Recorded],
    table: CostTable,
    sources: Sequence[str],
    drafts: int | str = AUTO,
    context: int = CONTEXT,
    clock: Clock = NOISY,
    seed: int = 0,
    pool: Pool | None = None,
) -> tuple[list[int], list[float]]:
    """Returns for each row how many tokens it emitted and the seconds until its end, as the runner decodes them."""
    draws, depth, mixture = np.random.default_rng(seed), by(table), Mixture(Drafting(sources=tuple(sources)), pool)
    live, at = list(range(len(some))), [0] * len(some)
    mixture.begin([RowText([*text.prompt.tolist(), int(text.tokens[0])]) for text in some])
    ends, took, rounds = [0.0] * len(some), 0.0, 0
    rows = [DraftRow(row, drafts, FREE, False) for row in live]
    reach = [WIDEST if drafts == AUTO else int(drafts)] * len(some)
    made = _made(depth, mixture, rows, context)
    chains, drafted = _chains(mixture, some, live, at, made, reach)
    while live:
        waiting = [len(chain.tokens) for chain in chains]
        sure = [chain.rates[: chain.own] for chain in chains]
        most, timed = verified(depth, rows, context, chains, sure, waiting)
        counts = [count if most is None else min(count, most) for count in waiting]
        kept, emitted = [], []
        for row, chain, count in zip(live, chains, counts, strict=True):
            text = some[row].tokens[at[row] + 1 :].tolist()
            kept.append(agreeing(chain.tokens[:count], text))
            emitted.append(text[: kept[-1] + 1])
        rebuilt = [chain.tokens[:n] for chain, n in zip(chains, counts, strict=True)] != drafted
        made = _made(depth, mixture, rows, context)
        verify = table.verify_at(len(live), context)
        taken = verify[max(counts)] + max(made) * table.draft_at(len(live), context) + REBUILD * verify[0] * rebuilt
        took, rounds = took + taken, rounds + 1
        if timed:
            depth.timed(clock.observe(taken, draws, rounds))
        depth.observe({
            row.id: min(count, leading(chain.sources)) for row, count, chain in zip(rows, kept, chains, strict=True)
        })  # fmt: skip
        mixture.take(emitted)
        for row, tokens in zip(live, emitted, strict=True):
            at[row] += len(tokens)
        stay = [i for i, row in enumerate(live) if at[row] < len(some[row].drafts)]
        for i, row in enumerate(live):
            if i not in stay:
                ends[row] = took
        depth.forget([row for i, row in enumerate(live) if i not in stay])
        live, rows, made = [live[i] for i in stay], [rows[i] for i in stay], [made[i] for i in stay]
        mixture.arrange(stay)
        if live:
            chains, drafted = _chains(mixture, some, live, at, made, [reach[row] for row in live])
    return at, ends


def _made(depth: Any, mixture: Mixture, rows: Sequence[DraftRow], context: int) -> list[int]:
    """How many drafts the drafter makes for each row."""
    counts = depth.draft(rows, context)
    asked = [i for i, count in enumerate(counts) if count]
    if asked and mixture.hot(asked):
        depth.give_way([row.id for row in rows], made=False)
        return [0] * len(rows)
    return counts


def _chains(
    mixture: Mixture,
    some: Sequence[Recorded],
    live: Sequence[int],
    at: Sequence[int],
    made: Sequence[int],
    reach: Sequence[int],
) -> tuple[list[Chain], list[list[int]]]:
    """The rows' drafts, and those of them that the drafter made."""
    drafted = [some[row].drafts[at[row]][:count].tolist() for row, count in zip(live, made, strict=True)]
    sure = [
        some[row].confidences[at[row]][:count].astype(float).tolist() for row, count in zip(live, made, strict=True)
    ]
    chains = mixture.chains(drafted, sure, reach)
    return chains, drafted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.mixtures", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="record the texts anew")
    parser.add_argument("--texts", type=int, default=4, help="of each class, to record")
    parser.add_argument("--max-tokens", type=int, default=200, help="of each text, to record")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--costs", type=Path, nargs="+", default=sorted((DATA / "costs").glob("*.json")))
    args = parser.parse_args(argv)
    if args.record:
        record(args.file, args.texts, args.max_tokens)
        return 0
    print("machine                 text      rows  copies over: plain   the drafter alone   worst row of it")
    short = {path.stem: read_table(path) for path in args.costs}
    for context, tables in ((CONTEXT, short), (LONG, after_long_texts(short))):
        for machine, table in tables.items():
            for name, some in read(args.file).items():
                for rows in ROWS:
                    plain, alone, worst = ratios(some, table, rows, context)
                    head = f"{machine:16} {context:6} {name:9} {rows:5}"
                    print(f"{head}  {plain:13.3f} {alone:15.3f} {worst:17.3f}", flush=True)
    return 0


def ratios(some: Sequence[Recorded], table: CostTable, rows: int, context: int = CONTEXT) -> tuple[float, float, float]:
    """Returns plain decoding's time and that of the drafter alone over that of copies beside it, for batches of these
    texts; and the latter for the row that it serves worst.
    """
    batches = [[some[(i + j) % len(some)] for j in range(rows)] for i in range(0, len(some), min(rows, len(some)))]
    totals, ends = [], []
    for sources, drafts in ((ALONE, 0), (ALONE, AUTO), (COPIES, AUTO)):
        pool = Pool()
        found = [run(batch, table, sources, drafts, context, seed=i, pool=pool) for i, batch in enumerate(batches)]
        totals.append(sum(max(last) for _, last in found))
        ends.append([each for _, last in found for each in last])
    worst = min(alone / copies for alone, copies in zip(ends[1], ends[2], strict=True))
    return totals[0] / totals[2], totals[1] / totals[2], worst


if __name__ == "__main__":
    sys.exit(main())
