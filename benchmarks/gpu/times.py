"""What our kernels cost beside MLX's own operations here: `python -m benchmarks.gpu.times OUT SECONDS`.

A line of JSON for each case. `alone_us`: the median of single calls, each waited for; `each_us`: of several calls that
are queued together, a call's share, from inputs of their own, so that weights come from memory. `gbps` is by the bytes
of weights that a call must read, over each_us.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.gpu.kernels import EXPERTS, HEADS, random_weights
from mlx_gemma_mtp import doctor
from mlx_gemma_mtp.ops.expert_paths import ON_METAL
from mlx_gemma_mtp.ops.fused import geglu
from mlx_gemma_mtp.ops.kernels import down, gate_up, grouping, head_argmax
from mlx_gemma_mtp.ops.kernels.products import Weights

TOKENS = (1, 4, 8, 32, 128)
HEAD_ROWS = (1, 4, 8)
CALLS = 8  # queued together
REPEATS = 5
FORMATS = {"4bit": 4, "bf16": 0, "8bit": 8}
BIG = 1 << 28  # bfloat16 values of the copy that measures the card


def timed(calls: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """Returns the two medians in microseconds. calls: with inputs of their own, already computed."""
    mx.eval([call() for call in calls])
    alone, together = [], []
    for call in calls:
        began = time.perf_counter()
        mx.eval(call())
        alone.append(time.perf_counter() - began)
    for _ in range(REPEATS):
        began = time.perf_counter()
        mx.eval([call() for call in calls])
        together.append((time.perf_counter() - began) / len(calls))
    return {"alone_us": round(1e6 * median(alone), 1), "each_us": round(1e6 * median(together), 1)}


def read_bytes(weights: Weights, experts: mx.array | None = None) -> int:
    """Returns the bytes of weights that must be read: of the distinct experts, or of all."""
    total = sum(part.nbytes for part in weights[:3] if part is not None)
    if experts is None:
        return total
    return total // weights.weight.shape[0] * len(np.unique(np.array(experts)))


def card() -> Iterator[dict[str, Any]]:
    """Yields the bandwidth of a copy and the time of a call that does nothing to speak of."""
    small, some = mx.zeros((8,)), [mx.random.normal((BIG,)).astype(mx.bfloat16) for _ in range(2)]
    mx.eval(small, some)
    yield {"what": "smallest call"} | timed([lambda i=i: small + i for i in range(CALLS)])
    found = timed([lambda part=part: part * 2 for part in some])
    yield {"what": "copy"} | found | {"gbps": round(4 * BIG / found["each_us"] / 1e3)}


def expert_layers() -> Iterator[dict[str, Any]]:
    """Yields the 26B's layer of experts by every path, and each kernel beside what MLX offers for the same."""
    hidden, size, _, top_k = doctor.LAYER
    shape = (hidden, size, EXPERTS, top_k)
    for name, bits in FORMATS.items():
        layer = doctor.layer(shape, bits)
        both = random_weights(bits, 64, mx.bfloat16, EXPERTS, 2 * size, hidden, seed=1)
        back = random_weights(bits, 64, mx.bfloat16, EXPERTS, hidden, size, seed=2)
        mx.eval(layer.parameters(), [part for part in (*both[:3], *back[:3]) if part is not None])
        for tokens in TOKENS:
            inputs = [doctor._inputs(tokens, shape, seed) for seed in range(CALLS)]
            size_read = float(np.mean([read_bytes(both, each[1]) + read_bytes(back, each[1]) for each in inputs]))
            about = {"what": "experts", "format": name, "tokens": tokens}
            for path in ON_METAL:
                found = timed([lambda each=each, path=path, layer=layer: layer.run(path, *each) for each in inputs])
                yield about | {"path": str(path)} | found | {"gbps": round(size_read / found["each_us"] / 1e3)}
            for kernel, calls, read in parts(both, back, inputs, EXPERTS):
                found = timed(calls)
                yield about | {"what": kernel} | found | {"gbps": round(read / found["each_us"] / 1e3)}


