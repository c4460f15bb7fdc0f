"""Lets MLX compile its quantised products beforehand, beside each other: `python -m benchmarks.gpu.compiled`.

NVRTC takes 5 to 10 seconds for each, and a process compiles one after another; what one has compiled is in
MLX_PTX_CACHE_DIR for all others.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import mlx.core as mx

BESIDE = 12
SHAPES = {"bundled": (192, 192, 24), "26B": (2816, 1408, 16)}  # inputs, outputs, experts
CASES = [
    *(("bundled", "dense", bits, rows) for bits, rows in product((4, 8), (12, 24, 48, 100, 300))),
    *(("bundled", kind, bits, rows) for kind, bits, rows in product(("pairs", "sorted"), (4, 8), (16, 400))),
    *(("26B", kind, bits, rows) for kind, bits, rows in product(("pairs", "sorted"), (4, 8), (8, 1024))),
]


def one(shape: str, kind: str, bits: int, rows: int) -> None:
    """Computes one product of `rows` rows or pairs, in bfloat16."""
    inputs, outputs, experts = SHAPES[shape]
    weight = mx.random.normal((experts, outputs, inputs)).astype(mx.bfloat16)
    form = {"group_size": 64, "bits": bits, "transpose": True}
    if kind == "dense":
        x = mx.random.normal((1, rows, inputs)).astype(mx.bfloat16)
        mx.eval(mx.quantized_matmul(x, *mx.quantize(weight[0], 64, bits), **form))
        return
    x = mx.random.normal((rows, 1, inputs)).astype(mx.bfloat16)
    index, numbers = mx.arange(rows, dtype=mx.uint32), mx.arange(rows, dtype=mx.uint32) % experts
    numbers = mx.sort(numbers) if kind == "sorted" else numbers
    quantised = mx.quantize(weight, 64, bits)
    mx.eval(mx.gather_qmm(x, *quantised, index, numbers, sorted_indices=kind == "sorted", **form))


def main() -> None:
    waiting, running, failed = list(CASES), [], 0
    while waiting or running:
        while waiting and len(running) < BESIDE:
            command = [sys.executable, "-m", "benchmarks.gpu.compiled", *map(str, waiting.pop(0))]
            running.append(subprocess.Popen(command))
        failed += running.pop(0).wait() != 0
    print(f"{len(CASES)} products, {failed} failed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
