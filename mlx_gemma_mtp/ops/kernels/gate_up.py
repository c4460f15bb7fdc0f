"""gate and up of the chosen experts and the GeGLU between them, each expert's weights read once for a group of rows."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ..fused import geglu
from . import Kernel, checked, difference, why_off
from .grouping import Groups, group
from .products import BF16_CLOSE, SIMD, Weights, arrays, example, gather_reference, specialised, supported, template

COLUMNS = 2  # of gate and as many of up: four weight rows in registers, as many as gather_qmv holds
SIMDGROUPS = 2


def gate_up_reference(x: mx.array, weights: Weights, experts: mx.array) -> mx.array:
    """Returns geglu(gate(x), up(x)) for every pair, [N k, size] in the order of the pairs, computed in float32 and
    rounded where separate products round.

    x: [N, K]; weights: [E, 2 size, K], gate above up; experts: [N, k].
    """
    rows = mx.arange(experts.size, dtype=mx.uint32) // experts.shape[1]
    both = gather_reference(x, weights, rows, experts.reshape(-1)).astype(x.dtype)
    return geglu(*mx.split(both, 2, axis=-1))


# A SIMD-group for each group of rows and COLUMNS outputs; the group's weight rows are gate, up, gate, up.
SOURCE = """
    int lane = static_cast<int>(thread_index_in_simdgroup);
    int place = static_cast<int>(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
    int expert = table[3 * threadgroup_position_in_grid.y];
    int start = table[3 * threadgroup_position_in_grid.y + 1];
    int count = table[3 * threadgroup_position_in_grid.y + 2];
    int first = place * COLUMNS;
    if (count == 0 || first >= SIZE) {
        return;
    }
    int columns = SIZE % COLUMNS == 0 ? COLUMNS : metal::min(COLUMNS, SIZE - first);
    uint rows[2 * COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        rows[2 * c] = static_cast<uint>(expert * 2 * SIZE + first + c);
        rows[2 * c + 1] = rows[2 * c] + static_cast<uint>(SIZE);
    }
    uint pairs[ROWS];
    uint tokens[ROWS];
    float sums[2 * COLUMNS * ROWS];
    for (int r = 0; r < ROWS; r++) {
        pairs[r] = r < count ? order[start + r] : 0u;
        tokens[r] = pairs[r] / static_cast<uint>(TOP_K);
        for (int c = 0; c < 2 * COLUMNS; c++) {
            sums[c * ROWS + r] = 0.0f;
        }
    }
    products<FORM, 2 * COLUMNS, ROWS>(WEIGHTS, x, rows, 2 * columns, tokens, count, lane, sums);
    for (int r = 0; r < ROWS; r++) {
        if (r < count) {
            for (int c = 0; c < COLUMNS; c++) {
                float gate = static_cast<float>(static_cast<T>(total<32>(sums[2 * c * ROWS + r])));
                float up = static_cast<float>(static_cast<T>(total<32>(sums[(2 * c + 1) * ROWS + r])));
                float slope = 1.5957691216057308f;
                float turn = (gate * gate * (0.044715f * slope) + slope) * gate;
                if (lane == 0 && c < columns) {
                    inner[size_t(pairs[r]) * SIZE + first + c] =
                        static_cast<T>(gate * up / (1.0f + metal::precise::exp(-turn)));
                }
            }
        }
    }
"""


@cache
def kernel(quantised: bool) -> Kernel:
    source, names, header = specialised(SOURCE, quantised)
    return Kernel("expert_gate_up", ("x", *names, "order", "table"), ("inner",), source, header)


def gate_up_metal(x: mx.array, weights: Weights, experts: mx.array, groups: Groups) -> mx.array:
    """Returns what `gate_up_reference` does, [N k, size], by one launch of the kernel. groups: of `experts`."""
    size = weights.outputs // 2
    shape = [("SIZE", size), ("TOP_K", experts.shape[1])]
    launch = [("ROWS", groups.rows), ("COLUMNS", COLUMNS), ("SIMDGROUPS", SIMDGROUPS)]
    threads = SIMD * SIMDGROUPS
    (inner,) = kernel(weights.scales is not None)(
        inputs=[x, *arrays(weights), groups.order, groups.table],
        template=[*template(weights, x.dtype), *shape, *launch],
        grid=(threads * -(-size // (COLUMNS * SIMDGROUPS)), groups.table.shape[0], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(experts.size, size)],
        output_dtypes=[x.dtype],
    )
    return inner


def gate_up(x: mx.array, weights: Weights, experts: mx.array, groups: Groups) -> mx.array:
    """Returns geglu(gate(x), up(x)) for every pair, [N k, size] in the order of the pairs.

    x: [N, K]; weights: [E, 2 size, K], gate above up; experts: [N, k]; groups: of `experts`.
    """
    if usable(weights, x.dtype):
        return gate_up_metal(x, weights, experts, groups)
    return gate_up_reference(x, weights, experts)


def usable(weights: Weights, dtype: mx.Dtype) -> bool:
    """Returns whether the kernel runs for this format; otherwise the reference does."""
    return why_off("gate_up") is None and supported(weights, dtype)


@checked
def self_check() -> str | None:
    """Returns None, or where the kernel differs from the reference, at 4 bits, 8 bits and bfloat16."""
    for bits in (4, 8, 0):
        x, weights, experts = example(bits, outputs=2 * 21, inputs=320)
        ours = gate_up_metal(x, weights, experts, group(experts.reshape(-1), weights.weight.shape[0]))
        if error := difference(ours, gate_up_reference(x, weights, experts), BF16_CLOSE):
            return f"{bits or 16}-bit weights: {error}"
    return None
