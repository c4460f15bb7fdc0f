"""The mixture of experts beside the dense MLP of Gemma 4 26B-A4B: routing, and the chosen experts.

The sums are computed by one of several paths, which the table in ops/expert_paths.py chooses.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import count, groupby, takewhile

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..machine import device
from ..ops import expert_paths
from ..ops.elementwise import geglu
from ..ops.fused import numbers
from ..ops.kernels import down, gate_up, why_off
from ..ops.kernels.grouping import Tiles, group, tiles
from .config import MoESpec
from .linear import DerivedWeights, Linear, Stack, Weighted, input_major


def route(logits: mx.array, top_k: int, expert_scale: mx.array) -> tuple[mx.array, mx.array]:
    """Returns each token's k experts, uint32 [N, k], and their weights, float32 [N, k]. logits: [N, E].

    Softmax over all experts, the k best, renormalised, equals softmax over the k best logits. Then comes the per-expert
    scale. The slots are in ascending order of logits; of equal logits the higher expert is kept, and comes later (MLX's
    argsort is stable).
    """
    experts = mx.argsort(logits, axis=-1)[:, -top_k:]
    chosen = mx.take_along_axis(logits, experts, axis=-1).astype(mx.float32)
    return experts, mx.softmax(chosen, axis=-1, precise=True) * expert_scale[experts].astype(mx.float32)


class Router(nn.Module):
    """Scores the experts from the residual stream, normed with `norm_weight`."""

    def __init__(self, hidden_size: int, moe: MoESpec):
        super().__init__()
        self.top_k, self.root = moe.top_k, hidden_size**-0.5
        self.proj = Linear(hidden_size, moe.num_experts)
        self.scale = mx.ones((hidden_size,))
        self.per_expert_scale = mx.ones((moe.num_experts,))

    @property
    def norm_weight(self) -> mx.array:
        """The checkpoint's scale, times hidden ** -0.5: the weight of the norm before the router."""
        return self.scale * self.root

    def __call__(self, normed: mx.array) -> tuple[mx.array, mx.array]:
        """Returns each token's experts and their weights, [N, k] each. normed: [N, hidden]."""
        return route(self.proj(normed), self.top_k, self.per_expert_scale)


class ExpertLinear(Weighted, DerivedWeights):
    """One linear for each expert. weight: [experts, out, in]."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        scale = math.sqrt(1 / inputs)
        self.weight = mx.random.uniform(-scale, scale, (experts, outputs, inputs))
        self.derive()

    def derive(self) -> None:
        self.weight, self._transposed = input_major(self.weight)

    def __call__(self, x: mx.array, rows: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """Returns x[rows[p]] times the weights of expert experts[p] for each of P pairs, [P, 1, out].

        x: [N, 1, in]; ordered: whether the pairs are sorted by expert.
        """
        return mx.gather_mm(x, self._transposed, lhs_indices=rows, rhs_indices=experts, sorted_indices=ordered)

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine") -> QuantizedExpertLinear:
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(Weighted):
    """One MLX-quantised linear for each expert."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]

    def __call__(self, x: mx.array, rows: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """Returns x[rows[p]] times the weights of expert experts[p] for each of P pairs, [P, 1, out].

        x: [N, 1, in]; ordered: whether the pairs are sorted by expert. MLX takes tiles, which give other bits, for
        pairs that it knows to be sorted, from 4 an expert on. So it is told in prefill alone.
        """
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            lhs_indices=rows,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered and experts.size > expert_paths.VERIFY,
        )


@lru_cache(maxsize=256)
def _rows(tokens: int, pairs: int) -> mx.array:
    """Returns the token of each pair, 0 0 .. 1 1 .., uint32 [tokens * pairs]. It is kept: every layer asks for it."""
    return mx.array(np.repeat(np.arange(tokens, dtype=np.uint32), pairs))


