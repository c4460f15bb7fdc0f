"""Elementwise arithmetic, each chain of it compiled into one primitive.

On MLX's CPU backend every primitive costs the main thread 5 to 10 microseconds, which is most of a small model's time;
on a GPU every one is a launch. What varies from model to model comes in as an array (`number`), for a constant would be
another kernel.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial

import mlx.core as mx
import numpy as np

from ..machine import device

compiled = partial(mx.compile, shapeless=True)


@cache
def number(value: float) -> mx.array:
    """Returns a scalar that is made once and kept, so that it is no part of any graph."""
    return mx.array(value)


@lru_cache(maxsize=1024)
def numbers(end: int, start: int = 0, dtype: type = np.int32) -> mx.array:
    """Returns the integers from start to end - 1, made once on the host and kept, so that they are no part of any
    graph. dtype: numpy's.
    """
    return mx.array(np.arange(start, end, dtype=dtype))


@compiled
def normed(x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array) -> mx.array:
    """Returns the RMS norm of x from its sum of squares. The weight carries sqrt(size), size_eps is size * eps."""
    return (x * mx.rsqrt(total + size_eps) * weight).astype(x.dtype)


@compiled
def normed_sum(
    residual: mx.array, x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array, scale: mx.array
) -> mx.array:
    """Returns (residual + norm(x)) * scale, the norm from the sum of squares as in `normed`."""
    return ((residual + x * mx.rsqrt(total + size_eps) * weight) * scale).astype(x.dtype)


def _exp(x: mx.array) -> mx.array:
    """Returns e^x: where that is dear as a power of two, one call of the C library and twice as fast as MLX's own."""
    return mx.exp(x) if device.traits().cheap_exponentials else mx.power(2.0, x * (1 / math.log(2)))


def gelu_exponent(x: mx.array) -> mx.array:
    """Returns the -2z of gelu_tanh(x) = x / 2 (1 + tanh(z)) = x / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    slope = -2 * math.sqrt(2 / math.pi)
    return (mx.square(x) * (0.044715 * slope) + slope) * x


@compiled
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Returns gelu_tanh(gate) * up, computed in float32."""
    x = gate.astype(mx.float32)
    return ((x * up) / (1 + _exp(gelu_exponent(x)))).astype(gate.dtype)


@compiled
def exponentials(scores: mx.array, largest: mx.array) -> mx.array:
    """Returns e^(scores - largest), which a softmax normalises."""
    return _exp(scores - largest)


@compiled
def angles(positions: mx.array, frequencies: mx.array, signs: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the cosine and the signed sine of position * frequency."""
    turned = positions.astype(mx.float32) * frequencies
    return mx.cos(turned), mx.sin(turned) * signs


@compiled
def turned(
    x: mx.array, swapped: mx.array, weight: mx.array, swapped_weight: mx.array, cos: mx.array, sin: mx.array
) -> mx.array:
    """Returns x * weight rotated by the angles. swapped, swapped_weight: x and weight with their halves swapped."""
    return (x * weight * cos + swapped * swapped_weight * sin).astype(x.dtype)


@compiled
def in_line(lengths: mx.array, queries: mx.array, slot: mx.array, written_before: mx.array) -> mx.array:
    """Returns which slots a query may see where slot s holds position s: those up to itself that are written."""
    return slot <= mx.minimum(queries, lengths + written_before)


@compiled
def in_ring(
    lengths: mx.array, queries: mx.array, slot: mx.array, written_before: mx.array, slots: mx.array, reach: mx.array
) -> mx.array:
    """Returns which slots a query may see where slot s holds the newest position p with p % slots == s: those up to
    itself and at most `reach` before it.
    """
    last = lengths + written_before
    position = last - (last - slot) % slots  # negative: never written
    return (position >= mx.maximum(queries - reach, 0)) & (position <= queries)


@compiled
def added_mask(seen: mx.array) -> mx.array:
    """Returns what is added to attention's scores: 0 where a key is seen, -inf elsewhere."""
    return mx.where(seen, 0.0, -mx.inf)
