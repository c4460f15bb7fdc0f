"""`python -m mlx_gemma_mtp.verify`: does MTP keep the text, with this pair on this machine?

The reference is plain decoding, one row at a time, with the same weights, dtype and kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .cli.command import Parser, command, loaded
from .cli.flags import add_kv_bits, add_row_invariant
from .cli.prompts import PROMPTS, read_lines
from .errors import UserError
from .sampling.params import SamplingParams

if TYPE_CHECKING:
    from .checks.equality import Cell
    from .engine.engine import Engine

CHANCE = 1e-3  # a difference of distributions that is likelier than this is no difference
FEWEST = 8  # samples each way: with 6, no difference however large has a chance below CHANCE


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.verify", description="Compare text with and without MTP, on this machine.")
    p.add_argument("--model", help="a converted folder or a hub id (default: the small bundled pair)")
    p.add_argument("--draft-model", default="auto", metavar="PATH|auto", help="the drafter (default: auto)")
    p.add_argument("--draft-bits", type=int, metavar="N", help="quantise a bf16 drafter to N bits while loading")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for what is not quantised")
    add_kv_bits(p)
    add_row_invariant(p)
    p.add_argument("--prompt-file", metavar="FILE", help="a prompt a line (default: eight short ones)")
    p.add_argument("--max-tokens", type=int, default=64, help="tokens of each text (default: 64)")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="batch sizes (default: 1 4 8)")
    p.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 4], help="draft lengths (default: 1 2 4)")
    p.add_argument("--temps", type=float, nargs="+", default=[0.0, 1.0], help="temperatures (default: 0 1)")
    p.add_argument("--samples", type=int, default=128, help="of the statistical test, each way; 0 leaves it out")
    p.add_argument("--tolerance", type=float, default=0.0, help="logit gap up to which a difference counts as a tie")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output, instead of text")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 all equal, 1 something differs, 2 bad input."""
    return command(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    prompts = read_lines(args.prompt_file) if args.prompt_file else PROMPTS
    _check(args, prompts)
    base = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True, seed=0)
    every = [replace(base, temperature=temperature) for temperature in args.temps]
    engine = loaded(
        args.model,
        args.draft_model,
        dtype=args.dtype,
        draft_bits=args.draft_bits,
        kv_bits=args.kv_bits,
        kv_bits_rings=args.kv_bits_rings,
        row_invariant=args.row_invariant,
        max_rows=max(args.rows),
        max_waiting=max(len(prompts), args.samples),
    )
    from .checks.equality import compare, same_distribution  # after the BLAS: these import MLX
    from .checks.invariance import probe
    from .machine import device

    if engine.drafter is None:
        raise UserError("there is no drafter to verify; name one with --draft-model")
    say = (lambda *lines: None) if args.json else (lambda *lines: print(*lines, sep="\n", flush=True))
    say(f"reference: plain decoding, one row at a time; {engine.description}")
    if (products := device.float32_products()) != "float32":
        say(f"products of float32 are computed in {products}; {device.TF32}=0 has them in float32")
    tokens = engine.text.encode(PROMPTS[1])
    widths = engine.call(lambda: list(probe(engine.target, tokens, engine.specs)))
    say("rows in one product that have the bits of a product of their own:")
    say(*(f"  {path}: {' '.join(map(str, agree))}" for path, agree in widths))
    say(f"{len(prompts)} prompts x {args.max_tokens} tokens:")
    cells = []
    for params in every:
        for cell in compare(engine, prompts, params, args.rows, args.num_draft_tokens):
            say(str(cell))
            cells.append(cell)
    chances = {}
    for params in every:
        if params.temperature and args.samples:
            drafts = max(args.num_draft_tokens)
            p = same_distribution(engine, prompts[0], params, drafts, args.samples)
            chances[params.temperature] = p
            say(
                f"  temperature {params.temperature:g}, {args.samples} samples each way: same distribution, p = {p:.3f}"
            )
    differing = [each for cell in cells for each in cell.divergences if not abs(each.gap) <= args.tolerance]
    failed = sum(len(cell.errors) for cell in cells)
    unlike = [temperature for temperature, p in chances.items() if not p >= CHANCE]  # NaN, too
    ok = not differing and not unlike and not failed
    say(
        "equal: MTP changes nothing here"
        if ok
        else f"NOT equal: {len(differing)} texts differ, {failed} could not go on; distributions: {unlike}"
    )
    if args.json:
        print(json.dumps(_record(engine, widths, cells, chances, ok) | {"float32_products": products}))
    return 0 if ok else 1


def _check(args: argparse.Namespace, prompts: Sequence[str]) -> None:
    if not prompts:
        raise UserError(f"--prompt-file {args.prompt_file} has no prompt; expected one a line")
    if not all(drafts >= 1 for drafts in args.num_draft_tokens):
        raise UserError(f"--num-draft-tokens is {args.num_draft_tokens}, expected 1 or more")
    if not all(rows >= 1 for rows in args.rows):
        raise UserError(f"--rows is {args.rows}, expected 1 or more")
    if args.samples < 0 or 0 < args.samples < FEWEST:
        raise UserError(
            f"--samples is {args.samples}, expected 0 (no statistical test), or {FEWEST} and more: fewer cannot tell"
        )
    if not 0 <= args.tolerance < math.inf:  # nor NaN
        raise UserError(f"--tolerance is {args.tolerance}, expected a gap between logits: 0 or more, and finite")
    if args.draft_model == "none":
        raise UserError("--draft-model is none, but a drafter is what is verified; name one, or leave it out")


def _record(engine: Engine, widths: list, cells: list[Cell], chances: dict[float, float], ok: bool) -> dict[str, Any]:
    return {
        "reference": f"plain decoding, one row at a time; {engine.description}",
        "widths": dict(widths),
        "cells": [asdict(cell) for cell in cells],
        "same_distribution": {t: None if math.isnan(p) else p for t, p in chances.items()},
        "equal": ok,
    }


if __name__ == "__main__":
    sys.exit(main())
