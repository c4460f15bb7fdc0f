"""The parent of the server: what Metal does wrong ends a process, so another one is started in its place.

The parent holds the socket that clients connect to, loads nothing, and answers 503 while no child listens. It imports
none of the server's packages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)
BAD_INPUT = 2  # the child's exit code that another start would give again
FAILED = 1  # the parent's, once it gives up
MOST_FAILURES = 5  # one after the other, of children that ended before they had lived for LIVED
LIVED = 60.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before the next start; doubled after each failure
LONGEST_HEAD = 1 << 16  # bytes of a request that is answered with 503
HEAD_IN = 5.0  # seconds in which it must have come
BODY = (
    b'{"error":{"message":"the model is loading; try again a little later","type":"server_error","param":null,'
    b'"code":"loading"}}'
)
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 2\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


@dataclass(frozen=True)
class Inherited:
    """What a child has of its parent, as numbers of open files.

    listening: the socket. ready: a pipe, to be written to once the child listens. parent: a pipe that ends when the
    parent does.
    """

    listening: int
    ready: int
    parent: int

    @classmethod
    def of(cls, text: str) -> Inherited:
        """Reads what `str` writes."""
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return f"{self.listening},{self.ready},{self.parent}"

    def socket(self) -> socket.socket:
        """Returns the socket that clients connect to."""
        return socket.socket(fileno=self.listening)

    def tell_ready(self) -> None:
        """Tells the parent that this process listens now."""
        os.write(self.ready, b"1")
        os.close(self.ready)

    def follow(self) -> None:
        """Has this process end, in good order, when its parent is gone."""

        def wait() -> None:
            os.read(self.parent, 1)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, daemon=True).start()


class Supervisor:
    """Starts a server again and again, until it ends by itself or a signal comes.

    command: of a child; the text of an Inherited is added to it. listening: the socket. signals: end it.
    """

    def __init__(self, command: Sequence[str], listening: socket.socket, signals: Sequence[signal.Signals]):
        self._command, self._socket, self._signals = list(command), listening, signals
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._ended = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit code of the whole server."""
        loop = asyncio.get_running_loop()
        for sign in self._signals:
            loop.add_signal_handler(sign, self._signalled, sign)
        failures = 0
        while True:
            began = time.monotonic()
            code = await self._live()
            if self._stopping or code in (0, BAD_INPUT):
                return max(code, 0)
            failures = 1 if time.monotonic() - began >= LIVED else failures + 1
            if failures >= MOST_FAILURES:
                log.error("the server has %s, %d times in a row; it is not started again", _said(code), failures)
                return FAILED
            pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
            log.error("the server has %s; it is started again in %.0f s", _said(code), pause)
            async with _Busy(self._socket):
                await self._sleep(pause)
            if self._stopping:
                return 0

    async def _live(self) -> int:
        """Starts a child and returns its exit code; clients are told to wait until it listens."""
        (ready, tell_ready), (parent, alive) = os.pipe(), os.pipe()
        given = Inherited(self._socket.fileno(), tell_ready, parent)
        try:
            # A session of its own: Ctrl-C in a terminal goes to the parent alone, which passes it on.
            self._child = subprocess.Popen(
                [*self._command, str(given)],
                pass_fds=(given.listening, given.ready, given.parent),
                start_new_session=True,
            )
            os.close(tell_ready)
            os.close(parent)
            loop = asyncio.get_running_loop()
            async with _Busy(self._socket):
                await loop.run_in_executor(None, os.read, ready, 1)  # also where the child has ended
            return await loop.run_in_executor(None, self._child.wait)
        finally:
            os.close(ready)
            os.close(alive)

    def _signalled(self, sign: signal.Signals) -> None:
        self._stopping = True
        self._ended.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(sign)

    async def _sleep(self, seconds: float) -> None:
        """Waits, unless the server is to end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)


class _Busy:
    """While it is entered, whoever connects is told that the server is loading."""

    def __init__(self, listening: socket.socket):
        self._socket = listening

    async def __aenter__(self) -> None:
        self._server = await asyncio.start_server(_refuse, sock=self._socket.dup(), limit=LONGEST_HEAD)

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_IN)
        writer.write(BUSY)
        await writer.drain()
    writer.close()


def _said(code: int) -> str:
    """How a process has ended."""
    if code >= 0:
        return f"ended with code {code}"
    return f"been killed by {signal.Signals(-code).name}"


def supervise(argv: Sequence[str], listening: socket.socket) -> int:
    """Serves with these arguments in a child process, which is started again where it fails. Returns the exit code."""
    return supervise_command([sys.executable, "-m", "mlx_gemma_mtp.serve", *argv, "--inherited"], listening)


def supervise_command(
    command: Sequence[str],
    listening: socket.socket,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> int:
    """Does so with any command, to which the text of an Inherited is added. signals: end it, and are passed on."""

    async def run() -> int:
        return await Supervisor(command, listening, signals).run()

    return asyncio.run(run())
