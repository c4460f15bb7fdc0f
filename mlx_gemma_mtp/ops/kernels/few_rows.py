"""Products of few rows with a matrix of weights: every weight is read once for all of up to 16 rows, and a row has the
bits of MLX's product of that row alone.

MLX reads the weights once for five rows at most, or pads to tiles of 32, and each of its kernels adds up in another
order. So a row's bits depend there on how many rows stand beside it. Here a row is added up as MLX 0.32.4 adds up one
row on Metal (qmv, qmv_fast and qmv_quad for affine weights, gemv for floats), whatever stands beside it. `order_of`
says which of these it is; MLX's host code, which chooses, is not in its wheel. quad_sum, of quantised rows of 64 or 128
inputs, is taken to add neighbours first; no Gemma 4 has such rows. Speed: not measured on a Mac.

What a thread holds: a SIMD-group takes `columns_of` rows of weights, 4 or 2, and all rows of x. A lane reads its VALUES
neighbours of each weight row, decodes them once into registers, and multiplies them with one row of x after the other.
Its floats are COLUMNS x VALUES weights, COLUMNS x ROWS sums and VALUES inputs:

    rows of x                          1    2    4    8   16
    4 bit, K a multiple of 512        84   88   96   64   80
    4 bit, other K; 8 bit, K of 256   44   48   56   72   56
    8 bit, other K; floats            24   28   36   52   84

BUDGET is 96: an Apple GPU gives a thread 128 registers of 32 bits, and keeps fewer threads the more each takes. A
threadgroup has 2 SIMD-groups, as MLX's qmv: 64 threads, no barrier, no threadgroup memory; N = 2816 outputs are 352 to
704 of them. Floats with K >= 16 N (a router) are split over 8 SIMD-groups, as in MLX, with a barrier and at most 2 KB.
x is read anew for every COLUMNS outputs, from a cache: at 16 rows and 4 bit that is 16 to 32 bytes of x in bfloat16 for
each byte of weights, so that there loads and products, not memory, are expected to set the pace.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from . import CONSTANT, Kernel, checked, difference, why_off
from .products import AFFINE_PARTS, BF16_CLOSE, DENSE_PARTS, SIMD, Weights, arrays, example, flat, supported

ROWS = (1, 2, 4, 8, 16)  # of x that a launch holds: a kernel is compiled for each, and takes fewer, too
MOST = ROWS[-1]
SIMDGROUPS = 2
BUDGET = 96  # floats that a thread may hold


class Order(NamedTuple):
    """How a product is added up: each of `lanes` lanes of each of `split` SIMD-groups takes `values` neighbouring
    inputs, block after block; then come the lanes, then the SIMD-groups.
    """

    values: int
    lanes: int = SIMD
    split: int = 1


def order_of(weights: Weights) -> Order:
    """Returns the order in which MLX 0.32.4 adds up one row on Metal."""
    K, N, bits = weights.inputs, weights.outputs, weights.bits
    if weights.scales is None:  # gemv
        if K <= 64:
            return Order(4, lanes=4)
        return Order(4, split=8 if K >= 16 * N else 1)
    if K in (64, 128):  # qmv_quad
        return Order(K // 4, lanes=4)
    return Order(32 // bits * (2 if K % (2048 // bits) == 0 else 1))  # qmv_fast or qmv


def rows_of(count: int) -> int:
    """Returns how many rows the kernel for `count` rows holds."""
    return next(rows for rows in ROWS if rows >= count)


def columns_of(values: int, rows: int) -> int:
    """Returns how many rows of weights a SIMD-group holds, by what fits a thread's registers."""
    return 4 if 4 * (values + rows) + values <= BUDGET else 2


def few_rows_reference(x: mx.array, weights: Weights) -> mx.array:
    """Returns x weights^T of x's type, computed in float32: [M, K] -> [M, N]. (MLX's CPU adds up affine products in
    x's type.)
    """
    wide, scales, biases = x.astype(mx.float32), weights.scales, weights.biases
    if scales is None:
        return (wide @ weights.weight.astype(mx.float32).T).astype(x.dtype)
    if weights.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    form = {"group_size": weights.group_size, "bits": weights.bits, "mode": weights.mode}
    return mx.quantized_matmul(wide, weights.weight, scales, biases, transpose=True, **form).astype(x.dtype)


