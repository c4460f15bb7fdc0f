"""Gemma 4 with its MTP drafters on MLX: more tokens a second, the same text.

>>> from mlx_gemma_mtp import SamplingParams, load
>>> engine = load()  # the small bundled pair; load("path/to/gemma-4-26B-A4B-it-4bit") for a real one
>>> engine.generate("def fibonacci(n):", SamplingParams(max_tokens=32)).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import UserError

if TYPE_CHECKING:
    from .engine.conversation import Conversation
    from .engine.engine import Engine
    from .engine.load import load
    from .engine.request import Chunk, Result
    from .engine.stats import Stats
    from .sampling.params import SamplingParams
    from .text.tools import ToolCall

__all__ = [
    "Chunk",
    "Conversation",
    "Engine",
    "Result",
    "SamplingParams",
    "Stats",
    "ToolCall",
    "UserError",
    "__version__",
    "load",
]

_HOMES = {
    "Chunk": "engine.request",
    "Conversation": "engine.conversation",
    "Engine": "engine.engine",
    "Result": "engine.request",
    "SamplingParams": "sampling.params",
    "Stats": "engine.stats",
    "ToolCall": "text.tools",
    "load": "engine.load",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `python -m mlx_gemma_mtp.generate` may load a BLAS before MLX does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
