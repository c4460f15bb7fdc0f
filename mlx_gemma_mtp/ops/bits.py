"""Masks of a vocabulary as bits: bit t % 32 of word t // 32 is token t's."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

BITS = 16  # looked up at once: a table of 4 MB, with a line of 64 bytes for each


def expand(bits: mx.array, vocab: int) -> mx.array:
    """Returns 0 where a token's bit is set and -inf elsewhere: uint32 [..., words] -> float32 [..., vocab]."""
    return _table()[bits.view(mx.uint16)].reshape(*bits.shape[:-1], -1)[..., :vocab]


@cache
def _table() -> mx.array:
    is_set = np.arange(1 << BITS)[:, None] >> np.arange(BITS) & 1
    return mx.array(np.where(is_set, np.float32(0), np.float32(-np.inf)))
