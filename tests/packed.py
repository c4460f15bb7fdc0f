"""Weights quantised as other programs store them, written from their formats' descriptions in plain numpy.

Each function returns (tensors beside `name` without its ending, the values that they stand for in float64).
"""

import mlx.core as mx
import numpy as np

FP8_LARGEST = 448.0


def fp8_values() -> np.ndarray:
    """The values of the 256 codes of e4m3 (fn): sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity."""
    values = []
    for code in range(256):
        sign, exponent, fraction = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
        size = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
        values.append(np.nan if exponent == 15 and fraction == 7 else sign * size)
    return np.array(values)


def to_fp8(values: np.ndarray) -> np.ndarray:
    """The nearest codes."""
    table = np.where(np.isnan(fp8_values()), np.inf, fp8_values())
    order = np.argsort(table)
    edges = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(edges, values)].astype(np.uint8)


def fp8(weight: np.ndarray, block: tuple[int, int], dtype=mx.float32) -> tuple[np.ndarray, mx.array, np.ndarray]:
    """(codes, scales [..., rows / block[0], columns / block[1]], values)."""
    *planes, rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    codes, values = np.zeros(weight.shape, np.uint8), np.zeros(weight.shape)
    scales = np.zeros((*planes, high, wide))
    for plane in np.ndindex(*planes):
        for i in range(high):
            for j in range(wide):
                where = (*plane, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scale = np.abs(weight[where]).max() / FP8_LARGEST
                scale = float(mx.array(scale).astype(dtype).item())
                codes[where] = to_fp8(weight[where] / scale)
                values[where] = fp8_values()[codes[where]] * scale
                scales[(*plane, i, j)] = scale
    return codes, mx.array(scales.astype(np.float32)).astype(dtype), values


def packed(
    weight: np.ndarray, bits: int, group: int | None, symmetric: bool, dtype=mx.bfloat16, q4_0: bool = False
) -> tuple[dict[str, mx.array], np.ndarray]:
    """compressed-tensors' pack-quantized: suffix -> tensor, and the values. group: columns, None for a whole row.

    q4_0: scales are the value of largest magnitude / -8, as in llama.cpp's Q4_0.
    """
    rows, columns = weight.shape
    group = group or columns
    grouped = weight.reshape(rows, columns // group, group)
    half = 2 ** (bits - 1)
    if symmetric:
        scales = np.abs(grouped).max(-1) / (half - 0.5)
        if q4_0:
            extremes = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
            scales = extremes / -half
        zeros = np.zeros_like(scales)
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = (high - low) / (2 * half - 1)
        zeros = np.clip(np.round(-half - low / scales), -half, half - 1)
    scales = np.array(mx.array(scales.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)
    codes = np.clip(np.round(grouped / scales[..., None]) + zeros[..., None], -half, half - 1)
    values = ((codes - zeros[..., None]) * scales[..., None]).reshape(rows, columns)
    tensors = {
        "weight_packed": mx.array(words(codes.reshape(rows, columns), bits)),
        "weight_scale": mx.array(scales.astype(np.float32)).astype(dtype),
        "weight_shape": mx.array([rows, columns], mx.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = mx.array(words(zeros.T, bits).T.copy())
    return tensors, values


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [rows, n] -> int32 [rows, n * bits / 32 rounded up]: offset by half the range, lowest bits first."""
    rows, count = codes.shape
    each = 32 // bits
    wide = -(-count // each)
    unsigned = np.zeros((rows, wide * each), np.uint64)
    unsigned[:, :count] = (codes + 2 ** (bits - 1)).astype(np.uint64)
    found = np.zeros((rows, wide), np.uint64)
    for i in range(each):
        found |= unsigned[:, i::each] << np.uint64(bits * i)
    return found.astype(np.uint32).view(np.int32)