# block adds to sums[c * R + r] this lane's part of one block: of weight row first_row + c times row r of x, for c <
# columns and r < count. What is written in one expression is so in MLX's kernels, too: there a compiler may fuse a
# product and a sum, which rounds once.
AFFINE = (
    AFFINE_PARTS
    + """
template <typename T, int VALUES, int BITS, int GS, int C, int R>
inline void block(
        const device uint32_t* weight, const device T* scales, const device T* biases, const device T* x,
        int first_row, int columns, int count, int inputs, int first, thread float* sums) {
    constexpr int PER_WORD = 32 / BITS;
    constexpr int RUN = BITS == 4 ? 4 : 1;
    float digits[C * VALUES];
    float scale[C];
    float bias[C];
    #pragma unroll
    for (int c = 0; c < C; c++) {
        if (c < columns) {
            size_t row = first_row + c;
            #pragma unroll
            for (int i = 0; i < VALUES / PER_WORD; i++) {
                uint32_t word = weight[row * (inputs / PER_WORD) + first / PER_WORD + i];
                #pragma unroll
                for (int j = 0; j < PER_WORD; j++) {
                    digits[c * VALUES + i * PER_WORD + j] = digit<BITS>(word, j);
                }
            }
            scale[c] = static_cast<float>(scales[row * (inputs / GS) + first / GS]);
            bias[c] = static_cast<float>(biases[row * (inputs / GS) + first / GS]);
        }
    }
    #pragma unroll
    for (int r = 0; r < R; r++) {
        if (r < count) {
            float value[VALUES];
            float total = values_of<T, VALUES, BITS>(x, size_t(r) * inputs + first, value);
            #pragma unroll
            for (int c = 0; c < C; c++) {
                if (c < columns) {
                    const thread float* own = digits + c * VALUES;
                    float dot = 0.0f;
                    #pragma unroll
                    for (int i = 0; i < VALUES; i += RUN) {
                        if (RUN == 4) {
                            dot += value[i] * own[i] + value[i + 1] * own[i + 1] +
                                value[i + 2] * own[i + 2] + value[i + 3] * own[i + 3];
                        } else {
                            dot += value[i] * own[i];
                        }
                    }
                    sums[c * R + r] += scale[c] * dot + total * bias[c];
                }
            }
        }
    }
}
"""
)
DENSE = (
    DENSE_PARTS
    + """
template <typename T, int VALUES, bool ALIGNED, int C, int R>
inline void block(
        const device T* weight, const device T* x,
        int first_row, int columns, int count, int inputs, int first, thread float* sums) {
    int held = ALIGNED ? VALUES : metal::min(VALUES, inputs - first);
    float words[C * VALUES];
    #pragma unroll
    for (int c = 0; c < C; c++) {
        if (c < columns) {
            size_t row = first_row + c;
            held_of<T, VALUES>(weight, row * inputs + first, held, words + c * VALUES);
        }
    }
    #pragma unroll
    for (int r = 0; r < R; r++) {
        if (r < count) {
            float value[VALUES];
            held_of<T, VALUES>(x, size_t(r) * inputs + first, held, value);
            #pragma unroll
            for (int c = 0; c < C; c++) {
                if (c < columns) {
                    #pragma unroll
                    for (int i = 0; i < VALUES; i++) {
                        sums[c * R + r] += words[c * VALUES + i] * value[i];
                    }
                }
            }
        }
    }
}
"""
)
# A SIMD-group has 32 / LANES parts of lanes, each with COLUMNS weight rows of its own.
SOURCE = """
    threadgroup float sums_of[(SPLIT > 1 ? SPLIT * COLUMNS * ROWS : 1)];
    int lane = static_cast<int>(thread_index_in_simdgroup) % LANES;
    int part = static_cast<int>(thread_index_in_simdgroup) / LANES;
    int group = static_cast<int>(simdgroup_index_in_threadgroup);
    int place = static_cast<int>(threadgroup_position_in_grid.x) * (SPLIT > 1 ? 1 : SIMDGROUPS) +
        (SPLIT > 1 ? 0 : group);
    int inputs = x_shape[1];
    int outputs = weight_shape[0];
    int count = x_shape[0];
    int first_row = place * (32 / LANES) * COLUMNS;
    if (first_row >= outputs) {
        return;
    }
    first_row += part * COLUMNS;
    int columns = WHOLE ? COLUMNS : metal::max(0, metal::min(COLUMNS, outputs - first_row));
    float sums[COLUMNS * ROWS];
    #pragma unroll
    for (int i = 0; i < COLUMNS * ROWS; i++) {
        sums[i] = 0.0f;
    }
    constexpr int BLOCK = SPLIT * LANES * VALUES;
    for (int first = ((SPLIT > 1 ? group * LANES : 0) + lane) * VALUES; first < inputs; first += BLOCK) {
        block<FORM, COLUMNS, ROWS>(WEIGHTS, x, first_row, columns, count, inputs, first, sums);
    }
    #pragma unroll
    for (int i = 0; i < COLUMNS * ROWS; i++) {
        if (i % ROWS < count) {
            sums[i] = total<LANES>(sums[i]);
        }
    }
    if (SPLIT > 1) {
        #pragma unroll
        for (int i = 0; i < COLUMNS * ROWS; i++) {
            if (lane == 0) {
                sums_of[group * COLUMNS * ROWS + i] = sums[i];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        #pragma unroll
        for (int i = 0; i < COLUMNS * ROWS; i++) {
            for (int g = 1; g < SPLIT; g++) {
                sums[i] += sums_of[g * COLUMNS * ROWS + i];
            }
        }
    }
    if (lane == 0 && (SPLIT == 1 || group == 0)) {
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (c < columns && r < count) {
                    y[size_t(r) * outputs + first_row + c] = static_cast<T>(sums[c * ROWS + r]);
                }
            }
        }
    }
"""


