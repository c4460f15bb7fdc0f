"""What K/V take: those of requests, and those that are kept for others. Numbers of the host alone."""

from __future__ import annotations

from dataclasses import dataclass

from .entries import Stage
from .prefix import Prefixes
from .prefix_disk import PrefixDisk
from .scheduler import Scheduler


@dataclass(frozen=True)
class KVBytes:
    """Bytes of K/V. used: of the tokens that requests have. reserved: that these requests have room in, whole rings and
    the places of tokens to come included. limit: that may be reserved, all that is beside the weights. memory, disk: of
    prefixes that are kept, on disk those of other models included.
    """

    used: int
    reserved: int
    limit: int
    memory: int
    disk: int


def kv_bytes(scheduler: Scheduler, prefixes: Prefixes, disk: PrefixDisk | None) -> KVBytes:
    """Returns what K/V take now. Any thread may ask; it reads the names of the files on disk."""
    demand = scheduler.demand
    rows, outside = scheduler.entries.at(Stage.LIVE), scheduler.entries.at(Stage.STAGED, Stage.READY)
    used = sum(demand.memory.saved(entry.fed) for entry in (*rows, *outside))
    reserved = sum(map(demand.row, rows)) + sum(map(demand.outside, outside))
    limit = max(demand.memory.limit - demand.memory.weights, 0)
    return KVBytes(used, reserved, limit, prefixes.bytes, 0 if disk is None else disk.store.bytes)
