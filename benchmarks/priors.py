"""Measures what a pair's drafts have kept, for its first start: `python -m benchmarks.priors [--model FOLDER]`.

Writes `acceptance.json` into the drafter's folder. At each token of texts that the target made, greedy and sampled,
drafts are compared with how the text goes on (benchmarks/traces.py). Counts only: the machine does not matter.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.texts import GREEDY, PROMPTS, SAMPLED
from benchmarks.traces import trace
from mlx_gemma_mtp import UserError, load
from mlx_gemma_mtp.engine.priors import key_of
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.speculative import acceptance
from mlx_gemma_mtp.speculative.drafting import DEFAULT_DRAFTING
from mlx_gemma_mtp.speculative.history import LASTING, Acceptance

KINDS = {"greedy": GREEDY, "sampled": SAMPLED}
KEEP = LASTING**0.125  # of a token, when the next one comes: several texts count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.priors", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled pair")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--texts", type=int, default=8, help="of each kind")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--out", type=Path, help="default: acceptance.json in the drafter's folder")
    args = parser.parse_args(argv)
    try:
        pair = hub.find_pair(args.model, args.draft_model, None)
        engine = load(args.model, args.draft_model, num_draft_tokens=0, dtype="float32")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prompts = [each["prompt"] for each in json.loads(PROMPTS.read_text())][-args.texts :]
    known = {}
    with engine:
        for kind, params in KINDS.items():
            found = Acceptance()
            for prompt in tqdm(prompts, desc=kind, disable=None):
                accepted, sure = trace(engine, prompt, True, replace(params, max_tokens=args.max_tokens))
                for kept, each in zip(accepted.tolist(), sure.astype(float).tolist(), strict=True):
                    found = found.after(each, kept, KEEP)
            known[kind] = found
            print(f"{kind}: kept by position {' '.join(f'{rate:.2f}' for rate in found.history.rates())}")
    out = args.out or pair.drafter / acceptance.SHIPPED
    out.write_text(acceptance.shipped(known, key_of(pair, DEFAULT_DRAFTING)), encoding="utf-8")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
