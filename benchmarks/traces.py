"""Records what every draft length would have kept: `python -m benchmarks.traces OUT.npz [--model FOLDER]`.

At each token of a text that the target made by itself, 7 tokens are drafted and compared with how the text goes on.
Since drafts never change the text, any rule for the draft length can be replayed on such a trace, exactly
(benchmarks/replay.py). For each class of text: accepted [n], how many of the drafts agree; confidences [n, 7], what the
drafter said; and starts, where the texts of the class begin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from benchmarks.texts import GREEDY, texts
from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS
from mlx_gemma_mtp.speculative.drafting import DraftState, Mtp


def trace(engine: Engine, prompt: str, chat: bool, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """accepted uint8 [n], confidences float16 [n, MAX_DRAFTS] at the tokens of one answer."""
    head = engine.text.encode(prompt, chat_template=chat)
    result = engine.generate(head, params, num_draft_tokens=0)
    text = [*head, *result.tokens]
    drafts, confidences = drafts_along(engine, text, len(head), params)
    after = [text[at + 1 : at + 1 + MAX_DRAFTS] for at in range(len(head), len(text) - MAX_DRAFTS)]
    return np.cumprod(drafts == np.array(after), axis=1).sum(1).astype(np.uint8), confidences


def drafts_along(
    engine: Engine, text: Sequence[int], start: int, params: SamplingParams = GREEDY
) -> tuple[np.ndarray, np.ndarray]:
    """drafts int [n, MAX_DRAFTS], confidences float16 [n, MAX_DRAFTS], after each token of a text from `start` on, but
    the last MAX_DRAFTS.
    """
    target, drafter, text = engine.target, engine.drafter, list(text)
    cache = Cache(engine.specs, len(text), target.dtype, engine.drafting.lookback).open(len(text))
    hidden = target(mx.array([text]), cache.span(len(text)))
    rules = Rules.of([params.resolved(engine.defaults)], target.config.vocab_size, engine.defaults.suppress_token_ids)
    source = Mtp(drafter, target.embed, engine.drafting)
    made, confidences = [], []
    for at in range(start, len(text) - MAX_DRAFTS):
        cache.lengths, cache.length_bound = mx.array([at], mx.int32), [at]
        token, state = mx.array([text[at]]), hidden[:, at - 1]
        drafts, sure, *_ = source.propose(DraftState(cache, token, state, rules, None, confident=True), MAX_DRAFTS)
        made.append(np.array(drafts)[0])
        confidences.append(np.nan_to_num(np.array(sure)[0]))  # not sure at all, as the loop takes it
    return np.array(made), np.array(confidences, np.float16)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.traces", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="default: the bundled pair")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--texts", type=int, default=4, help="of each class")
    parser.add_argument("--max-tokens", type=int, default=320)
    args = parser.parse_args(argv)
    try:
        engine = load(args.model, args.draft_model, num_draft_tokens=0, dtype="float32")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arrays: dict[str, np.ndarray] = {}
    for name, some in texts(args.texts).items():
        traces = []
        for prompt, chat, params, _ in tqdm(some, desc=name, disable=None):
            limited = SamplingParams(**{**vars(params), "max_tokens": args.max_tokens})
            traces.append(trace(engine, prompt, chat, limited))
        arrays[f"{name}_accepted"] = np.concatenate([accepted for accepted, _ in traces])
        arrays[f"{name}_confidences"] = np.concatenate([confidences for _, confidences in traces])
        arrays[f"{name}_starts"] = np.cumsum([0, *(len(accepted) for accepted, _ in traces[:-1])], dtype=np.int32)
        kept = arrays[f"{name}_accepted"]
        shares = " ".join(f"{np.mean(kept > i):.2f}" for i in range(MAX_DRAFTS))
        print(f"{name}: {len(kept)} tokens, share of places that keep at least 1..{MAX_DRAFTS} drafts: {shares}")
    np.savez_compressed(args.out, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
