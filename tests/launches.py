"""Every launch of our kernels that a model in use makes: its text, its template, its grid. Nothing is computed.

The functions of the package themselves are asked, with arrays of zeros; what they would launch is written down.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel, down, gate_up, grouping, head_argmax
from mlx_gemma_mtp.ops.kernels.products import Weights

DTYPES = (mx.bfloat16, mx.float16, mx.float32)
FORMATS = (
    (0, 0),
    (4, 32),
    (4, 64),
    (4, 128),
    (8, 32),
    (8, 64),
    (8, 128),
)  # bits, 0 for floats, and the size of a group
EXPERTS = {  # experts, experts a token, inputs, size of an expert
    "26B-A4B": (128, 8, 2816, 704),
    "bundled": (24, 4, 192, 96),
    "odd": (19, 8, 320, 21),
}
HEADS = {"26B-A4B, 31B": (262144, 1024), "12B": (262144, 512), "odd": (203, 320)}  # tokens, inputs
PRODUCTS = ((2816, 8192), (4096, 2816), (2112, 2816), (2816, 128), (128, 64), (320, 203))  # inputs, outputs
TOKENS = (1, 32, 128)  # one for each capacity of the down kernel, with 8 experts a token


@dataclass(frozen=True, eq=False)
class Launch:
    what: str
    kernel: Kernel
    arguments: dict[str, Any]


@contextmanager
def noted(what: str, seen: list[Launch]) -> Iterator[None]:
    """Has launches written down in `seen`, by the kernels' own names on every device, and their outputs be zeros."""

    def build(kernel: Kernel) -> Any:
        def launch(**arguments: Any) -> list[mx.array]:
            seen.append(Launch(f"{kernel.name}, {what}", kernel, arguments))
            outputs = zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)
            return [mx.zeros(*each) for each in outputs]

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "build", build)
        patch.setattr(Kernel, "on_metal", lambda kernel, inputs: kernel)
        yield


def of_checks() -> list[Launch]:
    """Returns the launches of the self-checks of every kernel, which find no difference here."""
    seen: list[Launch] = []
    for name in kernels.KERNELS:
        module = import_module(f"{kernels.__name__}.{name}")
        with noted(f"self-check of {name}", seen), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "difference", lambda *_: None, raising=False)
            module.self_check()
    return seen


def of_models() -> list[Launch]:
    """Returns the launches of all models in all types and formats, of an odd layer, and of the self-checks."""
    seen = of_checks()
    for dtype in DTYPES:
        for bits, group in FORMATS:
            form = f"{bits} bit by {group}" if bits else "floats"
            about = f"{form}, {str(dtype).removeprefix('mlx.core.')}"
            for name, sizes in EXPERTS.items():
                if not bits or sizes[2] % group == 0:
                    for tokens in TOKENS:
                        with noted(f"{name}, {tokens} tokens, {about}", seen):
                            _layer(dtype, bits, group, tokens, *sizes)
            for name, (vocabulary, inputs) in HEADS.items():
                with noted(f"{name}, {about}", seen):
                    head = weights(dtype, bits, group, vocabulary, inputs)
                    for bias in (None, mx.zeros((vocabulary,))):
                        head_argmax.best_token_metal(mx.zeros((8, inputs), dtype), head, bias)
            with noted(f"products, {about}", seen):
                _products(dtype, bits, group)
    return seen


def texts(launches: Iterable[Launch]) -> dict[str, Kernel]:
    """Returns the kernels of launches, by name and text, each once."""
    return {f"{kernel.name} {kernels.cuda_name(kernel)}": kernel for kernel in (each.kernel for each in launches)}


def _layer(dtype: mx.Dtype, bits: int, group: int, tokens: int, count: int, top_k: int, inputs: int, size: int) -> None:
    """Launches what a layer of experts does for a forward of so many tokens."""
    chosen = mx.zeros((tokens, top_k), mx.uint32)
    groups = grouping.group_metal(chosen.reshape(-1), count)
    both = weights(dtype, bits, group, count, 2 * size, inputs)
    gate_up.gate_up_metal(mx.zeros((tokens, inputs), dtype), both, chosen, groups)
    if bits and size % group:
        size = inputs  # of an odd layer the products alone are of interest
    back = weights(dtype, bits, group, count, inputs, size)
    if chosen.size <= down.CAPACITIES[-1]:
        inner = mx.zeros((chosen.size, size), dtype)
        down.down_metal(inner, back, chosen, mx.zeros((tokens, top_k)), groups)


def _products(dtype: mx.Dtype, bits: int, group: int) -> None:
    """Launches products of few rows, where this version has a kernel for them."""
    if "few_rows" not in kernels.KERNELS:
        return
    few_rows = import_module(f"{kernels.__name__}.few_rows")
    for inputs, outputs in PRODUCTS:
        for rows in few_rows.ROWS if not bits or inputs % group == 0 else ():
            x = mx.zeros((rows, inputs), dtype)
            few_rows.few_rows_metal(x, weights(dtype, bits, group, outputs, inputs))


def weights(dtype: mx.Dtype, bits: int, group: int, *shape: int) -> Weights:
    """Returns weights of zeros, [..., outputs, inputs]."""
    if not bits:
        return Weights(mx.zeros(shape, dtype))
    *rows, inputs = shape
    scales = mx.zeros((*rows, inputs // group), dtype)
    return Weights(mx.zeros((*rows, inputs * bits // 32), mx.uint32), scales, scales, group, bits)
