"""Record what transformers says about a trained pair into tests/data (needs extra `parity`).

    python tests/record_fixtures.py FOLDER        # FOLDER holds target/, drafter/ and prompts.json

Tests without torch then compare with these numbers: float32 on the stored weights, greedy.

`greedy.npz`: three prompts. Their ids; logits of each prompt's last four positions; 160 tokens
without a stop (past the window of 128); the logits that chose ten of them; four draft steps from
five places on the way (our window rule). Logits are thinned: columns 0, 8, 16, ..., and the best 16
with their ids.

`assisted.npz`: the twenty marked prompts. Tokens and accepted drafts of each round: four drafts, at
most 128 tokens, end tokens 1 and 6, with transformers' sliding window in the drafter and with ours.

Ragged lists are stored end to end, with their lengths.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hf_oracle import Assisted, assisted, draft_steps, greedy, load_pair, target_logits
from trained import DATA
from transformers import AutoTokenizer

END = (1, 6)
DRAFTS, MAX_TOKENS, CONTINUATION, LAST, STEPS = 4, 128, 160, 4, 4
CHECK_AT = (0, 1, 2, 31, 63, 95, 110, 127, 143, 159)  # new tokens (from 0) whose logits are kept
DRAFT_AT = (
    1,
    2,
    40,
    100,
    150,
)  # number of new tokens known when drafting starts; the last one is the newest


def read_prompts(folder: Path) -> list[list[int]]:
    """Token ids of the marked prompts as one user turn each, the model's turn opened."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    marked = [entry["prompt"] for entry in json.loads((folder / "prompts.json").read_text()) if entry["acceptance"]]
    turns = [[{"role": "user", "content": text}] for text in marked]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


def ragged(name: str, lists: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    return {
        name: np.array([item for row in lists for item in row], dtype=np.int32),
        f"{name}_lengths": np.array([len(row) for row in lists], dtype=np.int32),
    }


def thinned(name: str, rows: list) -> dict[str, np.ndarray]:
    """Whole rows would make most of a megabyte: every eighth column, the best 16 and their ids."""
    logits = np.array(rows, dtype=np.float32)
    top = np.argsort(-logits, axis=-1, kind="stable")[..., :16]
    return {
        name: logits[..., ::8],
        f"{name}_top": top.astype(np.int32),
        f"{name}_top_logits": np.take_along_axis(logits, top, -1),
    }


def record_greedy(target, drafter, prompts: list[list[int]]) -> None:
    texts = [greedy(target, prompt, CONTINUATION) for prompt in prompts]
    prefill, during, drafts = [], [], []
    for prompt, text in zip(prompts, texts, strict=True):
        logits = target_logits(target, prompt + text)
        prefill.append(logits[len(prompt) - LAST : len(prompt)])
        during.append(logits[[len(prompt) - 1 + step for step in CHECK_AT]])
        drafts.append([draft_steps(target, drafter, prompt + text[:known], STEPS) for known in DRAFT_AT])
    np.savez_compressed(
        DATA / "greedy.npz",
        **ragged("prompts", prompts),
        tokens=np.array(texts, dtype=np.int32),
        checked=np.array(CHECK_AT),
        drafted_after=np.array(DRAFT_AT),
        **thinned("prefill_logits", prefill),
        **thinned("logits", during),
        **thinned("draft_logits", [[draft.logits for draft in row] for row in drafts]),
        draft_tokens=np.array([[draft.tokens for draft in row] for row in drafts], dtype=np.int32),
        draft_hidden=np.array([[draft.hidden for draft in row] for row in drafts], dtype=np.float32),
    )


def summary(name: str, runs: list[Assisted]) -> str:
    rounds = np.concatenate([run.accepted for run in runs])
    reached = [f"{(rounds >= depth).mean():.3f}" for depth in range(1, DRAFTS + 1)]
    tokens = sum(len(run.tokens) for run in runs)
    return (
        f"{name}: P(accept >= 1..{DRAFTS}) {' '.join(reached)}; "
        f"{rounds.mean() + 1:.2f} tokens a round; {len(rounds)} rounds, {tokens} tokens"
    )


def record_assisted(target, drafter, prompts: list[list[int]]) -> None:
    arrays = ragged("prompts", prompts)
    for rule in ("transformers", "ours"):
        runs = [assisted(target, drafter, prompt, MAX_TOKENS, DRAFTS, END, rule) for prompt in prompts]
        print(summary(f"window rule of {rule}", runs))
        arrays |= ragged(f"accepted_{rule}", [run.accepted for run in runs])
        tokens = ragged("tokens", [run.tokens for run in runs])
        if any(not np.array_equal(arrays.setdefault(key, value), value) for key, value in tokens.items()):
            raise SystemExit(f"the text under the window rule of {rule} differs: drafting is not lossless")
    plain = [greedy(target, prompt, MAX_TOKENS, END) for prompt in prompts]
    same = np.array_equal(ragged("tokens", plain)["tokens"], arrays["tokens"])
    print(f"equal to plain greedy: {'all' if same else 'NOT all'} of {len(prompts)}")
    np.savez_compressed(DATA / "assisted.npz", **arrays)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record transformers' numbers for the trained pair.")
    parser.add_argument("folder", type=Path, help="folder with target/, drafter/ and prompts.json")
    folder = parser.parse_args(argv).folder
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    target, drafter = load_pair(folder / "target", folder / "drafter")
    prompts = read_prompts(folder)
    record_greedy(target, drafter, prompts[:3])
    record_assisted(target, drafter, prompts)
    for path in sorted(DATA.glob("*.npz")):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
