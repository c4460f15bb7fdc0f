"""Writes that nobody waits for: a bounded queue, and a daemon thread that works it off."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE = 10  # seconds that `close` gives what still waits
LAST = 1  # seconds for a write that was begun to be given up


@dataclass(frozen=True)
class Write:
    """Something to be written. act: writes it; it must not raise. bytes: what it holds meanwhile."""

    act: Callable[[], None]
    bytes: int


class Background:
    """Writes, one after the other, in a daemon thread of their own, which begins with the first one.

    limit: bytes that wait or are written at most; a single write may be larger. hurried: whether nobody waits for the
    end of what is being written any more, so that it is to be given up.

    A forked child has the object without its thread: there it takes in nothing.
    """

    def __init__(self, limit: int):
        self.limit, self.hurried = limit, False
        self._changed = threading.Condition()
        self._writes: deque[Write] = deque()  # the first one is being written
        self._thread: threading.Thread | None = None
        self._closed, self._process = False, os.getpid()

    def has_room(self, bytes: int) -> bool:
        """Returns whether a write of so many bytes would be taken in."""
        if os.getpid() != self._process:
            return False
        with self._changed:
            waiting = sum(each.bytes for each in self._writes)
            return not self._closed and (not self._writes or waiting + bytes <= self.limit)

    def put(self, write: Write) -> bool:
        """Takes a write in. Returns False where there is no room for it or no thread to be had, and after `close`."""
        if os.getpid() != self._process:
            return False
        with self._changed:
            if not self.has_room(write.bytes):
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="mlx_gemma_mtp writes", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the process has as many threads as it may have
                    return False
                self._thread = thread
                atexit.register(self.close)  # what the last call of a program gave is written, too
            self._writes.append(write)
            self._changed.notify_all()
            return True

    def flush(self, patience: float) -> bool:
        """Waits until everything is written, at most so many seconds. Returns whether it is."""
        if os.getpid() != self._process:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._writes, patience)

    def close(self, patience: float = PATIENCE) -> None:
        """Takes nothing in any more, gives what waits so many seconds, and drops the rest."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self.flush(patience):
            self.hurried = True
            self.flush(LAST)
        atexit.unregister(self.close)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._writes or self._closed)
                if not self._writes:
                    return
                write = self._writes[0]
            if not self.hurried:
                write.act()
            del write  # it holds its arrays
            with self._changed:
                self._writes.popleft()
                self._changed.notify_all()
