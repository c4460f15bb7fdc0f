"""What the requests of one call deliver, from the worker's thread to the call's reader."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from ..errors import UserError
from .request import Advance, Delivery, Request

LIMIT = 256  # chunks of one request that wait for their reader, from which on the request is paused
NAP = 0.5  # seconds after which who waits looks whether there was a signal
Item = Delivery | Advance
T = TypeVar("T")


def wait_for(queue: SimpleQueue[T]) -> T:
    """Returns the next thing in a queue; waits for it.

    A signal that comes just before the thread falls asleep is seen when it wakes, so it does now and then.
    """
    while True:
        with suppress(Empty):
            return queue.get(timeout=NAP)


class Outbox:
    """The way from the worker to one reader. The worker calls `put` and `fail`, the reader everything else.

    whole: the reader wants nothing before all is there (it is not woken), and of all only the results. told: it wants
    to hear of the prefill. Nothing is locked: each count has one writer, and a queue lies between the threads.
    """

    def __init__(self, requests: Sequence[Request], whole: bool = False, told: bool = False):
        self.ids = tuple(request.id for request in requests)
        self.whole, self._told = whole, told
        self.paused: set[int] = set()  # requests that wait for their reader; the worker's
        self._put, self._taken = dict.fromkeys(self.ids, 0), dict.fromkeys(self.ids, 0)
        self._queue: SimpleQueue[list[Item] | BaseException] = SimpleQueue()
        self._results: list[Item] = []
        self._waiting = set(self.ids)  # requests without a result

    @property
    def complete(self) -> bool:
        """Whether every request has delivered its result, or the call has failed. The worker's."""
        return not self._waiting

    @property
    def gone(self) -> bool:
        """Whether nobody can read any more. A thread's reader says so itself."""
        return False

    def put(self, items: Iterable[Item]) -> list[int]:
        """Delivers what a round gave these requests. Returns those that are to be paused, since nobody reads them.

        Raises ReaderGone where nobody can read them any more.
        """
        items = [each for each in items if self._told or isinstance(each, Delivery)]
        chunks = [each for each in items if isinstance(each, Delivery)]
        self._waiting.difference_update(each.id for each in chunks if each.chunk.result is not None)
        if self.whole:
            self._results += [each for each in chunks if each.chunk.result is not None]
            items = [each for each in items if isinstance(each, Advance)] + ([] if self._waiting else self._results)
        if not items:
            return []
        for each in chunks:
            self._put[each.id] += 1
        self._queue.put(items)
        self._ring()
        return [] if self.whole else self._to_be_paused({each.id for each in chunks})

    def _to_be_paused(self, ids: set[int]) -> list[int]:
        full = [id for id in ids & self._waiting - self.paused if self._unread(id) >= LIMIT]
        self.paused.update(full)
        # A reader that took everything before it could see that these are paused does not ask for more.
        late = [id for id in full if self._unread(id) <= LIMIT // 2]
        self.paused.difference_update(late)
        return [id for id in full if id not in late]

    def fail(self, error: BaseException) -> None:
        """Ends the call: the reader gets the exception."""
        self._waiting.clear()
        self._queue.put(error)
        self._ring()

    def _ring(self) -> None:
        """Wakes the reader. A queue does so by itself."""

    def get(self) -> list[Item]:
        """Returns what was delivered next; waits for it. Raises the exception that ended the call."""
        return self._checked(wait_for(self._queue))

    def _checked(self, items: list[Item] | BaseException) -> list[Item]:
        if isinstance(items, BaseException):
            raise items
        return items

    def taken(self, id: int) -> bool:
        """Notes that the reader has a chunk of this request. Returns whether a request that is paused is to go on."""
        self._taken[id] += 1
        return self._unread(id) == LIMIT // 2 and id in self.paused

    def _unread(self, id: int) -> int:
        return self._put[id] - self._taken[id]


class ReaderGone(Exception):
    """Nobody can read an outbox any more: its event loop is closed."""


class AsyncOutbox(Outbox):
    """An Outbox whose reader is a coroutine of the event loop that runs when it is made."""

    def __init__(self, requests: Sequence[Request], whole: bool = False, told: bool = False):
        super().__init__(requests, whole, told)
        self._loop = asyncio.get_running_loop()
        self._asleep: asyncio.Future[None] | None = None  # the reader's
        self._woken: asyncio.Future[None] | None = None  # the worker's

    @property
    def gone(self) -> bool:
        """Whether nobody can read any more: the event loop is closed, perhaps amid its task."""
        return self._loop.is_closed()

    def _ring(self) -> None:
        if self.gone:
            raise ReaderGone
        asleep = self._asleep
        if asleep is None or asleep is self._woken:
            return  # the reader looks into the queue before it sleeps
        self._woken = asleep
        try:
            self._loop.call_soon_threadsafe(_wake, asleep)
        except RuntimeError:  # it was closed just now
            raise ReaderGone from None

    async def aget(self) -> list[Item]:
        """Returns what was delivered next; waits for it. Raises the exception that ended the call, and UserError where it
        would have to wait in another event loop.
        """
        while self._queue.empty():
            if asyncio.get_running_loop() is not self._loop:
                raise UserError("the stream is read in another event loop; expected the one in which it began")
            self._asleep = self._loop.create_future()
            if self._queue.empty():
                await self._asleep
            self._asleep = None
        return self._checked(self._queue.get())


def _wake(asleep: asyncio.Future[None]) -> None:
    if not asleep.done():
        asleep.set_result(None)
