"""One call of the engine for one request of a client: begun, read, ended, and counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError, in_a_line
from ..speculative.readback import NOT_FINITE, NOTHING_ALLOWED
from .ask import SAME
from .errors import Refusal, of_user_error, stopping, unexpected
from .metrics import PHASES

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from .ask import Ask
    from .service import Served

T = TypeVar("T")
log = logging.getLogger(__name__)
PARAMS = (
    *(*SAME, "max_tokens", "stop", "logit_bias", "response_format", "tools", "tool_choice"),
    *("num_draft_tokens", "timeout", "priority"),
)
FOR_CLIENTS = (NOT_FINITE, NOTHING_ALLOWED)  # reasons of a failure that say nothing of the machine


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Run:
    """A call of the engine, read whole or as chunks; it has its places from its beginning to `close`.

    id: of the request. route: what was asked for, in the log.
    """

    def __init__(self, served: Served, ask: Ask, id: str, route: str):
        self.id, self.served, self.ask, self.route = id, served, ask, route
        self.results: dict[int, Result] = {}
        self.told = False  # whether a chunk came
        self.created, self._began = int(time.time()), time.monotonic()
        self._open = False
        self._first: asyncio.Future[Chunk] | None = None

    async def whole(self) -> list[Result]:
        """Returns the results of all choices, in order. Raises Refusal where one failed."""
        self._take_places()
        try:
            call = self.served.engine.agenerate(self.ask.prompts, self.ask.params, **self.ask.options)
            found = await _refusing(call, self.served)
            found = [each for some in found for each in (some if self.ask.n > 1 else [some])]
            self.results = dict(enumerate(found))
            for result in found:
                self._check(result)
            return found
        finally:
            self.close()

    async def begin(self) -> None:
        """Begins to stream: returns once the engine has taken the request in, before its prompt is prefilled.

        Raises Refusal where it is not taken in.
        """
        self._take_places()
        try:
            taken_in = _TakenIn()
            self._stream = self.served.engine.astream(
                self.ask.prompts, self.ask.params, cancel=taken_in, **self.ask.options
            )
            self._first = asyncio.ensure_future(_refusing(anext(self._stream), self.served))
            told = asyncio.ensure_future(taken_in.wait())
            try:
                await asyncio.wait((self._first, told), return_when=asyncio.FIRST_COMPLETED)
            finally:
                told.cancel()
            if self._first.done():
                self._first.result()
        except BaseException:
            self.close()
            raise

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yields the chunks of all choices. Raises Refusal where one failed."""
        left = self.ask.choices
        chunk = await self._first
        self.told = True
        while True:
            yield chunk
            if chunk.result is not None:
                self.results[chunk.index] = chunk.result
                self._check(chunk.result)
                left -= 1
                if not left:
                    return
            chunk = await _refusing(anext(self._stream), self.served)

    def close(self) -> None:
        """Ends what still runs, and gives the places back. Closing once more does nothing."""
        if not self._open:
            return
        self._open = False
        self.served.places.give_back(self.ask.choices)
        if self._first is not None and len(self.results) < self.ask.choices:
            self._first.cancel()  # which closes the stream where nothing came of it yet
            self._closing = asyncio.ensure_future(self._stream.aclose())
        left = PHASES[self.told] if len(self.results) < self.ask.choices else None
        self.served.metrics.ended(self.results.values(), time.monotonic() - self._began, left)
        self._tell()

    def _take_places(self) -> None:
        self.served.check_open()
        try:
            self.served.places.take(self.ask.choices)
        except Refusal:
            self.served.metrics.refused()
            raise
        self._open = True

    def _check(self, result: Result) -> None:
        """Raises Refusal for a result that is no answer."""
        if result.finish_reason == "cancelled":
            raise stopping()
        if result.error is not None:
            log.error("%s: %s failed: %s", self.id, self.route, result.error)
            if result.error in FOR_CLIENTS:
                raise Refusal(500, result.error, code="generation_failed", retry=False)
            raise unexpected()

    def _tell(self) -> None:
        """Writes the request's line of the log: numbers, and what was mended of calls."""
        results, seconds = self.results.values(), time.monotonic() - self._began
        ends = ",".join(result.finish_reason for result in results) or "none"
        if len(results) < self.ask.choices:
            ends += " (left)"
        tokens, accepted = (sum(each) for each in zip(*map(_counts, results), strict=True)) if results else (0, 0)
        log.info(
            "%s: %s: %d prompt tokens, %d tokens (%d drafts accepted) in %.2f s, end: %s",
            *(self.id, self.route, self.ask.prompt_tokens, tokens, accepted, seconds, ends),
        )
        for result in results:
            for call in result.tool_calls:
                for what in (*call.repaired, *call.faults):
                    log.warning("%s: the call of %s: %s", self.id, call.name, what)


def _counts(result: Result) -> tuple[int, int]:
    return len(result.tokens), result.stats.accepted


async def _refusing(call: Awaitable[T], served: Served) -> T:
    """Awaits a call of the engine. What it raises becomes a Refusal."""
    try:
        return await call
    except UserError as error:
        served.check_open()  # then the engine is closed, whatever the request is
        raise of_user_error(error, PARAMS) from None
    except (Refusal, StopAsyncIteration):
        raise
    except Exception as error:
        served.check_open()
        log.exception("the engine failed: %s", in_a_line(error))
        raise unexpected() from error


class _TakenIn:
    """An event for Engine.astream that nobody sets. The engine asks it first when it has taken its requests in."""

    def __init__(self) -> None:
        self._loop, self._event, self._asked = asyncio.get_running_loop(), asyncio.Event(), False

    def is_set(self) -> bool:
        if not self._asked:
            self._asked = True
            self._loop.call_soon_threadsafe(self._event.set)
        return False

    async def wait(self) -> None:
        """Waits until the engine has asked."""
        await self._event.wait()


async def unless_gone(work: Awaitable[T], receive: Callable[[], Awaitable[Any]]) -> T:
    """Awaits work for a client whose request was read. Raises ClientGone, and ends the work, once it has left."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns once the client has left. receive: of ASGI, after the request's body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
