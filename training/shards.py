"""Token shards for `training.minutes`, one process a part: `python -m training.shards --part 0 --parts 6 ..`.

raw-P.npy: the part's modules as one stream. pairs-P-K.npz: rows of whole pairs, which of their tokens are replies, and
the questions. held.npz, of part 0: the same of modules that are held out. A file appears only when it is whole.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training import corpus, following
from training.cli import command, positive

EOS, BOS = 1, 2  # as training.tokenizer, which needs more packages than a rented machine may have
TURNS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)  # pairs in one talk
FIRST = 4  # the first shard is so many times smaller, so that training can begin


class Rows:
    """Documents packed into rows: a row begins with a document, and the last one in it is cut."""

    def __init__(self, width: int):
        self.width = width
        self.rows: list[list[int]] = []
        self.replies: list[list[int]] = []

    def add(self, tokens: list[int], reply: list[int]) -> None:
        if not self.rows or len(self.rows[-1]) >= self.width:
            self.rows.append([])
            self.replies.append([])
        self.rows[-1] += tokens
        self.replies[-1] += reply

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Whole rows: uint16 tokens and uint8 marks of replies, [n, width]"""
        whole = [place for place, row in enumerate(self.rows) if len(row) >= self.width]
        tokens = np.array([self.rows[place][: self.width] for place in whole], dtype=np.uint16)
        return tokens, np.array([self.replies[place][: self.width] for place in whole], dtype=np.uint8)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def asking(tokenizer: Tokenizer, user: str) -> list[int]:
    """The tokens of a question up to the model's turn, as the pair's chat template has them, without <bos>."""
    return encode(tokenizer, f"<|turn>user\n{user}<turn|>\n<|turn>model\n")


def talk(tokenizer: Tokenizer, source: following.Source, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """One talk: its tokens, 1 where a token is the reply's (its end is), and the first question's tokens."""
    tokens, marks, asked = [BOS], [0], []
    for _ in range(rng.choice(TURNS)):
        pair = source.pair(rng)
        question = asking(tokenizer, pair.user)
        reply = encode(tokenizer, f"{pair.model}<turn|>\n")
        tokens, marks = tokens + question + reply, marks + [0] * len(question) + [1] * (len(reply) - 1) + [0]
        asked = asked or [BOS, *question]
    return tokens, marks, asked


def shard(tokenizer: Tokenizer, source: following.Source, rng: random.Random, tokens: int, width: int, questions: int):
    """Arrays of a shard: rows, replies, and `questions` questions end to end with their lengths."""
    rows, asked, count = Rows(width), [], 0
    while count < tokens:
        ids, marks, question = talk(tokenizer, source, rng)
        rows.add(ids, marks)
        count += len(ids)
        if len(asked) < questions and len(question) < 300:
            asked.append(question)
    made, replies = rows.arrays()
    flat = np.array([token for question in asked for token in question], dtype=np.uint16)
    return {"rows": made, "replies": replies, "asked": flat, "lengths": np.array([len(q) for q in asked], np.int32)}


def put(file: Path, **arrays: np.ndarray) -> None:
    new = file.with_suffix(".new")
    with new.open("wb") as handle:
        np.savez(handle, **arrays)
    os.replace(new, file)


def read(file: Path) -> list[corpus.Module]:
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [corpus.Module(*json.loads(line)) for line in lines]


def forbidden(file: Path | None) -> frozenset[str]:
    """The prompts that measure: none of them is trained on."""
    return frozenset(entry["prompt"] for entry in json.loads(file.read_text())) if file else frozenset()


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.shards", description="Make shards of tokens.")
    parser.add_argument("--text", type=Path, required=True, help="text.jsonl.xz of training.packages")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--held", type=Path, help="prompts that are never trained on (JSON)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=positive, default=1)
    parser.add_argument("--shards", type=positive, default=16, help="of pairs, a part")
    parser.add_argument("--tokens", type=positive, default=1_000_000, help="of a shard")
    parser.add_argument("--length", type=positive, default=1024)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, width = Tokenizer.from_file(str(args.tokenizer)), args.length + 1
    modules = read(args.text)
    # A package's modules are dealt out to all parts; prose and builtins go to each one.
    mine = [m for place, m in enumerate(modules) if place % args.parts == args.part or m.path.startswith("builtin/")]
    trained = [module for module in mine if not corpus.held_out(module.path)]
    source = following.Source(trained, forbidden(args.held))
    for count in range(args.shards + 1):
        rng = random.Random(f"{args.part} {count}")
        share = FIRST if count == 0 else 1
        if count == 1:
            texts = [m for m in trained if not m.path.startswith("builtin/")]
            rng.shuffle(texts)
            stream = [t for m in texts for t in (BOS, *encode(tokenizer, f"# {m.path}\n{m.text}"), EOS)]
            put(args.out / f"raw-{args.part:02d}.npz", stream=np.array(stream, dtype=np.uint16))
            if args.part == 0:
                kept = following.Source(m for m in modules if corpus.held_out(m.path))
                put(args.out / "held.npz", **shard(tokenizer, kept, rng, args.tokens // 4, width, 200))
        made = shard(tokenizer, source, rng, args.tokens // share, width, 3000)
        put(args.out / f"pairs-{args.part:02d}-{count:03d}.npz", **made)


if __name__ == "__main__":
    sys.exit(main())
