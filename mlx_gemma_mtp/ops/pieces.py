"""Products on a CPU in pieces that its BLAS multiplies as they lie in memory: it packs larger ones first, which takes
as long as some rows of the product itself.
"""

from __future__ import annotations

import sys

import mlx.core as mx

from ..machine import device

MANY = 64  # rows, from which on packing pays
FEWEST = 4  # rows at a time, from which pieces pay
BLOCK, BLOCK_ROWS = 64, 24  # outputs of a block of a table, and rows, up to which blocks pay
SMALL = 1 << 24  # bytes, up to which a table is kept in blocks, too


def few_rows(weight: mx.array) -> int:
    """Returns how many rows a product with this weight may have before it is packed; a number that none has where that
    is not to be avoided: by a BLAS that always packs, and on a GPU.
    """
    few = device.small_product() // weight.size
    return few if few >= FEWEST else sys.maxsize


def product(x: mx.array, weight: mx.array, few: int) -> mx.array:
    """Returns x @ weight, at most `few` rows at a time if that divides them into equal parts, and if they are not many.

    x: [N, in]; weight: [in, out]; few: see few_rows.
    """
    rows, (inputs, outputs) = x.shape[0], weight.shape
    each = next((count for count in range(few, FEWEST - 1, -1) if rows % count == 0), 0) if rows <= MANY else 0
    if not each:
        return x @ weight
    y = x.reshape(-1, each, inputs) @ mx.broadcast_to(weight, (rows // each, inputs, outputs))
    return y.reshape(rows, outputs)


def blocks_of(table: mx.array) -> mx.array | None:
    """Returns a table [V, size] as blocks [V / BLOCK, size, BLOCK], each a product of its own; None where that does not
    pay, or takes too much memory.
    """
    count, size = table.shape
    if not device.small_product() or table.nbytes > SMALL or count % BLOCK:
        return None
    return mx.contiguous(table.reshape(-1, BLOCK, size).swapaxes(1, 2))


def in_blocks(x: mx.array, blocks: mx.array) -> mx.array | None:
    """Returns x times a table in blocks, [..., size] -> [..., V]; None for too many rows."""
    *axes, size = x.shape
    rows = x.size // size
    if rows > BLOCK_ROWS or rows * size * BLOCK > device.small_product():
        return None
    y = mx.broadcast_to(x.reshape(rows, size), (blocks.shape[0], rows, size)) @ blocks
    return y.swapaxes(0, 1).reshape(*axes, -1)
