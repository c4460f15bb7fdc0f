"""The parent of the server: what Metal does wrong ends a process, so another one is started in its place.

The parent holds the socket that clients connect to, loads nothing, and answers where no child listens. A child that
nobody needs ends, which gives its memory back for certain; the next request has another one started, and waits for it.
It imports none of the server's packages.
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .door import Door

log = logging.getLogger(__name__)
BAD_INPUT = 2  # the child's exit code that another start would give again
UNLOADED = 75  # the child's exit code where nobody has asked for long
FAILED = 1  # the parent's, once it gives up
MOST_FAILURES = 5  # one after the other, of children that ended before they had lived for LIVED
LIVED = 60.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before the next start; doubled after each failure


@dataclass
class Inherited:
    """What a child has of its parent, as numbers of open files.

    listening: the socket. ready: a pipe, to be written to once the child listens. parent: a socket through which the
    parent hands connections over, and that ends when the parent does.
    """

    listening: int
    ready: int
    parent: int
    _adopt: Callable[[socket.socket | None], None] | None = field(init=False, repr=False, default=None)

    @classmethod
    def of(cls, text: str) -> Inherited:
        """Reads what `str` writes."""
        return cls(*map(int, text.split(",")))

    def __str__(self) -> str:
        return f"{self.listening},{self.ready},{self.parent}"

    def socket(self) -> socket.socket:
        """Returns the socket that clients connect to."""
        return socket.socket(fileno=self.listening)

    def tell_ready(self, adopt: Callable[[socket.socket | None], None]) -> None:
        """Tells the parent that this process listens now.

        adopt: is called in another thread, with each connection that has waited for that, and with None after the last.
        """
        self._adopt = adopt
        os.write(self.ready, b"1")
        os.close(self.ready)

    def follow(self) -> None:
        """Has this process end, in good order, when its parent is gone."""
        channel = socket.socket(fileno=self.parent)

        def wait() -> None:
            while True:
                said, files, *_ = socket.recv_fds(channel, 1, 1)
                if not said:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._adopt(socket.socket(fileno=files[0]) if files else None)

        threading.Thread(target=wait, daemon=True).start()


def hand_over(channel: socket.socket, connections: Sequence[socket.socket]) -> None:
    """Gives a child the connections that have waited for it."""
    for each in connections:
        with each, suppress(OSError):  # of a child that has ended
            socket.send_fds(channel, [b"c"], [each.fileno()])
    with suppress(OSError):
        channel.send(b".")


class Supervisor:
    """Starts a server again and again, until it ends by itself or a signal comes.

    command: of a child; the text of an Inherited is added to it. listening: the socket. signals: end it.
    """

    def __init__(self, command: Sequence[str], listening: socket.socket, signals: Sequence[signal.Signals]):
        self._command, self._socket, self._signals = list(command), listening, signals
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = self._served = False  # whether it is to end; whether a child has listened
        self._ended = asyncio.Event()

    async def run(self) -> int:
        """Returns the exit code of the whole server."""
        loop = asyncio.get_running_loop()
        for sign in self._signals:
            loop.add_signal_handler(sign, self._signalled, sign)
        failures, door = 0, Door(self._socket)
        while True:
            began = time.monotonic()
            code = await self._live(door)
            if self._stopping or code == 0 or (code == BAD_INPUT and not self._served):
                return 0 if code == UNLOADED else max(code, 0)
            if code == UNLOADED:
                failures, door = 0, Door(self._socket, holding=True)
                if not await self._called(door):
                    return 0
                continue
            failures, door = 1 if time.monotonic() - began >= LIVED else failures + 1, Door(self._socket)
            if failures >= MOST_FAILURES:
                log.error("the server has %s, %d times in a row; it is not started again", _said(code), failures)
                return FAILED
            pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
            log.error("the server has %s; it is started again in %.0f s", _said(code), pause)
            door.open()
            await self._sleep(pause)
            if self._stopping:
                await door.turn_away()
                return 0

    async def _called(self, door: Door) -> bool:
        """Waits for a request. Returns whether one has come; else the server is to end."""
        log.info("the model is unloaded; the next request loads it")
        door.open()
        ends = [asyncio.ensure_future(each) for each in (door.called.wait(), self._ended.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for each in ends:
            each.cancel()
        if self._stopping:
            await door.turn_away()
        return not self._stopping

    async def _live(self, door: Door) -> int:
        """Starts a child and returns its exit code. door: stays open until it listens."""
        ready, tell_ready = os.pipe()
        channel, parent = socket.socketpair()
        loop = asyncio.get_running_loop()
        given = Inherited(self._socket.fileno(), tell_ready, parent.fileno())
        try:
            # A session of its own: Ctrl-C in a terminal goes to the parent alone, which passes it on.
            self._child = subprocess.Popen(
                [*self._command, str(given)],
                pass_fds=(given.listening, given.ready, given.parent),
                start_new_session=True,
            )
            os.close(tell_ready)
            parent.close()
            door.open()
            if await loop.run_in_executor(None, os.read, ready, 1):
                self._served = True
                await loop.run_in_executor(None, hand_over, channel, await door.close())
            else:  # the child has ended
                await door.turn_away()
            return await loop.run_in_executor(None, self._child.wait)
        finally:
            os.close(ready)
            channel.close()

    def _signalled(self, sign: signal.Signals) -> None:
        self._stopping = True
        self._ended.set()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(sign)

    async def _sleep(self, seconds: float) -> None:
        """Waits, unless the server is to end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)


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
