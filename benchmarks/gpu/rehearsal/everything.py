"""Asks MLX's CUDA build for every operation that the package uses, in a rehearsal's environment (../README.md):
`python benchmarks/gpu/rehearsal/everything.py [PAIR]`. An operation without a CUDA implementation raises, and is told.

Both pairs, in floats and quantised as a load leaves them, in rows of 1 and 3, by every setting of a request that has
arithmetic of its own.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import mlx.nn as nn

from benchmarks.gpu.pairs import ROOT
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.models.linear import finish_loading

PAIRS = {"bundled": ROOT / "mlx_gemma_mtp/demo", "e2b": ROOT / "tests/data/e2b"}
PROMPTS = ["def add(a, b):", "What is a list?", "def"]
TOKENS = 6
GROUP = 32
SENSELESS = "not finite"  # as what a fake computes may be
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "unfiltered": {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.01},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "logprobs": {"temperature": 0.0, "logprobs": 3, "logit_bias": {5: -1.0}},
}
LOADS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "kv 8": {"kv_bits": 8},
    "kv 4, rings": {"kv_bits": 4, "kv_bits_rings": True},
    "rejection": {"accept": "rejection"},
    "8 bit": {"draft_bits": 8},
    "4 bit": {"draft_bits": 4},
}


def fits(path: str, module: nn.Module) -> bool:
    """Returns whether a module's inputs are whole groups."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0


def quantised(bits: int) -> Any:
    """Returns what opens a target and quantises it, in the place of loading.prepare."""
    usual = loading.prepare

    def prepare(model: nn.Module, *told: Any) -> None:
        usual(model, *told)
        if isinstance(model, Gemma4):
            nn.quantize(model, GROUP, bits, class_predicate=fits)
            finish_loading(model)

    return prepare


def main() -> int:
    """Returns 1 where something raised."""
    loading._check_ordering = lambda ordering, vocab, folder: None  # and are no order of tokens
    print(device.kind(), device.traits(), flush=True)
    failed, usual = 0, loading.prepare
    pairs = {name: PAIRS[name] for name in sys.argv[1:] or PAIRS}
    for (pair, folder), (name, options) in product(pairs.items(), LOADS.items()):
        loading.prepare = quantised(options["draft_bits"]) if "draft_bits" in options else usual
        try:
            engine = load(folder / "target", folder / "drafter", num_draft_tokens=0, **options)
        except Exception as raised:
            print(f"{pair}, {name}, load: {type(raised).__name__}: {raised}", flush=True)
            failed += 1
            continue
        finally:
            loading.prepare = usual
        print(engine.description, flush=True)
        with engine:
            for (what, settings), rows, drafts in product(SETTINGS.items(), (1, 3), (0, 3)):
                if what != "greedy" and (rows, drafts) != (3, 3):
                    continue
                params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=1, **settings)
                results = engine.generate(PROMPTS[:rows], params, num_draft_tokens=drafts)
                if errors := {each.error for each in results if each.error and SENSELESS not in each.error}:
                    print(f"{pair}, {name}, {what}, {rows} rows, {drafts} drafts: {errors}", flush=True)
                    failed += 1
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
