"""The kernel tests can fail: one small break of the Metal text at a time, and what notices it."""

import mlx.core as mx
import pytest
from cases import AFFINE, EXPERTS, FLOAT, Layer, routes
from emulator import KernelFault

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel, grouping

GATE_UP, DOWN, GROUPS = "expert_gate_up", "expert_down", "expert_groups"
BREAKS = [
    (AFFINE, GATE_UP, "rows[2 * c] + static_cast<uint>(SIZE)", "rows[2 * c] + static_cast<uint>(SIZE - 1)"),
    (AFFINE, GATE_UP, "lane == 0 && c < columns", "lane == 0"),
    (AFFINE, GATE_UP, "(1u << BITS) - 1u", "(1u << BITS) - 2u"),
    (AFFINE, GATE_UP, "first / GS]);\n            bias", "first / GS + 1]);\n            bias"),
    (AFFINE, DOWN, "g += SIMDGROUPS", "g += SIMDGROUPS + 1"),
    (AFFINE, DOWN, "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    (AFFINE, DOWN, "* scale[pair]", "* scale[token]"),
    (AFFINE, GROUPS, "start + done", "start"),
    (AFFINE, GROUPS, "rest < 3 * most", "rest < 3 * most - 1"),
    (FLOAT, DOWN, "K - first)", "K - first - 1)"),
]
MORE = [
    (AFFINE, GATE_UP, "pairs[r] / static_cast<uint>(TOP_K)", "pairs[r] % static_cast<uint>(TOP_K)"),
    (AFFINE, GATE_UP, "exp(-turn)", "exp(turn)"),
    (AFFINE, GATE_UP, "order[start + r]", "order[start]"),
    (AFFINE, DOWN, "start + BLOCK <= K", "start + BLOCK < K - BLOCK"),
    (AFFINE, DOWN, "simd_sum(part)", "part"),
    (AFFINE, DOWN, "total * bias[c]", "bias[c]"),
    (AFFINE, GROUPS, "held[before] + ROWS - 1", "held[before] + ROWS"),
    (AFFINE, GROUPS, "start += 1;", "start += 2;"),
    (FLOAT, GATE_UP, "step > 0", "step > 1"),
    (FLOAT, GATE_UP, "words[c][i] * value[i]", "words[c][0] * value[i]"),
]


def noticed(form, layer: Layer) -> bool:
    """Whether a fault, another value, or another value in another order shows."""
    arrays, experts = layer.inputs(8), routes(8)
    try:
        groups = grouping.group_metal(experts.reshape(-1), EXPERTS)
        results = layer.run(experts, arrays)
    except KernelFault:
        return True
    reference = grouping.group_reference(experts.reshape(-1), EXPERTS)
    if not (mx.array_equal(groups.order, reference.order) and mx.array_equal(groups.table, reference.table)):
        return True
    pairs = zip(results, layer.reference(experts, arrays), strict=True)
    return any(kernels.difference(ours, theirs, form.tolerance) is not None for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("form", "kernel", "text", "broken"), [*BREAKS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
def test_a_small_break_is_noticed(monkeypatch, emulator, form, kernel, text, broken):
    whole, layer = kernels.build, Layer(form)
    assert not noticed(form, layer)

    def build(one: Kernel):
        if one.name != kernel:
            return whole(one)
        changed = Kernel(
            one.name, one.inputs, one.outputs, one.source.replace(text, broken), one.header.replace(text, broken)
        )
        assert changed != one, "the text to break is not there"
        return whole(changed)

    monkeypatch.setattr(kernels, "build", build)
    assert noticed(form, layer)
