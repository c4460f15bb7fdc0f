"""The server's process: it listens, and ends in good order: after a signal, or where nobody has asked for long."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from .connection import Connection
from .idle import Idle
from .pulse import Pulse
from .service import Served
from .supervisor import Inherited

log = logging.getLogger(__name__)
WATCH = 5.0  # seconds between two looks at the engine
LOOK = 0.1  # seconds between two looks at whether anybody asks
BROKEN = 70  # the exit code of a process whose engine does not work any more
AFTERWARDS = 5  # seconds that the last events have, once their texts are ended
FREEING = 30.0  # seconds that the engine then has to give its memory back


class Server(uvicorn.Server):
    """Serves an app until a signal comes. What runs then goes on for `drain` seconds, nothing new begins; a second
    signal ends it at once. An engine that hangs does not keep the process.

    parent: the process that starts another one where this one fails; then it ends where the engine does not work any
    more. unload: seconds without requests after which it ends, and `unloaded` is set; None is never.
    """

    def __init__(
        self,
        app: ASGIApp,
        served: Served,
        drain: float,
        parent: Inherited | None = None,
        unload: float | None = None,
    ):
        self._idle = Idle(app)
        config = uvicorn.Config(
            app if unload is None else self._idle,
            interface="asgi3",
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=max(1, round(drain)) + AFTERWARDS,
        )
        super().__init__(config)
        self.served, self.drain, self.parent, self._unload = served, drain, parent, unload
        self.unloaded = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.parent is not None:
            self._begin(self.watch())
            self.parent.tell_ready(lambda connection: self._loop.call_soon_threadsafe(self._adopt, connection))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _adopt(self, connection: socket.socket | None) -> None:
        """Serves a connection that the parent has accepted; after the last, time without requests counts."""
        if connection is not None:
            self._begin(self._take_over(connection))
        elif self._unload is not None:
            self._idle.begin()
            self._begin(self._unload_if_idle())

    async def _take_over(self, connection: socket.socket) -> None:
        def protocol() -> Connection:
            state = {"server_state": self.server_state, "app_state": self.lifespan.state}
            return Connection(config=self.config, _loop=self._loop, **state)

        with suppress(OSError):  # the client has left
            await self._loop.connect_accepted_socket(protocol, connection)

    async def _unload_if_idle(self) -> None:
        """Ends the process once nobody has asked for long. Who connects meanwhile waits at the socket, which the parent
        holds; who has connected already is served.
        """
        while self._idle.seconds < self._unload or self.server_state.connections:
            await asyncio.sleep(LOOK)
        log.info("nobody has asked for %g s; the model is unloaded", self._unload)
        for server in self.servers:
            server.close()
        await asyncio.sleep(LOOK)  # for connections that were accepted at this very moment
        while self.server_state.connections or self.server_state.tasks:
            for each in tuple(self.server_state.connections):
                if each.cycle is not None:
                    each.shutdown()  # after its answer
            await asyncio.sleep(LOOK)
        _leave_after(FREEING)
        self.unloaded = self.should_exit = True

    async def watch(self) -> None:
        """Ends the process where the engine has failed or hangs. Nothing less gives a thread back that waits for
        Metal.
        """
        pulse, troubles = Pulse(self.served.engine), 0
        while True:
            trouble = await pulse.trouble()
            troubles = 0 if trouble is None else troubles + 1
            if troubles > 1 and not self.served.draining:  # one may come of a process that was stopped meanwhile
                log.critical("the engine does not work any more, so this process ends: %s", trouble)
                os._exit(BROKEN)
            await asyncio.sleep(WATCH)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Is called with each signal. The process is not ended by the signal itself, as uvicorn would have it."""
        if self.should_exit:
            self.force_exit = True
            return
        self.served.draining = self.should_exit = True
        log.info("stopping: what runs has %.0f s to end; a second signal ends it now", self.drain)
        _leave_after(self.drain + AFTERWARDS + FREEING)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.drain, self._end)

    def _end(self) -> None:
        """Ends what still runs: each stream then tells its client why."""
        self._loop.run_in_executor(None, self.served.engine.close)


def _leave_after(seconds: float) -> None:
    last = threading.Timer(seconds, _leave)
    last.daemon = True  # it keeps no process that ends by itself
    last.start()


def _leave() -> None:
    """Ends a process whose engine keeps it from ending."""
    log.critical("the engine does not end, so this process does")
    os._exit(BROKEN)
