"""Products with weights: linears, the embedding that is also the head, and stacks of linears that are one product.

`finish_loading` is called once weights are loaded: it merges, derives and evaluates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..machine import device
from ..ops import expert_paths, pieces
from ..ops.expert_paths import ProductPath, Rule
from ..ops.kernels import few_rows, why_off
from ..ops.kernels.products import Weights


class DerivedWeights(nn.Module):
    """A module that computes with something derived from its weights; `finish_loading` has it derived after a load."""

    def derive(self) -> None:
        """Makes what is derived anew from the weights."""
        raise NotImplementedError


class Weighted(nn.Module):
    """A module that has weights, plain or MLX-quantised."""

    @property
    def weights(self) -> Weights:
        """The weights [..., out, in] as kernels take them."""
        if "scales" not in self:
            return Weights(self.weight)
        return Weights(self.weight, self.scales, self.get("biases"), self.group_size, self.bits, self.mode)

    @property
    def form(self) -> str:
        """The format of weights, as in expert_paths.RULES."""
        return f"{self.mode}{self.bits}" if "scales" in self else "float"


class Asked(NamedTuple):
    """All that a product's rule depends on, but for the weights, which stay."""

    dtype: mx.Dtype
    row_invariant: bool
    runs: bool
    measured: tuple[Rule, ...]


@dataclass(frozen=True)
class Decision:
    """The rule that the table gave, and for what."""

    asked: Asked
    rule: Rule

    def __deepcopy__(self, memo: dict) -> Decision:
        """Returns this one, for a copy of a model: it never changes, and MLX's dtypes cannot be copied."""
        return self


