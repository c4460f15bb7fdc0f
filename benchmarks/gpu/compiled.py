"""Lets MLX compile its quantised products beforehand, beside each other:

    python -m benchmarks.gpu.compiled SHAPE OUT SECONDS

NVRTC takes long for each, and a process compiles one after another; what one has compiled is in MLX_PTX_CACHE_DIR for
all others. A line of JSON for each product, with its seconds. What a rehearsal compiled is packed (pack.sh ptx) and
costs a GPU's minutes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import mlx.core as mx

BESIDE = 14
SHAPES = {"bundled": (192, 192, 24), "26B": (2816, 1408, 16)}  # inputs, outputs, experts
CASES = {  # (kind, bits, rows): those that a text meets first come first
    "bundled": [
        *(("dense", bits, rows) for rows, bits in product((12, 24, 48, 100, 300), (4, 8))),
        *((kind, bits, rows) for kind, rows, bits in product(("pairs", "sorted"), (16, 400), (4, 8))),
    ],
    "26B": [(kind, bits, rows) for kind, rows, bits in product(("pairs", "sorted"), (8, 1024), (4, 8))],
}


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


def main(shape: str, out: Path, seconds: float) -> None:
    """Appends a line to `out` for each product that was compiled. Those that the seconds do not hold are ended."""
    waiting, running, end = list(CASES[shape]), {}, time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:
        while waiting or running:
            while waiting and len(running) < BESIDE and time.monotonic() < end:
                case = waiting.pop(0)
                command = [sys.executable, "-m", "benchmarks.gpu.compiled", shape, *map(str, case)]
                running[case] = subprocess.Popen(command), time.monotonic()
            if time.monotonic() > end:
                for process, _ in running.values():
                    process.kill()
                waiting = []
            for case, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[case]
                    took = round(time.monotonic() - began, 1)
                    line = {"shape": shape, "case": case, "ended with": process.returncode, "seconds": took}
                    print(json.dumps(line), file=file, flush=True)
            time.sleep(0.1)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        one(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
