"""Runs models through the Metal branches and prints, as JSON, which types and which paths were met.

    python tests/models/metal_child.py simulated|real MODEL[:DTYPE[:BITS[,rings]|rows]] DRAFTER ...

"simulated" is for machines without Metal: the question about the device is answered yes before anything of the package
but the asker is imported, MLX computes on the CPU by its own fallbacks, and a launch of one of our kernels runs its
reference.
What the package decides is then what it decides on a Mac; what comes out is right in float32 alone, for MLX's CPU adds
up 16-bit products in 16 bits. "real" replaces nothing. tests/test_metal_types.py reads what is printed.
"""

# ruff: noqa: E402 - the device is simulated between imports
from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import mlx.core as mx

SIMULATED = sys.argv[1] == "simulated"
if SIMULATED:
    real = mx.metal.is_available, mx.default_device
    mx.metal.is_available, mx.default_device = lambda: True, lambda: mx.gpu

from mlx_gemma_mtp.machine import device

assert device.kind() is not device.Kind.CPU, "no GPU here, and none simulated"  # asked once: the answer is kept
if SIMULATED:
    mx.metal.is_available, mx.default_device = real  # of MLX's other users, mlx-lm would ask for a GPU's stream
    mx.device_info = lambda: {"device_name": "Apple M4 Max", "max_recommended_working_set_size": 1 << 40}

import mlx.nn as nn

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.cache.kv import LayerKV, QuantizedKV
from mlx_gemma_mtp.models.drafter import CentroidHead, DenseHead, Drafter
from mlx_gemma_mtp.models.gemma4 import Block, Gemma4
from mlx_gemma_mtp.models.linear import Embedding, Linear, QuantizedEmbedding, QuantizedLinear
from mlx_gemma_mtp.models.moe import ExpertLinear, Experts, QuantizedExpertLinear
from mlx_gemma_mtp.ops import expert_paths
from mlx_gemma_mtp.ops.kernels import down, few_rows, gate_up, grouping, head_argmax
from mlx_gemma_mtp.speculative import drafting

PROMPTS = ["def mean(values):\n    total = 0\n    for value in values:", "What is a list?"]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "max_tokens": 8, "seed": 3, "ignore_eos": True}
REFERENCES: dict[str, tuple[Any, Callable]] = {
    "group_metal": (grouping, grouping.group_reference),
    "gate_up_metal": (gate_up, lambda x, weights, experts, groups: gate_up.gate_up_reference(x, weights, experts)),
    "down_metal": (down, lambda x, weights, experts, scale, groups: down.down_reference(x, weights, experts, scale)),
    "best_token_metal": (head_argmax, head_argmax.best_token_reference),
    "few_rows_metal": (few_rows, few_rows.few_rows_reference),
}
met: dict[str, set[str]] = defaultdict(set)  # where -> the types, paths or kernels seen there


def named(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def note(where: str, *arrays: mx.array) -> None:
    met[where].update(named(array.dtype) for array in arrays if mx.issubdtype(array.dtype, mx.floating))


def watch(owner: Any, name: str, look: Callable) -> None:
    """look(result, self, *arguments) after every call of a method; inside a compiled graph, when that is traced."""
    method = getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        look(result, *args)
        return result

    setattr(owner, name, watched)


def product(y: mx.array, module: nn.Module, x: mx.array, *rest: Any) -> None:
    note("products' inputs", x)
    note("products' weights", module.get("scales", module.weight))
    note("products' outputs", y)


def watch_all() -> None:
    """Everything a token's activations pass."""
    watch(Block, "__call__", lambda y, self, x, *_: (note("blocks' inputs", x), note("blocks' outputs", y)))
    for kind in (LayerKV, QuantizedKV):
        watch(kind, "write", lambda _, self, slot, keys, values: note("written", keys, values))
        watch(kind, "attend", lambda y, self, rows, slots, queries, mask: (
            note("queries", queries), note("cache", *self.arrays), note("attended", y)
        ))  # fmt: skip
    watch(QuantizedKV, "write", lambda _, self, *rest: note("quantised", *self.arrays))
    watch(Gemma4, "embed", lambda y, self, tokens: note("embedded", y))
    watch(Gemma4, "__call__", lambda y, *_: note("hidden", y))
    watch(Gemma4, "logits", lambda y, self, hidden: note("target's head", hidden))
    watch(Drafter, "__call__", lambda pair, *_: (note("drafted", pair[0]), note("carried", pair[1])))
    watch(drafting, "pick", lambda _, drafter, y, *rest: note("drafter's head", y))
    watch(Experts, "run", lambda y, self, path, *_: (met["paths"].add(str(path)), note("mixtures", y)))
    for linear in (Linear, ExpertLinear, QuantizedExpertLinear, QuantizedLinear):
        watch(linear, "__call__", product)
    for table in (Embedding, QuantizedEmbedding):
        watch(table, "as_linear", product)
    for name, (module, reference) in REFERENCES.items():
        if SIMULATED:
            setattr(module, name, reference)
        watch(module, name, lambda *_, name=name: met["launched"].add(name))


def choices(engine: Any) -> dict[str, Any]:
    """What would be chosen for the model's type, asked without a run."""
    target, drafter = engine.target, engine.drafter
    chosen: dict[str, Any] = {"dtype": named(target.dtype), "drafter": type(drafter.masked_embedding).__name__}
    if target.config.moe:
        every = range(1, expert_paths.VERIFY + 1)
        chosen["paths"] = sorted({str(layer.experts.path(target.dtype, n)) for layer in target.layers for n in every})
    if isinstance(drafter.masked_embedding, DenseHead):
        table = drafter.embed_tokens.weights
        chosen["head_argmax"] = head_argmax.usable(table, target.dtype)
    else:
        assert isinstance(drafter.masked_embedding, CentroidHead)
    return chosen


def compiles() -> bool:
    """Whether mx.compile traces: on a CPU without g++ it calls the function anew each time."""
    calls = []
    twice = mx.compile(lambda x: (calls.append(x), x + x)[1])
    mx.eval(twice(mx.ones(3)), twice(mx.ones(3)))
    return len(calls) == 1


def main(pairs: list[tuple[str, str]]) -> None:
    watch_all()
    results = []
    for target, drafter in pairs:
        folder, dtype, bits = (*target.split(":"), "", "")[:3]
        options = {"kv_bits": int(bits[0]), "kv_bits_rings": bits.endswith("rings")} if bits[:1].isdigit() else {}
        options["row_invariant"] = bits == "rows"
        engine = load(folder, drafter, dtype=dtype or None, **options)
        met.clear()  # the kernels' self-checks are not the model
        tokens = [
            [result.tokens for result in engine.generate(PROMPTS, SamplingParams(**params), num_draft_tokens=drafts)]
            for params in (GREEDY, SAMPLED)
            for drafts in (0, 3)
        ]
        found = {where: sorted(things) for where, things in met.items()}
        asked = {"prompts": PROMPTS, "greedy": GREEDY, "sampled": SAMPLED}
        result = {"chosen": choices(engine), "met": found, "tokens": tokens, "says": engine.description}
        result["compiles"] = compiles()
        results.append(result | asked)
    print(json.dumps(results))


if __name__ == "__main__":
    rest = sys.argv[2:]
    main(list(zip(rest[::2], rest[1::2], strict=True)))
