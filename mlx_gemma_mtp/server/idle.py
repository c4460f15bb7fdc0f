"""How long nobody has asked for anything that needs the model."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from .door import QUIET

PATHS = tuple(path.decode() for path in QUIET)


class Idle:
    """An app that notes when its requests begin and end; those that only look at the server do not count."""

    def __init__(self, app: ASGIApp):
        self._app, self._running, self._since = app, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the last request has ended; 0 while one runs."""
        return 0.0 if self._running else time.monotonic() - self._since

    def begin(self) -> None:
        """Counts from now on."""
        self._since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") in PATHS:
            await self._app(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
            self._since = time.monotonic()
