"""What clients are told by the parent while no child listens: to come back, or to wait until the model is loaded."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress

LONGEST_HEAD = 1 << 16  # bytes that are read of a request
HEAD_IN = 5.0  # seconds in which its first line must have come
NAP = 0.02  # seconds between two looks at a line that is not whole
LINGER = 1.0  # seconds in which a client may read its answer
MOST_HELD = 128  # connections that wait for the model; a Mac's process has 256 files
QUIET = (b"/health", b"/ready", b"/metrics")  # paths that never load a model, nor keep it loaded
UNLOADED = "the model is unloaded; a request for a reply loads it"
LOADING = "the model is loading; try again a little later"


class Door:
    """Answers, or holds, whoever connects while it is open.

    listening: the socket. holding: whether requests wait for a model that is unloaded; else they are told to come back.
    """

    def __init__(self, listening: socket.socket, holding: bool = False):
        self._listening, self.holding = listening, holding
        self.called = asyncio.Event()  # set once a request waits
        self._held: list[socket.socket] = []
        self._asking: set[asyncio.Task[None]] = set()  # tasks of connections whose path is not known yet
        self._answering: set[asyncio.Task[None]] = set()
        self._own: socket.socket | None = None

    def open(self) -> None:
        """Begins to answer. Opening once more does nothing."""
        if self._own is None:
            self._own = self._listening.dup()
            self._own.setblocking(False)
            self._look()

    async def close(self) -> list[socket.socket]:
        """Ends to answer. Returns the connections that wait, whose requests are unread."""
        if self._own is not None:
            asyncio.get_running_loop().remove_reader(self._own)
            self._own.close()
            self._own = None
        for each in tuple(self._asking):
            each.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
        held, self._held = self._held, []
        return held

    async def turn_away(self) -> None:
        """Closes, and tells those who wait to come back."""
        held, self.holding = await self.close(), False
        for each in held:
            self._begin(each)
        if tasks := self._asking | self._answering:
            await asyncio.wait(tasks)

    def _look(self) -> None:
        """Accepts from now on."""
        if self._own is not None:
            asyncio.get_running_loop().add_reader(self._own, self._accept)

    def _accept(self) -> None:
        # Not loop.sock_accept: to cancel it may lose a connection.
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._own.accept()
        except (BlockingIOError, ConnectionError):  # the client has left
            return
        except OSError:  # there are too many files
            loop.remove_reader(self._own)
            loop.call_later(HEAD_IN, self._look)
            return
        connection.setblocking(False)
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        task = asyncio.ensure_future(self._serve(connection))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        task.add_done_callback(self._answering.discard)

    async def _serve(self, connection: socket.socket) -> None:
        """Holds a connection, or answers it and closes it. One that is cancelled is held: its request is unread."""
        try:
            path = await asyncio.wait_for(_path(connection), HEAD_IN)
        except asyncio.CancelledError:
            self._held.append(connection)
            return
        except (OSError, TimeoutError):
            connection.close()
            return
        if self.holding and path not in QUIET and len(self._held) < MOST_HELD:
            self._held.append(connection)
            self.called.set()
            return
        task = asyncio.current_task()
        self._asking.discard(task)
        self._answering.add(task)
        with connection, suppress(OSError, TimeoutError):
            await asyncio.wait_for(_answer(connection, self._said(path)), HEAD_IN)

    def _said(self, path: bytes) -> bytes:
        """The answer to a request that does not wait."""
        if self.holding and path == b"/ready":
            return _response(200, {"ready": True})  # whoever asks waits, and is answered
        if self.holding and path == b"/health":
            return _response(200, {"status": "loading" if self.called.is_set() else "unloaded"})
        unloaded = self.holding and not self.called.is_set()
        message, code = (UNLOADED, "unloaded") if unloaded else (LOADING, "loading")
        return _response(503, {"error": {"message": message, "type": "server_error", "param": None, "code": code}})


async def _path(connection: socket.socket) -> bytes:
    """Returns the path that is asked for, and leaves the request unread."""
    while True:
        await _readable(connection)
        seen = connection.recv(LONGEST_HEAD, socket.MSG_PEEK)
        if not seen:
            raise ConnectionError
        if b"\n" in seen or len(seen) == LONGEST_HEAD:
            return [*seen.partition(b"\n")[0].split(b" "), b""][1].partition(b"?")[0]
        await asyncio.sleep(NAP)


async def _readable(connection: socket.socket) -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, told.set)
    try:
        await told.wait()
    finally:
        loop.remove_reader(connection)


async def _answer(connection: socket.socket, response: bytes) -> None:
    """Sends an answer, and reads on until the client leaves: what is unread would cut the answer off."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, response)
    connection.shutdown(socket.SHUT_WR)
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while await loop.sock_recv(connection, LONGEST_HEAD):
                pass


def _response(status: int, about: dict[str, object]) -> bytes:
    body = json.dumps(about).encode()
    line = {200: "200 OK", 503: "503 Service Unavailable\r\nretry-after: 2"}[status]
    head = f"HTTP/1.1 {line}\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n"
    return head.encode() + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
