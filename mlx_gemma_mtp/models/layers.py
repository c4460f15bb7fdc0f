"""Norms, rotary embedding, attention, gated MLP: what target and drafter are both made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from ..machine import device
from ..ops import elementwise, fused
from ..ops.fused import number
from .config import LayerSpec, RopeSpec
from .linear import DerivedWeights, Linear, Stack

FEWEST = 64  # positions from which on copies cost less than cosines


def rms_norm(x: mx.array, eps: float, size_eps: mx.array, weights: mx.array | None = None) -> mx.array:
    """Returns the RMS norm over the last axis, in x's type.

    size_eps: number(size * eps), kept in the caller's module, so that a compiled graph gets it as an input. weights:
    from `rooted`, of any shape that x broadcasts to; None for no weight.
    """
    if device.traits().fused_norms:
        y = mx.fast.rms_norm(x, None, eps)
        return y if weights is None else (y * weights).astype(x.dtype)
    size = x.shape[-1]
    return elementwise.normed(x, _square_sum(x), size_eps, _rooted_ones(size) if weights is None else weights)


def rooted(weights: mx.array) -> mx.array:
    """Returns norms' weights as `rms_norm` takes them on this device: on a CPU they are multiplied by sqrt(size)."""
    return weights if device.traits().fused_norms else weights * weights.shape[-1] ** 0.5


@cache
def _rooted_ones(size: int) -> mx.array:
    return mx.array([size**0.5] * size)


def _square_sum(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True)


