"""Noise for sampling, without a state: a counter-based hash of what it is for, computed only where it is needed."""

from __future__ import annotations

import mlx.core as mx


def gumbel(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Standard Gumbel noise, a pure function of (key, position, token). keys: uint32 [B, 2]; positions: [B, T];
    tokens: [B, T, C] (or broadcastable). Returns float32 [B, T, C].

    A counter-based hash, so that it is computed only where it is needed. -log(E) with E = -log1p(-u): the many small u
    keep their precision, which the large values of the noise need.
    """
    return -mx.log(-mx.log1p(-uniform(keys, positions, tokens)))


def uniform(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """The same, uniform in (0, 1]."""
    position = positions.astype(mx.uint32)
    first = _mix(_mix(position * 0x9E3779B9 + keys[:, :1]) ^ keys[:, 1:])[..., None]
    second = _mix(first + 0x85EBCA6B)
    bits = _mix(_mix(tokens.astype(mx.uint32) * 0xC2B2AE35 ^ first) + second)
    return (bits.astype(mx.float32) + 0.5) * 2.0**-32


def keys_of_round(keys: mx.array, first: mx.array) -> mx.array:
    """Keys for noise that no other round may meet, though it draws for the same positions: uint32 [B, 2]. first: [B],
    the tokens committed before the round, which no other round of the text begins with.
    """
    number = first.astype(mx.uint32)[:, None] * 0x27D4EB2F + mx.array([0x165667B1, 0xD3A2646C], mx.uint32)
    return _mix(_mix(number ^ keys) + keys[:, ::-1])


def _mix(x: mx.array) -> mx.array:
    """A bijection of 32-bit integers whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
