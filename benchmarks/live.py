"""The automatic draft length against plain decoding, live: `python -m benchmarks.live [--model FOLDER]`.

Classes of text as in benchmarks/texts.py. A pair is the same answers made plainly and with `auto`, in turn; reported
are the median of the pairs' ratios (decoding, without the prefill) and its 95 % interval by order statistics. Exit code
1 where a whole interval lies below 0.97: the machine's noise alone fails nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from statistics import median

from tqdm import tqdm

from benchmarks.texts import texts
from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.machine import blas
from mlx_gemma_mtp.speculative.costs import ROWS, CostFile

BAR = 0.97


def interval(values: list[float], chance: float = 0.95) -> tuple[float, float]:
    """Of the median, without any assumption on the law of the values: binomial ranks."""
    ordered, n = sorted(values), len(values)
    for rank in range(n // 2, 0, -1):
        tail = sum(math.comb(n, i) for i in range(rank)) / 2**n
        if 2 * tail <= 1 - chance:
            return ordered[rank - 1], ordered[n - rank]
    return ordered[0], ordered[-1]


def flatten(file: CostFile) -> None:
    """Writes a table from a bad moment: a verify of many drafts is no dearer than one of 1, a draft hardly costs."""
    file.write(
        {(rows, 0, width): 0.01 + 0.0005 * (width > 0) for rows in ROWS for width in (0, 1, 4, 7)}, {(1, 0): 1e-4}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.live", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the bundled pair")
    parser.add_argument("--draft-model", default="auto")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--texts", type=int, default=2, help="of each class in a run")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rows", type=int, default=1, help="of each text, in a batch (default: 1)")
    parser.add_argument("--flat", action="store_true", help="begin with a table by which drafts are nearly free")
    parser.add_argument("--json", help="append one line for each class")
    args = parser.parse_args(argv)
    blas.preload()
    from mlx_gemma_mtp import load

    try:
        engine = load(args.model, args.draft_model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.flat:
        for costs in engine.costs.values():
            flatten(costs.file)
    classes = {
        name: [(engine.text.encode(prompt, chat_template=chat), params) for prompt, chat, params in some]
        for name, some in texts(args.texts).items()
    }
    print(f"{engine.description}; {args.pairs} pairs, {args.texts} texts of {args.max_tokens} tokens", flush=True)
    failed = False
    for name, some in classes.items():
        ratios, depths = [], Counter()
        for pair in tqdm(range(args.pairs + 1), desc=name, disable=None, leave=False):
            seconds = {}
            for drafts in ((0, "auto"), ("auto", 0))[pair % 2]:
                batches = [
                    engine.generate(
                        [tokens] * args.rows, replace(params, max_tokens=args.max_tokens), num_draft_tokens=drafts
                    )
                    for tokens, params in some
                ]
                seconds[drafts] = sum(
                    sum(len(r.tokens) for r in batch) / batch[0].stats.batch_generation_tps for batch in batches
                )
                if drafts == "auto":
                    for result in (batch[0] for batch in batches):
                        for length, reasons in result.stats.depths.items():
                            depths[length] += sum(reasons.values())
            if pair:  # the first warms up
                ratios.append(seconds[0] / seconds["auto"])
        low, high = interval(ratios)
        bad = high < BAR
        failed |= bad
        used = ", ".join(f"{length}: {count}" for length, count in sorted(depths.items()))
        print(
            f"{name:9} {median(ratios):.3f} [{low:.3f}, {high:.3f}]{' BELOW' if bad else ''}; rounds by drafts {used}"
        )
        if args.json:
            line = {"text": name, "ratio": median(ratios), "interval": [low, high], "ratios": ratios, "depths": depths}
            with open(args.json, "a", encoding="utf-8") as file:
                print(json.dumps(line | {"measured": engine.description}), file=file)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
