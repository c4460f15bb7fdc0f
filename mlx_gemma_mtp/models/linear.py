"""Products with weights: linears, the embedding that is also the head, and stacks of linears that are one product.

`finish_loading` is called once weights are loaded: it merges, derives and evaluates.
"""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn

from ..machine import device

FEW = 64  # rows, up to which it pays to multiply a few at a time
FEWEST = 4  # rows at a time, from which it pays
BLOCK, BLOCK_ROWS = 64, 24  # outputs of a table that are multiplied at a time, and rows, up to which it pays
SMALL = 1 << 24  # bytes, up to which a table is kept in both layouts


class DerivedWeights(nn.Module):
    """A module that computes with something derived from its weights; `finish_loading` has it derived after a load."""

    def derive(self) -> None:
        """Makes what is derived anew from the weights."""
        raise NotImplementedError


class Linear(nn.Linear, DerivedWeights):
    """x @ weight.T for x [N, in], without a transposition at every call."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.derive()

    def derive(self) -> None:
        self.weight, self._transposed = input_major(self.weight)
        self._few = few_rows(self.weight.size)

    def __call__(self, x: mx.array) -> mx.array:
        if x.shape[0] <= self._few:
            return x @ self._transposed
        return product(x, self._transposed, self._few)


class Embedding(nn.Embedding, DerivedWeights):
    """Rows of a table; `as_linear` multiplies with the table, as the tied head does."""

    def __init__(self, count: int, size: int):
        super().__init__(count, size)
        self.derive()

    def derive(self) -> None:
        count, size = self.weight.shape
        if device.small_product() and self.weight.nbytes <= SMALL and count % BLOCK == 0:
            self.weight = mx.contiguous(self.weight)
            self._transposed = self.weight.T
            blocks = self.weight.reshape(-1, BLOCK, size).swapaxes(1, 2)  # [V / BLOCK, size, BLOCK]
            self._blocks = mx.contiguous(blocks)
        else:
            self.weight, self._transposed = input_major(self.weight)
            self._blocks = None

    def as_linear(self, x: mx.array) -> mx.array:
        """Returns the scores of all rows of the table, [..., V]. x: [..., size]."""
        *axes, size = x.shape
        rows = x.size // size
        if self._blocks is None or rows > BLOCK_ROWS or rows * size * BLOCK > device.small_product():
            return x @ self._transposed
        y = mx.broadcast_to(x.reshape(rows, size), (self._blocks.shape[0], rows, size)) @ self._blocks
        return y.swapaxes(0, 1).reshape(*axes, -1)


def few_rows(size: int) -> int:
    """Returns how many rows a product with a weight of so many numbers may have before the CPU packs it; a number that
    none has where it pays to pack anyway, and on a GPU.
    """
    few = device.small_product() // size
    return few if few >= FEWEST else sys.maxsize


def product(x: mx.array, weight: mx.array, few: int) -> mx.array:
    """Returns x @ weight, a few rows at a time if that divides them, and if they are no more than FEW.

    x: [N, in]; weight: [in, out]; few: rows, up to which the product is not packed (see few_rows).
    """
    rows, (inputs, outputs) = x.shape[0], weight.shape
    each = next((count for count in range(few, FEWEST - 1, -1) if rows % count == 0), 0)
    if rows > FEW or not each:
        return x @ weight
    y = x.reshape(-1, each, inputs) @ mx.broadcast_to(weight, (rows // each, inputs, outputs))
    return y.reshape(rows, outputs)


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
