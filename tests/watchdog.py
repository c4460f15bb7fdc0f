"""A test that hangs ends the run with every thread's stack, so that it is seen where it hung."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends the process with exit code 1 where the block takes longer: a thread that waits for ever cannot be raised in.

    seconds: many times what the block takes on a slow machine; nothing is measured by it.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
