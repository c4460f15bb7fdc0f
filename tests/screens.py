"""A program in a pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds until a test gives up; nothing is measured by it
CLEARED = ("NO_COLOR", "COLUMNS", "LINES", "PROMPT_TOOLKIT_NO_CPR", "PROMPT_TOOLKIT_COLOR_DEPTH")


class Terminal:
    """Runs `python -m MODULE ...` in a terminal of so many columns and rows. raw: all that the program wrote."""

    def __init__(self, module: str, *argv: str, columns: int = 80, rows: int = 24, **env: str):
        base = {name: value for name, value in os.environ.items() if name not in CLEARED}
        env = base | {"TERM": "xterm-256color", "MLX_GEMMA_MTP_BLAS": "off", "PYTHONPATH": str(ROOT)} | env
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream, self.raw = pyte.ByteStream(self.screen), b""
        command = ["-m", module, *argv]
        self.child = pexpect.spawn(sys.executable, command, env=env, dimensions=(rows, columns), echo=False)
        self.child.delaybeforesend = None
        self.screen.write_process_input = self.child.send  # a terminal says where its cursor is

    @property
    def lines(self) -> list[str]:
        """All lines, those that have left the screen included, without spaces behind them."""
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display)]

    @property
    def text(self) -> str:
        """All lines, without the empty ones at the end."""
        return "\n".join(self.lines).rstrip()

    @property
    def line(self) -> str:
        """The line of the cursor, without spaces behind it."""
        return self.screen.display[self.screen.cursor.y].rstrip()

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def read(self, seconds: float) -> bool:
        """Reads what comes; returns whether anything did before the time was over."""
        try:
            data = self.child.read_nonblocking(4096, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def wait(self, condition: Callable[[], bool] | str) -> None:
        """Reads until a condition holds, or a text is on the screen."""
        holds = condition if callable(condition) else lambda: condition in self.text
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"waited for {condition!r}; the screen shows:\n{self.text}"
            if not self.read(0.2) and not self.child.isalive():
                assert holds(), f"it ended; the screen shows:\n{self.text}"

    def ends(self) -> int:
        """Reads to the end of the program and returns its exit code."""
        self.wait(lambda: not self.read(0.2) and not self.child.isalive())
        self.child.close()
        return self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.child.close(force=True)
