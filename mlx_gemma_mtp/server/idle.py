"""How long nobody has asked for anything that needs the model."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .door import QUIET

PATHS = tuple(path.decode() for path in QUIET)


class Idle:
    """An app that notes when its requests begin and end.

    Those that only look at the server do not count. Their connections end with their answers: so no connection is open
    where nobody has asked for anything else, and none has to be closed on a client that asks just then.
    """

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
            await self._app(scope, receive, _Last(send))
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
            self._since = time.monotonic()


class _Last:
    """Sends an answer that ends its connection."""

    def __init__(self, send: Send):
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(raw=message.setdefault("headers", []))["connection"] = "close"
        await self._send(message)
