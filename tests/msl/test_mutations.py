"""The kernel tests can fail: one small break of the Metal text at a time, and what notices it."""

import mlx.core as mx
import pytest
from cases import AFFINE, EXPERTS, FLOAT, Layer, routes
from emulator import KernelFault

from mlx_gemma_mtp import kernels
from mlx_gemma_mtp.kernels import Kernel, grouping

AFFINE_BREAKS = [
    ("expert_gate_up", "rows[2 * c] + static_cast<uint>(SIZE)", "rows[2 * c] + static_cast<uint>(SIZE - 1)"),
    ("expert_gate_up", "pairs[r] / static_cast<uint>(TOP_K)", "pairs[r] % static_cast<uint>(TOP_K)"),
    ("expert_gate_up", "exp(-turn)", "exp(turn)"),
    ("expert_gate_up", "order[start + r]", "order[start]"),
    ("expert_gate_up", "lane == 0 && c < columns", "lane == 0"),
    ("expert_gate_up", "(1u << BITS) - 1u", "(1u << BITS) - 2u"),
    ("expert_gate_up", "first / GS]);\n            bias", "first / GS + 1]);\n            bias"),
    ("expert_down", "start + BLOCK <= K", "start + BLOCK < K - BLOCK"),
    ("expert_down", "simd_sum(part)", "part"),
    ("expert_down", "g += SIMDGROUPS", "g += SIMDGROUPS + 1"),
    ("expert_down", "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    ("expert_down", "* scale[pair]", "* scale[token]"),
    ("expert_down", "total * bias[c]", "bias[c]"),
]
FLOAT_BREAKS = [
    ("expert_gate_up", "step > 0", "step > 1"),
    ("expert_gate_up", "words[c][i] * value[i]", "words[c][0] * value[i]"),
    ("expert_down", "K - first)", "K - first - 1)"),
]
GROUPING_BREAKS = [
    ("expert_groups", "start + done", "start"),
    ("expert_groups", "held[before] + ROWS - 1", "held[before] + ROWS"),
    ("expert_groups", "start += 1;", "start += 2;"),
    ("expert_groups", "rest < 3 * most", "rest < 3 * most - 1"),
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
    ("form", "kernel", "text", "broken"),
    [(form, *one) for form, some in ((AFFINE, AFFINE_BREAKS + GROUPING_BREAKS), (FLOAT, FLOAT_BREAKS)) for one in some],
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
