"""Questions about packages that a pair never read, with its target's replies: the text on which its drafter is used.

`python -m training.unseen --wheels DIR --pair PAIR --out FOLDER --count 12000`

Only the questions come from the packages; what is learned from are the replies. Each batch is a file, so a killed run
goes on, and `training.polish` may read meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlx_gemma_mtp import SamplingParams, load
from training import corpus, following, packages, shards
from training.cli import command, positive

BATCH = 96  # questions answered together
NEW_TOKENS = 200
SAMPLED = 6  # every so-many-th batch is sampled at temperature 1, the others are greedy
LONGEST = 1000  # characters of a question
SEED = 7
ANY = 0.2  # of the questions are of any kind
HARD = 6, 2, 2  # of the others: to write, to continue, to explain


def questions(found: list[corpus.Module], forbidden: frozenset[str], count: int) -> list[str]:
    """So many different questions about modules that are not held out, none of them forbidden.

    Most are of the kinds whose replies are hard to foresee: functions to write, to continue and to explain.
    """
    source = following.Source([module for module in found if not corpus.held_out(module.path)], forbidden)
    rng, asked, ways = random.Random(SEED), {}, (following.write, following.go_on, following.about)
    while len(asked) < count:
        if rng.random() < ANY:
            pair = source.pair(rng)
        else:
            pair = rng.choices(ways, HARD)[0](rng, *rng.choice(source.functions))
        if pair and len(pair.user) <= LONGEST and pair.user not in forbidden:
            asked.setdefault(pair.user)
    return list(asked)


def read(folder: Path) -> list[tuple[list[int], int]]:
    """Tokens of each question with its reply, and where the reply begins, of the files that are there."""
    found = []
    for file in sorted(folder.glob("*.json")):
        for entry in json.loads(file.read_text()):
            found.append((entry["asked"] + entry["reply"], len(entry["asked"])))
    return found


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.unseen", description="Replies to unseen questions.")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with downloaded wheels")
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/ and drafter/")
    parser.add_argument("--held", type=Path, help="prompts that are never asked (JSON)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=positive, default=12_000, help="questions")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    found, _ = packages.of_wheels(sorted(args.wheels.glob("*.whl")))
    asked = questions(found, shards.forbidden(args.held), args.count)
    tokenizer = Tokenizer.from_file(str(args.pair / "target" / "tokenizer.json"))
    engine = load(args.pair / "target", args.pair / "drafter", num_draft_tokens=3)
    for start in range(0, len(asked), BATCH):
        file = args.out / f"{start:06d}.json"
        if file.exists():
            continue
        warm = start // BATCH % SAMPLED == SAMPLED - 1
        params = SamplingParams(temperature=float(warm), top_k=64, top_p=0.95, max_tokens=NEW_TOKENS, seed=start)
        part = asked[start : start + BATCH]
        made: list[dict[str, Any]] = []
        for user, result in zip(part, engine.generate(part, params), strict=True):
            asking = [shards.BOS, *shards.asking(tokenizer, user)]
            end = [] if result.end_token is None else [result.end_token]
            made.append({"user": user, "asked": asking, "reply": [*result.tokens, *end]})
        new = file.with_suffix(".new")
        new.write_text(json.dumps(made))
        os.replace(new, file)


if __name__ == "__main__":
    sys.exit(main())
