"""Whether a row of a whole model has the same bits at every width: every product with weights in the emulator, the
device simulated (models/metal_child.py), or on a Mac for real. Prints JSON.

    python tests/msl/rows_child.py simulated|real "small"|"whole" TARGET DRAFTER BITS ...

BITS: 4, or 0 for bfloat16. The same tokens are fed one by one and several at once, after the same prompt; on the whole
also one each to the rows of a batch, draft included. What is compared are the bits of every operation's output, in the
order of the computation, up to the logits: with attention computed for one query at a time, and with attention that
depends on the number of queries, on a Mac MLX's own.
"""

# ruff: noqa: E402 - the device is simulated between imports
from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parent)]
import metal_child  # before the package: it simulates the device
import mlx.core as mx
import mlx.nn as nn
from emulator import Emulator
from tokenizers import Tokenizer

from mlx_gemma_mtp.cache import kv
from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.gemma4 import Block, Gemma4
from mlx_gemma_mtp.models.linear import Embedding, Linear, Product, finish_loading, keep_rows
from mlx_gemma_mtp.models.loading import load_drafter, load_target
from mlx_gemma_mtp.models.moe import ExpertLinear, Experts
from mlx_gemma_mtp.ops import kernels

PROMPTS = [
    "def mean(values):\n    total = 0\n",
    "class Queue:\n    def __init__(self",
    "x = 1\n",
    "import os\n\nfor name in",
]
FOLLOWING = "    for value in values:\n        total += value\n    return total / len(values)\n\n\ndef median("
GROUP = 32
MOST = 16  # tokens of a pass
FUSED = 8  # queries up to which MLX has a fused kernel on Metal


class Sample(NamedTuple):
    """What is tried: so many of the prompts, these widths, and of each its first rows."""

    prompts: int
    widths: tuple[int, ...]
    rows: int
    batches: bool


SAMPLES = {"small": Sample(1, (4, 16), 2, False), "whole": Sample(len(PROMPTS), (2, 4, 8, 16), 16, True)}
NAMES = ["queries, keys, values", "attention", "what follows attention", "the last norm", "logits"]
Trace = list[tuple[str, mx.array]]  # an operation, and its rows [tokens, ...]
trace: Trace = []


def watch(owner: Any, name: str, operation: str, rows: Callable[[mx.array], mx.array] = lambda x: x) -> None:
    """Keeps what a method returns."""
    method = getattr(owner, name)

    def watched(*args: Any) -> Any:
        result = method(*args)
        for part in result if isinstance(result, tuple) else (result,):
            trace.append((operation, rows(part)))
        return result

    setattr(owner, name, watched)


def of_heads(x: mx.array) -> mx.array:
    """[B, heads, T, D] -> [B T, heads, D]."""
    return x.swapaxes(1, 2).flatten(0, 1)


def watch_all() -> None:
    watch(Block, "pre_attention", NAMES[0], of_heads)
    watch(Span, "attend", NAMES[1], of_heads)
    watch(Block, "post_attention", NAMES[2])
    watch(Gemma4, "__call__", NAMES[3], lambda x: x.flatten(0, 1))
    watch(Gemma4, "logits", NAMES[4], lambda x: x.flatten(0, 1))


