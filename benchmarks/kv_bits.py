"""What K/V in 8 and 4 bits take and what they change: `python -m benchmarks.kv_bits [--model FOLDER] [--json FILE]`.

Each way of keeping K/V reads the same texts, modules of Python's library that the bundled pair was not trained on. Its
scores at every token are compared with those of float K/V: the Kullback-Leibler divergence from float, in nats (mean
and 99th percentile), and how often the likeliest token is another one (flips). Then it goes on writing after part of
each text, with drafts, and its tokens a round are counted. Counts and bytes only: nothing here depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.command import command
from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.cache.spec import row_bytes
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.sampling.distribution import soft_cap

WAYS = ((None, False), (8, False), (4, False), (8, True), (4, True))  # bits, and whether rings have them, too
CHUNK = 256
ON_METAL = 2  # bytes of a number there
WRITING = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True, seed=3),
}


@dataclass(frozen=True)
class Row:
    """What one way of keeping K/V takes and changes.

    here, on_metal: bytes of a row of `context` tokens, in this engine's type and in 16 bits. divergence: mean, p99: in
    nats from float K/V. flips: the share of tokens after which another one is the likeliest. tokens_per_round: of
    greedy and of sampled text, with `drafts` drafts.
    """

    bits: int | None
    rings: bool
    here: int
    on_metal: int
    mean: float
    p99: float
    flips: float
    tokens_per_round: dict[str, float]

    def __str__(self) -> str:
        layers = "all" if self.rings else "full"
        where = "float" if self.bits is None else f"{self.bits} bits, {layers} layers"
        rounds = " | ".join(f"{each:.3f}" for each in self.tokens_per_round.values())
        sizes = f"{self.here / 1e6:.3f} MB | {self.on_metal / 1e6:.3f} MB"
        return f"| {where} | {sizes} | {self.mean:.2e} | {self.p99:.2e} | {self.flips:.2%} | {rounds} |"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="benchmarks.kv_bits", description=__doc__)
    p.add_argument("--model", help="a converted folder (default: the bundled pair)")
    p.add_argument("--draft-model", default="auto", help="its drafter (default: look for it)")
    p.add_argument("--texts", type=int, default=4, help="how many texts (default: 4)")
    p.add_argument("--context", type=int, default=2000, help="tokens of each (default: 2000)")
    p.add_argument("--drafts", type=int, default=4, help="a round (default: 4)")
    p.add_argument("--tokens", type=int, default=64, help="that are written after each text (default: 64)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    return p


def modules(encode, count: int, tokens: int) -> list[list[int]]:
    """Returns the first `tokens` ids of so many held-out modules that are long enough. Raises UserError for fewer."""
    from training import corpus

    found: list[list[int]] = []
    held = (module for module in corpus.modules(corpus.library()) if corpus.held_out(module.path))
    for module in held:
        if len(ids := encode(module.text, chat_template=False)) >= tokens:
            found.append(ids[:tokens])
        if len(found) == count:
            return found
    raise UserError(f"{len(found)} held-out modules have {tokens} tokens, expected {count}; ask for fewer or shorter")


def scores(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Returns the logarithms of the probabilities of what follows each token, float64 [T, V], read chunk by chunk."""
    target, found = engine.target, []
    cache = Cache(engine.specs, CHUNK, target.dtype).open(len(tokens))
    for start in range(0, len(tokens), CHUNK):
        piece = tokens[start : start + CHUNK]
        hidden = target(mx.array([piece]), cache.span(len(piece)))
        cache.commit(mx.array([len(piece)]), [len(piece)])
        found.append(np.array(soft_cap(target.logits(hidden), target.config.softcap))[0].astype(np.float64))
    logits = np.concatenate(found)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _all_scores(engine: Engine, texts: Sequence[list[int]]) -> list[np.ndarray]:
    return [scores(engine, text) for text in texts]


def divergences(exact: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each token the Kullback-Leibler divergence of `other` from `exact`, and whether the likeliest token is
    another one. exact, other: logarithms of probabilities, [T, V].
    """
    gaps = np.where(exact > -np.inf, exact - other, 0.0)  # what never comes adds nothing
    return (np.exp(exact) * gaps).sum(axis=-1), exact.argmax(axis=-1) != other.argmax(axis=-1)


def written(engine: Engine, texts: Sequence[list[int]], drafts: int, tokens: int) -> dict[str, float]:
    """Returns the tokens a round of each kind of text that goes on after these."""
    found = {}
    for kind, params in WRITING.items():
        kept = rounds = 0
        for text in texts:
            stats = engine.generate(text, replace(params, max_tokens=tokens), num_draft_tokens=drafts).stats
            kept, rounds = kept + stats.accepted, rounds + stats.rounds
        found[kind] = 1 + kept / rounds
    return found


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Yields a row for each way of keeping K/V, float first."""
    exact: list[np.ndarray] = []
    texts: list[list[int]] = []
    for bits, rings in WAYS:
        options = {"num_draft_tokens": args.drafts, "kv_bits": bits, "kv_bits_rings": rings}
        with load(args.model, args.draft_model, **options) as engine:
            texts = texts or modules(engine.text.encode, args.texts, args.context)
            read = engine.call(partial(_all_scores, engine, texts))
            exact = exact or read
            parts = [divergences(ours, theirs) for ours, theirs in zip(exact, read, strict=True)]
            gaps, flips = (np.concatenate(each) for each in zip(*parts, strict=True))
            block, size = engine.settings.prefill_chunk, engine.target.dtype.size
            sizes = [row_bytes(engine.specs, args.context, block, each) for each in (size, ON_METAL)]
            begun = [text[: len(text) * 3 // 4] for text in texts]
            rounds = written(engine, begun, args.drafts, args.tokens)
            yield Row(bits, rings, *sizes, gaps.mean(), np.percentile(gaps, 99), flips.mean(), rounds)


def run(args: argparse.Namespace) -> int:
    print("| K/V | a row here | in 16 bits | KL mean | KL p99 | flips | tokens a round, greedy | sampled |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for row in measured(args):
        print(row, flush=True)
        rows.append(asdict(row))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input."""
    return command(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
