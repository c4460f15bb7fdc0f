"""Norms, rotary embedding, linears, attention, gated MLP: what target and drafter are both made of."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from .cache import Span
from .config import LayerSpec, RopeSpec
from .kernels import metal_available


def rms_norm(x: mx.array, eps: float, weight: mx.array | None = None) -> mx.array:
    """RMS norm over the last axis; Gemma 4 multiplies by `weight` itself, not by 1 + weight."""
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def _geglu_compiled(gate: mx.array, up: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * up


def geglu(gate_up: mx.array) -> mx.array:
    """[..., 2 I] (gate half first) -> gelu_tanh(gate) * up, [..., I]."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    # On the CPU a compiled island costs a second of g++ and saves nothing.
    return _geglu_compiled(gate, up) if metal_available() else nn.gelu_approx(gate) * up


class Fused(nn.Module):
    """A module that computes with something derived from its weights."""

    def fuse(self) -> None:
        """Derives it anew; `fuse(model)` calls this once weights are loaded."""
        raise NotImplementedError


class Stack(Fused):
    """Linears that read one input; the output is their outputs side by side.

    `fuse` merges neighbours of one format into a single product (exact: output rows are independent), so that q/k/v or
    gate/up cost one launch. The children keep the names of the checkpoint.
    """

    def __init__(self, **linears: nn.Module):
        super().__init__()
        for name, linear in linears.items():
            self[name] = linear

    def __call__(self, x: mx.array, *args: mx.array | bool) -> mx.array:
        outputs = [linear(x, *args) for linear in self.values()]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def fuse(self) -> None:
        groups: list[tuple[str, nn.Module]] = []
        for name, linear in list(self.items()):
            if groups and _format(groups[-1][1]) == _format(linear):
                previous, first = groups[-1]
                merged = {
                    key: mx.concatenate([first[key], linear[key]], axis=first[key].ndim - 2)
                    for key in first.parameters()
                }
                first.update(merged)
                groups[-1] = (f"{previous}_{name}", first)
            else:
                groups.append((name, linear))
        self.clear()
        for name, linear in groups:
            self[name] = linear


def _format(linear: nn.Module) -> tuple:
    """Two linears with equal formats can be one: the class, its quantisation, its dtypes."""
    quantised = "scales" in linear
    numbers = (linear.group_size, linear.bits, linear.mode) if quantised else ()
    return (type(linear), *numbers, *(value.dtype for value in linear.parameters().values()))


def fuse(part: nn.Module) -> None:
    """After weights were loaded: merges what can be one product, and derives what follows from weights alone."""
    for module in part.modules():
        if isinstance(module, Fused):
            module.fuse()


class Rope:
    """Rotary embedding of one layer kind, in the half-split layout."""

    def __init__(self, spec: RopeSpec):
        self.spec = spec
        half = spec.head_dim // 2
        exponents = mx.arange(0, 2 * spec.pairs, 2, dtype=mx.float32) / spec.head_dim
        still = half - spec.pairs
        self.frequencies = mx.concatenate([mx.power(spec.theta, -exponents), mx.zeros((still,))])
        # mx.fast.rope takes periods; an infinite one does not turn.
        self.periods = mx.concatenate([mx.power(spec.theta, exponents), mx.full((still,), mx.inf)])
        mx.eval(self.frequencies, self.periods)

    def at(self, positions: mx.array) -> Rotation | FastRotation:
        """positions: [B, T], consecutive along T. Made once a forward and shared by the layers of the kind."""
        return FastRotation(self, positions[:, 0]) if metal_available() else Rotation(self, positions)


class FastRotation:
    """One kernel for a rotation (Metal)."""

    def __init__(self, rope: Rope, offset: mx.array):
        self.rope, self.offset = rope, offset

    def __call__(self, x: mx.array) -> mx.array:
        """x: [B, heads, T, head_dim]."""
        dims, periods = self.rope.spec.head_dim, self.rope.periods
        return mx.fast.rope(x, dims, traditional=False, base=None, scale=1.0, offset=self.offset, freqs=periods)


class Rotation:
    """The same from a table (elsewhere, where mx.fast.rope recomputes sines for every call)."""

    def __init__(self, rope: Rope, positions: mx.array):
        angles = positions[:, None, :, None].astype(mx.float32) * rope.frequencies  # [B, 1, T, D/2]
        cos, sin = mx.cos(angles), mx.sin(angles)
        self.half = rope.spec.head_dim // 2
        self.cos = mx.concatenate([cos, cos], axis=-1)
        self.sin = mx.concatenate([-sin, sin], axis=-1)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [B, heads, T, head_dim]."""
        turned = x * self.cos + mx.roll(x, self.half, axis=-1) * self.sin
        return turned.astype(x.dtype)


class Attention(Fused):
    """Attention that owns K/V, or only queries and reads another layer's (KV sharing in E2B/E4B, every drafter layer).

    Attention scale is 1; Q and K are normed, then rotated; V is normed without a weight. With `v_is_k` V is the raw K
    projection, before norm and rotation. (transformers, modeling_gemma4.Gemma4TextAttention)
    """

    def __init__(self, spec: LayerSpec, hidden_size: int, eps: float):
        super().__init__()
        kv, dim = spec.kv, spec.kv.head_dim
        self.spec, self.eps = spec, eps
        linears = {"q_proj": nn.Linear(hidden_size, spec.heads * dim, bias=False)}
        self.q_norm = nn.RMSNorm(dim, eps)
        if spec.owns_kv:
            self.k_norm = nn.RMSNorm(dim, eps)
            linears["k_proj"] = nn.Linear(hidden_size, kv.kv_heads * dim, bias=False)
            if not spec.v_is_k:
                linears["v_proj"] = nn.Linear(hidden_size, kv.kv_heads * dim, bias=False)
        self.qkv = Stack(**linears)
        self.o_proj = nn.Linear(spec.heads * dim, hidden_size, bias=False)
        self.fuse()

    def fuse(self) -> None:
        """One weight for the norms of all query and key heads, [heads, 1, head_dim]."""
        norms = mx.broadcast_to(self.q_norm.weight, (self.spec.heads, 1, self.spec.kv.head_dim))
        if self.spec.owns_kv:
            keys = mx.broadcast_to(self.k_norm.weight, (self.spec.kv.kv_heads, 1, self.spec.kv.head_dim))
            norms = mx.concatenate([norms, keys], axis=0)
        self._norms = norms

    def __call__(self, x: mx.array, span: Span, rotate: Rotation | FastRotation) -> mx.array:
        """x: [B, T, hidden] -> [B, T, hidden]."""
        spec, (B, T, _) = self.spec, x.shape
        heads = self.qkv(x).reshape(B, T, -1, spec.kv.head_dim).transpose(0, 2, 1, 3)  # [B, q + k + v heads, T, D]
        heads = rms_norm(heads, self.eps)  # one norm and one rotation for all heads
        queries = rotate(heads[:, : self._norms.shape[0]] * self._norms)
        if spec.owns_kv:
            queries, keys = queries[:, : spec.heads], queries[:, spec.heads :]
            values = heads[:, -spec.kv.kv_heads :]  # with v_is_k these are the raw keys, normed without a weight
            span.write(spec.kv_layer, keys, values)
        out = span.attend(spec.kv_layer, queries)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gate_up = Stack(
            gate_proj=nn.Linear(hidden_size, size, bias=False), up_proj=nn.Linear(hidden_size, size, bias=False)
        )
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_up(x)))
