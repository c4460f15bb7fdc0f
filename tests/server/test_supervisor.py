"""The parent: what it does with children that end, and what clients are told meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from serving import Scripted

from mlx_gemma_mtp.server import drain, supervisor
from mlx_gemma_mtp.server.service import Served

READY = "import os, sys; listening, ready, parent = map(int, sys.argv[1].split(',')); os.write(ready, b'1'); "


@pytest.fixture
def listening(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def lives(code: str, listening: socket.socket, tmp_path: Path) -> tuple[int, int]:
    """The exit code of a parent whose children run this code, and how many there were."""
    log = tmp_path / "lives"
    code = f"open({str(log)!r}, 'a').write('.'); lives = len(open({str(log)!r}).read()); {code}"
    return supervisor.supervise_command([sys.executable, "-c", code], listening), len(log.read_text())


@pytest.mark.parametrize(
    "code, expected, children",
    [
        (READY + "sys.exit(0)", 0, 1),
        ("import sys; sys.exit(2)", 2, 1),  # bad input would be bad again
        ("import sys; sys.exit(3)", 1, supervisor.MOST_FAILURES),
        (READY + "os.abort()", 1, supervisor.MOST_FAILURES),
        (READY + "sys.exit(0) if lives == 3 else os.kill(os.getpid(), 9)", 0, 3),
    ],
)
def test_children_that_end(listening, tmp_path, caplog, code, expected, children):
    assert lives(code, listening, tmp_path) == (expected, children)
    if children > 1:
        assert "started again" in caplog.text


def test_a_child_that_lived_for_long_does_not_count(listening, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "LIVED", 0.0)
    code = READY + f"sys.exit(0 if lives == {supervisor.MOST_FAILURES + 2} else 3)"
    assert lives(code, listening, tmp_path) == (0, supervisor.MOST_FAILURES + 2)


def test_clients_are_told_to_wait(listening, tmp_path):
    go = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(_in_thread([sys.executable, "-c", code], listening)))
    thread.start()
    for path in ("/v1/chat/completions", "/health"):
        answer = httpx.post(url + path, json={"messages": []})
        assert (
            answer.status_code == 503 and answer.headers["retry-after"] and answer.json()["error"]["code"] == "loading"
        )
    with socket.create_connection(("127.0.0.1", listening.getsockname()[1])) as rude:
        rude.sendall(b"x" * 200_000)  # no head ends there
    go.touch()
    thread.join(60)
    assert done == [0]


def _in_thread(command: list[str], listening: socket.socket) -> int:
    """A thread hears no signals, so that the parent sets no handlers there."""
    return supervisor.supervise_command(command, listening, signals=())


def test_a_child_ends_with_its_parent(tmp_path):
    reading, writing = socket.socketpair()
    code = "import signal, sys, time; from mlx_gemma_mtp.server.supervisor import Inherited\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    code += f"Inherited(0, 0, {reading.fileno()}).follow()\nprint('here', flush=True)\ntime.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(reading.fileno(),), stdout=subprocess.PIPE)
    reading.close()
    assert child.stdout.readline() == b"here\n"
    writing.close()
    assert child.wait(60) == 7
    child.stdout.close()


def test_a_process_whose_engine_is_dead_ends(engine, monkeypatch):
    class Dead(Scripted):
        def call(self, function) -> None:
            raise RuntimeError("the engine's worker failed: Bang")

    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(drain.os, "_exit", leave)
    monkeypatch.setattr(drain, "WATCH", 0.01)
    served = Served(Dead(engine, lambda number: []), "demo")
    with pytest.raises(SystemExit):
        asyncio.run(drain.Server(None, served, 1.0).watch())
    assert codes == [drain.BROKEN]


def test_an_engine_that_hangs_does_not_keep_the_process(engine, monkeypatch):
    codes: list[int] = []
    left = threading.Event()
    monkeypatch.setattr(drain.os, "_exit", lambda code: (codes.append(code), left.set()))
    monkeypatch.setattr(drain, "AFTERWARDS", 0)
    monkeypatch.setattr(drain, "FREEING", 0.01)
    server = drain.Server(None, Served(Scripted(engine, lambda number: []), "demo"), 0.01)
    server.handle_exit(signal.SIGTERM, None)
    assert left.wait(60) and codes == [drain.BROKEN]


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_server_serves_again():
    """kill -9 of the real one amid a stream: the client sees its stream cut, and the next request is answered."""
    from test_serve import BODY, process, wait_until_ready

    with process() as (parent, url):
        (child,) = children_of(parent.pid)
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=300) as response,
        ):
            for _ in response.iter_lines():
                os.kill(child, signal.SIGKILL)
        wait_until_ready(url)
        (after,) = children_of(parent.pid)
        assert after != child
        answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"max_tokens": 4}, timeout=300)
        assert answer.json()["usage"]["completion_tokens"] == 4
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(300) == 0