class RMSNorm(DerivedWeights):
    """RMS norm over the last axis; Gemma 4 multiplies by `weight` itself, not by 1 + weight.

    On a CPU mx.fast has no kernels but chains of primitives. So there the elementwise work after the sum is one
    compiled chain: x * rsqrt(mean(x^2) + eps) = x * rsqrt(sum(x^2) + n eps) * sqrt(n), with sqrt(n) kept in the weight.
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
        """Returns the norm of x, of its shape and type, whatever type the weight has."""
        if device.traits().fused_norms:
            return mx.fast.rms_norm(x, self.weight, self.eps).astype(x.dtype)
        return elementwise.normed(x, _square_sum(x), self._size_eps, self._rooted)

    def add(self, residual: mx.array, x: mx.array, scale: mx.array) -> mx.array:
        """Returns (residual + norm(x)) * scale in x's type: how a sub-layer's output joins the residual stream."""
        if device.traits().fused_norms:
            return ((residual + mx.fast.rms_norm(x, self.weight, self.eps)) * scale).astype(x.dtype)
        return elementwise.normed_sum(residual, x, _square_sum(x), self._size_eps, self._rooted, scale)


class FastRotation:
    """Rotary embedding of one layer kind, in the half-split layout, by MLX's kernel (on a GPU)."""

    def __init__(self, spec: RopeSpec):
        self.dims = spec.head_dim
        exponents = mx.arange(0, 2 * spec.pairs, 2, dtype=mx.float32) / spec.head_dim
        # mx.fast.rope takes periods; an infinite one does not turn.
        still = mx.full((spec.head_dim // 2 - spec.pairs,), mx.inf)
        self.periods = mx.concatenate([mx.power(spec.theta, exponents), still])
        mx.eval(self.periods)

    def tables(self, positions: mx.array) -> tuple[mx.array, ...]:
        """Returns what `rotate` needs of the positions, [B, T], consecutive along T: the first of each row. It is made
        once a forward, for all layers of the kind.
        """
        return (positions[:, 0],)

    def rotate(self, x: mx.array, weight: mx.array, swapped_weight: mx.array, offset: mx.array) -> mx.array:
        """Returns x * weight rotated, of x's shape. x: [B, heads, T, head_dim]; weight: [heads, 1, head_dim];
        swapped_weight: with its halves swapped; offset: from `tables`.
        """
        x = (x * weight).astype(x.dtype)
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods)


class Rotation:
    """Rotary embedding of one layer kind, in the half-split layout, from tables of cosines and sines (elsewhere, where
    mx.fast.rope computes them anew at every call).
    """

    def __init__(self, spec: RopeSpec):
        exponents = mx.arange(0, 2 * spec.pairs, 2, dtype=mx.float32) / spec.head_dim
        half = spec.head_dim // 2
        self.turning, self.still = mx.power(spec.theta, -exponents), mx.zeros((half - spec.pairs,))  # of one half
        self.frequencies = mx.concatenate([self.turning, self.still] * 2)
        self.signs = mx.repeat(mx.array([-1.0, 1.0]), half)
        mx.eval(self.turning, self.still, self.frequencies, self.signs)

    def tables(self, positions: mx.array) -> tuple[mx.array, ...]:
        """Returns what `rotate` needs of the positions, [B, T]: cosines and signed sines, [B, 1, T, head_dim] each. It
        is made once a forward, for all layers of the kind.

        A cosine is dear: of many positions each is computed once, and copied where it stands again.
        """
        positions = positions[:, None, :, None]
        if positions.size < FEWEST:
            return fused.angles(positions, self.frequencies, self.signs)
        cos, sin = fused.angles(positions, self.turning, number(1.0))
        ones, zeros = (mx.broadcast_to(number(each), (*cos.shape[:-1], self.still.size)) for each in (1.0, 0.0))
        return mx.concatenate([cos, ones, cos, ones], axis=-1), mx.concatenate([-sin, zeros, sin, zeros], axis=-1)

    def rotate(self, x: mx.array, weight: mx.array, swapped_weight: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Returns x * weight rotated, of x's shape. x: [B, heads, T, head_dim]; weight: [heads, 1, head_dim];
        swapped_weight: with its halves swapped; cos, sin: from `tables`.
        """
        return fused.turned(x, swap_halves(x), weight, swapped_weight, cos, sin)


@cache
def rotation(spec: RopeSpec) -> Rotation | FastRotation:
    """Returns the rotary embedding of one layer kind as this device computes it, one for all layers of the kind."""
    return FastRotation(spec) if device.traits().fused_rope else Rotation(spec)


def swap_halves(x: mx.array) -> mx.array:
    """[..., a | b] -> [..., b | a]."""
    return mx.roll(x, x.shape[-1] // 2, axis=-1)


class Attention(DerivedWeights):
    """Attention that owns K/V, or only queries and reads another layer's (KV sharing in E2B/E4B, every drafter layer).

    Attention scale is 1; Q and K are normed, then rotated; V is normed without a weight. With `v_is_k` V is the raw K
    projection, before norm and rotation. (transformers, modeling_gemma4.Gemma4TextAttention)
    """

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float):
        super().__init__()
        kv, dim = spec.kv, spec.kv.head_dim
        self.spec, self.eps, self.rotation = spec, eps, rotation(spec.rope)
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
        """Derives one weight for the norms of all query and key heads, [heads, 1, head_dim]."""
        norms = mx.broadcast_to(self.q_norm.weight, (self.spec.heads, 1, self.spec.kv.head_dim))
        if self.spec.owns_kv:
            keys = mx.broadcast_to(self.k_norm.weight, (self.spec.kv.kv_heads, 1, self.spec.kv.head_dim))
            norms = mx.concatenate([norms, keys], axis=0)
        self._norms, self._swapped_norms = norms, swap_halves(norms)
        self._size_eps = number(self.spec.kv.head_dim * self.eps)

    def project(self, x: mx.array, tables: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """Returns queries, and where the layer owns them keys and values, each [B, heads, T, head_dim].

        x: [N, hidden]. tables: from the rotation's `tables`, of the tokens' positions in B rows.
        """
        spec = self.spec
        heads = _split_heads(self.qkv(x), tables[0].shape[0], spec.kv.head_dim)  # [B, q + k + v heads, T, D]
        heads = rms_norm(heads, self.eps, self._size_eps)  # one norm and one rotation for all heads
        if not spec.owns_kv:
            return (self.rotation.rotate(heads, self._norms, self._swapped_norms, *tables),)
        if spec.v_is_k:
            values = heads[:, spec.heads :]  # the raw keys, normed without a weight
        else:
            heads, values = mx.split(heads, [self._norms.shape[0]], axis=1)
        turned = self.rotation.rotate(heads, self._norms, self._swapped_norms, *tables)
        return *mx.split(turned, [spec.heads], axis=1), values

    def join(self, attended: mx.array) -> mx.array:
        """Returns the output projection of what the heads attended to: [B, heads, T, head_dim] -> [N, hidden]."""
        return self.o_proj(_join_heads(attended))


def _split_heads(x: mx.array, rows: int, head_dim: int) -> mx.array:
    """[rows * tokens, heads * head_dim] -> [rows, heads, tokens, head_dim]."""
    tokens = x.shape[0] // rows
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
        return self.down_proj(elementwise.geglu(*mx.split(self.gate_up(x), 2, axis=-1)))
