"""Inputs for the tests of the expert kernels: one odd shape, its routes, and routes of the bundled pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.ops.kernels import down, gate_up
from mlx_gemma_mtp.ops.kernels.grouping import ROWS, group_reference
from mlx_gemma_mtp.ops.kernels.products import Weights

EXPERTS, TOP_K = 19, 8
RECORDED = Path(__file__).parents[1] / "data" / "routings.npz"


@dataclass(frozen=True)
class Format:
    """bits 0: floats of the dtype."""

    dtype: mx.Dtype
    bits: int
    group_size: int = 0
    inputs: int = 320  # no multiple of 256
    outputs: int = 21  # odd

    def __str__(self) -> str:
        form = f"affine{self.bits}g{self.group_size}" if self.bits else "float"
        return f"{form}-{str(self.dtype).removeprefix('mlx.core.')}-{self.inputs}x{self.outputs}"

    @property
    def tolerance(self) -> float:
        """Of the largest value: rounding of float32 sums, or of one value stored in the dtype."""
        return {mx.float32: 1e-5, mx.bfloat16: 2**-7, mx.float16: 2**-10}[self.dtype]


AFFINE = Format(mx.float32, 4, 64)
FLOAT = Format(mx.float32, 0, inputs=75)  # no multiple of 4
FORMATS = (
    AFFINE,
    FLOAT,
    Format(mx.float32, 4, 32, inputs=96),
    Format(mx.float32, 4, 64, inputs=512, outputs=8),  # the fast form
    Format(mx.float32, 8, 32, inputs=256, outputs=8),  # and at 8 bits
    Format(mx.bfloat16, 4, 64),  # these three are the self-checks'
    Format(mx.bfloat16, 8, 64),
    Format(mx.bfloat16, 0),
    Format(mx.float16, 8, 64, inputs=64, outputs=5),
)


def normal(form: Format, *shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(form.dtype)


def weights(form: Format, rows: int, experts: int = EXPERTS) -> Weights:
    """[experts, rows, form.inputs], of unit gain."""
    values = (normal(form, experts, rows, form.inputs) * form.inputs**-0.5).astype(form.dtype)
    if not form.bits:
        return Weights(values)
    return Weights(*mx.quantize(values, form.group_size, form.bits), group_size=form.group_size, bits=form.bits)


def coded(experts: int, rows: int, inputs: int, dtype: mx.Dtype = mx.float32, group: int = 64) -> Weights:
    """[experts, rows, inputs] of random 4-bit codes, of about unit gain: what is too many to quantise."""
    words = np.random.default_rng(0).integers(0, 2**32, (experts, rows, inputs // 8), np.uint32)
    scales = np.random.default_rng(1).normal(size=(experts, rows, inputs // group)) * inputs**-0.5 / 8
    scales = mx.array(scales.astype(np.float32)).astype(dtype)
    return Weights(mx.array(words), scales, -8 * scales, group, 4)


def uniform(tokens: int) -> np.ndarray:
    """Routes of the 26B's shape, [tokens, 8] of 128, even and independent."""
    rng = np.random.default_rng(tokens)
    return np.stack([rng.choice(128, 8, replace=False) for _ in range(tokens)])


def routes(tokens: int, kind: str = "mixed") -> mx.array:
    """uint32 [tokens, TOP_K]; mixed: expert 4 twice for every token, some experts never; one: all on expert 7."""
    if kind == "one":
        return mx.full((tokens, TOP_K), 7, dtype=mx.uint32)
    chosen = np.random.default_rng(tokens).integers(0, EXPERTS - 6, (tokens, TOP_K)).astype(np.uint32)
    chosen[:, [1, 5]] = 4
    return mx.array(chosen)


def recorded(tokens: int) -> list[np.ndarray]:
    """Routes of consecutive tokens of the bundled target, two places in each of its layers: [tokens, 4] of 24."""
    with np.load(RECORDED) as file:
        return [layer[start : start + tokens] for layer in file["experts"] for start in (0, 90)]


class Layer:
    """Both kernels with weights: x [N, inputs] through gate and up, pairs [N TOP_K, inputs] through down."""

    def __init__(self, form: Format):
        self.form = form
        self.gate_up, self.down = weights(form, 2 * form.outputs), weights(form, 2 * form.outputs + 1)

    def inputs(self, tokens: int) -> tuple[mx.array, mx.array, mx.array]:
        """x, the pairs' inner rows, and the route weights of so many tokens."""
        scale = mx.softmax(mx.array(np.random.default_rng(2).normal(size=(tokens, TOP_K)).astype(np.float32)), axis=-1)
        inner = normal(self.form, tokens * TOP_K, self.form.inputs, seed=3)
        return normal(self.form, tokens, self.form.inputs, seed=1), inner, scale

    def run(self, experts: mx.array, arrays: tuple, rows: int = ROWS) -> tuple[mx.array, mx.array]:
        x, inner, scale = arrays
        groups = group_reference(experts.reshape(-1), EXPERTS, rows)
        return (
            gate_up.gate_up_metal(x, self.gate_up, experts, groups),
            down.down_metal(inner, self.down, experts, scale, groups),
        )

    def reference(self, experts: mx.array, arrays: tuple) -> tuple[mx.array, mx.array]:
        x, inner, scale = arrays
        return (
            gate_up.gate_up_reference(x, self.gate_up, experts),
            down.down_reference(inner, self.down, experts, scale),
        )
