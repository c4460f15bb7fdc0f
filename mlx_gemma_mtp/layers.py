"""Norms, rotary embedding, attention, gated MLP: what target and drafter are both made of."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from . import islands
from .cache import Narrow, Span
from .config import LayerSpec, RopeSpec
from .islands import number
from .kernels import metal_available
from .linear import Linear, Settled, Stack


def rms_norm(x: mx.array, eps: float, weights: mx.array | None = None) -> mx.array:
    """RMS norm over the last axis. weights: from `rooted`, any shape that x broadcasts to; None: without."""
    if metal_available():
        y = mx.fast.rms_norm(x, None, eps)
        return y if weights is None else y * weights
    size = x.shape[-1]
    return islands.normed(x, _square_sum(x), number(size * eps), _rooted_ones(size) if weights is None else weights)


def rooted(weights: mx.array) -> mx.array:
    """Norms' weights as `rms_norm` takes them on this device: on a CPU times sqrt(size), see RMSNorm."""
    return weights if metal_available() else weights * weights.shape[-1] ** 0.5


@cache
def _rooted_ones(size: int) -> mx.array:
    return mx.array([size**0.5] * size)


def _square_sum(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True)


class RMSNorm(Settled):
    """RMS norm over the last axis; Gemma 4 multiplies by `weight` itself, not by 1 + weight.

    On a CPU mx.fast has no kernels but chains of primitives. So there the elementwise work after the sum is one island:
    x * rsqrt(mean(x^2) + eps) = x * rsqrt(sum(x^2) + n eps) * sqrt(n), with sqrt(n) kept in the weight.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = mx.ones((size,))
        self.derive()

    def derive(self) -> None:
        self._size_eps = number(self.weight.size * self.eps)
        self._rooted = rooted(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        if metal_available():
            return mx.fast.rms_norm(x, self.weight, self.eps)
        return islands.normed(x, _square_sum(x), self._size_eps, self._rooted)

    def add(self, residual: mx.array, x: mx.array, scale: mx.array) -> mx.array:
        """(residual + norm(x)) * scale: how a sub-layer's output joins the stream."""
        if metal_available():
            return (residual + mx.fast.rms_norm(x, self.weight, self.eps)) * scale
        return islands.normed_sum(residual, x, _square_sum(x), self._size_eps, self._rooted, scale)


class Rope:
    """Rotary embedding of one layer kind, in the half-split layout."""

    def __init__(self, spec: RopeSpec):
        self.spec = spec
        half = spec.head_dim // 2
        exponents = mx.arange(0, 2 * spec.pairs, 2, dtype=mx.float32) / spec.head_dim
        still = half - spec.pairs
        frequencies = mx.concatenate([mx.power(spec.theta, -exponents), mx.zeros((still,))])
        self.frequencies = mx.concatenate([frequencies, frequencies])  # of both halves
        self.signs = mx.repeat(mx.array([-1.0, 1.0]), half)
        # mx.fast.rope takes periods; an infinite one does not turn.
        self.periods = mx.concatenate([mx.power(spec.theta, exponents), mx.full((still,), mx.inf)])
        mx.eval(self.frequencies, self.signs, self.periods)

    def at(self, positions: mx.array) -> Rotation | FastRotation:
        """positions: [B, T], consecutive along T. Made once a forward and shared by the layers of the kind."""
        return FastRotation(self, positions[:, 0]) if metal_available() else Rotation(self, positions)


class FastRotation:
    """One kernel for a rotation (Metal)."""

    def __init__(self, rope: Rope, offset: mx.array):
        self.rope, self.offset = rope, offset

    def __call__(self, x: mx.array, weight: mx.array, swapped_weight: mx.array) -> mx.array:
        """Turns x * weight. x: [B, heads, T, head_dim]; weight: [heads, 1, head_dim], and with its halves swapped."""
        dims, periods = self.rope.spec.head_dim, self.rope.periods
        x = x * weight
        return mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=self.offset, freqs=periods)


