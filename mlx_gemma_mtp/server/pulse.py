"""The pulse of an engine: whether its thread still computes."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

from ..errors import in_a_line

if TYPE_CHECKING:
    from ..engine.engine import Engine

PATIENCE = 60.0  # seconds that a round may last; the first ones compile kernels
WAIT = 1.0  # seconds that one look waits


class Pulse:
    """Asks an engine's thread for a sign, one at a time, whoever wants to know."""

    def __init__(self, engine: Engine, patience: float = PATIENCE):
        self._engine, self._patience = engine, patience
        self._sign: asyncio.Future[None] | None = None
        self._asked = 0.0

    async def trouble(self) -> str | None:
        """Returns why the engine does not work, None where it does."""
        if self._sign is None or self._sign.done():
            self._ask()
        await asyncio.wait((self._sign,), timeout=WAIT)
        silent = time.monotonic() - self._asked
        if not self._sign.done():
            return f"the engine has given no sign for {silent:.0f} s" if silent >= self._patience else None
        error = self._sign.exception()
        return None if error is None else in_a_line(error)

    def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        self._sign, self._asked = loop.create_future(), time.monotonic()
        # Not a pool's thread: the process would wait for it in the end.
        threading.Thread(target=_call, args=(self._engine, self._sign, loop), daemon=True).start()


def _call(engine: Engine, sign: asyncio.Future[None], loop: asyncio.AbstractEventLoop) -> None:
    error: Exception | None = None
    try:
        engine.call(_nothing)
    except Exception as caught:
        error = caught
    try:
        loop.call_soon_threadsafe(_settle, sign, error)
    except RuntimeError:  # the loop has ended meanwhile
        return


def _nothing() -> None:
    """What the engine's thread is asked to do."""


def _settle(sign: asyncio.Future[None], error: Exception | None) -> None:
    if sign.cancelled():
        return
    if error is None:
        sign.set_result(None)
    else:
        sign.set_exception(error)
