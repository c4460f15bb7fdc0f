"""Noise for sampling, without a state: a counter-based hash of what it is for, computed only where it is needed."""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..ops.fused import compiled

TOKEN = 0xC2B2AE35
LARGEST = 2**31 - 1  # of an int32


def gumbel(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Returns standard Gumbel noise, float32 [B, T, C], a pure function of (key, position, token).

    keys: uint32 [B, 2]; positions: [B, T]; tokens: [B, T, C], or broadcastable to it. It is -log(E) with E = -log1p(-u)
    for a uniform u: small u keep their precision, which the large values of the noise need.
    """
    return _gumbel(tokens, *_of_positions(keys, positions))


def drawn(scores: mx.array, keys: mx.array, positions: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the token whose score with noise is the largest, int32 [B, T], of equals the lowest, and that sum.

    scores: [B, T, C]; the others: see `gumbel`. Equals come where scores are so large that float32 loses the noise;
    their order is not the columns', which a batch's other rows may change. A NaN never makes a token that is not
    among these.
    """
    noisy = scores + gumbel(keys, positions, tokens)
    most = noisy.max(axis=-1, keepdims=True)
    return mx.where(noisy < most, LARGEST, tokens.astype(mx.int32)).min(axis=-1), most[..., 0]


def uniform(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Returns noise that is uniform in (0, 1], float32 [B, T, C], a pure function of (key, position, token).

    keys: uint32 [B, 2]; positions: [B, T]; tokens: [B, T, C], or broadcastable to it.
    """
    return _uniform(tokens, *_of_positions(keys, positions))


def _of_positions(keys: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
    """Returns two hashes of the row and the position, uint32 [B, T, 1] each."""
    return _hashed(positions[..., None], keys[:, :1, None], keys[:, 1:, None])


@compiled
def _hashed(positions: mx.array, low: mx.array, high: mx.array) -> tuple[mx.array, mx.array]:
    first = _mix(_mix(positions.astype(mx.uint32) * 0x9E3779B9 + low) ^ high)
    return first, _mix(first + 0x85EBCA6B)


def _plain_uniform(tokens: mx.array, first: mx.array, second: mx.array) -> mx.array:
    bits = _mix(_mix(tokens.astype(mx.uint32) * TOKEN ^ first) + second)
    return (bits.astype(mx.float32) + 0.5) * 2.0**-32


@compiled
def _gumbel(tokens: mx.array, first: mx.array, second: mx.array) -> mx.array:
    return -mx.log(-mx.log1p(-_plain_uniform(tokens, first, second)))


def gumbel_bound(keys: mx.array, positions: mx.array, vocab: int) -> mx.array:
    """Returns numbers that `gumbel` of the tokens 0 to vocab - 1 is not above, float32 [B, T, vocab], nor far below: by
    0.07 at most where it is above 2.

    keys: uint32 [B, 2]; positions: [B, T]. E >= u + u^2 / 2; and log2(x) is at least the bits of x as an integer, by
    2^23, less 127. So nothing but plain arithmetic is computed for every token.
    """
    first, second = _of_positions(keys, positions)
    return _bound(_least(_mixed(_products(vocab) ^ first) + second).view(mx.int32))


@compiled
def _least(x: mx.array) -> mx.array:
    u = (_mix(x).astype(mx.float32) + 0.5) * 2.0**-32
    return u + u * u * 0.5


@compiled
def _bound(bits: mx.array) -> mx.array:
    return bits.astype(mx.float32) * (-math.log(2) * 2.0**-23) + (127 * math.log(2) + 1e-4)  # and what float32 rounds


@lru_cache(maxsize=4)
def _products(vocab: int) -> mx.array:
    return mx.array(np.arange(vocab, dtype=np.uint32) * np.uint32(TOKEN))


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


_mixed = compiled(_mix)
_uniform = compiled(_plain_uniform)
