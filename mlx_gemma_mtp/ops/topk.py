"""The largest of many values, exact and without a sort of all of them.

Values are taken in groups of neighbours. The k groups with the largest maxima hold the k largest values: a value in
any other group has k maxima before it. So one pass makes the maxima, k groups are picked among these, and what is left
to look through is k groups instead of all. On a GPU, where a partition is a sort of everything, that pass is a cheap
reduction; on a CPU it is a fifth of a partition.

The order is total: larger values first, and of equals the lower column. It holds at the border of the k, too, so that
the first of the k largest are the same whatever k is. Groups are neighbours for its sake: of equal maxima the group
that comes first has the lower columns. NaN is as good as nothing in here, and a row that has one is in no useful
order; its columns exist.
"""

from __future__ import annotations

import mlx.core as mx

from .fused import numbers

FEW = 32  # times k: of so few values all are looked at
SMALL = 16384  # values of all rows, likewise: what every operation costs by itself is more
LANES = 64  # of a sum: MLX adds whole lines of a matrix four times as fast as the numbers of one line


def topk(values: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Returns the k largest values, best first, and their columns, uint32: [..., k] each, or [..., n] where k is more.

    values: [..., n]. Of equals the lower column comes first.
    """
    rows = values.reshape(-1, values.shape[-1])
    if k < rows.shape[1]:
        columns = _members(rows, k)
        found = mx.take_along_axis(rows, columns, axis=-1)
        order = mx.argsort(-found, axis=-1)  # MLX leaves equals in their order
        found, columns = (mx.take_along_axis(each, order, axis=-1) for each in (found, columns))
    else:
        columns = mx.argsort(-rows, axis=-1)
        found = mx.take_along_axis(rows, columns, axis=-1)
    return tuple(each.reshape(*values.shape[:-1], -1) for each in (found, columns))


def total(values: mx.array) -> mx.array:
    """Returns the sums of values [..., n], [...]: finite where all values are."""
    *rows, n = values.shape
    if n % LANES:
        return values.sum(axis=-1)
    return values.reshape(*rows, LANES, n // LANES).sum(axis=-2).sum(axis=-1)


def _members(rows: mx.array, k: int) -> mx.array:
    """Returns the columns of the k largest, in the order of the columns: [R, k] of [R, n], k < n."""
    count, n = rows.shape
    size = _group(count, n, k)
    if size == 1:
        return mx.sort(mx.argpartition(-rows, kth=k - 1, axis=-1)[:, :k], axis=-1)
    if short := -n % size:
        rows = mx.concatenate([rows, mx.full((count, short), -mx.inf, rows.dtype)], axis=-1)
    groups = rows.shape[1] // size
    best = _members(rows.reshape(count, groups, size).max(axis=-1), k)
    lines = rows.reshape(count * groups, size)[best + numbers(count)[:, None] * groups]
    inside = _members(lines.reshape(count, k * size), k)
    columns = mx.take_along_axis(best, inside // size, axis=-1) * size + inside % size
    return mx.minimum(columns, n - 1) if short else columns  # beyond the end is only what NaN let in


def _group(rows: int, n: int, k: int) -> int:
    """Returns how many neighbours make a group: about as many groups then are there as values in the best k. 1 where
    all values are looked at.
    """
    if n <= FEW * k or rows * n <= SMALL:
        return 1
    return 1 << max((n // k).bit_length() - 1 >> 1, 1)
