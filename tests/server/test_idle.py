"""A server that nobody asks: its process ends, and the next request has another one started."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from mlx_gemma_mtp.server import door

HERE = Path(__file__).parent
PATIENCE = 120.0
LOADING = 900.0  # seconds for a reply that has the model loaded first
CHAT = "{}/v1/chat/completions"
ENDLESS = {"stream": True, "ignore_eos": True, "max_tokens": 4000}
BODY = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 8, "temperature": 0}
PARENT = (
    "import socket, sys; from mlx_gemma_mtp.server.supervisor import supervise_command; "
    "listening = socket.create_server(('127.0.0.1', 0)); print(listening.getsockname()[1], flush=True); "
    "sys.exit(supervise_command(sys.argv[1:], listening))"
)


@contextmanager
def parent(*command: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A parent in a process of its own, whose children run a command. Yields it and its address."""
    child = subprocess.Popen([sys.executable, "-c", PARENT, *command], stdout=subprocess.PIPE, text=True)
    try:
        yield child, f"http://127.0.0.1:{int(child.stdout.readline())}"
    finally:
        child.terminate()
        child.wait(PATIENCE)
        child.stdout.close()


def idle(seconds: float) -> tuple[str, ...]:
    return sys.executable, str(HERE / "idle_child.py"), str(seconds)


def until_unloaded(url: str, *lost: type[Exception]) -> None:
    """Waits until /health says so. lost: what may become of a question."""
    end = time.monotonic() + PATIENCE
    with httpx.Client(timeout=PATIENCE) as client:  # it keeps its connection, if it may
        while True:
            with suppress(*lost):
                found = client.get(f"{url}/health")
                if found.headers.get("content-type") == "application/json" and found.json().get("status") == "unloaded":
                    return
            assert time.monotonic() < end
            time.sleep(0.05)


def test_the_next_requests_wait_for_a_new_child():
    with parent(*idle(0.3)) as (process, url):
        until_unloaded(url)
        assert httpx.get(f"{url}/ready").json() == {"ready": True}
        refused = httpx.get(f"{url}/metrics")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unloaded"
        assert httpx.get(f"{url}/health").json() == {"status": "unloaded"}
        paths = ("/", "/sleep/0.6") * 4  # the latter is longer than it may be idle
        with ThreadPoolExecutor(8) as pool:  # bodies are read by the child alone, large ones too
            asked = [pool.submit(httpx.post, url + path, content=b"x" * 300_000, timeout=PATIENCE) for path in paths]
            answers = [each.result() for each in asked]
        assert {each.status_code for each in answers} == {200} and len({each.text for each in answers}) == 1
        until_unloaded(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_who_waits_for_a_child_that_fails_is_told_to_come_back(tmp_path):
    log = tmp_path / "lives"
    ready = "import os, sys; listening, ready, parent = map(int, sys.argv[1].split(',')); "
    code = f"open({str(log)!r}, 'a').write('.'); lives = len(open({str(log)!r}).read()); "
    code += "lives == 1 and os.write(ready, b'1'); sys.exit(75 if lives == 1 else 2)"
    with parent(sys.executable, "-c", ready + code) as (process, url):
        until_unloaded(url, httpx.TransportError)  # a child that listens and ends at once
        answer = httpx.get(f"{url}/v1/models", timeout=PATIENCE)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
        assert process.poll() is None  # bad input where another child has served is tried again


@pytest.mark.slow
def test_requests_that_come_while_it_unloads_are_answered():
    """Four clients at random times, most of which are near the moment at which a child ends."""
    seen: set[str] = set()

    def ask(url: str, seed: int) -> None:
        times = random.Random(seed)
        for _ in range(10):
            answer = httpx.get(f"{url}/sleep/{times.choice((0, 0, 0.05))}", timeout=PATIENCE)
            assert answer.status_code == 200
            seen.add(answer.text)
            time.sleep(times.uniform(0.2, 0.9))

    with parent(*idle(0.2)) as (_, url):
        until_unloaded(url)
        with ThreadPoolExecutor(4) as pool:
            for each in [pool.submit(ask, url, seed) for seed in range(4)]:
                each.result()
    assert len(seen) > 3  # processes


def memory(pid: int) -> int:
    """Bytes of a process and of its children."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * os.sysconf("SC_PAGESIZE") + sum(map(memory, map(int, children)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_memory_is_given_back_and_prefixes_stay(tmp_path):
    from test_serve import process

    said = "".join(f"def f{number}(x): return x + {number}\n" for number in range(60))
    body = BODY | {"messages": [{"role": "user", "content": said}]}
    with process("--idle-unload", "2", "--prefix-cache", str(tmp_path)) as (child, url):
        first = httpx.post(CHAT.format(url), json=body, timeout=LOADING).json()
        with httpx.stream("POST", CHAT.format(url), json=BODY | ENDLESS, timeout=LOADING):  # so it is not idle
            loaded = memory(child.pid)
            about = httpx.get(f"{url}/health", timeout=LOADING).json()
        until_unloaded(url)
        freed = memory(child.pid)
        print(f"loaded: {loaded / 1e6:.0f} MB, unloaded: {freed / 1e6:.0f} MB")
        assert freed < loaded / 3 and Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text() == ""
        again = httpx.post(CHAT.format(url), json=body, timeout=LOADING).json()
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert about["settings"]["idle_unload"] == {"value": 2.0, "origin": "flag"}


def test_a_door_that_closes_hands_over_who_has_said_nothing_yet():
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            held = door.Door(listening)
            held.open()
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(b"GET / HT")
                while not held._asking:
                    await asyncio.sleep(0.01)
                (connection,) = await held.close()
                with connection:
                    assert connection.recv(100) == b"GET / HT"

    asyncio.run(run())


def test_a_slow_line_waits_no_longer_than_it_may(monkeypatch):
    monkeypatch.setattr(door, "HEAD_IN", 0.1)

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            closed = door.Door(listening, holding=True)
            closed.open()
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(b"GET / HT")
                loop = asyncio.get_running_loop()
                client.setblocking(False)
                with suppress(ConnectionError):  # cut, or ended
                    assert await asyncio.wait_for(loop.sock_recv(client, 1), PATIENCE) == b""
            assert await closed.close() == []

    asyncio.run(run())
