"""Noise for sampling, without a state: a counter-based hash of what it is for, computed only where it is needed."""

from __future__ import annotations

import mlx.core as mx


def gumbel(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Returns standard Gumbel noise, float32 [B, T, C], a pure function of (key, position, token).

    keys: uint32 [B, 2]; positions: [B, T]; tokens: [B, T, C], or broadcastable to it. It is -log(E) with E = -log1p(-u)
    for a uniform u: small u keep their precision, which the large values of the noise need.
    """
    return -mx.log(-mx.log1p(-uniform(keys, positions, tokens)))


def uniform(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Returns noise that is uniform in (0, 1], float32 [B, T, C], a pure function of (key, position, token).

    keys: uint32 [B, 2]; positions: [B, T]; tokens: [B, T, C], or broadcastable to it.
    """
    position = positions.astype(mx.uint32)
    first = _mix(_mix(position * 0x9E3779B9 + keys[:, :1]) ^ keys[:, 1:])[..., None]
    second = _mix(first + 0x85EBCA6B)
    bits = _mix(_mix(tokens.astype(mx.uint32) * 0xC2B2AE35 ^ first) + second)
    return (bits.astype(mx.float32) + 0.5) * 2.0**-32


def keys_of_round(keys: mx.array, first: mx.array) -> mx.array:
    """Returns keys, uint32 [B, 2], for noise that no other round of the text meets, though it draws for the same
    positions.

    keys: uint32 [B, 2], of the rows; first: [B], the tokens committed before the round, with which no other round
    begins.
    """
    number = first.astype(mx.uint32)[:, None] * 0x27D4EB2F + mx.array([0x165667B1, 0xD3A2646C], mx.uint32)
    return _mix(_mix(number ^ keys) + keys[:, ::-1])


def _mix(x: mx.array) -> mx.array:
    """Returns a bijection of 32-bit integers whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
