"""Tokens a pass by source of drafts: edits of files from this repository's own history, and the JSON schemas of tests.

    python -m benchmarks.sources --edits 20 --schemas 100

An edit has the file before in its prompt and is led through the file after, as a target would be that makes this edit;
the drafter drafts on the target's real hidden states all the way. A schema's text is the target's own.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.engine.intake import Options
from mlx_gemma_mtp.sampling.rules import Rules
from mlx_gemma_mtp.speculative.copies import RowText
from mlx_gemma_mtp.speculative.drafting import Drafting
from mlx_gemma_mtp.speculative.guide import Constraint, guide, only
from mlx_gemma_mtp.speculative.loop import Speculation
from mlx_gemma_mtp.speculative.mixture import Pool
from mlx_gemma_mtp.speculative.prefill import batch

from .schemas import schema_of
from .texts import BINDING

ROOT = Path(__file__).resolve().parent.parent
SIZES = range(700, 1700)  # bytes of a file that is edited
ROWS, BLOCK, CHUNK, LONGEST = 4, 16, 256, 400
ASK = "Edit this file.\n\n```python\n{}```\n"
REPLY = "```python\n{}```"  # an edit as it is made


@dataclass
class Led:
    """A Constraint that leaves one text alone."""

    text: Sequence[int]
    vocab: int
    at: int = 0

    def copy(self) -> Led:
        return replace(self)

    def mask(self) -> np.ndarray:
        return only([self.text[min(self.at, len(self.text) - 1)]], self.vocab)

    def advance(self, token: int) -> None:
        self.at += 1


@dataclass(frozen=True)
class Passes:
    """What texts took. tokens: emitted after the first of each. passes: verifies of a row. sources: drafted and
    accepted tokens by source. seconds: of all rounds.
    """

    tokens: int
    passes: int
    drafted: Counter
    accepted: Counter
    seconds: float

    @property
    def pace(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def rate(self) -> float:
        return self.tokens / max(self.passes, 1)

    def __str__(self) -> str:
        by = ", ".join(f"{name} {self.accepted[name]} of {self.drafted[name]}" for name in sorted(self.drafted))
        return f"{self.rate:5.2f} tokens a pass, {self.pace:.0f} a second ({self.tokens} tokens; kept: {by})"


def edits(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Returns (commit and path, file before, file after) of edits in this repository's history."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: E731
    commits = git("log", "--format=%h", "--no-merges").split()
    random.Random(seed).shuffle(commits)
    found: list[tuple[str, str, str]] = []
    for commit in commits:
        if len(found) == count:
            break
        for line in git("show", "--format=", "--numstat", "--diff-filter=M", commit, "--", "*.py").splitlines():
            added, removed, path = line.split("\t")
            if not (2 <= int(added) + int(removed) <= 40):
                continue
            before, after = git("show", f"{commit}~1:{path}"), git("show", f"{commit}:{path}")
            if len(before) in SIZES and len(after) in SIZES:
                found.append((f"{commit}:{path}", before, after))
                break
    return found


def run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    constraints: Sequence[Constraint],
    params: Sequence[SamplingParams],
    done: Callable[[int, list[int]], bool],
    drafting: Drafting,
    drafts: int,
    reach: int,
    pool: Pool,
) -> Passes:
    """Decodes these rows, each until it is `done`: a function of the row and its text."""
    vocab, live = engine.target.config.vocab_size, list(range(len(prompts)))
    cache, hidden = batch(engine.target, prompts, CHUNK, BLOCK, drafting.lookback)
    loop = Speculation(engine.target, engine.drafter, cache, drafting, confident=True, pool=pool)
    inputs = lambda: (  # noqa: E731
        Rules.of([params[row] for row in live], vocab, engine.settings.suppress),
        None,
        guide([constraints[row] for row in live], vocab),
    )
    loop.begin(hidden, *inputs(), [RowText(prompt) for prompt in prompts])
    texts: list[list[int]] = [[] for _ in prompts]
    tokens, passes, drafted, accepted = 0, 0, Counter(), Counter()
    began = time.perf_counter()
    while live:
        given = loop.step([drafts] * len(live), reach=[reach] * len(live))
        for i, row in enumerate(live):
            assert given.errors[i] is None, given.errors[i]
            texts[row] += given.tokens[i]
            if given.drafted[i] is None:
                continue
            passes, tokens = passes + 1, tokens + len(given.tokens[i])
            drafted.update(given.sources[i])
            accepted.update(given.sources[i][: len(given.tokens[i]) - 1])
        stay = [i for i, row in enumerate(live) if not done(row, texts[row])]
        if len(stay) < len(live):
            live = [live[i] for i in stay]
            loop.arrange(stay, *inputs())
    return Passes(tokens, passes, drafted, accepted, time.perf_counter() - began)


def together(parts: Sequence[Passes]) -> Passes:
    """Returns the sum."""
    counts = (sum((getattr(part, name) for part in parts), Counter()) for name in ("drafted", "accepted"))
    sums = (sum(getattr(part, name) for part in parts) for name in ("tokens", "passes"))
    return Passes(*sums, *counts, sum(part.seconds for part in parts))


Measure = Callable[[str, int, Pool], Passes]  # with these sources, up to so many drafts


def of_edits(engine: Engine, made: Sequence[tuple[str, str, str]], drafts: int) -> Measure:
    """Returns what measures these edits."""
    vocab = engine.target.config.vocab_size
    prompts = [engine.text.encode(ASK.format(before)) for _, before, _ in made]
    texts = [engine.text.spelled(REPLY.format(after)) for _, _, after in made]
    greedy = [SamplingParams(temperature=0.0, top_k=-1, top_p=1.0, seed=0)] * len(made)

    def measure(sources: str, reach: int, pool: Pool) -> Passes:
        led = [Led(text, vocab) for text in texts]
        done = lambda row, text: len(text) >= len(texts[row])  # noqa: E731
        return run(engine, prompts, led, greedy, done, Drafting(sources=sources), drafts, reach, pool)

    return measure


def of_schemas(engine: Engine, schemas: Sequence[dict], drafts: int) -> Measure:
    """Returns what measures JSON by these schemas."""
    params = [SamplingParams(temperature=0.0, json_schema=each, top_k=-1, top_p=1.0, seed=0) for each in schemas]

    def measure(sources: str, reach: int, pool: Pool) -> Passes:
        prompts = [BINDING[i % 2] for i in range(len(params))]
        requests = engine._intake.requests(prompts, params, Options())
        done = lambda row, text: len(text) >= LONGEST or not requests[row].end_tokens.isdisjoint(text)  # noqa: E731
        constraints, ids = [each.constraint for each in requests], [each.prompt for each in requests]
        return run(engine, ids, constraints, params, done, Drafting(sources=sources), drafts, reach, pool)

    return measure


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="benchmarks.sources", description=__doc__)
    p.add_argument("--model", help="a converted folder (default: the bundled pair)")
    p.add_argument("--draft-model", default="auto")
    p.add_argument("--edits", type=int, default=20)
    p.add_argument("--schemas", type=int, default=100)
    p.add_argument("--drafts", type=int, default=4, help="of the drafter, in each round")
    p.add_argument("--mixtures", type=int, default=4, help="how many of those that are listed, MTP alone first")
    p.add_argument("--seconds", type=float, default=math.inf, help="after which no other texts begin")
    args = p.parse_args(argv)
    wide, began = BLOCK - 1, time.perf_counter()
    alone = ("mtp", args.drafts)
    classes = {
        "edits": (of_edits, edits(args.edits), (alone, ("mtp,copy", wide), ("mtp,copy", args.drafts), ("copy", wide))),
        "JSON": (of_schemas, [schema_of(seed) for seed in range(args.schemas)],
                 (alone, ("mtp,forced", wide), ("mtp,copy,forced", wide))),
    }  # fmt: skip
    with load(args.model, args.draft_model, num_draft_tokens=args.drafts, dtype="float32") as engine:
        for name, (measure, texts, mixtures) in classes.items():
            mixtures = mixtures[: args.mixtures]
            parts: list[list[Passes]] = [[] for _ in mixtures]
            pools, done = [Pool() for _ in mixtures], 0
            for start in range(0, len(texts), ROWS):
                if time.perf_counter() - began > args.seconds:
                    break
                some = measure(engine, texts[start : start + ROWS], args.drafts)
                for part, pool, mixture in zip(parts, pools, mixtures, strict=True):
                    part.append(engine.call(partial(some, *mixture, pool)))
                done += len(texts[start : start + ROWS])
            sums = [together(part) for part in parts] if done else []
            for (sources, reach), found in zip(mixtures, sums, strict=False):
                ratio, pace = found.rate / sums[0].rate, found.pace / sums[0].pace
                print(
                    f"{done} {name}: {sources}, up to {reach}: {found}; {ratio:.2f} and {pace:.2f} of MTP", flush=True
                )


if __name__ == "__main__":
    main()