def parts(
    both: Weights, back: Weights, inputs: Sequence[tuple[mx.array, ...]], count: int
) -> Iterator[tuple[str, list[Callable[[], Any]], float]]:
    """Yields (name, calls, bytes) of each kernel of the experts and of MLX's operations in its place."""
    grouped = [grouping.group_metal(chosen.reshape(-1), count) for _, chosen, _ in inputs]
    wide = [mx.repeat(x[:, : back.inputs], chosen.shape[1], axis=0) for x, chosen, _ in inputs]
    mx.eval([list(each[:2]) for each in grouped], wide)
    every = list(zip(inputs, grouped, wide, strict=True))
    first, second = (float(np.mean([read_bytes(w, each[1]) for each in inputs])) for w in (both, back))
    pairs = [chosen.reshape(-1) for _, chosen, _ in inputs]
    yield "grouping", [lambda p=p: list(grouping.group_metal(p, count)[:2]) for p in pairs], 0.0
    yield "grouping, plain MLX", [lambda p=p: list(grouping.group_reference(p, count)[:2]) for p in pairs], 0.0
    yield "gate_up", [lambda i=i, g=g: gate_up.gate_up_metal(i[0], both, i[1], g) for i, g, _ in every], first
    yield "gate_up, plain MLX", [lambda i=i: geglu(*mx.split(own(i[0], both, i[1]), 2, axis=-1)) for i in inputs], first
    yield "down", [lambda i=i, g=g, w=w: down.down_metal(w, back, i[1], i[2], g) for i, g, w in every], second
    yield (
        "down, plain MLX",
        [lambda i=i, w=w: down.combine(own(w, back, i[1], True).reshape(*i[1].shape, -1), i[2]) for i, _, w in every],
        second,
    )


def own(x: mx.array, weights: Weights, experts: mx.array, paired: bool = False) -> mx.array:
    """Returns the products by MLX's operation, in x's type, [N k, N]. paired: x has a row for each pair."""
    rows = mx.arange(experts.size, dtype=mx.uint32) // (1 if paired else experts.shape[1])
    x, experts = x[:, None], experts.reshape(-1)
    if weights.scales is None:
        return mx.gather_mm(x, weights.weight.swapaxes(-1, -2), lhs_indices=rows, rhs_indices=experts)[:, 0]
    form = {"group_size": weights.group_size, "bits": weights.bits, "transpose": True}
    return mx.gather_qmm(x, *weights[:3], rows, experts, **form)[:, 0]


def heads() -> Iterator[dict[str, Any]]:
    """Yields the head with its argmax in one pass, and MLX's product with argmax and logsumexp after it."""
    for shape in ("26B", "E2B as if dense", "bundled"):
        for name, bits in FORMATS.items():
            vocabulary, inputs = HEADS[shape]
            head = random_weights(bits, 64, mx.bfloat16, vocabulary, inputs, seed=6)
            mx.eval([part for part in head[:3] if part is not None])
            for rows in HEAD_ROWS:
                every = [mx.random.normal((rows, inputs), key=mx.random.key(i)).astype(mx.bfloat16) for i in range(4)]
                mx.eval(every)
                about = {"format": name, "shape": shape, "tokens": rows}
                for what, run in (("head_argmax", head_argmax.best_token_metal), ("head, plain MLX", plain_head)):
                    found = timed([lambda y=y, run=run, head=head: list(run(y, head, None)) for y in every])
                    yield {"what": what} | about | found | {"gbps": round(read_bytes(head) / found["each_us"] / 1e3)}


def plain_head(y: mx.array, head: Weights, bias: None) -> tuple[mx.array, mx.array]:
    if head.scales is None:
        logits = y @ head.weight.swapaxes(-1, -2)
    else:
        form = {"group_size": head.group_size, "bits": head.bits, "transpose": True}
        logits = mx.quantized_matmul(y, *head[:3], **form)
    return mx.argmax(logits, axis=-1), head_argmax.certainty(logits.astype(mx.float32))


def main(out: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    with out.open("a", encoding="utf-8") as file:
        for part in (card, expert_layers, heads):
            try:
                for each in part():
                    print(json.dumps(each), file=file, flush=True)
                    if time.monotonic() > end:
                        print(json.dumps({"what": "skipped", "in": part.__name__}), file=file, flush=True)
                        return
            except (RuntimeError, ValueError) as raised:
                print(json.dumps({"what": "raised", "in": part.__name__, "error": str(raised)[:500]}), file=file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