class Product(Weighted):
    """A module that multiplies with its weights by the path that the table in ops/expert_paths.py chooses.

    row_invariant: whether a row's bits must not depend on how many there are; see `keep_rows`.
    """

    row_invariant = False
    _decision: Decision | None = None

    def rule(self, dtype: mx.Dtype) -> Rule:
        """Returns the rule of products with inputs of dtype. The table is asked once, and again when something changed
        on which its answer depends: the measured rules, a kernel that is switched off, `row_invariant`.
        """
        asked = Asked(dtype, self.row_invariant, why_off("few_rows") is None, expert_paths.measured())
        if self._decision is None or self._decision.asked != asked:
            weights, usable = self.weights, few_rows.usable(self.weights, dtype)
            case = device.name(), dtype, self.form, max(weights.inputs, weights.outputs), usable, self.row_invariant
            self._decision = Decision(asked, expert_paths.product_rule(*case))
        return self._decision.rule

    def path(self, dtype: mx.Dtype, rows: int) -> ProductPath:
        """Returns the path of a product with so many rows of dtype."""
        return self.rule(dtype).path(rows)

    def product(self, x: mx.array) -> mx.array:
        """Returns x weight^T: [..., in] -> [..., out]."""
        if why_off("few_rows") is not None:
            return self.stock(x)
        return self.run(self.path(x.dtype, x.size // x.shape[-1]), x)

    def run(self, path: ProductPath, x: mx.array) -> mx.array:
        """Returns x weight^T by the given path: [..., in] -> [..., out]."""
        return few_rows.few_rows(x, self.weights) if path == ProductPath.FEW_ROWS else self.stock(x)

    def stock(self, x: mx.array) -> mx.array:
        """Returns x weight^T by MLX's own product."""
        raise NotImplementedError


class Linear(Product, nn.Linear, DerivedWeights):
    """x @ weight.T for x [N, in], without a transposition at every call."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.derive()

    def derive(self) -> None:
        self.weight, self._transposed = input_major(self.weight)
        self._few = pieces.few_rows(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x)

    def stock(self, x: mx.array) -> mx.array:
        if x.shape[0] <= self._few:
            return x @ self._transposed
        return pieces.product(x, self._transposed, self._few)

    def to_quantized(self, group_size: int | None, bits: int | None, mode: str = "affine") -> QuantizedLinear:
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class QuantizedLinear(Product, nn.QuantizedLinear):
    """A linear with MLX-quantised weights."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x)

    def stock(self, x: mx.array) -> mx.array:
        return nn.QuantizedLinear.__call__(self, x)


class Embedding(Product, nn.Embedding, DerivedWeights):
    """Rows of a table; `as_linear` multiplies with the table, as the tied head does."""

    def __init__(self, count: int, size: int):
        super().__init__(count, size)
        self.derive()

    def derive(self) -> None:
        self._blocks = pieces.blocks_of(self.weight)
        if self._blocks is None:
            self.weight, self._transposed = input_major(self.weight)
        else:
            self.weight = mx.contiguous(self.weight)
            self._transposed = self.weight.T

    def as_linear(self, x: mx.array) -> mx.array:
        return self.product(x)

    def stock(self, x: mx.array) -> mx.array:
        y = None if self._blocks is None else pieces.in_blocks(x, self._blocks)
        return x @ self._transposed if y is None else y

    def to_quantized(self, group_size: int | None, bits: int | None, mode: str = "affine") -> QuantizedEmbedding:
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class QuantizedEmbedding(Product, nn.QuantizedEmbedding):
    """Rows of an MLX-quantised table; `as_linear` multiplies with the table."""

    def as_linear(self, x: mx.array) -> mx.array:
        return self.product(x)

    def stock(self, x: mx.array) -> mx.array:
        return nn.QuantizedEmbedding.as_linear(self, x)


def input_major(weight: mx.array) -> tuple[mx.array, mx.array]:
    """Returns a weight [..., out, in] in the layout that is fast on this device, and its transposed view of one buffer.

    MLX's CPU products run up to twice as fast when the input axis is the outer one. On a GPU the file's layout stays.
    """
    transposed = weight.swapaxes(-1, -2)
    if device.traits().input_major:
        transposed = mx.contiguous(transposed)
        weight = transposed.swapaxes(-1, -2)
    return weight, transposed


class Stack(nn.Module):
    """Linears that read one input; the output is their outputs side by side.

    `merge` makes one product of neighbours of one format (exact: output rows are independent), so that q/k/v or gate/up
    cost one launch. The children keep the names of the checkpoint.
    """

    def __init__(self, **linears: nn.Module):
        super().__init__()
        for name, linear in linears.items():
            self[name] = linear

    def __call__(self, x: mx.array, *args: mx.array | bool) -> mx.array:
        outputs = [linear(x, *args) for linear in self.values()]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def merge(self) -> None:
        """Makes one linear of neighbours of one format, named after both."""
        groups: list[tuple[str, nn.Module]] = []
        for name, linear in self.items():
            if groups and _format(groups[-1][1]) == _format(linear):
                merged, first = groups.pop()
                both = {k: mx.concatenate([v, linear[k]], axis=v.ndim - 2) for k, v in first.parameters().items()}
                first.update(both)
                groups.append((f"{merged}_{name}", first))
            else:
                groups.append((name, linear))
        self.clear()
        for name, linear in groups:
            self[name] = linear


def _format(linear: nn.Module) -> tuple:
    """Returns the class, its quantisation and its dtypes: two linears that are equal in these can be one."""
    quantised = "scales" in linear
    numbers = (linear.group_size, linear.bits, linear.mode) if quantised else ()
    return (type(linear), *numbers, *(value.dtype for value in linear.parameters().values()))


def finish_loading(part: nn.Module) -> None:
    """Merges what can be one product, derives what follows from weights, and evaluates. Call it once weights are
    loaded.
    """
    for module in part.modules():
        if isinstance(module, Stack):
            module.merge()
    for module in part.modules():
        if isinstance(module, DerivedWeights):
            module.derive()
    mx.eval([[value for value in module.values() if isinstance(value, mx.array)] for module in part.modules()])


def products_of(model: nn.Module) -> list[Product]:
    """Returns what a model multiplies with: all but the table of per-layer inputs, which is only looked up."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, Product) and path != "embed_tokens_per_layer"
    ]


def measured_rules(model: nn.Module) -> list[str]:
    """Returns the measured rules that may decide how this model's products and experts are computed here. They change
    its bits, beside versions and kernels.
    """
    forms = {module.form for module in model.modules() if isinstance(module, Weighted)}
    return [str(rule) for rule in expert_paths.measured() if rule.weights in ("", *forms)]


def keep_rows(model: nn.Module, dtype: mx.Dtype) -> list[str]:
    """Has a model's products give a row the same bits whatever rows stand beside it, up to expert_paths.ROWS of them.

    Returns the formats of weights for which no kernel does so here. Call it before the first pass. dtype: of inputs.
    """
    products = products_of(model)
    for module in products:
        module.row_invariant = True
    return sorted({module.form for module in products if module.path(dtype, 1) != ProductPath.FEW_ROWS})


def first_products(model: nn.Module, dtype: mx.Dtype) -> Iterator[list[mx.array]]:
    """Yields products of each kind of matrix with every number of rows that has a kernel of ours, to be evaluated: that
    compiles the kernels. dtype: of inputs.
    """
    kinds = {(module.form, *module.weight.shape): module for module in products_of(model)}
    for module in kinds.values():
        rows = [rows for rows in few_rows.ROWS if module.path(dtype, rows) == ProductPath.FEW_ROWS]
        yield [few_rows.few_rows(mx.zeros((count, module.weights.inputs), dtype), module.weights) for count in rows]
