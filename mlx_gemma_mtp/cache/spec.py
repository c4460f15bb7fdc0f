"""What a cache must know of a layer that owns keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CAPACITY_STEP = 256


@dataclass(frozen=True)
class KVSpec:
    """The shape of one layer's K/V. window: how many keys a query sees, itself included; None for full attention."""

    kv_heads: int
    head_dim: int
    window: int | None


def kv_bytes(specs: Sequence[KVSpec], tokens: int, rows: int, block: int, item_size: int) -> int:
    """Returns the bytes that a cache takes for `tokens` positions of `rows` sequences.

    Rings have window + block - 1 positions, however short the text is. Full layers grow in steps of 256. item_size:
    bytes of a number.
    """
    whole = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    slots = [spec.window + block - 1 if spec.window else whole for spec in specs]
    per_row = sum(2 * n * spec.kv_heads * spec.head_dim for n, spec in zip(slots, specs, strict=True))
    return rows * per_row * item_size
