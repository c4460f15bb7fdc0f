"""The likeliest token of a dense head and its probability: the product with the vocabulary, its argmax and the sum of
its exponentials in one pass, without a row of logits.

For greedy drafts, where nothing else is asked for. speculative/drafting.py chooses between this and the head.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from . import Kernel, checked, difference, why_off
from .products import BF16_CLOSE, SIMD, Weights, arrays, example, flat, specialised, supported, template

ROWS = 8  # rows of y that share one pass
COLUMNS = 4
SIMDGROUPS = 2
PARTS = 1024  # SIMD-groups that share the vocabulary: enough for the widest GPU, few for the last comparison


def logits_reference(y: mx.array, weights: Weights, bias: mx.array | None) -> mx.array:
    """Returns y weights^T, rounded to y's dtype as the head rounds it, plus the bias: float32 [B, V]."""
    if weights.scales is None:
        logits = y @ weights.weight.swapaxes(-1, -2)
    else:  # in float32: MLX's CPU adds up affine products in y's dtype
        scales, biases = weights.scales, weights.biases
        if weights.mode == "affine":
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        form = {"group_size": weights.group_size, "bits": weights.bits, "mode": weights.mode}
        logits = mx.quantized_matmul(y.astype(mx.float32), weights.weight, scales, biases, transpose=True, **form)
    logits = logits.astype(y.dtype).astype(mx.float32)
    return logits if bias is None else logits + bias


def best_token_reference(y: mx.array, weights: Weights, bias: mx.array | None) -> tuple[mx.array, mx.array]:
    """Returns argmax(y weights^T + bias), int32 [B], of equals the lower token, and its probability in their softmax,
    float32 [B].

    y: [B, K]; weights: [V, K]; bias: float32 [V], -inf at tokens that nobody may say.
    """
    logits = logits_reference(y, weights, bias)
    return mx.argmax(logits, axis=-1).astype(mx.int32), certainty(logits)


def certainty(logits: mx.array) -> mx.array:
    """Returns the probability of the likeliest column: float32 [B, C] -> [B]."""
    return mx.exp(logits.max(axis=-1) - mx.logsumexp(logits, axis=-1))


# Part p takes LENGTH tokens from p * LENGTH on, in ascending order; its lane 0 keeps the best of each row, and the sum
# of exp(logit - best) over its tokens, rescaled whenever the best changes.
SOURCE = """
    int lane = static_cast<int>(thread_index_in_simdgroup);
    int part = static_cast<int>(threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup);
    int end = metal::min(VOCAB, (part + 1) * LENGTH);
    int count = y_shape[0];
    uint inputs[ROWS];
    float best[ROWS];
    float mass[ROWS];
    int token[ROWS];
    for (int r = 0; r < ROWS; r++) {
        inputs[r] = static_cast<uint>(r);
        best[r] = -INFINITY;
        mass[r] = 0.0f;
        token[r] = 0;
    }
    for (int first = part * LENGTH; first < end; first += COLUMNS) {
        int columns = metal::min(COLUMNS, end - first);
        uint rows[COLUMNS];
        float sums[COLUMNS * ROWS];
        for (int c = 0; c < COLUMNS; c++) {
            rows[c] = static_cast<uint>(first + c);
            for (int r = 0; r < ROWS; r++) {
                sums[c * ROWS + r] = 0.0f;
            }
        }
        products<FORM, COLUMNS, ROWS>(WEIGHTS, y, rows, columns, inputs, count, lane, sums);
        for (int c = 0; c < COLUMNS; c++) {
            for (int r = 0; r < ROWS; r++) {
                if (r < count && c < columns) {
                    float logit = static_cast<float>(static_cast<T>(total<32>(sums[c * ROWS + r])));
                    logit += BIASED ? bias[first + c] : 0.0f;
                    if (logit > best[r]) {
                        mass[r] = mass[r] * metal::precise::exp(best[r] - logit) + 1.0f;
                        best[r] = logit;
                        token[r] = first + c;
                    } else if (logit > -INFINITY) {
                        mass[r] += metal::precise::exp(logit - best[r]);
                    }
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        if (lane == 0 && r < count) {
            values[r * PARTS + part] = best[r];
            masses[r * PARTS + part] = mass[r];
            tokens[r * PARTS + part] = token[r];
        }
    }
"""


@cache
def kernel(quantised: bool) -> Kernel:
    source, names, header = specialised(SOURCE, quantised)
    return Kernel("head_argmax", ("y", *names, "bias"), ("values", "masses", "tokens"), source, header)


def best_token_metal(
    y: mx.array, weights: Weights, bias: mx.array | None, parts: int = PARTS
) -> tuple[mx.array, mx.array]:
    """Returns the token and the probability of `best_token_reference`, by one pass over the weights for every ROWS
    rows. parts: how many SIMD-groups share the vocabulary.
    """
    vocab, biased = weights.outputs, bias is not None
    length = -(-vocab // parts)
    length += -length % COLUMNS
    found = []
    for start in range(0, y.shape[0], ROWS):
        some = y[start : start + ROWS]
        values, masses, tokens = kernel(weights.scales is not None)(
            inputs=[some, *arrays(weights), bias if biased else mx.zeros((1,))],
            template=[
                *template(weights, y.dtype),
                *(("VOCAB", vocab), ("LENGTH", length), ("PARTS", parts), ("BIASED", biased)),
                *(("ROWS", ROWS), ("COLUMNS", COLUMNS), ("SIMDGROUPS", SIMDGROUPS)),
            ],
            grid=(SIMD * parts, 1, 1),
            threadgroup=(SIMD * SIMDGROUPS, 1, 1),
            output_shapes=[(some.shape[0], parts)] * 3,
            output_dtypes=[mx.float32, mx.float32, mx.int32],
        )
        best = mx.argmax(values, axis=-1, keepdims=True)  # the first of equals, whose tokens are lower
        largest = mx.take_along_axis(values, best, axis=-1)
        probability = 1 / (masses * mx.exp(values - largest)).sum(axis=-1)
        found.append((mx.take_along_axis(tokens, best, axis=-1)[:, 0], probability))
    return found[0] if len(found) == 1 else tuple(map(mx.concatenate, zip(*found, strict=True)))


def usable(weights: Weights, dtype: mx.Dtype) -> bool:
    """Returns whether the kernel runs for this format. Otherwise the head makes a row of logits."""
    return why_off("head_argmax") is None and supported(weights, dtype)


@checked
def self_check() -> str | None:
    """Returns None, or what is wrong, at 4 bits, 8 bits and bfloat16. Of nearly equal logits either token is right."""
    for bits in (4, 8, 0):
        y, weights, _ = example(bits, outputs=203, inputs=320)
        head = flat(weights)
        bias = mx.where(mx.arange(head.outputs) % 5 == 1, -mx.inf, 0.0)
        logits = logits_reference(y, head, bias)
        token, probability = best_token_metal(y, head, bias)
        ours = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        for found, expected in ((ours, logits.max(axis=-1)), (probability, certainty(logits))):
            if error := difference(found, expected, 4 * BF16_CLOSE):
                return f"{bits or 16}-bit weights: {error}"
    return None
