"""Layers and routing against plain formulas; on a Mac (`-m metal`) the same bodies run MLX's kernels."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_gemma_mtp.machine.device import Kind, kind
from mlx_gemma_mtp.models import layers, moe
from mlx_gemma_mtp.models.config import MoESpec, RopeSpec
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.ops import fused
from mlx_gemma_mtp.ops.attention import additive_mask, attention, attention_mask, attention_reference
from mlx_gemma_mtp.ops.expert_paths import ExpertPath

ON_CPU = kind() is Kind.CPU
CLOSE = 2e-6 if ON_CPU else 1e-3


@pytest.fixture(params=[pytest.param("here"), pytest.param("metal", marks=pytest.mark.metal)], autouse=True)
def device(request):
    """The default device of this machine; under the marker `metal` it must be a GPU."""
    if request.param == "metal" and ON_CPU:
        pytest.skip("no GPU here")


def normal(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


def close(ours: mx.array, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(ours), theirs, atol=CLOSE * max(1, np.abs(theirs).max()), rtol=0)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 3, 4, 24)])
def test_norms(shape):
    norm = layers.RMSNorm(24, 1e-6)
    norm.weight = normal(24)
    finish_loading(norm)
    x, residual, scale = normal(*shape), normal(*shape) + 1, mx.array([0.3])
    close(layers.rms_norm(x, 1e-6, fused.number(x.shape[-1] * 1e-6)), rms(np.array(x)))
    close(norm(x), rms(np.array(x)) * np.array(norm.weight))
    close(norm.add(residual, x, scale), (np.array(residual) + rms(np.array(x)) * np.array(norm.weight)) * 0.3)


def test_geglu():
    gate, up = normal(7, 20) * 4, normal(7, 20)
    x = np.array(gate)
    close(fused.geglu(gate, up), x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * np.array(up))


def test_geglu_far_from_zero():
    """No overflow: far below zero nothing passes, far above all does."""
    gate = mx.array([-3e4, -40.0, -12.0, 0.0, 12.0, 40.0, 3e4])
    close(fused.geglu(gate, mx.full(gate.shape, 2.0)), 2 * np.maximum(np.array(gate), 0))


@pytest.mark.parametrize("spec", [RopeSpec(1e4, 8, 16), RopeSpec(1e6, 4, 32)], ids=["default", "proportional"])
def test_rotation(spec):
    """Pair i turns by position * theta ** (-2 i / head_dim); pairs past `pairs` stay; each row at its own position."""
    x, weight = normal(2, 3, 4, spec.head_dim), normal(3, 1, spec.head_dim)
    positions = np.array([[5, 6, 7, 8], [200, 201, 202, 203]])
    half = spec.head_dim // 2
    angles = positions[:, None, :, None] * spec.theta ** (-2 * np.arange(half) / spec.head_dim)
    angles = np.where(np.arange(half) < spec.pairs, angles, 0.0)
    a, b = np.split(np.array(x) * np.array(weight), 2, axis=-1)
    want = np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)
    for rotation in (layers.Rotation(spec), layers.FastRotation(spec)):
        turned = rotation.rotate(x, weight, layers.swap_halves(weight), *rotation.tables(mx.array(positions)))
        np.testing.assert_allclose(np.array(turned), want, atol=1e-4 if ON_CPU else 1e-3)


@pytest.mark.parametrize("tokens", [1, 4])
def test_attention(tokens):
    """Against a loop over rows, heads and queries."""
    q, k, v = normal(2, 6, tokens, 8), normal(2, 3, 11, 8), normal(2, 3, 11, 8)
    seen = np.random.default_rng(0).random((2, 1, tokens, 11)) < 0.5
    seen[..., 4] = True
    want = np.zeros(q.shape)
    for b, h, t in np.ndindex(2, 6, tokens):
        scores = np.where(seen[b, 0, t], np.array(k)[b, h // 2] @ np.array(q)[b, h, t], -np.inf)
        weights = np.exp(scores - scores.max())
        want[b, h, t] = weights / weights.sum() @ np.array(v)[b, h // 2]
    close(attention(q, k, v, attention_mask(mx.array(seen), 6, 3)), want)
    close(attention_reference(q, k, v, additive_mask(mx.array(seen), 6, 3)), want)


def test_routing():
    logits, scale = normal(9, 12), normal(12)
    experts, weights = moe.route(logits, 4, scale)
    for row in range(9):
        raw = np.array(logits)[row]
        p = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
        best = np.argsort(-p)[:4]
        found = np.array(experts)[row]
        assert sorted(found.tolist()) == sorted(best.tolist())
        want = p[found] / p[found].sum() * np.array(scale)[found]
        np.testing.assert_allclose(np.array(weights)[row], want, atol=1e-6)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_experts_are_a_loop_over_pairs(tokens, bits):
    """Also above the 64 pairs from which on they are sorted; float and quantised."""
    experts = moe.Experts(64, MoESpec(8, 3, 32))
    nn.quantize(experts, 32, bits) if bits else None
    finish_loading(experts)
    glu = experts.switch_glu

    def matrices(linear: nn.Module) -> np.ndarray:
        if "scales" not in linear:
            return np.array(linear.weight)
        return np.array(mx.dequantize(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits))

    gate_up, down = matrices(next(iter(glu.gate_up.values()))), matrices(glu.down_proj)
    x = normal(tokens, 64)
    chosen, weights = moe.route(normal(tokens, 8), 3, mx.ones(8))
    want = np.zeros((tokens, 64))
    for t in range(tokens):
        for e, w in zip(np.array(chosen)[t], np.array(weights)[t], strict=True):
            inner = gate_up[e] @ np.array(x)[t]
            want[t] += w * (down[e] @ np.array(fused.geglu(*mx.split(mx.array(inner), 2))))
    atol = 1e-5 if ON_CPU else 1e-3
    np.testing.assert_allclose(np.array(experts(x, chosen, weights)), want, atol=atol)
    if bits is None:
        np.testing.assert_allclose(np.array(experts.run(ExpertPath.TILED, x, chosen, weights)), want, atol=atol)


def test_many_positions_have_the_bits_of_few():
    """Each cosine is computed once there, and copied where it stands again; those that never turn are 1 and 0."""
    for spec in (RopeSpec(10000.0, 8, 16), RopeSpec(1e6, 4, 32)):
        rope, positions = layers.Rotation(spec), mx.arange(700, 700 + 2 * layers.FEWEST)[:, None]
        many = rope.tables(positions)
        few = [rope.tables(part) for part in mx.split(positions, 2 * layers.FEWEST)]
        for whole, *parts in zip(many, *few, strict=True):
            assert mx.array_equal(whole, mx.concatenate(parts)).item()
