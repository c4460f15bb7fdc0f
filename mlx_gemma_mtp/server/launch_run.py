"""A client that runs on a server of its own, which ends with it."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError, in_a_line

LOOK = 0.2  # seconds between two looks at the server
ENDING = 30.0  # seconds that the server has to end


def execute(
    command: Sequence[str], environment: Mapping[str, str], server: Sequence[str], address: tuple[str, int], log: Path
) -> int:
    """Runs a client on a server, and returns the client's exit code.

    server: the server's command. address: its host and port. log: where the server writes. Raises UserError where the
    server does not begin.
    """
    with _serving(server, address, log), _for_the_client():
        return subprocess.call(list(command), env=dict(environment))


@contextmanager
def _serving(server: Sequence[str], address: tuple[str, int], log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        # In a session of its own: a Ctrl-C is the client's.
        process = subprocess.Popen(
            list(server), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            _wait(process, address, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], address: tuple[str, int], log: Path) -> None:
    """Waits until the server takes requests."""
    while not _ready(address):
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            why = in_a_line(said[-1]) if said else f"exit code {process.returncode}"
            raise UserError(f"the server ended before it was ready: {why} (all it said: {log})")
        time.sleep(LOOK)


def _ready(address: tuple[str, int]) -> bool:
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def _for_the_client() -> Iterator[None]:
    """Leaves Ctrl-C to the client, and ends in good order at SIGTERM."""

    def ended(number: int, frame: object) -> None:
        sys.exit(128 + number)

    handlers: dict[signal.Signals, Callable[..., None]] = {signal.SIGINT: lambda *_: None, signal.SIGTERM: ended}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
