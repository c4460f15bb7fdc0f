"""What an engine is made with, apart from its models."""

from __future__ import annotations

from dataclasses import dataclass

from ..sampling.params import MAX_ROWS
from ..speculative.depth import AUTO
from ..speculative.drafting import DEFAULT_DRAFTING, Drafting

PREFILL_CHUNK = 256
MAX_WAITING = 1024


@dataclass(frozen=True)
class Settings:
    """The settings of an engine, checked, as `load` describes them.

    prefix_memory: bytes for prefixes; 0 keeps none, None is a share of the limit (keeping.py). suppress: token ids that
    the folder forbids.
    """

    num_draft_tokens: int | str = AUTO
    max_rows: int = MAX_ROWS
    prefill_chunk: int = PREFILL_CHUNK
    max_waiting: int = MAX_WAITING
    memory_limit: int | None = None
    prefix_memory: int | None = None
    wired_limit: bool = False
    drafting: Drafting = DEFAULT_DRAFTING
    frozen_costs: bool = False
    suppress: tuple[int, ...] = ()
