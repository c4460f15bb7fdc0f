"""Threads for MLX that never end: when a job is over, its thread is parked, and the next job takes it.

A thread in which MLX computed takes the interpreter's lock once more when it ends, and aborts the process where that is
ending, too. A daemon thread that is blocked in a queue's `get` is not touched by the interpreter's end.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue

from ..errors import UserError

Job = Callable[[], None]


class _Pool:
    """The threads of this process, and which of them have no job. A forked child begins with none.

    `idle` holds the queues of the threads without a job.
    """

    def __init__(self) -> None:
        self.lock, self.ending = threading.Lock(), False
        self.idle: SimpleQueue[SimpleQueue[Job]] = SimpleQueue()
        self.threads = 0
        self.stops: dict[int, Job] = {}


_pool = _Pool()


def run(job: Job, stop: Job) -> None:
    """Runs a job in a thread of its own. A parked thread is taken before a new one is made.

    stop: called where the process ends before the job; it makes the job return soon. Raises UserError once the process
    is ending.
    """
    with _pool.lock:
        if not _pool.ending:
            _pool.stops[id(job)] = stop
            return _begin(job)
    wait_for_the_end()
    raise UserError("the process is ending; expected engines to be made before that")


def _begin(job: Job) -> None:
    try:
        jobs = _pool.idle.get_nowait()
    except Empty:
        jobs = SimpleQueue()
        jobs.put(job)
        threading.Thread(target=_serve, args=(_pool, jobs), name="mlx_gemma_mtp", daemon=True).start()
        _pool.threads += 1
    else:
        jobs.put(job)


def wait_for_the_end() -> None:
    """Blocks a daemon thread for ever once the process is ending: what it could raise would be printed amid the end."""
    if _pool.ending and threading.current_thread().daemon:
        SimpleQueue().get()


def _serve(pool: _Pool, jobs: SimpleQueue[Job]) -> None:
    """Runs one job after the other, for ever.

    Between the note that this thread is idle and its `get` no bytecode runs, so that the interpreter's lock is not let
    go of: whoever has read the note finds the thread blocked.
    """
    job = jobs.get()
    while True:
        job()
        pool.stops.pop(id(job), None)
        del job
        _, job = map(partial.__call__, (partial(pool.idle.put, jobs), partial(jobs.get)))


def _end() -> None:
    """Stops what runs, and waits until every thread is parked. No job begins afterwards."""
    with _pool.lock:
        _pool.ending = True
    for stop in list(_pool.stops.values()):
        stop()
    for _ in range(_pool.threads):
        _pool.idle.get()


def _forget() -> None:
    """In a forked child, which has no other threads: they did not come along."""
    global _pool
    _pool = _Pool()


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
