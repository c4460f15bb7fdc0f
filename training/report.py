"""Figures of a pair: held-out loss, loss at late positions, drafts accepted by position, greedy and at temperature 1.

`python -m training.report --pair OUT --data DATA`, OUT as `training.export` wrote it. Float32 on the bfloat16 files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from mlx_gemma_mtp.engine.load import load
from mlx_gemma_mtp.sampling.params import SamplingParams
from training import assisted, data, gemma
from training.cli import command
from training.drafter import ROUND
from training.target import Loss, held_out

PROMPTS = Path(__file__).parents[1] / "tests" / "data" / "prompts.json"
NEW_TOKENS = 128
LENGTH = 512
LONG = 6144
SEED = 0
GEMMA_SAMPLING = {"top_k": 64, "top_p": 0.95}  # as the published generation_config.json


def marked_prompts(file: Path = PROMPTS) -> list[str]:
    return [entry["prompt"] for entry in json.loads(file.read_text()) if entry["acceptance"]]


@torch.no_grad()
def loss_by_position(model, stream: np.ndarray, length: int = LONG) -> dict[str, float]:
    """Nats a token on windows of `length` by position in the window: is text this long still understood?"""
    losses = []
    for row in torch.from_numpy(data.windows(stream, length)).split(1):
        hidden = model.model(input_ids=row[:, :-1], use_cache=False).last_hidden_state
        logits = gemma.soft_cap(model.lm_head(hidden), model.config.final_logit_softcapping)
        losses.append(F.cross_entropy(logits[0], row[0, 1:], reduction="none"))
    by_position = torch.stack(losses).mean(0)
    edges = [0, 512, 1024, 2048, 4096, 5120, 6144]
    return {f"{a}-{b}": by_position[a:b].mean().item() for a, b in pairwise(edges) if b <= length}


def by_engine(pair: Path, prompts: Sequence[str], temperature: float) -> dict[str, Any]:
    """Acceptance in mlx_gemma_mtp. At temperature 1 drafts and tokens share their noise (see its sampling.py)."""
    loaded = load(str(pair / "target"), str(pair / "drafter"), num_draft_tokens=ROUND, dtype="float32")
    params = SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS, seed=SEED, **GEMMA_SAMPLING)
    stats = [result.stats for result in loaded.generate(list(prompts), params)]
    rounds = sum(stat.rounds for stat in stats)
    shares = np.zeros(ROUND)
    for stat in stats:
        kept = stat.acceptance_by_position
        shares[: len(kept)] += np.array(kept) * stat.rounds / rounds
    kept = sum(stat.accepted for stat in stats)
    return {
        "rounds": rounds,
        "tokens": sum(stat.generation_tokens for stat in stats),
        "by_position": shares.tolist(),
        "tokens_a_round": 1 + kept / rounds,
    }


def report(pair: Path, source: Path, prompts: Sequence[str]) -> dict[str, Any]:
    """All figures of a pair, and the bytes of its two folders."""
    held = data.load(source).held
    model = gemma.load_target(pair / "hf" / "target")
    figures: dict[str, Any] = {
        "bytes": {name: sum(f.stat().st_size for f in (pair / name).iterdir()) for name in ("target", "drafter")},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out": held_out(Loss(model).parts, held, LENGTH),
    }
    longest = max(held.values(), key=len)
    if len(longest) > LONG:
        figures["loss_by_position"] = loss_by_position(model, longest)
    tokenizer = AutoTokenizer.from_pretrained(pair / "hf" / "target")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]
    target, drafter = (
        load(pair / "hf" / name, "eager")
        for load, name in ((gemma.load_target, "target"), (gemma.load_drafter, "drafter"))
    )
    figures["transformers_greedy"] = assisted.measure(target, drafter, ids, NEW_TOKENS)._asdict()
    figures["greedy"] = by_engine(pair, prompts, 0.0)
    figures["temperature_1"] = by_engine(pair, prompts, 1.0)
    return figures


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.report", description="Measure a pair.")
    parser.add_argument("--pair", type=Path, required=True, help="folder that python -m training.export wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder that python -m training.data wrote")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="held-out questions; those marked are used")
    args = parser.parse_args(argv)
    figures = report(args.pair, args.data, marked_prompts(args.prompts))
    (args.pair / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())
