"""A server that tells what its allocator keeps: `python -m benchmarks.server.allocator SOCKET FLAGS...`.

glibc gives little of what is freed back to the system, so that the memory of a process grows in steps while nothing in
it does. A line sent to the socket, `look` or `trim`, is answered with a line of JSON: the bytes that are resident, and
those of them that the allocator keeps and nobody has. `trim` has it first give back what it can.
"""

from __future__ import annotations

import ctypes
import json
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from mlx_gemma_mtp import serve

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2, summed over its arenas. fordblks: bytes that are free in them."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


class Allocator:
    """glibc's malloc in this process. Raises AttributeError where there is another, or one before 2.33."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._info, self._trim = library.mallinfo2, library.malloc_trim
        self._info.restype = _Info

    def look(self) -> dict[str, int]:
        """Returns the bytes that are resident, and those that are kept."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"resident": pages * resource.getpagesize(), "kept": self._info().fordblks}

    def trim(self) -> dict[str, int]:
        """Has it give back what it can. Returns the same; what was given back still counts as kept."""
        self._trim(0)
        return self.look()


def answer(path: str, words: dict[str, Callable[[], dict[str, int]]]) -> None:
    """Answers at a socket, a word a connection, in a thread that keeps no process."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()

    def run() -> None:
        while True:
            connection, _ = listening.accept()
            with connection, connection.makefile("rw") as file:
                if line := file.readline():
                    file.write(json.dumps(words[line.strip()]()) + "\n")

    threading.Thread(target=run, daemon=True).start()


def ask(path: str, word: str) -> dict[str, int]:
    """Returns what a server's allocator tells. word: look or trim."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(path)
        connection.sendall(f"{word}\n".encode())
        return json.loads(connection.makefile().readline())


def main(argv: list[str]) -> int:
    """Serves with the flags behind the socket's path."""
    allocator = Allocator()
    answer(argv[0], {"look": allocator.look, "trim": allocator.trim})
    return serve.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
