"""What a cache must know of a layer that owns keys and values, and how many bytes follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UserError

BITS = (8, 4)  # of a quantised number of K/V
GROUPS = (64, 32)  # numbers along a head that share a scale and a bias: the first that divides the head
SMALLEST, STEADY = 256, 1024  # tokens: the smallest capacity class, and the one from which on an octave has four


@dataclass(frozen=True)
class KVSpec:
    """The shape of one layer's K/V.

    window: how many keys a query sees, itself included; None for full attention. bits: of a quantised number, of BITS;
    None for numbers of the model's type.
    """

    kv_heads: int
    head_dim: int
    window: int | None
    bits: int | None = None

    @property
    def group(self) -> int | None:
        """How many numbers of a head share a scale and a bias; None where no group divides the head."""
        return next((size for size in GROUPS if self.head_dim % size == 0), None)

    def slot_bytes(self, item_size: int) -> int:
        """Returns the bytes of the K/V of one position. item_size: bytes of a number of the model's type."""
        if self.bits is None:
            return 2 * self.kv_heads * self.head_dim * item_size
        scales = 2 * self.head_dim // self.group * item_size  # a bias beside each
        return 2 * self.kv_heads * (self.head_dim * self.bits // 8 + scales)


def with_bits(specs: Sequence[KVSpec], bits: int | None, rings: bool = False) -> tuple[KVSpec, ...]:
    """Returns the specs of a cache whose K/V have so many bits: in full layers, and in sliding layers where `rings`
    says so. None keeps all as they are.

    Raises UserError for heads that no group divides.
    """
    if bits is None:
        return tuple(specs)
    chosen = [spec.window is None or rings for spec in specs]
    for spec in (spec for spec, quantised in zip(specs, chosen, strict=True) if quantised and spec.group is None):
        raise UserError(
            f"kv_bits is {bits}, but this model has K/V heads of {spec.head_dim} numbers, expected a multiple of "
            f"{min(GROUPS)}; leave kv_bits out"
        )
    return tuple(replace(spec, bits=bits) if quantised else spec for spec, quantised in zip(specs, chosen, strict=True))


def capacity(tokens: int) -> int:
    """Returns the capacity class of a row: how many slots full layers keep for so many tokens.

    The classes are 256, 512, 1024, and then four an octave: 1280, 1536, 1792, 2048, 2560, 3072 and so on. So a row
    that grows is copied seldom, and at most a fifth of what it takes is unused.
    """
    octave = (max(tokens, 1) - 1).bit_length()  # of 2^(octave - 1) < tokens <= 2^octave
    if tokens <= STEADY:
        return max(SMALLEST, 1 << octave)
    step = 1 << (octave - 3)
    return -(-tokens // step) * step


def ring_slots(window: int, block: int, lookback: int = 0) -> int:
    """Returns the slots of a sliding layer's ring, by the ring law. block: the longest write. lookback: how far before
    the newest token's index a drafter's query may sit.
    """
    return window + block - 1 + lookback


def row_bytes(specs: Sequence[KVSpec], tokens: int, block: int, item_size: int, lookback: int = 0) -> int:
    """Returns the bytes that a row of so many tokens takes in a batch's cache: whole rings, however short the text is,
    and in full layers the class that holds it and two blocks more.

    block: the longest write. item_size: bytes of a number of the model's type.
    """
    full = capacity(tokens + 2 * block)
    return _bytes(
        specs, [full if s.window is None else ring_slots(s.window, block, lookback) for s in specs], item_size
    )


def staged_bytes(specs: Sequence[KVSpec], tokens: int, block: int, item_size: int, lookback: int = 0) -> int:
    """Returns the bytes of a cache opened for one row of at most so many tokens (`Cache.open`). block: the chunk."""
    full = capacity(tokens)
    slots = [full if s.window is None else min(full, ring_slots(s.window, block, lookback)) for s in specs]
    return _bytes(specs, slots, item_size)


def saved_bytes(specs: Sequence[KVSpec], tokens: int, item_size: int, lookback: int = 0) -> int:
    """Returns the bytes of a sequence of so many tokens by itself (`Cache.save` without slack)."""
    slots = [tokens if s.window is None else min(tokens, s.window - 1 + lookback) for s in specs]
    return _bytes(specs, slots, item_size)


def _bytes(specs: Sequence[KVSpec], slots: Sequence[int], item_size: int) -> int:
    return sum(n * spec.slot_bytes(item_size) for n, spec in zip(slots, specs, strict=True))
