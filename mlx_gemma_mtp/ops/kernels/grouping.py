"""Pairs (token, expert) sorted by expert on the device: which rows share one reading of an expert's weights."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..fused import numbers
from . import Kernel, checked, why_off

ROWS = 8  # rows of one group: what a SIMD-group holds accumulators for
THREADS = 128


class Groups(NamedTuple):
    """Pairs in groups of one expert and at most `rows` pairs.

    order: the pairs by expert, then by number, uint32 [P]. table: int32 [G, 3], for each group its expert, its first
    place in `order` and its number of pairs. Groups are in the order of experts; after the last come rows of zeros,
    since the host knows only a bound on how many there are.
    """

    order: mx.array
    table: mx.array
    rows: int


def most_groups(pairs: int, experts: int, rows: int) -> int:
    """Returns the largest number of groups that `pairs` pairs can fall into."""
    spread = min(pairs, experts)
    return spread + (pairs - spread) // rows


def group_reference(experts: mx.array, count: int, rows: int = ROWS) -> Groups:
    """Returns the groups of pairs, in plain MLX. experts: of each pair, [P] below `count`. Nothing is read back."""
    pairs = experts.size
    ids = experts.astype(mx.int32)
    order = mx.argsort(ids * pairs + mx.arange(pairs, dtype=mx.int32)).astype(mx.uint32)
    held = (ids[None] == mx.arange(count)[:, None]).sum(axis=1)  # pairs of each expert
    groups = (held + rows - 1) // rows
    ends = mx.cumsum(groups)
    number = mx.arange(most_groups(pairs, count, rows))
    expert = (ends[None] <= number[:, None]).sum(axis=1)  # `count` after the last group
    real, expert = expert < count, mx.minimum(expert, count - 1)
    done = (number - (ends - groups)[expert]) * rows  # pairs of this expert in earlier groups
    start = (mx.cumsum(held) - held)[expert] + done
    table = mx.stack([expert, start, mx.minimum(held[expert] - done, rows)], axis=1)
    return Groups(order, mx.where(real[:, None], table, 0).astype(mx.int32), rows)


class Tiles(NamedTuple):
    """Groups as G matrices of `rows` rows each. slot: int32 [P], the row that each pair has among all G * rows; pair:
    uint32 [G * rows], the pair that each row has, 0 where it has none; expert: [G], a tile's, any where it has no pair.
    """

    slot: mx.array
    pair: mx.array
    expert: mx.array


def tiles(experts: mx.array, count: int, rows: int = ROWS) -> Tiles:
    """Returns the tiles of pairs. experts: of each pair, [P] below `count`. Pairs of one expert keep their order.
    Nothing is read back.
    """
    pairs = experts.size
    own = experts[None] == numbers(count, dtype=np.uint32)[:, None]
    ranks = mx.cumsum(own.astype(mx.int32), axis=1)  # [E, P], from 1
    held = (ranks[:, -1:] + rows - 1) // rows  # tiles of each expert
    slots = ranks + ((mx.cumsum(held, axis=0) - held) * rows - 1)
    slot = mx.take_along_axis(slots, experts[None], axis=0)[0]
    empty = _zeros(most_groups(pairs, count, rows) * rows)
    pair = mx.put_along_axis(empty, slot, numbers(pairs, dtype=np.uint32), axis=0)
    return Tiles(slot, pair, experts[pair[::rows]])


@lru_cache(maxsize=256)
def _zeros(size: int) -> mx.array:
    return mx.array(np.zeros(size, np.uint32))  # from the host: no part of any graph


# A counting sort by one threadgroup. A thread owns every THREADS-th expert and reads all pairs twice, first to count
# and then to place its own: no atomics, so that pairs of one expert keep their order.
SOURCE = """
    threadgroup int held[EXPERTS];
    int lane = static_cast<int>(thread_index_in_threadgroup);
    int pairs = experts_shape[0];
    for (int e = lane; e < EXPERTS; e += THREADS) {
        int count = 0;
        for (int p = 0; p < pairs; p++) {
            count += static_cast<int>(experts[p]) == e ? 1 : 0;
        }
        held[e] = count;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = lane; e < EXPERTS; e += THREADS) {
        int start = 0;
        int group = 0;
        for (int before = 0; before < e; before++) {
            start += held[before];
            group += (held[before] + ROWS - 1) / ROWS;
        }
        for (int done = 0; done < held[e]; done += ROWS) {
            table[3 * group] = e;
            table[3 * group + 1] = start + done;
            table[3 * group + 2] = metal::min(held[e] - done, ROWS);
            group += 1;
        }
        for (int p = 0; p < pairs; p++) {
            if (static_cast<int>(experts[p]) == e) {
                order[start] = static_cast<uint>(p);
                start += 1;
            }
        }
        if (e == EXPERTS - 1) {
            int spread = metal::min(pairs, EXPERTS);
            int most = spread + (pairs - spread) / ROWS;
            for (int rest = 3 * group; rest < 3 * most; rest++) {
                table[rest] = 0;
            }
        }
    }
"""
KERNEL = Kernel("expert_groups", ("experts",), ("order", "table"), SOURCE)


def group_metal(experts: mx.array, count: int, rows: int = ROWS) -> Groups:
    """Returns the groups of pairs as `group_reference` does, by one launch of the kernel."""
    pairs = experts.size
    groups = most_groups(pairs, count, rows)
    order, table = KERNEL(
        inputs=[experts],
        template=[("EXPERTS", count), ("ROWS", rows), ("THREADS", THREADS)],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(pairs,), (groups, 3)],
        output_dtypes=[mx.uint32, mx.int32],
    )
    return Groups(order, table, rows)


def group(experts: mx.array, count: int, rows: int = ROWS) -> Groups:
    """Returns the groups of pairs, on the device. experts: of each pair, uint32 [P] below `count`."""
    if why_off("grouping") is None:
        return group_metal(experts, count, rows)
    return group_reference(experts, count, rows)


@checked
def self_check() -> str | None:
    """Returns None, or where the kernel differs from the reference."""
    experts = (mx.arange(75) ** 2 % 37 % 19).astype(mx.uint32)
    ours, reference = group_metal(experts, 19), group_reference(experts, 19)
    same = mx.array_equal(ours.order, reference.order) and mx.array_equal(ours.table, reference.table)
    return None if same else "another order or table of groups"
