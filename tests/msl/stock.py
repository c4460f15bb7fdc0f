"""What stock MLX runs for one row, or one row a pair: its own kernels' Metal text, taken from the installed wheel.

gather_qmm dispatches quantised weights to affine_gather_qmv or its fast form, gather_mm floats to gemv_gather. Of one
row quantized_matmul goes to affine_qmv, its fast form or affine_qmv_quad, matmul to gemv. Which, and with how many
threads, is MLX's host code, not in the wheel: the rules here are those of MLX 0.32.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mlx.core as mx

from mlx_gemma_mtp.ops.kernels import Kernel
from mlx_gemma_mtp.ops.kernels.products import SIMD, Weights

FOLDER = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
OFFSETS = {"utils.h": ("elem_to_loc",), "steel/utils.h": ("elem_to_loc_broadcast",)}
QMV = OFFSETS | {
    "quantized.h": (
        "get_pack_factor", "get_bytes_per_pack", "load_vector", "load_vector_safe", "qdot", "qdot_safe",
        "qmv_quad_impl", "qmv_fast_impl", "qmv_impl", "adjust_matrix_offsets", "affine_gather_qmv_fast",
        "affine_gather_qmv", "affine_qmv_quad", "affine_qmv_fast", "affine_qmv",
    )
}  # fmt: skip
GEMV = OFFSETS | {"gemv.h": ("DefaultAccT", "GEMVKernel", "gemv", "gemv_gather")}
# What the definitions need of the headers above them, as the emulator has it.
PRELUDE = """
#define METAL_FUNC inline
#define MLX_MTL_CONST static constexpr
#define MLX_MTL_PRAGMA_UNROLL
constexpr int SIMD_SIZE = 32;
constexpr int QUAD_SIZE = 4;
struct complex64_t;
template <typename T> using uniform = T;
template <typename T> constexpr T make_uniform(T x) { return x; }
"""
QMV_SOURCE = """
    affine_gather_qmv<T, GS, BITS>(
        weight, scales, biases, x, rows, experts, y, x_shape[2], weight_shape[1], 1, x_shape, x_strides,
        1, weight_shape, weight_strides, scales_strides, biases_strides, 1, rows_shape, rows_strides, experts_strides,
        threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
GEMV_SOURCE = """
    int64_t strides[2] = {rows_strides[0], experts_strides[0]};
    gemv_gather<T, SIMDGROUPS, 1, 1, 32, 4, 4>(
        weight, x, x, y, x_shape[2], weight_shape[1], x_shape[2], 1.0f, 0.0f, 1, rows_shape, strides,
        1, x_shape, x_strides, 1, weight_shape, weight_strides, rows, experts,
        threadgroup_position_in_grid, thread_position_in_threadgroup,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
QMV_ONE_SOURCE = """
    FUNCTION(
        weight, scales, biases, x, y, x_shape[1], weight_shape[0], 0, x_shape, x_strides,
        0, weight_shape, weight_strides, scales_strides, biases_strides, threadgroup_position_in_grid, INDICES);
"""
FUNCTIONS = {  # of one row: the call, and the indices in a threadgroup that it takes
    "quad": ("affine_qmv_quad<T, GS, BITS, QUAD, false>", "LANE / 4, LANE % 4"),
    "fast": ("affine_qmv_fast<T, GS, BITS, false, PARTIAL>", "simdgroup_index_in_threadgroup, LANE"),
    "any": ("affine_qmv<T, GS, BITS, false>", "simdgroup_index_in_threadgroup, LANE"),
}
GEMV_ONE_SOURCE = """
    int64_t strides[1] = {0};
    int batch[1] = {1};
    gemv<T, BM, BN, SM, 32 / SM, TM, 4, false, false>(
        weight, x, x, y, x_shape[1], weight_shape[0], x_shape[1], 1.0f, 0.0f, 1, batch, strides, strides, strides, 1,
        threadgroup_position_in_grid, thread_position_in_threadgroup,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
# Where MLX splits a row over SIMD-groups, only their first lanes go to the barrier. A GPU's compiler lets a SIMD-group
# pass; the emulator demands all lanes of it, so that the others are let go there, too.
ALONE = "threadgroup_barrier(mem_flags::mem_none);"
ALL_LANES = f"}} {ALONE} if (thrN == 0) {{"


def missing() -> str | None:
    """Why the installed MLX cannot be compared with, or None."""
    try:
        definitions(QMV)
        definitions(GEMV)
    except LookupError as error:
        return str(error)
    return None


@cache
def kernel(quantised: bool, fast: bool) -> Kernel:
    """x: [N, 1, K]; weight: [E, out, ..]; rows, experts: uint32 [P]. y: [P, out]. Raises LookupError."""
    inputs = ("x", "weight", *(("scales", "biases") if quantised else ()), "rows", "experts")
    if not quantised:
        return Kernel("gemv_gather", inputs, ("y",), GEMV_SOURCE, PRELUDE + definitions(GEMV))
    source = QMV_SOURCE.replace("affine_gather_qmv", "affine_gather_qmv_fast") if fast else QMV_SOURCE
    return Kernel("gather_qmv", inputs, ("y",), source, PRELUDE + definitions(QMV))


def gather(x: mx.array, weights: Weights, rows: mx.array, experts: mx.array) -> mx.array:
    """Pair p multiplies x[rows[p]] with expert experts[p]. x: [N, K]; rows, experts: uint32 [P]. Returns [P, out].

    For floats 64 < K < 16 out and out >= 4: other sizes go to other instances of the kernel.
    """
    pairs, quantised = experts.size, weights.scales is not None
    K, outputs = weights.inputs, weights.outputs
    fast = quantised and K % (2048 // weights.bits) == 0 and outputs % 8 == 0
    simdgroups, held = (2, 4) if quantised else (4, 4)  # outputs of a SIMD-group
    form = [("GS", weights.group_size), ("BITS", weights.bits)] if quantised else [("SIMDGROUPS", simdgroups)]
    tiles = -(-outputs // (simdgroups * held))
    # MLX's qmv counts tiles of outputs along y, its gemv along x
    grid = (SIMD, simdgroups * tiles, pairs) if quantised else (SIMD * tiles, 1, simdgroups * pairs)
    parts = [part for part in weights[:3] if part is not None]
    (y,) = kernel(quantised, fast)(
        inputs=[x[:, None], *parts, *map(_long, (rows, experts))],
        template=[("T", x.dtype), *form],
        grid=grid,
        threadgroup=(SIMD, simdgroups, 1) if quantised else (SIMD, 1, simdgroups),
        output_shapes=[(pairs, outputs)],
        output_dtypes=[x.dtype],
    )
    return y


@cache
def one_row_kernel(form: str) -> Kernel:
    """form: of FUNCTIONS, or "gemv". x: [1, K]; weight: [N, ..]; y: [1, N]. Raises LookupError."""
    if form == "gemv":
        text = definitions(GEMV).replace(ALONE, ALL_LANES)
        text = text.replace("typename gemv_kernel::acc_type tgp_memory", "float tgp_memory")  # as the emulator knows it
        return Kernel("gemv", ("x", "weight"), ("y",), GEMV_ONE_SOURCE, PRELUDE + text)
    function, indices = FUNCTIONS[form]
    source = QMV_ONE_SOURCE.replace("FUNCTION", function).replace("INDICES", indices)
    inputs = ("x", "weight", "scales", "biases")
    source = source.replace("LANE", "thread_index_in_simdgroup")
    text = definitions(QMV).replace("    constant int&", "    const constant int&")  # Metal's `constant` is const
    return Kernel(f"qmv_{form}", inputs, ("y",), source, PRELUDE + text)


def one_row(x: mx.array, weights: Weights) -> mx.array:
    """Returns what MLX's product of the one row x [1, K] is on Metal: [1, N].

    For rows of few inputs MLX's text reads beyond the weights, or lets lanes go before others shuffle: there the
    weights are filled up to whole SIMD-groups.
    """
    K, outputs, bits = weights.inputs, weights.outputs, weights.bits
    if K <= 64 or (bits and K == 128):
        pads = [(0, -outputs % 64), (0, 0)]
        weights = Weights(*(part if part is None else mx.pad(part, pads) for part in weights[:3]), *weights[3:])
    N = weights.outputs
    if weights.scales is None:
        bm, bn, sm = (8 if N >= 4096 else 4), 1, 1
        if K <= 64:
            bm, sm = 1, 8
        elif K >= 16 * N:
            bm, bn = 1, 8
        tm = 4 if N >= 4 else 1
        form, template = "gemv", [("BM", bm), ("BN", bn), ("SM", sm), ("TM", tm)]
        groups, threadgroup = (-(-N // (bm * sm * tm)), 1), (SIMD, bn, bm)
    else:
        form = "quad" if K in (64, 128) else "fast" if K % (2048 // bits) == 0 else "any"
        template = [("GS", weights.group_size), ("BITS", bits)]
        template += {"quad": [("QUAD", K)], "fast": [("PARTIAL", N % 8 != 0)], "any": []}[form]
        groups, threadgroup = (1, -(-N // (64 if form == "quad" else 8))), (SIMD, 1 if form == "quad" else 2, 1)
    (y,) = one_row_kernel(form)(
        inputs=[x, *(part for part in weights[:3] if part is not None)],
        template=[("T", x.dtype), *template],
        grid=(threadgroup[0] * groups[0], threadgroup[1] * groups[1], threadgroup[2]),
        threadgroup=threadgroup,
        output_shapes=[(1, N)],
        output_dtypes=[x.dtype],
    )
    return y[:, :outputs]


def one_by_one(x: mx.array, weights: Weights) -> mx.array:
    """Returns MLX's product of every row alone, [M, N]."""
    return mx.concatenate([one_row(row, weights) for row in mx.split(x, x.shape[0])])


def _long(indices: mx.array) -> mx.array:
    """At least eight, by zeros that nobody reads: fewer would become `constant`, which MLX's kernels do not take."""
    return mx.concatenate([indices, mx.zeros((max(0, 8 - indices.size),), dtype=indices.dtype)])


@cache
def _declarations(name: str) -> tuple[str, ...]:
    """What a header declares at its top level, without comments, preprocessor lines and Metal's attributes."""
    path = FOLDER / name
    if not path.is_file():
        raise LookupError(f"MLX {mx.__version__} is installed without its Metal header {name}")
    text = re.sub(r"//.*|\[\[.*?\]\]|^[ \t]*#(?:.*\\\n)*.*$", "", path.read_text(encoding="utf-8"), flags=re.M)
    return tuple(_top_level(text))


def _top_level(text: str) -> Iterator[str]:
    depth = start = 0
    for mark in re.finditer(r"[{};]", text):
        depth += {"{": 1, "}": -1, ";": 0}[mark.group()]
        if depth == 0:
            yield text[start : mark.end()]
            start = mark.end()


def definitions(wanted: dict[str, tuple[str, ...]]) -> str:
    """All definitions of the names wanted of each header, in that order. Raises LookupError for a missing one."""
    found = []
    for header, names in wanted.items():
        for name in names:
            pattern = re.compile(rf"\bstruct {name}\b|\b{name}\(")
            texts = [text for text in _declarations(header) if pattern.search(text.partition("{")[0])]
            if not texts:
                raise LookupError(f"MLX {mx.__version__} has no {name} in its Metal header {header}")
            found += [f"{text};" if "struct" in text.partition("{")[0] else text for text in texts]
    return "\n".join(found)
