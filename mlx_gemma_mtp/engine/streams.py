"""Streams: a call's chunks in the hands of its reader, as an iterator or as an asynchronous one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any
from weakref import finalize

from ..files.progress import Progress, no_progress
from .arguments import Cancel
from .outbox import AsyncOutbox, Item, Outbox
from .request import Advance, Chunk, Delivery, Request
from .worker import Worker


@cache
def encoders() -> ThreadPoolExecutor:
    """The threads in which coroutines have their prompts encoded and their grammars compiled."""
    return ThreadPoolExecutor(4, "mlx_gemma_mtp_encoder")


class _Reading:
    """What a reader has of its call: chunks that it did not look at yet, and how far the prompts are prefilled.

    While it lives the requests go on; when it is closed or forgotten they are cancelled. keep: is kept as long.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], outbox: Outbox, progress: Progress, keep: Any):
        self.outbox, self.chunks = outbox, deque[Delivery]()
        self._worker, self._keep, self._progress = worker, keep, progress
        self._done = dict.fromkeys(outbox.ids, 0)
        self._total = sum(len(request.prompt) for request in requests)
        self._left = len(requests)
        self._give_up = finalize(self, worker.cancel, outbox.ids)
        self._give_up.atexit = False

    def take_in(self, items: Sequence[Item]) -> None:
        """Takes in what was delivered. Tells how far the prompts are."""
        for item in items:
            if isinstance(item, Delivery):
                self.chunks.append(item)
            else:
                self._told(item)

    def _told(self, advance: Advance) -> None:
        before = sum(self._done.values())
        self._done[advance.id] = max(self._done[advance.id], advance.done)
        if (now := sum(self._done.values())) > before:  # a prompt that is prefilled once more advances nothing
            self._progress(now, self._total)

    def next(self) -> Chunk:
        """Returns the next of the chunks that are here."""
        delivery = self.chunks.popleft()
        if self.outbox.taken(delivery.id):
            self._worker.resume(self.outbox, delivery.id)
        self._left -= delivery.chunk.result is not None
        if not self._left:
            self._give_up.detach()
        return delivery.chunk

    @property
    def over(self) -> bool:
        """Whether every result was given away, or nobody wants more."""
        return not self._give_up.alive

    def close(self) -> None:
        """Has the requests end after the current round."""
        self._give_up()


class Stream(Iterator[Chunk]):
    """The chunks of a call, as they are made. Any thread may read it; `close` ends the call."""

    def __init__(
        self,
        worker: Worker,
        requests: Sequence[Request],
        cancel: Cancel | None,
        progress: Progress | None,
        keep: Any,
        whole: bool = False,
    ):
        """whole: chunks with results alone, once all are there."""
        outbox = Outbox(requests, whole, progress is not None)
        self._worker, self._lock = worker, threading.RLock()
        self._reading = _Reading(worker, requests, outbox, progress or no_progress, keep)
        worker.submit(requests, outbox, cancel)

    def __next__(self) -> Chunk:
        reading = self._reading
        with self._lock:  # else a second thread would wait for a chunk that the first one takes
            if reading.over:
                raise StopIteration
            try:
                self._worker.check_reader()
                while not reading.chunks:
                    reading.take_in(reading.outbox.get())
                return reading.next()
            except BaseException:
                reading.close()
                raise

    def close(self) -> None:
        """Ends the call after the current round. What is not read yet is dropped."""
        self._reading.close()


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of a call, as they are made, for one task at a time; `aclose` ends the call.

    begin: makes the requests. The call begins when the first chunk is asked for.
    """

    def __init__(
        self,
        worker: Worker,
        begin: Callable[[], Awaitable[Sequence[Request]]],
        cancel: Cancel | None,
        progress: Progress | None,
        keep: Any,
        whole: bool = False,
    ):
        self._worker, self._begin, self._cancel = worker, begin, cancel
        self._progress, self._keep, self._whole = progress, keep, whole
        self._reading: _Reading | None = None
        self._busy = self._closed = False

    async def __anext__(self) -> Chunk:
        if self._busy:
            raise RuntimeError("the stream is being read by another task; expected one at a time")
        if self._closed or (self._reading is not None and self._reading.over):
            raise StopAsyncIteration
        self._busy = True
        try:
            if self._reading is None:
                self._reading = await self._begun()
            self._worker.check_reader()
            while not self._reading.chunks:
                self._reading.take_in(await self._reading.outbox.aget())
            return self._reading.next()
        except BaseException:
            self._close()
            raise
        finally:
            self._busy = False

    async def _begun(self) -> _Reading:
        requests = await self._begin()
        if self._closed:  # meanwhile
            raise StopAsyncIteration
        outbox = AsyncOutbox(requests, self._whole, self._progress is not None)
        reading = _Reading(self._worker, requests, outbox, self._progress or no_progress, self._keep)
        self._worker.submit(requests, outbox, self._cancel)
        return reading

    async def aclose(self) -> None:
        """Ends the call after the current round. What is not read yet is dropped."""
        self._close()

    def _close(self) -> None:
        self._closed = True
        if self._reading is not None:
            self._reading.close()
