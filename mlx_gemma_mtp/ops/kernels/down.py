"""down of the chosen experts, times the route weights, added up for each token in the order of its slots."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from . import Kernel, checked, difference, why_off
from .grouping import Groups, group
from .products import BF16_CLOSE, SIMD, Weights, arrays, example, gather_reference, specialised, supported, template

COLUMNS = 4
SIMDGROUPS = 8
CAPACITIES = (64, 256, 1024)  # pairs that a threadgroup keeps, COLUMNS values each; a kernel is compiled for each


def combine(products: mx.array, weights: mx.array) -> mx.array:
    """Returns each token's mixture of its experts' outputs, [N, out], added up in the order of the slots.

    products: [N, k, out] of the chosen experts; weights: float32 [N, k]. (MLX's sum over a middle axis goes through it
    in order; a test holds it to that.)
    """
    return (products * weights[..., None]).sum(axis=1).astype(products.dtype)


def down_reference(inner: mx.array, weights: Weights, experts: mx.array, scale: mx.array) -> mx.array:
    """Returns each token's mixture of its experts' down products, [N, out], computed in float32 and rounded where
    separate products round.

    inner: [N k, K], a row for each pair; weights: [E, out, K]; experts: [N, k]; scale: float32 [N, k].
    """
    rows = mx.arange(experts.size, dtype=mx.uint32)
    products = gather_reference(inner, weights, rows, experts.reshape(-1)).astype(inner.dtype)
    return combine(products.reshape(*experts.shape, -1), scale)


# A threadgroup for each COLUMNS outputs: its SIMD-groups take the groups of rows in turn and leave every pair's product
# in threadgroup memory, so that one launch reads each expert once and still adds in the order of the slots.
SOURCE = """
    threadgroup T products_of[PAIRS * COLUMNS];
    int lane = static_cast<int>(thread_index_in_simdgroup);
    int first = static_cast<int>(threadgroup_position_in_grid.x) * COLUMNS;
    int columns = SIZE % COLUMNS == 0 ? COLUMNS : metal::min(COLUMNS, SIZE - first);
    for (int g = static_cast<int>(simdgroup_index_in_threadgroup); g < table_shape[0]; g += SIMDGROUPS) {
        int expert = table[3 * g];
        int start = table[3 * g + 1];
        int count = table[3 * g + 2];
        if (count == 0) {
            break;
        }
        uint rows[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) {
            rows[c] = static_cast<uint>(expert * SIZE + first + c);
        }
        uint pairs[ROWS];
        float sums[COLUMNS * ROWS];
        for (int r = 0; r < ROWS; r++) {
            pairs[r] = r < count ? order[start + r] : 0u;
            for (int c = 0; c < COLUMNS; c++) {
                sums[c * ROWS + r] = 0.0f;
            }
        }
        products<FORM, COLUMNS, ROWS>(WEIGHTS, inner, rows, columns, pairs, count, lane, sums);
        for (int r = 0; r < ROWS; r++) {
            if (r < count) {
                for (int c = 0; c < COLUMNS; c++) {
                    float product = total<32>(sums[c * ROWS + r]);
                    if (lane == 0) {
                        products_of[pairs[r] * COLUMNS + c] = static_cast<T>(product);
                    }
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int tokens = static_cast<int>(order_shape[0]) / TOP_K;
    for (int i = static_cast<int>(thread_index_in_threadgroup); i < tokens * COLUMNS; i += 32 * SIMDGROUPS) {
        int token = i / COLUMNS;
        int c = i % COLUMNS;
        if (c < columns) {
            float sum = 0.0f;
            for (int k = 0; k < TOP_K; k++) {
                int pair = token * TOP_K + k;
                sum += static_cast<float>(products_of[pair * COLUMNS + c]) * scale[pair];
            }
            combined[size_t(token) * SIZE + first + c] = static_cast<T>(sum);
        }
    }
"""


@cache
def kernel(quantised: bool) -> Kernel:
    source, names, header = specialised(SOURCE, quantised)
    return Kernel("expert_down", ("inner", *names, "order", "table", "scale"), ("combined",), source, header)


def down_metal(inner: mx.array, weights: Weights, experts: mx.array, scale: mx.array, groups: Groups) -> mx.array:
    """Returns what `down_reference` does, [N, out], by one launch of the kernel. groups: of `experts`, which are at
    most CAPACITIES[-1] pairs.
    """
    size, (tokens, top_k) = weights.outputs, experts.shape
    capacity = next(pairs for pairs in CAPACITIES if pairs >= experts.size)
    shape = [("SIZE", size), ("TOP_K", top_k), ("PAIRS", capacity)]
    launch = [("ROWS", groups.rows), ("COLUMNS", COLUMNS), ("SIMDGROUPS", SIMDGROUPS)]
    threads = SIMD * SIMDGROUPS
    (combined,) = kernel(weights.scales is not None)(
        inputs=[inner, *arrays(weights), groups.order, groups.table, scale],
        template=[*template(weights, inner.dtype), *shape, *launch],
        grid=(threads * -(-size // COLUMNS), 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(tokens, size)],
        output_dtypes=[inner.dtype],
    )
    return combined


def down(inner: mx.array, weights: Weights, experts: mx.array, scale: mx.array, groups: Groups) -> mx.array:
    """Returns each token's mixture of its experts' down products, [N, out].

    inner: [N k, K], a row for each pair; weights: [E, out, K]; experts: [N, k]; scale: float32 [N, k].
    """
    if usable(weights, inner.dtype, experts.size):
        return down_metal(inner, weights, experts, scale, groups)
    return down_reference(inner, weights, experts, scale)


def usable(weights: Weights, dtype: mx.Dtype, pairs: int) -> bool:
    """Returns whether the kernel runs for this format and so many pairs; otherwise the reference does."""
    return why_off("down") is None and pairs <= CAPACITIES[-1] and supported(weights, dtype)


@checked
def self_check() -> str | None:
    """Returns None, or where the kernel differs from the reference, at 4 bits, 8 bits and bfloat16."""
    for bits in (4, 8, 0):
        x, weights, experts = example(bits, outputs=43, inputs=320)
        inner = mx.repeat(x, experts.shape[1], axis=0)
        scale = mx.softmax(inner[:, 0].astype(mx.float32).reshape(experts.shape), axis=-1, precise=True)
        ours = down_metal(inner, weights, experts, scale, group(experts.reshape(-1), weights.weight.shape[0]))
        if error := difference(ours, down_reference(inner, weights, experts, scale), BF16_CLOSE):
            return f"{bits or 16}-bit weights: {error}"
    return None
