"""What the kernels over weight rows share: the weights' formats, and a SIMD-group's part of a few products.

A SIMD-group holds C rows of weights and up to R inputs: each lane reads its piece of the C rows once, keeps the words
in registers and uses them for every input. So weights are read once for R inputs, and what is added up for an input,
and in which order, does not depend on the inputs beside it.

Kept from MLX 0.32's gather_qmv and gemv_gather, so that a row gets their bits where the compiler treats both alike (not
seen on a Mac; tests/msl/test_stock.py compares with MLX's own text): a lane takes VALUES neighbouring inputs, the 32
lanes a block, block after block. Affine weights add scale * (integer products) + bias * (sum of inputs) a block, the
products by fours at 4 bits, one by one at 8. All in float32; lanes last, by simd_sum (affine) or by halves (floats).
VALUES is 8 at 4 bits and 4 at 8, twice that where gather_qmv's fast form runs (K a multiple of 512 or 256, N of 8), and
4 for floats, as there where 64 < K < 16 N.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

FLOATS = (mx.float32, mx.bfloat16, mx.float16)
SIMD = 32
BF16_CLOSE = 0.02  # of the largest value: a few roundings, as a self-check allows


class Weights(NamedTuple):
    """Rows of weights [..., N, K] or their affine quantisation. scales None: floats."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 0
    mode: str = "affine"

    @property
    def inputs(self) -> int:
        """K."""
        width = self.weight.shape[-1]
        return width if self.scales is None else width * 32 // self.bits

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[-2]


def supported(weights: Weights, dtype: mx.Dtype) -> bool:
    """Returns whether the kernels read this format for inputs of dtype; all others go through the references."""
    if weights.scales is None:
        return weights.weight.dtype == dtype in FLOATS
    affine = weights.mode == "affine" and weights.bits in (4, 8) and weights.group_size in (32, 64, 128)
    return affine and weights.scales.dtype == dtype in FLOATS


def arrays(weights: Weights) -> list[mx.array]:
    """Returns the weights' arrays, in the order of a kernel's inputs."""
    return [weights.weight] if weights.scales is None else [weights.weight, weights.scales, weights.biases]


def template(weights: Weights, dtype: mx.Dtype) -> list[tuple[str, mx.Dtype | int]]:
    """Returns the template arguments T, K and VALUES, and for quantised weights BITS and GS."""
    K, N, bits = weights.inputs, weights.outputs, weights.bits
    if weights.scales is None:
        return [("T", dtype), ("K", K), ("VALUES", 4)]
    values = 32 // bits * (2 if K % (2048 // bits) == 0 and N % 8 == 0 else 1)
    return [("T", dtype), ("K", K), ("VALUES", values), ("BITS", bits), ("GS", weights.group_size)]


def gather_reference(x: mx.array, weights: Weights, rows: mx.array, experts: mx.array) -> mx.array:
    """Returns x[rows[p]] times the weights of expert experts[p] for each of P pairs, in float32: [P, N].

    x: [tokens, K]; weights: [experts, N, K]; rows, experts: uint32 [P].
    """
    x = x.astype(mx.float32)[:, None]
    if weights.scales is None:
        transposed = weights.weight.astype(mx.float32).swapaxes(-1, -2)
        return mx.gather_mm(x, transposed, lhs_indices=rows, rhs_indices=experts)[:, 0]
    scales, biases = weights.scales, weights.biases
    if weights.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    form = {"group_size": weights.group_size, "bits": weights.bits, "mode": weights.mode}
    return mx.gather_qmm(x, weights.weight, scales, biases, rows, experts, transpose=True, **form)[:, 0]