class SwitchGLU(nn.Module):
    """gate, up and down of every expert, under the checkpoint's names."""

    def __init__(self, hidden_size: int, moe: MoESpec):
        super().__init__()
        self.gate_up = Stack(
            gate_proj=ExpertLinear(moe.num_experts, hidden_size, moe.size),
            up_proj=ExpertLinear(moe.num_experts, hidden_size, moe.size),
        )
        self.down_proj = ExpertLinear(moe.num_experts, moe.size, hidden_size)

    def __call__(self, x: mx.array, rows: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """Returns down(geglu(gate(x), up(x))) for each pair, [P, 1, hidden].

        x: [N, hidden]; rows, experts: of each pair, uint32 [P]; ordered: whether the pairs are sorted by expert.
        """
        both = self.gate_up(x[:, None], rows, experts, ordered)
        inner = geglu(*mx.split(both, 2, axis=-1))  # [P, 1, size]
        return self.down_proj(inner, numbers(experts.size, dtype=np.uint32), experts, ordered)  # [P, 1, hidden]

    def tiled(self, x: mx.array, experts: mx.array) -> mx.array:
        """Returns down(geglu(gate(x), up(x))) for each pair, [N k, hidden], by matrices of 8 rows of one expert.

        x: [N, hidden]; experts: [N, k]. Pair 0 fills the tiles up, and what comes of that is dropped.
        """
        tile = tiles(experts.reshape(-1), self.down_proj.weight.shape[0])
        both = self._tile_products(self.gate_up, x[tile.pair // experts.shape[1]], tile)
        inner = geglu(*mx.split(both[tile.slot], 2, axis=-1))  # [P, size]
        return self._tile_products(self.down_proj, inner[tile.pair], tile)[tile.slot]

    @staticmethod
    def _tile_products(linear: nn.Module, x: mx.array, tile: Tiles) -> mx.array:
        """Returns a linear's outputs for the rows of all tiles: [G rows, in] -> [G rows, out]."""
        count = tile.expert.size
        y = linear(x.reshape(count, -1, x.shape[-1]), numbers(count, dtype=np.uint32), tile.expert, True)
        return y.reshape(x.shape[0], -1)

    def groupable(self, dtype: mx.Dtype, pairs: int) -> bool:
        """Returns whether the kernels run for these weights (gate and up of one format) and so many pairs."""
        if why_off("gate_up") or why_off("down"):
            return False
        first, *rest = self.gate_up.values()
        alone = not rest and gate_up.usable(first.weights, dtype)
        return alone and down.usable(self.down_proj.weights, dtype, pairs)

    def grouped(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Returns each token's mixture, [N, hidden], by our kernels: every expert is read once for 8 rows.

        x: [N, hidden]; experts, weights: [N, k].
        """
        (both,) = self.gate_up.values()
        groups = group(experts.reshape(-1), both.weight.shape[0])
        inner = gate_up.gate_up(x, both.weights, experts, groups)
        return down.down(inner, self.down_proj.weights, experts, weights, groups)


class Experts(nn.Module):
    """Applies each token's chosen experts: all (token, expert) pairs of all rows of the batch in one product."""

    def __init__(self, hidden_size: int, moe: MoESpec):
        super().__init__()
        self.switch_glu = SwitchGLU(hidden_size, moe)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Returns each token's mixture of its experts, [N, hidden], by the path that the table chooses.

        x: [N, hidden]; experts, weights: [N, k].
        """
        return self.run(self.path(x.dtype, experts.size), x, experts, weights)

    def run(self, path: expert_paths.ExpertPath, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Returns each token's mixture of its experts, [N, hidden], by the given path.

        x: [N, hidden]; experts, weights: [N, k].
        """
        (tokens, top_k), pairs = experts.shape, experts.reshape(-1)
        if path == expert_paths.ExpertPath.GROUPED:
            return self.switch_glu.grouped(x, experts, weights)
        if path == expert_paths.ExpertPath.TILED:
            y = self.switch_glu.tiled(x, experts)
        elif path == expert_paths.ExpertPath.SORTED:
            order = mx.argsort(pairs)
            y = self.switch_glu(x, order // top_k, pairs[order], True)[mx.argsort(order)]
        elif path == expert_paths.ExpertPath.PAIRS:
            y = self.switch_glu(x, _rows(tokens, top_k), pairs, False)
        else:
            raise NotImplementedError(f"no code computes the path {path}")
        return down.combine(y.reshape(tokens, top_k, -1), weights)

    def path(self, dtype: mx.Dtype, pairs: int) -> expert_paths.ExpertPath:
        """Returns the path that the table chooses for so many pairs of inputs of dtype."""
        glu = self.switch_glu
        return expert_paths.choose(device.name(), dtype, glu.down_proj.form, pairs, glu.groupable(dtype, pairs))

    def paths(self, dtype: mx.Dtype, top_k: int) -> list[str]:
        """Returns the paths of forwards of one token up to expert_paths.VERIFY pairs, those of few tokens first."""
        widths = takewhile(lambda pairs: pairs <= expert_paths.VERIFY, (top_k << i for i in count()))
        return [str(path) for path, _ in groupby(self.path(dtype, pairs) for pairs in widths)]