def one_query_at_a_time(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    parts = [
        mx.fast.scaled_dot_product_attention(
            queries[:, :, t : t + 1], keys, values, scale=1.0, mask=mask[:, :, t : t + 1]
        )
        for t in range(queries.shape[2])
    ]
    return mx.concatenate(parts, axis=2)


def by_the_number(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """MLX's attention; where Metal is simulated, with what is true of it there: beyond a number of queries another
    kernel computes, and rounds scores otherwise.
    """
    if metal_child.SIMULATED and queries.shape[2] > FUSED:
        wide = [x.astype(mx.float32) for x in (queries, keys, values)]
        return mx.fast.scaled_dot_product_attention(*wide, scale=1.0, mask=mask).astype(queries.dtype)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)


def models(target: str, drafter: str, bits: int) -> tuple[Gemma4, Drafter]:
    """Both in bfloat16, with all matrices quantised whose rows allow it."""
    first = load_target(Path(target), mx.bfloat16)
    pair = first, load_drafter(Path(drafter), first.config, mx.bfloat16)
    for model in pair:
        if bits:
            fits = lambda _, m: isinstance(m, Linear | Embedding | ExpertLinear) and m.weight.shape[-1] % GROUP == 0  # noqa: E731
            nn.quantize(model, GROUP, bits, class_predicate=fits)
            finish_loading(model)
        left = keep_rows(model, mx.bfloat16)
        assert not left, f"products of {left} weights go elsewhere"
        for module in model.modules():
            assert not isinstance(module, nn.Linear | nn.QuantizedLinear) or isinstance(module, Product)
            assert not isinstance(module, Experts) or module.path(mx.bfloat16, 4) == "grouped"
    return pair


def run(model: Gemma4, tokens: mx.array, cache: Cache) -> Trace:
    """A forward of tokens [B, T], down to the logits."""
    trace.clear()
    model.logits(model(tokens, cache.span(tokens.shape[1])))
    found = list(trace)
    mx.eval([rows for _, rows in found])
    return found


def first_difference(ours: Trace, alone: Trace, rows: slice) -> str | None:
    """The first operation of which rows differ from those of a trace of them alone."""
    for (name, one), (other, theirs) in zip(ours, alone, strict=True):
        assert name == other
        if not mx.array_equal(one[rows], theirs).item():
            return name
    return None


def prefilled(model: Gemma4, prompt: list[int]) -> Cache:
    cache = Cache(model.config.kv, max(len(prompt), MOST), model.dtype).open(len(prompt) + MOST)
    model(mx.array([prompt]), cache.span(len(prompt)))
    cache.commit(mx.array([len(prompt)]), [len(prompt)])
    return cache


def of_widths(model: Gemma4, prompt: list[int], following: list[int], sample: Sample) -> dict[int, list[str | None]]:
    """For each width and each of its rows the first operation that differs from the token's own pass."""
    cache, tokens = prefilled(model, prompt), mx.array([following])
    wide = {width: run(model, tokens[:, :width], cache) for width in sample.widths}
    alone = []
    for t in range(sample.rows):
        alone.append(run(model, tokens[:, t : t + 1], cache))
        cache.commit(mx.array([1]), [1])
    assert len({int(mx.argmax(each[-1][1])) for each in alone}) > 1, "logits that do not change prove little"
    return {
        width: [first_difference(each, alone[t], slice(t, t + 1)) for t in range(min(width, sample.rows))]
        for width, each in wide.items()
    }


def of_batches(
    model: Gemma4, drafter: Drafter, prompt: list[int], following: list[int], sample: Sample
) -> dict[int, list[str | None]]:
    """For each number of rows the first operation in which a row of a batch differs from the row alone, draft included.

    All rows have the same prompt, and another token each.
    """
    saved = prefilled(model, prompt).save(0)

    def step(tokens: list[int]) -> Trace:
        cache = Cache(model.config.kv, MOST, model.dtype)
        cache.arrange([saved] * len(tokens))
        found = run(model, mx.array([[token] for token in tokens]), cache)
        cache.commit(mx.array([1] * len(tokens)), [1] * len(tokens))
        trace.clear()
        span, hidden = Span(cache, 0), found[-2][1]
        newest = model.embed(mx.array(tokens))
        y, carried = drafter(newest, hidden, span, drafter.ropes.tables(span.positions))
        scores, _ = drafter.scores(y)
        return found + list(trace) + [("the drafter's step", y), ("its hidden state", carried), ("its scores", scores)]

    alone = [step([token]) for token in following]
    found = {}
    for rows in sample.widths:
        together = step(following[:rows])
        found[rows] = [first_difference(together, alone[b], slice(b, b + 1)) for b in range(rows)]
    return found


def of_pair(model: Gemma4, drafter: Drafter, folder: str, sample: Sample) -> dict[str, list[dict]]:
    """What differs, by what was tried, for each prompt."""
    encode = Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode
    following = encode(FOLLOWING, add_special_tokens=False).ids[:MOST]
    assert len(following) == MOST
    found = defaultdict(list)
    for prompt in PROMPTS[: sample.prompts]:
        ids = [2, *encode(prompt, add_special_tokens=False).ids]
        for name, kv.attention in (("one query at a time", one_query_at_a_time), ("by their number", by_the_number)):
            found[name].append(of_widths(model, ids, following, sample))
        if sample.batches:
            found["batch"].append(of_batches(model, drafter, ids, following, sample))
    return found


def main(sample: str, *pairs: str) -> None:
    mx.disable_compile()
    if metal_child.SIMULATED:
        kernels.build = Emulator().build
    watch_all()
    found = []
    for target, drafter, bits in zip(pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        found.append(of_pair(*models(target, drafter, int(bits)), target, SAMPLES[sample]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[2:])
