"""The room that a run has, and what takes it: an engine's models and settings as admission's Memory."""

from __future__ import annotations

from ..cache.spec import row_bytes, staged_bytes
from ..machine import memory
from ..machine.device import metal_available
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.loading import model_bytes
from ..models.transients import Transients
from .admission import Memory
from .settings import Settings


def room(target: Gemma4, drafter: Drafter | None, settings: Settings, block: int) -> Memory:
    """Returns where the bytes of an engine's run go. block: tokens of the longest verify."""
    config, size, chunk = target.config, target.dtype.size, settings.prefill_chunk
    back = settings.drafting.lookback
    transients = Transients(config, size, chunk, metal_available())
    return Memory(
        limit=settings.memory_limit or memory.total_bytes(),
        weights=sum(model_bytes(model) for model in (target, drafter) if model is not None),
        row=lambda tokens: row_bytes(config.kv, tokens, block, size, back),
        staged=lambda tokens: staged_bytes(config.kv, tokens, chunk, size, back),
        saved=lambda tokens: row_bytes(config.kv, tokens, 1, size, back),
        chunk=transients.chunk,
        verify=lambda rows, context: transients.verify(rows, block, context),
    )
