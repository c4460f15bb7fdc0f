"""A client's connection, with a limit for the time that a request may take to arrive."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_IN = 20.0  # seconds from a connection's beginning, or a further request's first byte, to the end of the head
BODY_IN = 300.0  # seconds from there to the end of the body


class Connection(H11Protocol):
    """As uvicorn has it, which waits for ever for the rest of a head or a body.

    Its parser is h11, whatever else is installed: httptools loses the body of a request that offers HTTP/2, takes heads
    of any size and two Host headers, and saves nothing that could be measured.
    """

    _limit: float | None = None  # what it waits for now
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._expect(HEAD_IN)

    def data_received(self, data: bytes) -> None:
        """Waits for what is still missing of a request, if anything is."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect(HEAD_IN)
        else:
            self._expect(BODY_IN if self.cycle.more_body else None)

    def connection_lost(self, error: Exception | None) -> None:
        """Waits for nothing any more."""
        self._expect(None)
        super().connection_lost(error)

    def _expect(self, limit: float | None) -> None:
        """Has the connection end after so many seconds; the same limit once more changes nothing."""
        if limit == self._limit:
            return
        self._limit = limit
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if limit is None else self.loop.call_later(limit, self.transport.close)
