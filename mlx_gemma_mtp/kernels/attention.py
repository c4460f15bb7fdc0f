"""Attention of a few queries over all slots of a cache: grouped heads, scale 1."""

from __future__ import annotations

import mlx.core as mx

from . import metal_available


def attention_mask(seen: mx.array) -> mx.array:
    """seen: bool [B, 1, T, S] -> the mask that `attention` takes on this device; made once, used by many layers."""
    return seen if metal_available() else mx.where(seen, 0.0, -mx.inf)


def attention_reference(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """queries: [B, heads, T, D]; keys, values: [B, kv_heads, S, D]; mask: [B, 1, T, S], added to the scores.

    The queries that share a key head go through one product. Softmax in float32. Returns [B, heads, T, D].
    """
    B, heads, T, D = queries.shape
    shared = (B, keys.shape[1], heads // keys.shape[1] * T)
    scores = queries.reshape(*shared, D) @ keys.swapaxes(-1, -2)  # [B, kv_heads, heads / kv_heads * T, S]
    if T > 1:
        weights = mx.softmax(scores.reshape(B, heads, T, -1) + mask, axis=-1, precise=True).reshape(scores.shape)
    else:
        weights = mx.softmax(scores + mask, axis=-1, precise=True)
    return (weights @ values).reshape(B, heads, T, D)


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
    """The same; on Metal by MLX's fused kernels."""
    if metal_available():
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    return attention_reference(queries, keys, values, mask)
