"""Norms and gates of however many tokens, on a CPU: the chains of fused.py for few, and for many, as in a prefill, what
the compiler vectorises.

A chain that reads arrays of several shapes goes through them number by number there. MLX's plain primitives do not, and
a row costs them nothing but memory; of few numbers it is the primitives that count.
"""

from __future__ import annotations

import mlx.core as mx

from ..machine import device
from . import fused
from .exponentials import exponentials
from .fused import compiled, gelu_exponent, number

MANY = 1 << 14  # numbers, from which on a pass over memory costs less than a chain
LARGEST = 80.0  # e^80 + 1 is far from float32's end, and a gate whose e^-2z is larger passes nothing


def normed(x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array) -> mx.array:
    """Returns what `fused.normed` does, with the same bits."""
    if x.size < MANY:
        return fused.normed(x, total, size_eps, weight)
    return (x * mx.rsqrt(total + size_eps) * weight).astype(x.dtype)


def normed_sum(
    residual: mx.array, x: mx.array, total: mx.array, size_eps: mx.array, weight: mx.array, scale: mx.array
) -> mx.array:
    """Returns what `fused.normed_sum` does, with the same bits."""
    if x.size < MANY:
        return fused.normed_sum(residual, x, total, size_eps, weight, scale)
    return ((residual + x * mx.rsqrt(total + size_eps) * weight) * scale).astype(x.dtype)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Returns gelu_tanh(gate) * up, computed in float32, as `fused.geglu` does. Many numbers have other bits than few
    where the products before them have, too.
    """
    if gate.size < MANY or not device.rounds_by_width():
        return fused.geglu(gate, up)
    x = mx.contiguous(gate.astype(mx.float32))
    powers = exponentials(_exponent(x), number(0.0))
    return _gated(x, mx.contiguous(up), powers).astype(gate.dtype)


@compiled
def _exponent(x: mx.array) -> mx.array:
    return mx.minimum(gelu_exponent(x), LARGEST)


@compiled
def _gated(x: mx.array, up: mx.array, powers: mx.array) -> mx.array:
    return x * up / (1 + powers)
