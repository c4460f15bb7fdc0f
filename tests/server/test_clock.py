"""A clock that jumps: nothing waits by it, ends by it, or is taken for dead by it."""

from __future__ import annotations

import ast
import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from mlx_gemma_mtp.server.idle import Idle
from mlx_gemma_mtp.server.pulse import Pulse

PACKAGE = Path(__file__).resolve().parents[2] / "mlx_gemma_mtp"
WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today"}
# Dates of answers, and the age of files that others have left.
READERS = {
    "server/service.py": 1,
    "server/run.py": 1,
    "server/responses_output.py": 1,
    "files/prefix_store.py": 1,
}


def test_the_clock_on_the_wall_is_read_for_dates_alone():
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in WALL and isinstance(called.value, ast.Name):
                assert called.value.id in ("time", "datetime", "date"), (path, called.value.id)
                name = str(path.relative_to(PACKAGE))
                found[name] = found.get(name, 0) + 1
    assert found == READERS


def test_a_jump_neither_hides_a_hang_nor_makes_one(monkeypatch):
    """A day forward and a day back, while an engine gives no sign."""
    hangs = threading.Event()
    pulse = Pulse(SimpleNamespace(call=lambda function: hangs.wait()), patience=1.5)

    async def run() -> list[str | None]:
        found = []
        for jump in (86400.0, -86400.0):
            now = time.time()
            monkeypatch.setattr(time, "time", lambda now=now, jump=jump: now + jump)
            found.append(await pulse.trouble())  # each waits for a second
        hangs.set()
        await asyncio.sleep(0.1)
        return [*found, await pulse.trouble()]

    healthy, hung, again = asyncio.run(run())
    assert healthy is None and "no sign" in hung and again is None


def test_a_jump_unloads_nothing(monkeypatch):
    idle = Idle(None)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert idle.seconds < 3600