# What a block is made of, in these kernels and in few_rows.py; the order in which they add up is said here once.
# values_of reads VALUES inputs and returns their sum: by fours at 4 bits, one by one at 8. held_of reads floats, of
# which `held` are there. total is the sum over LANES lanes, valid in the first of them.
AFFINE_PARTS = """
template <int BITS>
inline float digit(uint32_t word, int i) {
    return static_cast<float>((word >> (BITS * i)) & ((1u << BITS) - 1u));
}

template <typename T, int VALUES, int BITS>
inline float values_of(const device T* x, size_t first, thread float* value) {
    constexpr int RUN = BITS == 4 ? 4 : 1;
    float total = 0.0f;
    #pragma unroll
    for (int i = 0; i < VALUES; i++) {
        value[i] = static_cast<float>(x[first + i]);
    }
    #pragma unroll
    for (int i = 0; i < VALUES; i += RUN) {
        float run = value[i];
        #pragma unroll
        for (int j = 1; j < RUN; j++) {
            run += value[i + j];
        }
        total += run;
    }
    return total;
}

template <int LANES>
inline float total(float part) {
    if (LANES == 32) {
        return simd_sum(part);
    }
    part += simd_shuffle_xor(part, 1);
    part += simd_shuffle_xor(part, 2);
    return part;
}
"""
DENSE_PARTS = """
template <typename T, int VALUES>
inline void held_of(const device T* x, size_t first, int held, thread float* value) {
    #pragma unroll
    for (int i = 0; i < VALUES; i++) {
        value[i] = i < held ? static_cast<float>(x[first + i]) : 0.0f;
    }
}

template <int LANES>
inline float total(float part) {
    for (ushort step = LANES / 2; step > 0; step /= 2) {
        part += simd_shuffle_down(part, step);
    }
    return part;
}
"""
# products adds to sums[c][r] this lane's part of weight row rows[c] times row inputs[r] of x, for c < columns and
# r < count.
# The four products of a run of 4 bits are added up in one expression, as in MLX's gather_qmv. A compiler may fuse a
# product and a sum into one operation, which rounds once. Within one expression it fuses the same products in both
# kernels, so that both round alike. Across statements it need not: gcc's -ffp-contract=fast decides by the target's
# instructions.
AFFINE = (
    AFFINE_PARTS
    + """
template <typename T, int K, int VALUES, int BITS, int GS, int C, int R>
inline void block(
        const device uint32_t* weight, const device T* scales, const device T* biases, const device T* x,
        const thread uint* rows, int columns, const thread uint* inputs, int count, int first, thread float* sums) {
    constexpr int PER_WORD = 32 / BITS;
    constexpr int WORDS = VALUES / PER_WORD;
    uint32_t words[C][WORDS];
    float scale[C];
    float bias[C];
    for (int c = 0; c < C; c++) {
        if (c < columns) {
            size_t row = rows[c];
            for (int i = 0; i < WORDS; i++) {
                words[c][i] = weight[row * (K / PER_WORD) + first / PER_WORD + i];
            }
            scale[c] = static_cast<float>(scales[row * (K / GS) + first / GS]);
            bias[c] = static_cast<float>(biases[row * (K / GS) + first / GS]);
        }
    }
    for (int r = 0; r < R; r++) {
        if (r < count) {
            float value[VALUES];
            float total = values_of<T, VALUES, BITS>(x, size_t(inputs[r]) * K + first, value);
            for (int c = 0; c < C; c++) {
                if (c < columns) {
                    float dot = 0.0f;
                    if (BITS == 4) {
                        for (int i = 0; i < VALUES; i += 4) {
                            uint32_t word = words[c][i / PER_WORD] >> (BITS * (i % PER_WORD));
                            dot += value[i] * digit<BITS>(word, 0) + value[i + 1] * digit<BITS>(word, 1) +
                                value[i + 2] * digit<BITS>(word, 2) + value[i + 3] * digit<BITS>(word, 3);
                        }
                    } else {
                        for (int i = 0; i < VALUES; i++) {
                            dot += value[i] * digit<BITS>(words[c][i / PER_WORD], i % PER_WORD);
                        }
                    }
                    sums[c * R + r] += scale[c] * dot + total * bias[c];
                }
            }
        }
    }
}

template <typename T, int K, int VALUES, int BITS, int GS, int C, int R>
inline void products(
        const device uint32_t* weight, const device T* scales, const device T* biases, const device T* x,
        const thread uint* rows, int columns, const thread uint* inputs, int count, int lane, thread float* sums) {
    constexpr int BLOCK = 32 * VALUES;
    for (int start = 0; start + BLOCK <= K; start += BLOCK) {
        block<T, K, VALUES, BITS, GS, C, R>(
            weight, scales, biases, x, rows, columns, inputs, count, start + lane * VALUES, sums);
    }
    if (K % BLOCK != 0 && lane * VALUES < K % BLOCK) {
        block<T, K, VALUES, BITS, GS, C, R>(
            weight, scales, biases, x, rows, columns, inputs, count, K - K % BLOCK + lane * VALUES, sums);
    }
}
"""
)
DENSE = (
    DENSE_PARTS
    + """
template <typename T, int K, int VALUES, int C, int R>
inline void block(
        const device T* weight, const device T* x,
        const thread uint* rows, int columns, const thread uint* inputs, int count, int first, int held,
        thread float* sums) {
    float words[C][VALUES];
    for (int c = 0; c < C; c++) {
        if (c < columns) {
            held_of<T, VALUES>(weight, size_t(rows[c]) * K + first, held, words[c]);
        }
    }
    for (int r = 0; r < R; r++) {
        if (r < count) {
            float value[VALUES];
            held_of<T, VALUES>(x, size_t(inputs[r]) * K + first, held, value);
            for (int c = 0; c < C; c++) {
                if (c < columns) {
                    for (int i = 0; i < VALUES; i++) {
                        sums[c * R + r] += words[c][i] * value[i];
                    }
                }
            }
        }
    }
}

template <typename T, int K, int VALUES, int C, int R>
inline void products(
        const device T* weight, const device T* x,
        const thread uint* rows, int columns, const thread uint* inputs, int count, int lane, thread float* sums) {
    constexpr int BLOCK = 32 * VALUES;
    for (int start = 0; start + BLOCK <= K; start += BLOCK) {
        block<T, K, VALUES, C, R>(
            weight, x, rows, columns, inputs, count, start + lane * VALUES, VALUES, sums);
    }
    if (K % BLOCK != 0 && lane * VALUES < K % BLOCK) {
        int first = K - K % BLOCK + lane * VALUES;
        block<T, K, VALUES, C, R>(
            weight, x, rows, columns, inputs, count, first, metal::min(VALUES, K - first), sums);
    }
}
"""
)


