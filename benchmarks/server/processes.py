"""Processes that the parts use: servers, and the clients that read from them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import OPENBLAS, ROOT
from benchmarks.workers import Failed, Gone

THREADS = "OPENBLAS_NUM_THREADS"
PATIENCE = 600.0  # seconds that a server has to answer for the first time


class Readers:
    """Clients in a process of their own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server.readers"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def read(self, url: str, path: str, bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the streams of all bodies give, asked for at once. Raises Failed where one fails."""
        self._process.stdin.write(json.dumps({"url": url, "path": path, "bodies": list(bodies)}) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise Gone("the readers have ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Serving:
    """A server in a process of its own, at `url`. command: its module and flags; the port is added. environment: what
    it finds there beside what this process has.

    Raises Failed where it ends before it answers.
    """

    def __init__(self, command: Sequence[str], blas: str = "stock", environment: Mapping[str, str] | None = None):
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        usual = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | {THREADS: "1"}
        environment = usual | (environment or {}) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["MLX_GEMMA_MTP_BLAS"] = "off"  # the one before it is for all servers
        if blas == "openblas":
            environment["LD_PRELOAD"] = OPENBLAS
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port)],
            cwd=ROOT,
            env=environment,
            stdout=self._log,
            stderr=self._log,
        )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise Failed(f"ended with code {self.process.returncode}: {self.said()[-300:]}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as asked:
                    asked.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    if b" 200 " in asked.recv(100):
                        return
            except OSError:
                pass
            time.sleep(0.2)
        raise Failed(f"does not answer within {PATIENCE:g} s")

    def said(self) -> str:
        """Its log."""
        self._log.flush()
        with open(f"/proc/{os.getpid()}/fd/{self._log.fileno()}") as again:
            return again.read()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
