"""What a disk does to whoever writes: calls of the system that fail, or in which the process is killed.

`python -m tests.files.faults` kills a process of its own at every call of a store, and prints what was found.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_gemma_mtp.files import prefix_file, prefix_store
from mlx_gemma_mtp.files.prefix_store import PrefixStore
from tests.files.prefixes import layers, same

CALLS = ("mkdir", "scandir", "open", "ftruncate", "write", "close", "replace", "unlink", "utime")
OLD, USED, FIRST, SECOND = [1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]  # entries of one size


@contextmanager
def at_every(act: Callable[[str, int, Callable, tuple], object]) -> Iterator[None]:
    """Has `act` do the calls of the system that a store makes: it is told their name, their number from 0 on, the
    function and its arguments. Pieces are small, so that there are many writes.
    """
    originals, number, piece = {name: getattr(os, name) for name in CALLS}, [0], prefix_file.PIECE

    def wrapped(name: str) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            number[0] += 1
            return act(name, number[0] - 1, lambda *own: originals[name](*(own or arguments), **named), arguments)

        return call

    prefix_file.PIECE = 256
    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        prefix_file.PIECE = piece
        for name, function in originals.items():
            setattr(os, name, function)


def prepared(folder: Path) -> int:
    """Makes a folder that holds two entries and an old unfinished file; returns a limit that one more is beyond."""
    store = PrefixStore(folder, "key", 10**9)
    for age, tokens in enumerate((OLD, USED)):
        store.put(tokens, None, layers(tokens))
        store.flush()
        path = next(path for path in folder.iterdir() if path.stat().st_mtime > 10)
        os.utime(path, (age + 1, age + 1))
    store.close()
    (folder / f"{path.name}.old.part").write_bytes(b"x" * 100)
    os.utime(folder / f"{path.name}.old.part", (1, 1))
    return 3 * path.stat().st_size


def use(folder: Path, limit: int, told: Callable[[str], None]) -> tuple[bool, bool]:
    """Reads and writes as an engine would. Returns which entries were written."""
    store = PrefixStore(folder, "key", limit, notice=told)
    store.read([*USED, 9])
    for tokens in (FIRST, SECOND):
        if store.wants(tokens, None, 1):
            store.put(tokens, None, layers(tokens))
            store.flush()
    store.close()
    return store.longest(FIRST) == 3, store.longest(SECOND) == 3


def wrong(folder: Path, limit: int) -> list[str]:
    """Returns what is wrong with a folder after whatever happened to who wrote: nothing but its entry may be lost."""
    told: list[str] = []
    store, faults = PrefixStore(folder, "key", 10**9, notice=told.append), []
    for tokens in (OLD, USED, FIRST, SECOND):
        found = store.read(tokens)
        if found is not None and not (found[0] == len(tokens) and same(found[1], layers(tokens))):
            faults.append(f"{tokens} is served wrong")
        if found is None and tokens is USED:
            faults.append("an entry is lost that was there, and used")
    for path in folder.glob("*.part"):
        old = time.time() - prefix_store.STALE - 1
        os.utime(path, (old, old))
    if use(folder, limit, told.append) != (True, True):
        faults.append("entries are not written afterwards")
    if sum(path.stat().st_size for path in folder.iterdir()) > limit or list(folder.glob("*.part")):
        faults.append("more is left than the limit allows, or unfinished files")
    return faults + told


def killed(name: str, number: int, call: Callable, arguments: tuple, at: int, after: bool) -> object:
    """Does a call of the system; in number `at` the process ends, before or after it, a write in its middle."""
    if number == at and name == "write":
        call(arguments[0], arguments[1][: len(arguments[1]) // 2])
    elif number == at and after:
        call()
    if number == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return call()


def power_cuts(folder: Path) -> dict[str, object]:
    """Kills a child at every call, before it and after it. Returns how many times, and what was wrong."""
    points, faults = 0, []
    for after in (False, True):
        at, ended = 0, False
        while not ended:
            place = folder / f"{after}-{at}"
            limit = prepared(place)
            child = os.fork()
            if child == 0:
                with at_every(lambda *call, at=at, after=after: killed(*call, at, after)):
                    use(place, limit, print)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            ended = os.WIFEXITED(status)
            points += not ended
            faults += [f"{'after' if after else 'before'} call {at}: {fault}" for fault in wrong(place, limit)]
            shutil.rmtree(place)
            at += 1
    return {"points": points, "faults": faults}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        json.dump(power_cuts(Path(scratch)), sys.stdout)
