"""The server's process: it listens, and ends in good order."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from .service import Served

log = logging.getLogger(__name__)
AFTERWARDS = 5  # seconds that the last events have, once their texts are ended


class Server(uvicorn.Server):
    """Serves an app until a signal comes. What runs then goes on for `drain` seconds, nothing new begins; a second
    signal ends it at once.
    """

    def __init__(self, app: ASGIApp, served: Served, host: str, port: int, drain: float):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=max(1, round(drain)) + AFTERWARDS,
        )
        super().__init__(config)
        self.served, self.drain = served, drain
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @property
    def port(self) -> int:
        """The port that it listens on, also where the system chose it."""
        return self.servers[0].sockets[0].getsockname()[1]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Is called with each signal. The process is not ended by the signal itself, as uvicorn would have it."""
        if self.should_exit:
            self.force_exit = True
            return
        self.served.draining = self.should_exit = True
        log.info("stopping: what runs has %.0f s to end; a second signal ends it now", self.drain)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.drain, self._end)

    def _end(self) -> None:
        """Ends what still runs: each stream then tells its client why."""
        self._loop.run_in_executor(None, self.served.engine.close)
