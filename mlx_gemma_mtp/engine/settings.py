"""What an engine is made with, apart from its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..cache.spec import KVSpec, with_bits
from ..files import prefix_store
from ..models.config import TargetConfig
from ..sampling.params import MAX_ROWS
from ..speculative.depth import AUTO
from ..speculative.drafting import DEFAULT_DRAFTING, Drafting

PREFILL_CHUNK = 512
MAX_WAITING = 1024


@dataclass(frozen=True)
class Settings:
    """The settings of an engine, checked, as `load` describes them.

    kv_bits: of full layers' K/V, None for the model's type. kv_bits_rings: whether sliding layers' have them, too.
    row_invariant: whether products give a row the same bits in any company (models/linear.py).
    prefix_memory: bytes for prefixes; 0 keeps none, None is a share of the limit (keeping.py). prefix_cache: a folder
    for prefixes on disk; None keeps none there. suppress: token ids that the folder forbids.
    """

    num_draft_tokens: int | str = AUTO
    max_rows: int = MAX_ROWS
    prefill_chunk: int = PREFILL_CHUNK
    max_waiting: int = MAX_WAITING
    memory_limit: int | None = None
    prefix_memory: int | None = None
    prefix_cache: Path | None = None
    prefix_cache_limit: int = prefix_store.LIMIT
    wired_limit: bool = False
    drafting: Drafting = DEFAULT_DRAFTING
    learning: bool = True
    kv_bits: int | None = None
    kv_bits_rings: bool = False
    row_invariant: bool = False
    suppress: tuple[int, ...] = ()

    def specs(self, config: TargetConfig) -> tuple[KVSpec, ...]:
        """Returns what the caches of a target are made of. Raises UserError where its K/V cannot have these bits."""
        return with_bits(config.kv, self.kv_bits, self.kv_bits_rings)