@cache
def kernel(quantised: bool) -> Kernel:
    """Returns the kernel. Sizes are read from its inputs, so that one compilation serves all matrices of a format."""
    if quantised:
        form, names, header = "T, VALUES, BITS, GS", ("weight", "scales", "biases"), AFFINE
    else:
        form, names, header = "T, VALUES, ALIGNED", ("weight",), DENSE
    source = SOURCE.replace("FORM", form).replace("WEIGHTS", ", ".join(names))
    return Kernel("few_rows", ("x", *names), ("y",), source, header)


def few_rows_metal(x: mx.array, weights: Weights) -> mx.array:
    """Returns x weights^T, [M, K] -> [M, N], by one pass over the weights for every MOST rows."""
    parts = [_launch(x[start : start + MOST], weights) for start in range(0, x.shape[0], MOST)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _launch(x: mx.array, weights: Weights) -> mx.array:
    """Of at most MOST rows."""
    outputs, order, rows = weights.outputs, order_of(weights), rows_of(x.shape[0])
    columns = columns_of(order.values, rows)
    held = columns * (SIMD // order.lanes)  # outputs of a SIMD-group, or of a threadgroup that shares them
    simdgroups = order.split if order.split > 1 else SIMDGROUPS
    groups = -(-outputs // (held if order.split > 1 else held * simdgroups))
    if weights.scales is None:
        form = [("ALIGNED", weights.inputs % order.values == 0)]
    else:
        form = [("BITS", weights.bits), ("GS", weights.group_size)]
    form += [("T", x.dtype), ("VALUES", order.values), ("LANES", order.lanes), ("SPLIT", order.split)]
    launch = [("COLUMNS", columns), ("ROWS", rows), ("SIMDGROUPS", simdgroups), ("WHOLE", outputs % held == 0)]
    (y,) = kernel(weights.scales is not None)(
        inputs=[x, *arrays(weights)],
        template=[*form, *launch],
        grid=(SIMD * simdgroups * groups, 1, 1),
        threadgroup=(SIMD * simdgroups, 1, 1),
        output_shapes=[(x.shape[0], outputs)],
        output_dtypes=[x.dtype],
    )
    return y


def few_rows(x: mx.array, weights: Weights) -> mx.array:
    """Returns x weights^T of x's type: [..., K] -> [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    y = few_rows_metal(rows, weights) if usable(weights, x.dtype) else few_rows_reference(rows, weights)
    return y.reshape(*x.shape[:-1], weights.outputs)


def usable(weights: Weights, dtype: mx.Dtype) -> bool:
    """Returns whether the kernel runs for this format. Otherwise MLX's own product does."""
    return why_off("few_rows") is None and supported(weights, dtype) and min(map(_size, arrays(weights))) >= CONSTANT


def _size(array: mx.array) -> int:
    return array.size


CHECKED = ((4, 320), (8, 320), (0, 320), (4, 512), (8, 512), (0, 2048))  # bits and K: a kernel of each order
WIDTHS = (2, 3, 5, 8, 13)  # a kernel of each number of rows, beside that of one


@checked
def self_check() -> str | None:
    """Returns None, or what is wrong: at 4 bits, 8 bits and bfloat16 a product differs from the reference, or a row has
    other bits beside others than alone.
    """
    for bits, inputs in CHECKED:
        x, weights, _ = example(bits, outputs=21, inputs=inputs)
        x, weights = mx.concatenate([x, 2 * x[:5]]), flat(weights)
        if error := difference(few_rows_metal(x, weights), few_rows_reference(x, weights), BF16_CLOSE):
            return f"{bits or 16}-bit weights: {error}"
        alone = mx.concatenate([few_rows_metal(row, weights) for row in mx.split(x, x.shape[0])])
        for width in WIDTHS:
            if not mx.array_equal(few_rows_metal(x[:width], weights), alone[:width]):
                return f"{bits or 16}-bit weights: a row of {width} has other bits than alone"
    return None
