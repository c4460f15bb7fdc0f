"""Lanes: on a CPU, MLX computes what is asked of a stream in one thread, one operation after the other. What is asked
of a second stream meanwhile takes a second core.

A prefill has work that can wait for nobody: the blocks of its attention, and a dense MLP beside the experts. Halves of
the tokens, all the way, gain less: they double the operations, each of which costs the host some microseconds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import count

import mlx.core as mx

from ..machine import device

FEWEST = 96  # tokens from which on work that is done side by side pays for the waits
_begun = count()


@cache
def _second() -> mx.ThreadLocalStream | None:
    """The stream beside the default one, of each thread its own; None where it would take no core of its own."""
    return mx.new_thread_local_stream(mx.cpu) if device.streams_take_cores() else None


def number() -> int:
    """Returns how many lanes there are, 1 or 2."""
    return 1 if _second() is None else 2


def turn() -> int:
    """Returns 0, 1, 2 .. at each call: the lane with which the next one begins whose work may lie on any."""
    return next(_begun)


def lane(index: int) -> AbstractContextManager:
    """Returns a context in which operations go to a lane, of which indices go round."""
    second = _second()
    return nullcontext() if second is None or index % 2 == 0 else mx.stream(second)
