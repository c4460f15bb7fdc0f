"""Products of 1 to 16 rows in the shapes of all five models: `python -m benchmarks.gpu.products OUT SECONDS`.

MLX's own product, and ours of few rows (mlx_gemma_mtp/ops/kernels/few_rows.py, where this version has it). A line of
JSON for each shape, format and number of rows: microseconds of a call among several that are queued, as in times.py,
GB/s of the weights' bytes, and whether every row has the bits of a product of it alone. Weights change from call to
call, so that they come from memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.gpu.kernels import random_weights
from benchmarks.gpu.times import CALLS, FORMATS, read_bytes, timed
from mlx_gemma_mtp.models.config import TargetConfig
from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import few_rows
from mlx_gemma_mtp.ops.kernels.products import Weights

CONFIGS = Path(__file__).parents[2] / "tests/data/configs"
MODELS = {
    "26B-A4B": "gemma-4-26B-A4B-it", "E2B": "gemma-4-E2B-it", "E4B": "gemma-4-E4B-it", "12B": "gemma-4-12B-it",
    "31B": "gemma-4-31B-it",
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 3, 12)
MOST_BYTES = int(os.environ.get("GPU_PRODUCT_BYTES", 2 << 30))  # of a shape's weights, all copies together
Product = Callable[[mx.array, Weights], mx.array]


def shapes(config: TargetConfig) -> dict[str, tuple[int, int]]:
    """Returns (inputs, outputs) of a model's products by name, those of a layer kind once."""
    hidden, found = config.hidden_size, {}
    for layer in config.layers:
        kind, dim = "sliding" if layer.kv.window else "full", layer.kv.head_dim
        owned = layer.kv.kv_heads * (1 if layer.v_is_k else 2) if layer.owns_kv else 0
        found.setdefault(f"{kind} q/k/v" if owned else f"{kind} q", (hidden, (layer.heads + owned) * dim))
        found.setdefault(f"{kind} out", (layer.heads * dim, hidden))
        found.setdefault(f"gate/up {layer.mlp_size}", (hidden, 2 * layer.mlp_size))
        found.setdefault(f"down {layer.mlp_size}", (layer.mlp_size, hidden))
    return found | {"head": (hidden, config.vocab_size)}


def stock(x: mx.array, weights: Weights) -> mx.array:
    """Returns MLX's product."""
    if weights.scales is None:
        return x @ weights.weight.T
    form = {"group_size": weights.group_size, "bits": weights.bits, "transpose": True}
    return mx.quantized_matmul(x, *weights[:3], **form)


def contestants() -> dict[str, Product]:
    """Returns the products that are timed, by name."""
    return {"MLX": stock} | ({"few rows": few_rows.few_rows_metal} if kernels.available() else {})


def measured(inputs: int, outputs: int, bits: int, rows: int) -> Iterator[dict[str, Any]]:
    """Yields the time of a product by everybody."""
    one = random_weights(bits, 64, mx.bfloat16, outputs, inputs)
    size = read_bytes(one)
    several = [one] + [random_weights(bits, 64, mx.bfloat16, outputs, inputs, seed=i) for i in range(1, CALLS)]
    several = several[: max(1, min(CALLS, MOST_BYTES // max(1, size)))]
    x = mx.random.normal((rows, inputs), key=mx.random.key(rows)).astype(mx.bfloat16)
    mx.eval(x, [part for each in several for part in each[:3] if part is not None])
    for name, product in contestants().items():
        each_call = [several[i % len(several)] for i in range(CALLS)]
        calls = [lambda weights=weights, product=product: product(x, weights) for weights in each_call]
        found = timed(calls)
        together = product(x, one)
        alone = all(mx.array_equal(product(x[i : i + 1], one)[0], together[i]).item() for i in range(rows))
        yield {"by": name} | found | {"gbps": round(size / found["each_us"] / 1e3), "alone": alone}


def main(out: Path, seconds: float) -> None:
    """Appends a line to `out` for each case, until the seconds are over: the 26B at 4 bit comes first."""
    end, seen = time.monotonic() + seconds, set()
    with out.open("a", encoding="utf-8") as file:
        for form, bits in FORMATS.items():
            for model, name in MODELS.items():
                config = TargetConfig.from_dict(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))
                for what, shape in shapes(config).items():
                    for rows in ROWS if (form, shape) not in seen else ():
                        about = {"model": model, "what": what, "shape": shape, "format": form, "rows": rows}
                        if time.monotonic() > end:
                            print(json.dumps(about | {"what": "skipped"}), file=file, flush=True)
                            return
                        try:
                            for each in measured(*shape, bits, rows):
                                print(json.dumps(about | each), file=file, flush=True)
                        except (RuntimeError, ValueError) as raised:
                            print(json.dumps(about | {"raised": str(raised)[:300]}), file=file, flush=True)
                    seen.add((form, shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
