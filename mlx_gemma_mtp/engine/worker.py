"""The worker: one thread that owns MLX, and everybody else's way to it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from ..errors import UserError, in_a_line
from . import threads
from .arguments import Cancel
from .outbox import Item, Outbox, ReaderGone, wait_for
from .request import Delivery, Request

T = TypeVar("T")


class Runner(Protocol):
    """What the worker drives: it holds the requests and computes their rounds, in the worker's thread alone.

    busy: whether a round would advance anything: a prompt, a row, or a request that is to be ended.
    """

    @property
    def busy(self) -> bool: ...

    def submit(self, request: Request) -> None:
        """Takes a request in. Raises UserError for one that can never fit, and where too many wait."""

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Has the next round end a request; one that is done is passed over. reason: its finish_reason."""

    def pause(self, id: int) -> None:
        """Lets a request rest until `resume`: its reader does not read. One that is done is passed over."""

    def resume(self, id: int) -> None:
        """Lets a request go on."""

    def next_deadline(self) -> float | None:
        """Returns when the next request is to be ended, in time.monotonic's seconds; None where none is."""

    def round(self, deliver: Callable[[list[Item]], None]) -> None:
        """Computes one round, and calls `deliver` with what it gives. The last Delivery of a request carries its
        Result.
        """

    def fail(self, error: BaseException) -> list[Item]:
        """Ends, with finish_reason 'error', the requests of a round that raised, and is ready for others."""

    def close(self) -> list[Item]:
        """Ends every request with finish_reason 'cancelled', and gives back what it holds."""


