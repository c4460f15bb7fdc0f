"""Sums of e^x over a vocabulary, which on MLX's CPU backend cost as much as a small model's layer: that calls the C
library for every exponential and every tanh. The chains below are plain arithmetic, which the compiler vectorises.

What comes out is right to 1e-5 of itself. It is meant for sums whose few large terms are known exactly from elsewhere,
and for bounds with room to spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from ..machine.device import metal_available
from .fused import compiled
from .topk import total

# tanh(z) = z P(z^2) / Q(z^2) for |z| up to 9, where float32 calls it 1: a fit of our own, 2e-8 of tanh off at most.
END = 9.0
P = (0.999999979, 0.133810504, 0.00349561829, 2.06095894e-05, 1.33553481e-08)
Q = (1.0, 0.467143659, 0.0258770952, 0.000328568485, 7.77684462e-07)
LOG2 = 1 / math.log(2)
LEAST = -200.0  # of an exponent: far below what float32 can say
# 2^f for f from -1 to 0: interpolated at Chebyshev's points, 1e-7 off at most.
POWER = (0.99999994, 0.69314313, 0.24017896, 0.05529812, 0.00920918, 0.00094688)


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
        y = capped(logits, cap, holes) * scale - shift
        if holes or cap is None:
            y = mx.where(y > LEAST, y, LEAST)
        n = y.astype(mx.int32)
        return mx.maximum(n + 127, 0) * (1 << 23), _polynomial(y - n.astype(mx.float32), POWER)

    return compiled(parts)


def capped(logits: mx.array, cap: float | None, holes: bool) -> mx.array:
    """Returns cap * tanh(logits / cap), about, or the logits where there is no cap. holes: some are -inf, and stay
    it.
    """
    if cap is None:
        return logits
    z = logits * (1 / cap)
    if metal_available():
        score = mx.tanh(z) * cap
    else:
        z = mx.where(z > -END, z, -END)  # two choices: mx.clip asks for NaN besides, and is not vectorised
        z = mx.where(z < END, z, END)
        square = z * z
        score = cap * z * _polynomial(square, P) / _polynomial(square, Q)
    return mx.where(logits > -mx.inf, score, -mx.inf) if holes else score


@compiled
def _product(a: mx.array, b: mx.array) -> mx.array:
    return a * b


def _plain(numbers: mx.array) -> mx.array:
    """Returns one number as a scalar, which leaves a chain over many values one simple loop."""
    return numbers.reshape(()) if numbers.size == 1 else numbers


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
