"""Which widths of a product agree bit for bit with one row, on this machine.

Speculative decoding computes in passes of K + 1 tokens what plain decoding computes one by one. Where every product
gives a row the same bits whatever rows stand beside it, both give the same text to the last bit; elsewhere a near-tie
may flip (research: MLX picks other kernels by width, and with them another order of additions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..cache.cache import Cache
from ..cache.spec import KVSpec
from ..models.gemma4 import Gemma4

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
INPUTS = 3  # one input may agree by luck


def probe(model: Gemma4, prompt: Sequence[int], specs: Sequence[KVSpec]) -> Iterator[tuple[str, list[int]]]:
    """Yields (what, the widths at which it agrees bit for bit with one row).

    Probed are a whole pass, the products of each kind by their path, and the routed experts.
    specs: of the cache of a pass.
    """
    yield "whole pass", of_passes(model, prompt, specs)
    yield from of_products(model)
    yield from of_experts(model)


def agreeing_widths(product: Callable[[mx.array], mx.array], inputs: int, dtype: mx.Dtype) -> list[int]:
    """Returns the widths of WIDTHS at which every row of a product has the bits of the product of that row alone.

    product: takes [width, inputs] of `dtype`.
    """
    agree = set(WIDTHS)
    for seed in range(INPUTS):
        x = mx.random.normal((max(WIDTHS), inputs), key=mx.random.key(seed)).astype(dtype)
        alone = mx.concatenate([product(x[i : i + 1]) for i in range(max(WIDTHS))])
        agree = {width for width in agree if mx.array_equal(product(x[:width]), alone[:width]).item()}
    return sorted(agree)


def of_products(model: Gemma4) -> Iterator[tuple[str, list[int]]]:
    """Yields (path, widths that agree) for each kind of product of a model, under the path of its first one."""
    seen = set()
    for path, module in reversed(model.named_modules()):  # MLX lists the last layer first
        weight = module.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        table = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
        if table and path != "embed_tokens":
            continue  # a table that is only looked up
        bits, inputs = module.get("bits", None), weight.shape[1]
        if "scales" in module:
            bits, inputs = module.bits, weight.shape[1] * 32 // module.bits
        if (kind := (weight.shape[0], inputs, bits)) in seen:
            continue
        seen.add(kind)
        yield path, agreeing_widths(module.as_linear if table else module, inputs, model.dtype)


def of_experts(model: Gemma4) -> Iterator[tuple[str, list[int]]]:
    """Yields the widths that agree for the routed experts of the first layer that has some, router included."""
    for i, layer in enumerate(model.layers):
        if "experts" in layer:

            def product(x: mx.array, layer: nn.Module = layer) -> mx.array:
                return layer.experts(x, *layer.router(x))

            yield f"layers.{i}.experts", agreeing_widths(product, model.config.hidden_size, model.dtype)
            return


def of_passes(model: Gemma4, prompt: Sequence[int], specs: Sequence[KVSpec]) -> list[int]:
    """Returns the widths at which a whole pass gives its first token the hidden state of a pass of that token alone."""
    cache = Cache(specs, max(len(prompt), *WIDTHS), model.dtype).open(len(prompt) + max(WIDTHS))
    tokens = mx.array([list(prompt)])
    mx.eval(model(tokens, cache.span(tokens.shape[1])))
    cache.commit(mx.array([tokens.shape[1]]), [tokens.shape[1]])
    following = mx.random.randint(0, model.config.vocab_size, (1, max(WIDTHS)), key=mx.random.key(0))
    first = [model(following[:, :width], cache.span(width))[:, 0] for width in WIDTHS]
    return [width for width, hidden in zip(WIDTHS, first, strict=True) if mx.array_equal(hidden, first[0]).item()]
