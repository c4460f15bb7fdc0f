"""Attention of a few queries over all slots of a cache: grouped heads, scale 1."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..machine import device
from . import fused
from .elementwise import MANY

Exponentials = Callable[[mx.array, mx.array], mx.array]  # of scores less their largest
Quantized = tuple[mx.array, mx.array, mx.array]  # packed words, scales, biases
SCORES = 1 << 18  # of a block of queries: so many stay in a processor's cache, and in memory that is used again
FEWEST = 64  # queries of a block, however short a window is
READ_STEP = 16  # slots; a multiple of every SIMD width, so that a longer read adds zeros alone to each lane


def slots_read(slots: int, used: int) -> int:
    """Returns how many of a cache's slots `attention` is given, where no query sees a slot from `used` on.

    On a GPU it is all of them: MLX's fused kernels split their sums by the number of slots, so another number gives
    other bits. Elsewhere it is the used ones, rounded up.
    """
    return slots if device.traits().splits_by_slots else min(slots, -(-max(used, 1) // READ_STEP) * READ_STEP)


def queries_at_once(heads: int, used: int, window: int | None) -> int:
    """Returns how many queries a block of a prefill has where `used` slots are used. window: as of a KVSpec; beyond its
    own length a block would read more than its queries see.
    """
    if window is None:
        return max(READ_STEP, SCORES // (heads * used) // READ_STEP * READ_STEP)
    return min(queries_at_once(heads, 2 * window, None), max(window, FEWEST))


def attention_mask(seen: mx.array, heads: int, kv_heads: int) -> mx.array:
    """Returns the mask that `attention` takes on this device; it is made once and used by many layers. seen: bool [B,
    1, T, S].
    """
    return seen if device.traits().fused_attention else additive_mask(seen, heads, kv_heads)


def additive_mask(seen: mx.array, heads: int, kv_heads: int) -> mx.array:
    """Returns what `attention_reference` adds to its scores, 0 or -inf: [B, kv_heads, heads / kv_heads * T, S]. seen:
    bool [B, 1, T, S].
    """
    rows, _, tokens, slots = seen.shape
    each = mx.broadcast_to(fused.added_mask(seen)[:, :, None], (rows, kv_heads, heads // kv_heads, tokens, slots))
    return each.reshape(rows, kv_heads, -1, slots)


def attention_reference(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array, exponentials: Exponentials = fused.exponentials
) -> mx.array:
    """Returns grouped attention with scale 1, [B, heads, T, D], in plain MLX.

    queries: [B, heads, T, D]; keys, values: [B, kv_heads, S, D]; mask: from `additive_mask`, or of the last keys alone,
    where all queries see those before. The queries that share a key head go through one product. The softmax is in
    float32, as the mask is. exponentials: what computes its e^x.
    """
    grouped = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])  # [B, kv_heads, heads / kv_heads * T, D]
    if mask.shape[-1] == keys.shape[2]:
        scores = mx.addmm(mask, grouped, keys.swapaxes(-1, -2))
    else:
        scores = masked(grouped @ keys.swapaxes(-1, -2), mask)
    weights = exponentials(scores, _largest(scores))
    return ((weights @ values) / weights.sum(axis=-1, keepdims=True)).reshape(queries.shape)


def masked(scores: mx.array, mask: mx.array) -> mx.array:
    """Returns scores with the mask of the last keys, [..., n], added to theirs: [..., S]. It is done in place."""
    if (seen := scores.shape[-1] - mask.shape[-1]) == 0:
        return scores + mask
    return mx.slice_update(scores, scores[..., seen:] + mask, mx.array([seen]), (scores.ndim - 1,))


def _largest(scores: mx.array) -> mx.array:
    """Returns the largest of each row of scores, [..., 1]. MLX reduces the last axis number by number on a CPU, any
    other in a vectorised loop.
    """
    slots = scores.shape[-1]
    if scores.size >= MANY and slots % READ_STEP == 0:
        scores = scores.reshape(*scores.shape[:-1], slots // READ_STEP, READ_STEP).max(axis=-2)
    return scores.max(axis=-1, keepdims=True)


@lru_cache(maxsize=64)
def band(queries: int, keys: int, ahead: int, window: int | None, times: int) -> mx.array:
    """Returns the mask, 0 or -inf, of queries at positions from `ahead` on over keys at positions from 0 on, [times *
    queries, keys]: a query sees the last `window` keys up to its own position, None for all of them.

    times: query heads that share a key head. It is made once on the host and kept, so that it is no part of any graph.
    """
    behind = ahead + np.arange(queries)[:, None] - np.arange(keys)
    seen = (behind >= 0) & (behind < (window or keys + ahead + queries))
    return mx.array(np.tile(np.where(seen, np.float32(0), np.float32(-np.inf)), (times, 1)))


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array, exponentials: Exponentials = fused.exponentials
) -> mx.array:
    """Returns grouped attention with scale 1, [B, heads, T, D]: on a GPU by MLX's fused kernels, elsewhere by
    `attention_reference`, which says what the others are.

    queries: [B, heads, T, D]; keys, values: [B, kv_heads, S, D]; mask: from `attention_mask`.
    """
    if device.traits().fused_attention:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    return attention_reference(queries, keys, values, mask, exponentials)


def quantized_attention(
    queries: mx.array,
    keys: Quantized,
    values: Quantized,
    mask: mx.array,
    group: int,
    bits: int,
    exponentials: Exponentials = fused.exponentials,
) -> mx.array:
    """Returns grouped attention with scale 1, [B, heads, T, D], over keys and values that stay packed: what is read of
    them is their words. Where no product takes batches of such (CUDA), they are dequantised first.

    queries: [B, heads, T, D]; keys, values: packed words, scales and biases, [B, kv_heads, S, any] each; mask: from
    `attention_mask`. group: numbers along D that share a scale. On a CPU all is float32, for MLX adds up quantised
    products of 16 bits in 16 bits there; on a GPU the softmax alone is, as in MLX's own attention.
    """
    traits = device.traits()
    if not traits.packed_batches:
        floats = (mx.dequantize(*packed, group_size=group, bits=bits) for packed in (keys, values))
        return attention(queries, *(each.astype(queries.dtype) for each in floats), mask, exponentials)
    rows, heads, tokens, dim = queries.shape
    kv_heads, slots = keys[0].shape[1:3]
    grouped = queries.reshape(rows, kv_heads, -1, dim)  # [B, kv_heads, heads / kv_heads * T, D]
    if not traits.float32_sums:
        grouped = grouped.astype(mx.float32)
        scores = mx.quantized_matmul(grouped, *keys, transpose=True, group_size=group, bits=bits)
        scores = masked(scores, mask)
        weights = exponentials(scores, _largest(scores))
        summed = mx.quantized_matmul(weights, *values, transpose=False, group_size=group, bits=bits)
        return (summed / weights.sum(axis=-1, keepdims=True)).astype(queries.dtype).reshape(queries.shape)
    scores = mx.quantized_matmul(grouped, *keys, transpose=True, group_size=group, bits=bits)
    scores = scores.reshape(rows, kv_heads, heads // kv_heads, tokens, slots)
    weights = mx.softmax(mx.where(mask[:, None], scores, -mx.inf), axis=-1, precise=True)
    weights = weights.reshape(rows, kv_heads, -1, slots)
    summed = mx.quantized_matmul(weights, *values, transpose=False, group_size=group, bits=bits)
    return summed.reshape(queries.shape)
