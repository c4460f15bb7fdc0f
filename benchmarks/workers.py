"""The end that asks a system in a process of its own (benchmarks/systems)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import OPENBLAS, ROOT
from mlx_gemma_mtp.files.hub import Pair

OURS = "mlx_gemma_mtp"
# What each is imported as, and how it gets installed.
PEERS = {
    "mlx-lm": ("mlx_lm", "pip install 'mlx-lm>=0.32'"),
    "mlx-vlm": ("mlx_vlm", "pip install 'mlx-gemma-mtp[bench]'"),
    "transformers": ("torch", "pip install 'mlx-gemma-mtp[parity]'"),
}


class Failed(Exception):
    """A system did not do what it was asked; the message is its own."""


class Gone(Failed):
    """Its process has ended."""


def missing(peer: str) -> str | None:
    """A line that says how to install a peer, None where it is there."""
    module, install = PEERS[peer]
    if importlib.util.find_spec(module):
        return None
    return f"{peer} is skipped: {module} is not installed; {install}"


@dataclass(frozen=True)
class Setup:
    """What it takes to start a worker. rows: of its batches, None for its default. root: the checkout it runs."""

    system: str
    pair: Pair
    blas: str
    rows: int | None = None
    root: Path = ROOT

    def start(self) -> Worker:
        return Worker(self)


class Worker:
    """A running system and the pipe to it. Raises Failed where it cannot be loaded."""

    def __init__(self, setup: Setup) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        environment |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if setup.blas == "openblas":
            environment["LD_PRELOAD"] = OPENBLAS
        folders = [str(folder) for folder in (setup.pair.target, setup.pair.drafter) if folder]
        self.system, self._log = setup.system, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        options = [] if setup.rows is None else ["--rows", str(setup.rows)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.systems", setup.system, *folders, *options], cwd=setup.root,
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, **arguments: Any) -> Any:
        """The result of a method of benchmarks/systems/__main__.py."""
        with suppress(BrokenPipeError):  # a worker that died says why in its log; `_answer` reports it
            self._process.stdin.write(json.dumps({method: arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise Gone(said[-1] if said else f"ended with exit code {self._process.wait()}, without a message")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["result"]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
