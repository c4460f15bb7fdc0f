"""Elementwise arithmetic, each chain of it compiled into one primitive.

On MLX's CPU backend every primitive costs the main thread 5 to 10 microseconds, which is most of a small model's time;
on Metal every one is a launch. What varies from model to model comes in as an array (`number`), for a constant would be
another kernel.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial

import mlx.core as mx
import numpy as np

from ..machine.device import metal_available

island = partial(mx.compile, shapeless=True)


@cache
def number(value: float) -> mx.array:
    """A kept scalar: no part of any graph."""
    return mx.array(value)


@lru_cache(maxsize=1024)
def numbers(end: int, start: int = 0, dtype: type = np.int32) -> mx.array:
    """start .. end - 1, kept likewise. dtype: numpy's, since it is made on the host."""
    return mx.array(np.arange(start, end, dtype=dtype))


@island
def normed(x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array) -> mx.array:
    """RMS norm from the sum of squares: weight carries sqrt(size)."""
    return (x * mx.rsqrt(total + size_eps) * weight).astype(x.dtype)


@island
def normed_sum(
    residual: mx.array, x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array, scale: mx.array
) -> mx.array:
    return ((residual + x * mx.rsqrt(total + size_eps) * weight) * scale).astype(x.dtype)


def _exp(x: mx.array) -> mx.array:
    """On a CPU as a power of two, one call of the C library, and twice as fast as MLX's own, a chain of calls."""
    return mx.exp(x) if metal_available() else mx.power(2.0, x * (1 / math.log(2)))


@island
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) * up, in float32 inside."""
    # gelu_tanh(x) = x / 2 (1 + tanh(z)) = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    slope = -2 * math.sqrt(2 / math.pi)
    x = gate.astype(mx.float32)
    return ((x * up) / (1 + _exp((mx.square(x) * (0.044715 * slope) + slope) * x))).astype(gate.dtype)


@island
def exponentials(scores: mx.array, largest: mx.array) -> mx.array:
    """What a softmax normalises."""
    return _exp(scores - largest)


@island
def angles(positions: mx.array, frequencies: mx.array, signs: mx.array) -> tuple[mx.array, mx.array]:
    """cos and signed sin of position * frequency."""
    turned = positions.astype(mx.float32) * frequencies
    return mx.cos(turned), mx.sin(turned) * signs


@island
def turned(
    x: mx.array, swapped: mx.array, weight: mx.array, swapped_weight: mx.array, cos: mx.array, sin: mx.array
) -> mx.array:
    return (x * weight * cos + swapped * swapped_weight * sin).astype(x.dtype)


@island
def in_line(lengths: mx.array, queries: mx.array, slot: mx.array, written_before: mx.array) -> mx.array:
    """Slot s holds position s: which of them a query may see, see cache.visible."""
    return slot <= mx.minimum(queries, lengths + written_before)


@island
def in_ring(
    lengths: mx.array, queries: mx.array, slot: mx.array, written_before: mx.array, slots: mx.array, reach: mx.array
) -> mx.array:
    """Slot s holds the newest position p with p % slots == s: which of them a query may see, see cache.visible."""
    last = lengths + written_before
    position = last - (last - slot) % slots  # negative: never written
    return (position >= mx.maximum(queries - reach, 0)) & (position <= queries)


@island
def added_mask(seen: mx.array) -> mx.array:
    """What is added to the scores: 0 or -inf."""
    return mx.where(seen, 0.0, -mx.inf)
