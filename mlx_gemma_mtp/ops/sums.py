"""Sums of e^x over a vocabulary, which on MLX's CPU backend cost as much as a small model's layer: that calls the C
library for every exponential and every tanh. The chains below are plain arithmetic, which the compiler vectorises.

What comes out is right to 1e-5 of itself. It is meant for sums whose few large terms are known exactly from elsewhere,
and for bounds with room to spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from ..machine import device
from .fused import compiled
from .topk import total

# tanh(z) = z P(z^2) / Q(z^2) for |z| up to 9, where float32 calls it 1: a fit of our own, 4e-7 of tanh off at most.
END = 9.0
P = (0.999999607, 0.128353072, 0.00285507973, 1.04239075e-05)
Q = (1.0, 0.461683519, 0.0234199002, 0.000225285297, 2.14561606e-07)
LOG2 = 1 / math.log(2)
BIAS = 127.0  # of a float's exponent: what is below has 0
# 2^f for f from 0 to 1: interpolated at Chebyshev's points, 4e-6 off at most.
POWER = (1.00000349, 0.692972922, 0.241604357, 0.0517449978, 0.0136703095)


def sum_of_exponentials(
    logits: mx.array, cap: float | None, holes: bool, scale: mx.array, largest: mx.array
) -> tuple[mx.array, mx.array]:
    """Returns the sums of e^(scale * score - largest), [...], and these exponentials, [..., n]. A score is cap *
    tanh(logit / cap), or the logit where there is no cap.

    logits: float32 [..., n]; holes: some are -inf, which count 0. scale, largest: broadcastable to [..., 1]. The
    exponents are not above 0, about.
    """
    exponent, rest = _parts(cap, holes)(logits, _plain(scale * LOG2), _plain(largest * LOG2))
    powers = _product(exponent.view(mx.float32), rest)
    return total(powers), powers


def with_noise(logits: mx.array, cap: float | None, holes: bool, scale: mx.array, noise: mx.array) -> mx.array:
    """Returns scale * score + noise, [..., n], -inf where a logit is. noise: [..., n]; the others as above."""
    return _with_noise(cap, holes)(logits, _plain(scale), noise)


@cache
def _with_noise(cap: float | None, holes: bool) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    return compiled(lambda logits, scale, noise: capped(logits, cap, holes) * scale + noise)


@cache
def _parts(cap: float | None, holes: bool) -> Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Returns what makes of logits, scale and shift 2^n, as the bits of a float, and 2^(y - n), for y = score * scale -
    shift and its whole part n.
    """

    def parts(logits: mx.array, scale: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
        y = capped(logits, cap, holes) * scale - (shift - BIAS)
        if holes or cap is None:
            y = mx.where(y > 0, y, 0)
        n = y.astype(mx.int32)
        return mx.maximum(n, 0) << 23, _polynomial(y - n.astype(mx.float32), POWER)

    return compiled(parts)


def capped(logits: mx.array, cap: float | None, holes: bool) -> mx.array:
    """Returns cap * tanh(logits / cap), about, or the logits where there is no cap. holes: some are -inf, and stay
    it.
    """
    if cap is None:
        return logits
    if device.traits().cheap_exponentials:
        score = mx.tanh(logits * (1 / cap)) * cap
    else:
        end = END * cap
        z = mx.where(logits > -end, logits, -end)  # two choices: mx.clip asks for NaN besides, and is not vectorised
        z = mx.where(z < end, z, end)
        p, q = ([each / cap ** (2 * i) for i, each in enumerate(of)] for of in (P, Q))
        score = z * _polynomial(z * z, p) / _polynomial(z * z, q)
    return mx.where(logits > -mx.inf, score, -mx.inf) if holes else score


@compiled
def _product(a: mx.array, b: mx.array) -> mx.array:
    return a * b


def _plain(numbers: mx.array) -> mx.array:
    """Returns one number as a scalar, which leaves a chain over many values one simple loop."""
    return numbers.reshape(()) if numbers.size == 1 else numbers


def _polynomial(x: mx.array, coefficients: Sequence[float]) -> mx.array:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