class Rotation:
    """The same from a table (elsewhere, where mx.fast.rope recomputes sines for every call)."""

    def __init__(self, rope: Rope, positions: mx.array):
        self.cos, self.sin = islands.angles(positions[:, None, :, None], rope.frequencies, rope.signs)  # [B, 1, T, D]

    def __call__(self, x: mx.array, weight: mx.array, swapped_weight: mx.array) -> mx.array:
        """As FastRotation."""
        return islands.turned(x, swap_halves(x), weight, swapped_weight, self.cos, self.sin)


def swap_halves(x: mx.array) -> mx.array:
    """[..., a | b] -> [..., b | a]."""
    return mx.roll(x, x.shape[-1] // 2, axis=-1)


class Attention(Settled):
    """Attention that owns K/V, or only queries and reads another layer's (KV sharing in E2B/E4B, every drafter layer).

    Attention scale is 1; Q and K are normed, then rotated; V is normed without a weight. With `v_is_k` V is the raw K
    projection, before norm and rotation. (transformers, modeling_gemma4.Gemma4TextAttention)
    """

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float):
        super().__init__()
        kv, dim = spec.kv, spec.kv.head_dim
        self.spec, self.eps = spec, eps
        linears = {"q_proj": Linear(hidden_size, spec.heads * dim)}
        self.q_norm = RMSNorm(dim, eps)
        if spec.owns_kv:
            self.k_norm = RMSNorm(dim, eps)
            linears["k_proj"] = Linear(hidden_size, kv.kv_heads * dim)
            if not spec.v_is_k:
                linears["v_proj"] = Linear(hidden_size, kv.kv_heads * dim)
        self.qkv = Stack(**linears)
        self.o_proj = Linear(spec.heads * dim, hidden_size)
        self.derive()

    def derive(self) -> None:
        """One weight for the norms of all query and key heads, [heads, 1, head_dim]."""
        norms = mx.broadcast_to(self.q_norm.weight, (self.spec.heads, 1, self.spec.kv.head_dim))
        if self.spec.owns_kv:
            keys = mx.broadcast_to(self.k_norm.weight, (self.spec.kv.kv_heads, 1, self.spec.kv.head_dim))
            norms = mx.concatenate([norms, keys], axis=0)
        self._norms, self._swapped_norms = norms, swap_halves(norms)

    def __call__(
        self, x: mx.array, span: Span, rotate: Rotation | FastRotation, narrow: Narrow | None = None
    ) -> mx.array:
        """x: [N, hidden], the tokens of the span -> [N, hidden], or [B, hidden] of those that `narrow` picks."""
        spec, (B, T) = self.spec, span.positions.shape
        heads = _split_heads(span.spread(self.qkv(x)), B, T, spec.kv.head_dim)  # [B, q + k + v heads, T, D]
        heads = rms_norm(heads, self.eps)  # one norm and one rotation for all heads
        if spec.owns_kv:
            if spec.v_is_k:
                values = heads[:, spec.heads :]  # the raw keys, normed without a weight
            else:
                heads, values = mx.split(heads, [self._norms.shape[0]], axis=1)
            queries, keys = mx.split(rotate(heads, self._norms, self._swapped_norms), [spec.heads], axis=1)
            span.write(spec.kv_layer, keys, values)
        else:
            queries = rotate(heads, self._norms, self._swapped_norms)
        if narrow is not None:
            span, queries = narrow, narrow.picked(queries)
        return self.o_proj(span.pack(_join_heads(span.attend(spec.kv_layer, queries))))


def _split_heads(x: mx.array, rows: int, tokens: int, head_dim: int) -> mx.array:
    """[rows * tokens, heads * head_dim] -> [rows, heads, tokens, head_dim]."""
    if tokens == 1:  # the same memory, two primitives fewer
        return x.reshape(rows, -1, 1, head_dim)
    return x.reshape(rows, tokens, -1, head_dim).swapaxes(1, 2)


def _join_heads(x: mx.array) -> mx.array:
    """[rows, heads, tokens, head_dim] -> [rows * tokens, heads * head_dim]."""
    rows, heads, tokens, head_dim = x.shape
    return (x if tokens == 1 else x.swapaxes(1, 2)).reshape(rows * tokens, heads * head_dim)


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gate_up = Stack(gate_proj=Linear(hidden_size, size), up_proj=Linear(hidden_size, size))
        self.down_proj = Linear(size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(islands.geglu(*mx.split(self.gate_up(x), 2, axis=-1)))
