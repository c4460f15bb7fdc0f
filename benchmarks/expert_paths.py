"""Several ways to compute the same routed experts, which experts.py times.

A path takes (x [M, hidden], experts [M, k], weights [M, k]), all but the numbers of the experts in float32, and returns
[M, hidden].
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.checks.routing_trace import watched
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files.hub import DEMO
from mlx_gemma_mtp.models.config import MoESpec
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.models.loading import read_tensors
from mlx_gemma_mtp.models.moe import Experts
from mlx_gemma_mtp.ops.fused import geglu

Path = Callable[[mx.array, mx.array, mx.array], mx.array]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OURS, THEIRS = "mlx_gemma_mtp", "mlx-lm"


def quantised(hidden: int, moe: MoESpec, bits: int, group: int = 64) -> dict[str, mx.array]:
    """Random experts under the checkpoint's names: uniform codes, centred, scales and biases in float32.

    Inputs of size one give outputs of size one.
    """
    tensors, rng = {}, np.random.default_rng(0)
    shapes = ((moe.size, hidden), (moe.size, hidden), (hidden, moe.size))
    for name, (outputs, inputs) in zip(PROJECTIONS, shapes, strict=True):
        words = rng.integers(0, 2**32, (moe.num_experts, outputs, inputs * bits // 32), np.uint32)
        step = (12 / (4**bits - 1) / inputs) ** 0.5  # variance of uniform codes: (4 ** bits - 1) / 12
        scales = step * rng.uniform(0.75, 1.25, (moe.num_experts, outputs, inputs // group)).astype(np.float32)
        parts = {"weight": words, "scales": scales, "biases": scales * np.float32((1 - 2**bits) / 2)}
        tensors |= {f"switch_glu.{name}.{part}": mx.array(value) for part, value in parts.items()}
    return tensors


def layers(hidden: int, moe: MoESpec, bits: int) -> dict[str, Path]:
    """This package's experts and mlx-lm's, with the same quantised weights."""
    tensors = quantised(hidden, moe, bits)
    args = gemma4_text.ModelArgs(
        hidden_size=hidden, num_experts=moe.num_experts, top_k_experts=moe.top_k, moe_intermediate_size=moe.size
    )
    found = {OURS: Experts(hidden, moe), THEIRS: gemma4_text.Experts(args)}
    for module in found.values():
        nn.quantize(module, group_size=64, bits=bits)
        paths = [path for path, _ in tree_flatten(module.parameters())]
        module.load_weights([(path, tensors[path.replace(".gate_up.", ".")]) for path in paths])
        finish_loading(module)
    return found


class Plain:
    """Unquantised experts as bare arrays. gate_up: [E, hidden, 2 size]; down: [E, size, hidden]; both input-major."""

    def __init__(self, tensors: dict[str, mx.array]):
        """tensors: of PROJECTIONS, [E, out, in]."""
        gate_up = mx.concatenate([tensors["gate_proj"], tensors["up_proj"]], axis=1)
        self.gate_up, self.down = (mx.contiguous(w.swapaxes(1, 2)) for w in (gate_up, tensors["down_proj"]))
        mx.eval(self.gate_up, self.down)

    @property
    def paths(self) -> dict[str, Path]:
        return {"pairs": self.pairs, "sorted": self.ordered, "dense": self.dense}

    def pairs(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """A product for each pair of a token and an expert, in the order of the tokens."""
        tokens, top_k = experts.shape
        y = self._pairs(x, mx.array(np.repeat(np.arange(tokens, dtype=np.uint32), top_k)), experts.reshape(-1), False)
        return (y.reshape(tokens, top_k, -1) * weights[..., None]).sum(axis=1)

    def ordered(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Computes the routed experts with the pairs of an expert one after the other."""
        tokens, top_k = experts.shape
        order = mx.argsort(experts.reshape(-1))
        y = self._pairs(x, order // top_k, experts.reshape(-1)[order], True)[mx.argsort(order)]
        return (y.reshape(tokens, top_k, -1) * weights[..., None]).sum(axis=1)

    def _pairs(self, x: mx.array, rows: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        inner = mx.gather_mm(x[:, None], self.gate_up, rows, experts, sorted_indices=is_sorted)  # [P, 1, 2 size]
        inner, own = geglu(*mx.split(inner, 2, axis=-1)), mx.arange(experts.size, dtype=mx.uint32)
        return mx.gather_mm(inner, self.down, own, experts, sorted_indices=is_sorted)  # [P, 1, hidden]

    def dense(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Every expert for every token; those that were not chosen weigh nothing."""
        count = self.down.shape[0]
        inner = geglu(*mx.split(x[None] @ self.gate_up, 2, axis=-1))  # [E, M, size]
        shares = mx.put_along_axis(mx.zeros((x.shape[0], count)), experts, weights, axis=-1)  # [M, E]
        return ((inner @ self.down) * shares.T[..., None]).sum(axis=0)


def bundled(engine: Engine) -> dict[str, Path]:
    """The first layer's experts of the bundled pair, loaded in float32: as the package runs them, and as `Plain`."""
    tensors = read_tensors(DEMO / "target")
    names = {name: f"language_model.model.layers.0.experts.switch_glu.{name}.weight" for name in PROJECTIONS}
    plain = Plain({name: tensors[path].astype(mx.float32) for name, path in names.items()})
    return {OURS: engine.target.layers[0].experts, **plain.paths}


def random_inputs(tokens: int, hidden: int, moe: MoESpec) -> tuple[mx.array, mx.array, mx.array]:
    """Tokens that choose evenly and independently."""
    rng = np.random.default_rng(tokens)
    everyone = np.tile(np.arange(moe.num_experts, dtype=np.uint32), (tokens, 1))
    return _with_experts(mx.array(rng.permuted(everyone, axis=1)[:, : moe.top_k]), hidden)


def recorded_inputs(engine: Engine, prompt: str, tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    """The choices of the first layer for the last tokens of a prompt, consecutive as in a verify.

    Raises UserError for a prompt of fewer tokens.
    """
    ids = mx.array([engine.text.encode(prompt)])
    if ids.size < tokens:
        raise UserError(f"the prompt has {ids.size} tokens, expected at least {tokens}; ask for fewer")
    with watched(engine.target) as log:
        cache = Cache(engine.target.config.kv, ids.size, engine.target.dtype).open(ids.size)
        mx.eval(engine.target(ids, cache.span(ids.size)), log)
    return _with_experts(log[0][-tokens:], engine.target.config.hidden_size)


def _with_experts(experts: mx.array, hidden: int) -> tuple[mx.array, mx.array, mx.array]:
    tokens, top_k = experts.shape
    x = mx.random.normal((tokens, hidden), key=mx.random.key(tokens))
    weights = mx.softmax(mx.random.normal((tokens, top_k), key=mx.random.key(top_k)), axis=-1)
    mx.eval(x, experts, weights)
    return x, experts, weights