class Worker:
    """A thread that computes for an engine: rounds of its runner, and functions that others `call`.

    It takes in what came, computes a round, delivers, and waits only where there is nothing to do. Its methods may be
    called from any thread, `cancel`, `resume` and `stop` even by a garbage collector.
    """

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._outboxes: dict[int, Outbox] = {}  # of each request that is not done
        self._cancels: dict[Outbox, Cancel] = {}  # events that end a call
        self._resting: set[Outbox] = set()  # with requests that are paused
        self._runner: Runner | None = None
        self._running: Call | None = None
        self._give_back: Callable[[], None] = lambda: None
        self._gate, self._closed = threading.Lock(), False
        self._leaving = self._stopping = self._silent = False
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._process, self._ident = os.getpid(), 0
        threads.run(self._work, self._halt)

    def check(self) -> None:
        """Raises UserError where this worker cannot be called: in a forked child, from its own thread, once it is
        closed. Raises RuntimeError where it failed.
        """
        try:
            self._check()
        except Exception:
            threads.wait_for_the_end()
            raise

    def check_reader(self) -> None:
        """Raises UserError where nobody can wait for a delivery: in a forked child, from the worker's own thread, at
        the end of the process. A worker that is closed has delivered what there is.
        """
        self._check_place()
        if self._silent:
            threads.wait_for_the_end()
            raise UserError("the process is ending; expected streams to be read before that")

    def _check(self) -> None:
        self._check_place()
        if self._error is not None:
            raise RuntimeError(f"the engine's worker failed: {_said(self._error)}; load it again") from self._error
        if self._closed:
            raise _closed()

    def _check_place(self) -> None:
        if os.getpid() != self._process:
            raise UserError(
                f"this engine was loaded in process {self._process} and this is process {os.getpid()}, forked from it; "
                "load it in the child, which multiprocessing must start with 'spawn'"
            )
        if threading.get_ident() == self._ident:
            raise UserError("the engine is called from within its own work; call it once that function has returned")

    def drive(self, make: Callable[[], Runner], end: Callable[[], None] = lambda: None) -> None:
        """Makes the runner, in the worker's thread, and computes its rounds from now on.

        end: is called in the worker's thread once the runner is closed, unless the process ends.
        """

        def begin() -> None:
            self._give_back = end
            self._runner = make()

        self.call(begin)

    def call(self, function: Callable[..., T], *listeners: Callable[..., None]) -> T:
        """Runs a function in the worker's thread, between two rounds. Returns what it returns and raises what it
        raises.

        listeners: the function's arguments; each is called in the caller's thread, as long as the call lasts. Where the
        caller is interrupted, or a listener raises, the function ends when it next calls one.
        """
        return self.begin(function, *listeners).wait()

    def begin(self, function: Callable[..., T], *listeners: Callable[..., None]) -> Call:
        """Begins a `call`, for a caller that does something else before it waits."""
        call = Call(function, listeners)
        self._send(_Message(partial(self._run, call), call.refuse))
        return call

    def submit(self, requests: Sequence[Request], outbox: Outbox, cancel: Cancel | None = None) -> None:
        """Has the runner take in the requests of a call. Whatever it raises, the outbox's reader gets.

        cancel: an event; once it is set, the requests end after the current round.
        """
        self._send(_Message(partial(self._submit, requests, outbox, cancel), outbox.fail))

    def cancel(self, ids: Iterable[int]) -> None:
        """Has requests end after the current round; those that are done are passed over."""
        self._inbox.put(_Message(partial(self._cancel, tuple(ids))))

    def resume(self, outbox: Outbox, id: int) -> None:
        """Has a request go on whose reader has read."""
        self._inbox.put(_Message(partial(self._resume, outbox, id)))

    def stop(self) -> None:
        """Has the thread end its requests and its work after the current round, or when the function that it runs next
        calls a listener. No other function begins. Does not wait.
        """
        self._leaving = True
        self._inbox.put(_Message(self._stop))
        if (call := self._running) is not None:
            call.leave()

    def close(self) -> None:
        """Stops, and waits until everything is given back. Closing once more does nothing.

        Raises UserError from within the worker's own thread, which would wait for itself.
        """
        if threading.get_ident() == self._ident:
            raise UserError("the engine is closed from within its own work; close it once that function has returned")
        if os.getpid() == self._process:
            self.stop()
            self._ended.wait()

    def _send(self, message: _Message) -> None:
        """Puts a message into the inbox, which is read to the end before the worker ends. Raises what `check` does."""
        try:
            with self._gate:
                self._check()
                self._inbox.put(message)
        except Exception:
            threads.wait_for_the_end()
            raise

    # What follows runs in the worker's thread.

    def _work(self) -> None:
        self._ident = threading.get_ident()
        try:
            while not self._stopping:
                self._step()
        except BaseException as error:
            self._error = error
        self._end()

    def _step(self) -> None:
        """Takes in one message or, where none has come before something is due, computes a round."""
        patience = self._patience()
        if patience == 0 and self._inbox.empty():
            return self._round()
        with suppress(Empty):
            return self._inbox.get(timeout=patience).act()
        return self._round()

    def _patience(self) -> float | None:
        """For how many seconds there is nothing to do but to wait for messages; None is for ever."""
        if self._runner is None:
            return None
        if self._runner.busy:
            return 0
        deadline = self._runner.next_deadline()
        return None if deadline is None else max(0, deadline - time.monotonic())

    def _round(self) -> None:
        try:
            self._runner.round(self._deliver)
        except BaseException as error:  # a library's panic is no Exception
            self._deliver(self._runner.fail(error))
        for outbox, cancel in list(self._cancels.items()):
            self._heed(outbox, cancel)
        for outbox in [each for each in self._resting if each.gone]:
            self._drop(outbox)

    def _deliver(self, items: Iterable[Item]) -> None:
        """Puts each item into its call's outbox. Those of requests whose reader has gone are dropped."""
        by_outbox: dict[Outbox, list[Item]] = {}
        for item in items:
            outbox = self._outboxes.get(item.id)
            if outbox is not None:
                by_outbox.setdefault(outbox, []).append(item)
            if isinstance(item, Delivery) and item.chunk.result is not None:
                self._outboxes.pop(item.id, None)
        for outbox, some in by_outbox.items():
            try:
                for id in outbox.put(some):
                    self._runner.pause(id)
                    self._resting.add(outbox)
            except ReaderGone:
                self._drop(outbox)
            if outbox.complete:
                self._cancels.pop(outbox, None)
                self._resting.discard(outbox)

    def _run(self, call: Call) -> None:
        self._running = call
        if self._leaving:  # `stop` did not see this call, or does now
            call.leave()
        call.run()
        self._running = None

    def _submit(self, requests: Sequence[Request], outbox: Outbox, cancel: Cancel | None) -> None:
        try:
            for request in requests:
                self._runner.submit(request)
                self._outboxes[request.id] = outbox
        except BaseException as error:
            self._drop(outbox, error)
        else:
            if cancel is not None:
                self._cancels[outbox] = cancel
                self._heed(outbox, cancel)

    def _heed(self, outbox: Outbox, cancel: Cancel) -> None:
        """Ends a call whose event is set. What `is_set` raises ends it, too, and its reader gets that."""
        try:
            if not cancel.is_set():
                return
        except BaseException as error:
            self._drop(outbox, error)
        self._cancels.pop(outbox, None)
        self._cancel(outbox.ids)

    def _drop(self, outbox: Outbox, error: BaseException | None = None) -> None:
        """Ends a call without its results. error: what its reader gets."""
        self._cancels.pop(outbox, None)
        self._resting.discard(outbox)
        self._cancel([id for id in outbox.ids if self._outboxes.pop(id, None) is not None])
        if error is not None:
            outbox.fail(error)

    def _cancel(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._runner.cancel(id)

    def _resume(self, outbox: Outbox, id: int) -> None:
        if id in outbox.paused:
            outbox.paused.discard(id)
            self._runner.resume(id)
        if not outbox.paused:
            self._resting.discard(outbox)

    def _stop(self) -> None:
        self._stopping = True

    def _halt(self) -> None:
        """Has the thread end since the process does: readers are not woken. Called in the main thread."""
        self._silent = True
        self.stop()

    def _end(self) -> None:
        """Gives the runner back, and tells everybody who waits. No message is taken in afterwards."""
        try:
            items = self._runner.close() if self._runner is not None else []
            if not self._silent and self._error is None:  # of a runner that failed nobody knows what its results are
                self._deliver(items)
        except BaseException as error:
            self._error = self._error or error
        self._runner = None
        with self._gate:
            self._closed = True
        if not self._silent:
            self._give_back()
            self._refuse()
        self._outboxes.clear()
        self._cancels.clear()
        self._resting.clear()
        self._ident = 0
        self._ended.set()

    def _refuse(self) -> None:
        """Tells callers that came too late, and readers whose requests were not ended."""
        error: Exception = _closed()
        if self._error is not None:
            error = RuntimeError(f"the engine's worker failed: {_said(self._error)}; load it again")
            error.__cause__ = self._error
        refusals = [outbox.fail for outbox in set(self._outboxes.values())]
        while not self._inbox.empty():
            refusals.append(self._inbox.get().refuse)
        for refuse in refusals:
            with suppress(ReaderGone):
                refuse(error)


@dataclass(frozen=True)
class _Message:
    """act: is called in the worker's thread. refuse: is called instead where the worker has ended."""

    act: Callable[[], None]
    refuse: Callable[[Exception], None] = lambda error: None


class Call:
    """A function on its way through the worker: what it tells its listeners, and what comes of it."""

    def __init__(self, function: Callable[..., Any], listeners: Sequence[Callable[..., None]]):
        self._function = function
        self._listeners = [partial(self._tell, listener) for listener in listeners]
        self._events: SimpleQueue[tuple[Callable[[], Any], bool]] = SimpleQueue()  # and whether it is the last
        self._left = False  # whether the function is to end

    def run(self) -> None:
        """Calls the function, in the worker's thread, unless it is to end."""
        try:
            if self._left:
                raise _Left
            found = self._function(*self._listeners)
        except _Left:
            self.refuse(_closed())
        except BaseException as error:
            self.refuse(error)
        else:
            self._events.put((lambda: found, True))

    def refuse(self, error: BaseException) -> None:
        """Has the caller get the exception."""
        self._events.put((partial(_raise, error), True))

    def wait(self) -> Any:
        """Returns what the function returned, or raises what it raised. Meanwhile listeners are called."""
        try:
            while True:
                event, last = wait_for(self._events)
                found = event()
                if last:
                    return found
        except Exception:
            threads.wait_for_the_end()
            raise
        finally:
            self.leave()

    def leave(self) -> None:
        """Has the function end when it next calls a listener: nobody waits any more, or the worker stops."""
        self._left = True

    def _tell(self, listener: Callable[..., None], *args: Any) -> None:
        if self._left:
            raise _Left
        self._events.put((partial(listener, *args), False))


class _Left(BaseException):
    """Ends a function whose caller does not wait any more, or whose worker stops."""


def _raise(error: BaseException) -> None:
    raise error


def _closed() -> UserError:
    return UserError("the engine is closed; load it again")


def _said(error: BaseException) -> str:
    return in_a_line(error) if isinstance(error, Exception) else type(error).__name__
