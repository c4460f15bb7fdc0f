"""Every kernel of ours on this device, in every type and format.

    python -m benchmarks.gpu.kernels PART OUT SECONDS

A line of JSON for each case: the largest errors as shares of the largest value, against float64 on the host (of many
pairs for a sample); whether three runs have the same bits, and whether a token has the same bits alone and in company.
PART: `checks`, the self-checks; a type, all shapes and formats in it; `small`, as under compute-sanitizer: the
self-checks, and the small shapes in all types, in turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import down, gate_up, grouping, head_argmax
from mlx_gemma_mtp.ops.kernels.products import Weights

CLOSE = {mx.float32: 1e-5, mx.bfloat16: 2**-7, mx.float16: 2**-10}  # of the largest value: a rounding or a few
FORMATS = ((0, 0), (4, 64), (4, 32), (8, 64), (8, 32))  # bits, 0 for floats, and group size
SAMPLE = {True: 5, False: 48}  # pairs that are computed again in float64, of large shapes or not


@dataclass(frozen=True)
class Layer:
    name: str
    experts: int
    top_k: int
    hidden: int
    size: int
    tokens: tuple[int, ...]


SMALL = (Layer("odd", 19, 8, 320, 96, (1, 3, 8)), Layer("bundled", 24, 4, 192, 64, (1, 4, 32, 128)))
EXPERTS = int(os.environ.get("GPU_EXPERTS", "128"))  # fewer where memory is short
LARGE = (Layer("26B", EXPERTS, 8, 2816, 704, (1, 8, 32, 128)),)
HEADS = {"odd": (203, 320), "bundled": (4096, 128), "E2B as if dense": (262144, 256), "26B": (262144, 1024)}


def random_weights(bits: int, group: int, dtype: mx.Dtype, *shape: int, seed: int = 0) -> Weights:
    """Returns weights [..., N, K] of about unit gain: random codes, or normal floats."""
    keys, gain = mx.random.split(mx.random.key(seed), 3), shape[-1] ** -0.5
    if not bits:
        return Weights((mx.random.normal(shape, key=keys[0]) * gain).astype(dtype))
    of_words = (*shape[:-1], shape[-1] * bits // 32)
    low, high = (mx.random.randint(0, 1 << 16, of_words, mx.uint32, key) for key in (keys[0], keys[2]))
    words = low | (high << 16)
    scales = mx.random.normal((*shape[:-1], shape[-1] // group), key=keys[1]) * (gain * 2 / 2**bits)
    scales = scales.astype(dtype)
    return Weights(words, scales, (scales * -(2 ** (bits - 1))).astype(dtype), group, bits)


def dense(weights: Weights, *index: int) -> np.ndarray:
    """Returns one matrix of the weights in float64, dequantised on the host."""
    weight, *affine = (None if part is None else part[index] if index else part for part in weights[:3])
    if affine[0] is None:
        return wide(weight)
    bits = weights.bits
    codes = np.array(weight)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    scales, biases = (np.repeat(wide(part), weights.group_size, axis=-1) for part in affine)
    return codes.reshape(scales.shape) * scales + biases


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return wide(mx.array(values.astype(np.float32)).astype(dtype))


def error(ours: np.ndarray | mx.array, reference: np.ndarray | mx.array) -> float:
    """Returns the largest difference as a share of the largest value; infinite where ours is not finite."""
    ours, reference = (wide(each) if isinstance(each, mx.array) else each for each in (ours, reference))
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - reference).max() / max(np.abs(reference).max(), 1e-30))


def routes(layer: Layer, tokens: int) -> mx.array:
    """Returns uint32 [tokens, top_k]: uneven, and one expert is on every token."""
    rng = np.random.default_rng(tokens)
    weights = rng.exponential(size=layer.experts)
    chosen = [rng.choice(layer.experts, layer.top_k, False, weights / weights.sum()) for _ in range(tokens)]
    return mx.array(np.stack(chosen).astype(np.uint32))


def steady(run: Callable[[], mx.array]) -> bool:
    """Returns whether three runs have the same bits."""
    first, *others = (run() for _ in range(3))
    return all(mx.array_equal(first, other).item() for other in others)


def layer_cases(layer: Layer, bits: int, group: int, dtype: mx.Dtype) -> Iterator[dict[str, Any]]:
    """Checks gate_up and down."""
    both = random_weights(bits, group, dtype, layer.experts, 2 * layer.size, layer.hidden, seed=1)
    back = random_weights(bits, group, dtype, layer.experts, layer.hidden, layer.size, seed=2)
    mx.eval([part for part in (*both[:3], *back[:3]) if part is not None])
    for tokens in layer.tokens:
        experts = routes(layer, tokens)
        groups = grouping.group_metal(experts.reshape(-1), layer.experts)
        yield {"kernel": "grouping", "tokens": tokens, "ok": _same_groups(experts, layer, groups)}
        x = mx.random.normal((tokens, layer.hidden), key=mx.random.key(3)).astype(dtype)
        run = lambda x=x, experts=experts, groups=groups: gate_up.gate_up_metal(x, both, experts, groups)  # noqa: E731
        inner = run()
        found = {"float64": _gate_up_sample(x, both, experts, inner, layer)}
        one = gate_up.gate_up_metal(x[:1], both, experts[:1], grouping.group_metal(experts[0], layer.experts))
        alone = mx.array_equal(one, inner[: layer.top_k]).item()
        yield judged("gate_up", tokens, dtype, found, steady(run), alone)
        if experts.size > down.CAPACITIES[-1]:
            continue
        rows = mx.random.normal((experts.size, layer.size), key=mx.random.key(4)).astype(dtype)
        scale = mx.softmax(mx.random.normal(experts.shape, key=mx.random.key(5)), axis=-1)
        run = lambda rows=rows, experts=experts, scale=scale, groups=groups: down.down_metal(  # noqa: E731
            rows, back, experts, scale, groups
        )
        combined = run()
        found = {"float64": _down_sample(rows, back, experts, scale, combined, layer)}
        one = down.down_metal(
            rows[: layer.top_k], back, experts[:1], scale[:1], grouping.group_metal(experts[0], layer.experts)
        )
        yield judged("down", tokens, dtype, found, steady(run), mx.array_equal(one, combined[:1]).item())


def _same_groups(experts: mx.array, layer: Layer, groups: grouping.Groups) -> bool:
    order = np.argsort(np.array(experts).reshape(-1), kind="stable")
    table = grouping.group_reference(experts.reshape(-1), layer.experts).table
    return np.array_equal(np.array(groups.order), order) and mx.array_equal(groups.table, table).item()


def _gate_up_sample(x: mx.array, both: Weights, experts: mx.array, inner: mx.array, layer: Layer) -> float:
    pairs, chosen = np.arange(experts.size), np.array(experts).reshape(-1)
    if (sample := SAMPLE[layer in LARGE]) < experts.size:
        pairs = np.unique(np.linspace(0, experts.size - 1, sample).astype(int))
    ours, true = [], []
    for pair in pairs:
        product = rounded(dense(both, int(chosen[pair])) @ wide(x)[pair // experts.shape[1]], x.dtype)
        gate, up = np.split(product, 2)
        true.append(gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up)
        ours.append(wide(inner[int(pair)]))
    return error(np.stack(ours), np.stack(true))


def _down_sample(
    rows: mx.array, back: Weights, experts: mx.array, scale: mx.array, combined: mx.array, layer: Layer
) -> float:
    chosen, weights, values = np.array(experts), np.array(scale).astype(np.float64), wide(rows)
    top_k, ours, true = chosen.shape[1], [], []
    few = layer in LARGE or len(chosen) > 8
    for token in sorted({0, len(chosen) - 1}) if few else range(len(chosen)):
        products = [dense(back, int(e)) @ values[token * top_k + k] for k, e in enumerate(chosen[token])]
        true.append((rounded(np.stack(products), rows.dtype) * weights[token][:, None]).sum(axis=0))
        ours.append(wide(combined[token]))
    return error(np.stack(ours), np.stack(true))


def head_case(vocabulary: int, inputs: int, bits: int, group: int, dtype: mx.Dtype) -> Iterator[dict[str, Any]]:
    """Checks head_argmax: the token found must have the largest logit but for rounding."""
    head = random_weights(bits, group, dtype, vocabulary, inputs, seed=6)
    mx.eval([part for part in head[:3] if part is not None])
    small = vocabulary < 10_000
    for rows in (1, 8, 11) if small else (1, 8):
        y = mx.random.normal((rows, inputs), key=mx.random.key(7)).astype(dtype)
        bias = mx.where(mx.arange(vocabulary) % 5 == 1, -mx.inf, 0.0)
        if small:
            logits = mx.array(rounded(wide(y) @ dense(head).T, dtype).astype(np.float32)) + bias
        else:
            logits = head_argmax.logits_reference(y, head, bias)
        token, sure = head_argmax.best_token_metal(y, head, bias)
        best = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        found = {
            "reference": error(best, logits.max(axis=-1)),
            "probability": error(sure, head_argmax.certainty(logits)) / 8,
        }
        one = head_argmax.best_token_metal(y[:1], head, bias)
        alone = mx.array_equal(one[0], token[:1]).item() and mx.array_equal(one[1], sure[:1]).item()
        run = lambda y=y, bias=bias: head_argmax.best_token_metal(y, head, bias)[1]  # noqa: E731
        yield judged("head_argmax", rows, dtype, found, steady(run), alone)


def judged(
    kernel: str, tokens: int, dtype: mx.Dtype, found: dict[str, float], steady: bool, alone: bool
) -> dict[str, Any]:
    ok = all(share <= CLOSE[dtype] for share in found.values()) and steady and alone
    return {"kernel": kernel, "tokens": tokens, "ok": ok, "errors": found, "steady": steady, "alone": alone}


def cases(part: str) -> Iterator[dict[str, Any]]:
    """Yields a finding a case; small shapes come before large ones, and of each format all types."""
    if part in ("checks", "small"):
        for name in kernels.KERNELS:
            finding = import_module(f"{kernels.__name__}.{name}").self_check()
            yield {"kernel": name, "what": "self-check", "ok": finding is None, "finding": finding}
    for shape, (bits, group), dtype in planned(part):
        about = {
            "shape": shape.name if isinstance(shape, Layer) else shape,
            "dtype": named(dtype),
            "bits": bits,
            "group": group,
        }
        if isinstance(shape, Layer):
            yield from guarded(about, layer_cases(shape, bits, group, dtype))
        else:
            yield from guarded(about, head_case(*HEADS[shape], bits, group, dtype))


def planned(part: str) -> list[tuple[Layer | str, tuple[int, int], mx.Dtype]]:
    """Returns (layer or head, format, type) of every case of a part, in their order."""
    types = [dtype for dtype in CLOSE if part in (named(dtype), "small")]
    sizes = [(*SMALL, "odd", "bundled")]
    if part != "small":
        sizes.append((*LARGE, "E2B as if dense", "26B"))
    return [
        (shape, form, dtype)
        for shapes in sizes
        for form in FORMATS
        for shape in shapes
        for dtype in types
        if not form[0] or not isinstance(shape, Layer) or shape.size % form[1] == 0
    ]


def named(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def guarded(about: dict[str, Any], found: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields what is found, and an exception as a finding."""
    try:
        for each in found:
            yield about | each
    except (RuntimeError, ValueError) as raised:
        yield about | {"ok": False, "raised": " ".join(str(raised).split())[:500]}


def main(part: str, out: Path, seconds: float) -> None:
    end, failed, count = time.monotonic() + seconds, 0, 0
    with out.open("a", encoding="utf-8") as file:
        for each in cases(part):
            count, failed = count + 1, failed + (not each["ok"])
            print(json.dumps(each), file=file, flush=True)
            if not each["ok"]:
                print(json.dumps(each), flush=True)
            if time.monotonic() > end:
                print(json.dumps({"what": "skipped"}), file=file, flush=True)
                break
    print(f"{count} cases, {failed} not as they should be")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
