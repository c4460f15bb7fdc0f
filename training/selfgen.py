"""The target's own replies to training questions: the text on which its drafter will be used.

`python -m training.selfgen --target FOLDER --data DATA --out REPLIES --tokens N`
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from mlx_gemma_mtp.errors import UserError
from training import data, gemma
from training.cli import command, positive
from training.tokenizer import PAD, ids

SEED = 5
ROWS = 48
NEW_TOKENS = 160
LONGEST = 512  # tokens of a question
SAMPLED = 4  # every so-many-th batch is sampled at temperature 1, the others are greedy
TURN = "<|turn>model\n"


def questions(stream: np.ndarray, source: Path) -> dict[int, np.ndarray]:
    """Questions of the training stream up to the model's turn, by length: {length: [n, length]}.

    Raises UserError where there are none.
    """
    tokenizer = data.load_tokenizer(source)
    opening, answer = ids(tokenizer, "<bos><|turn>user\n"), ids(tokenizer, TURN)
    starts = np.flatnonzero((stream[:-1] == opening[0]) & (stream[1:] == opening[1]))
    found = defaultdict(set)
    for start in starts:
        text = stream[start : start + LONGEST].tolist()
        for place in range(len(opening), len(text) - len(answer) + 1):
            if text[place : place + len(answer)] == answer:
                found[place + len(answer)].add(tuple(text[: place + len(answer)]))
                break
    if not found:
        raise UserError(f"--data {source} holds no questions of at most {LONGEST} tokens; give --text with some")
    return {length: np.array(sorted(rows)) for length, rows in sorted(found.items())}


@torch.no_grad()
def reply(model, asked: np.ndarray, sampled: bool, seed: int) -> list[list[int]]:
    """Questions with the model's replies, cut after the token that ends them."""
    torch.manual_seed(seed)
    stop = model.config.eos_token_id
    stop = [stop] if isinstance(stop, int) else stop
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95} if sampled else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=PAD, **settings)
    tokens = torch.from_numpy(asked).to(model.device)
    rows = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config).tolist()
    length = asked.shape[1]
    ends = [next((i for i in range(length, len(row)) if row[i] in stop), len(row) - 1) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def replies(
    target: Path, source: Path, out: Path, tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> np.ndarray:
    """At least `tokens` tokens of questions and replies, int64 [n]. Each batch is a file: a killed run goes on."""
    out.mkdir(parents=True, exist_ok=True)
    model = gemma.load_target(target, "sdpa", dtype, device)
    asked = questions(data.load(source).train, source)
    lengths = list(asked)
    weights = np.array([len(asked[length]) for length in lengths], float)
    streams: list[np.ndarray] = []
    with tqdm(total=tokens, unit="token", mininterval=5, desc="replies") as bar:
        while sum(map(len, streams)) < tokens:
            index = len(streams)
            file = out / f"{index:05d}.npy"
            if not file.exists():
                rng = np.random.default_rng([SEED, index])
                rows = asked[lengths[rng.choice(len(lengths), p=weights / weights.sum())]]
                chosen = rows[rng.permutation(len(rows))[:ROWS]]
                made = reply(model, chosen, index % SAMPLED == SAMPLED - 1, index)
                new = file.with_suffix(".new")
                with new.open("wb") as handle:
                    np.save(handle, np.concatenate(made).astype(np.uint32))
                os.replace(new, file)
            streams.append(np.load(file).astype(np.int64))
            bar.update(len(streams[-1]))
    return np.concatenate(streams)


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.selfgen", description="Make a target's own replies.")
    parser.add_argument("--target", type=Path, required=True, help="target folder in Hugging Face layout")
    parser.add_argument("--data", type=Path, required=True, help="folder that python -m training.data wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the replies; what is there is kept")
    parser.add_argument("--tokens", type=positive, default=400_000)
    args = parser.parse_args(argv)
    replies(args.target, args.data, args.out, args.tokens)


if __name__ == "__main__":
    sys.exit(main())