def specialised(source: str, quantised: bool) -> tuple[str, tuple[str, ...], str]:
    """Returns the source with FORM and WEIGHTS replaced for the format, the names of the weights' inputs, and the
    header.
    """
    if quantised:
        form, names, header = "T, K, VALUES, BITS, GS", ("weight", "scales", "biases"), AFFINE
    else:
        form, names, header = "T, K, VALUES", ("weight",), DENSE
    return source.replace("FORM", form).replace("WEIGHTS", ", ".join(names)), names, header


def flat(weights: Weights) -> Weights:
    """Returns weights [E, N, K] as [E N, K]."""
    parts = [None if part is None else part.flatten(0, 1) for part in weights[:3]]
    return Weights(*parts, *weights[3:])


def example(bits: int, outputs: int, inputs: int) -> tuple[mx.array, Weights, mx.array]:
    """Returns a self-check's inputs in bfloat16: x of 8 tokens, weights of five experts, and 8 routes of each token.
    One expert is chosen 24 times, one never. bits: of the weights, 0 for floats.
    """
    keys = mx.random.split(mx.random.key(bits), 2)
    weight = (mx.random.normal((5, outputs, inputs), key=keys[0]) * inputs**-0.5).astype(mx.bfloat16)
    x = mx.random.normal((8, inputs), key=keys[1]).astype(mx.bfloat16)
    experts = mx.array([4, 0, 1, 4, 3, 0, 4, 1], dtype=mx.uint32)[(mx.arange(64) * 5) % 62 % 8].reshape(8, 8)
    if not bits:
        return x, Weights(weight), experts
    return x, Weights(*mx.quantize(weight, 64, bits), group_size=64, bits=bits), experts
