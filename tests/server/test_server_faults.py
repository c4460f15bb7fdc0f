"""What goes wrong beside a server's clients: rounds that raise, processes that die or hang, clocks, a full disk."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import test_clients
from serving import ASKED, NAME, events, post, serving
from test_clients import ask, figure, until

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.server.limits import Limits

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED, "max_tokens": 24, "temperature": 0}
PATIENCE = 300


def own(engine, count: int = 24) -> str:
    """The text of BODY where nobody else asks."""
    return engine.generate(ASKED, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=count > 24)).text


def text_of(found: list) -> str:
    """The text of a stream's events."""
    deltas = [each["choices"][0]["delta"] for each in found if each != "[DONE]" and each.get("choices")]
    return "".join(delta.get("content") or "" for delta in deltas)


@contextmanager
def breaking(engine, error: Exception):
    """Has the engine's next round but two raise, once."""
    runner = engine._worker._runner
    stock, left = runner.round, [2]

    def round(deliver) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise error
        stock(deliver)

    runner.round = round
    try:
        yield
    finally:
        runner.round = stock


def test_a_round_that_raises_ends_its_requests_and_the_next_are_answered(url, engine, caplog):
    """The engine's own round, amid streams: each is told in its own shape, no other word of it gets out."""
    text = own(engine)
    with breaking(engine, RuntimeError("secret /home/me")):
        paths = [CHAT, "/v1/completions", "/v1/messages"]
        bodies = [BODY | {"max_tokens": 200}, {"prompt": "def", "max_tokens": 200}, BODY | {"max_tokens": 200}]
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda p=p, b=b: found.append(post(url, p, b | {"stream": True}).text))
            for p, b in zip(paths, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    failed = [each for each in found if '"error":{' in each]
    assert failed and all("secret" not in each for each in found)
    assert any("secret" in record.getMessage() for record in caplog.records)  # the log has the reason
    assert text_of(events(url, CHAT, BODY)) == text
    assert httpx.get(f"{url}/health").json()["status"] == "ok" and figure(url, "num_requests_") == 0


def test_clocks_of_the_wall_decide_nothing(engine, monkeypatch):
    """An hour ahead, a year back, amid streams and between them: no timeout, no comment, the same text."""
    text, stock, off = own(engine, 60), time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: stock() + off[0])
    with serving(engine, limits=Limits(seconds=100.0, reading=50.0)) as url:
        body = BODY | {"max_tokens": 60, "ignore_eos": True, "stream": True, "timeout": 90}
        for jump in (3600.0, -3.2e7):
            lines: list[str] = []
            with httpx.stream("POST", url + CHAT, json=body, timeout=PATIENCE) as response:
                for line in response.iter_lines():
                    off[0] = jump
                    lines.append(line)
            found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert text_of(found) == text and ": keepalive" not in lines
            assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert httpx.get(f"{url}/health").json()["status"] == "ok"


@pytest.mark.slow
def test_a_client_that_never_reads_delays_nobody(engine, monkeypatch):
    """The real engine: its request ends, the others' texts are theirs, and its place is given back."""
    monkeypatch.setattr(test_clients, "PATIENCE", PATIENCE)  # a socket takes megabytes that nobody reads
    text, more = own(engine), {"max_tokens": 4000, "ignore_eos": True, "logprobs": True, "top_logprobs": 20, "n": 4}
    with serving(engine, limits=Limits(reading=1.0)) as url:
        mute = ask(url, BODY | more | {"stream": True})
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda: figure(url, "num_requests_running") == 4)
        for _ in range(3):
            assert text_of(events(url, CHAT, BODY)) == text
        until(lambda: figure(url, "num_requests_running") == 0)
        assert figure(url, "request_cancelled_total") == 1
        mute.close()


async def both(url: str, bodies: list[dict]) -> list[str]:
    """The answers to bodies that are posted at once."""
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        answers = await asyncio.gather(*(client.post(url + CHAT, json=body) for body in bodies))
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_server_that_aborts_serves_again():
    """SIGABRT, as Metal ends a process, amid a stream."""
    from test_serve import process, wait_until_ready
    from test_supervisor import children_of

    with process() as (parent, url):
        (child,) = children_of(parent.pid)
        body = {"messages": ASKED, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with pytest.raises(httpx.HTTPError), httpx.stream("POST", url + CHAT, json=body, timeout=PATIENCE) as response:
            for _ in response.iter_lines():
                os.kill(child, signal.SIGABRT)
        wait_until_ready(url)
        assert post(url, CHAT, {"messages": ASKED, "max_tokens": 4}).json()["usage"]["completion_tokens"] == 4
        assert any("SIGABRT" in line and "started again" in line for line in parent.said)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(PATIENCE) == 0


HANGS = """
import sys, threading, time
from mlx_gemma_mtp import serve
from mlx_gemma_mtp.server import pulse, service
pulse.Pulse.__init__.__defaults__ = (3.0,)
stock = service.Served.check_model
def check_model(self, name):  # a request for this model has the engine's thread wait for ever
    if name == "hang":
        threading.Thread(target=self.engine.call, args=(lambda: time.sleep(10_000),), daemon=True).start()
        name = None
    return stock(self, name)
service.Served.check_model = check_model
sys.exit(serve.main(sys.argv[1:]))
"""
PARENT = """
import socket, sys
from mlx_gemma_mtp.server.supervisor import supervise_command
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
sys.exit(supervise_command([sys.executable, "-c", sys.argv[1], "--num-draft-tokens", "3", "--inherited"], listening))
"""


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced():
    """The engine's thread never comes back: /health says so, the process ends, and another one answers."""
    from test_serve import wait_until_ready

    command = [sys.executable, "-c", PARENT, HANGS]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(parent.stderr), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{int(parent.stdout.readline())}"
        wait_until_ready(url)
        with pytest.raises(httpx.HTTPError):
            httpx.post(
                url + CHAT, json=BODY | {"model": "hang", "max_tokens": 2000}, timeout=PATIENCE
            ).raise_for_status()
        wait_until_ready(url)
        assert post(url, CHAT, BODY | {"model": None, "max_tokens": 4}).json()["usage"]["completion_tokens"] == 4
        assert any("no sign" in line for line in said) and any("started again" in line for line in said), said
    finally:
        parent.send_signal(signal.SIGTERM)
        parent.wait(PATIENCE)
        parent.stdout.close()
        parent.stderr.close()


@pytest.mark.slow
def test_a_full_disk_below_the_prefixes_harms_nobody(tmp_path):
    """A file system of a few kilobytes: prefixes are not kept there, as the log says, and texts are the same."""
    from test_serve import process

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with process("--prefix-cache", str(small), "--no-parent") as (child, url):
            long = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
            bodies = [{"messages": [{"role": "user", "content": f"{long}# {i}"}], "max_tokens": 8, "temperature": 0}
                      for i in range(4)]  # fmt: skip
            first = asyncio.run(both(url, bodies))
            for _ in range(3):
                assert asyncio.run(both(url, bodies)) == first
            said = [line for line in child.said if "No space left" in line or "prefix" in line]
            assert said and not any("Traceback" in line for line in child.said), child.said
            assert httpx.get(f"{url}/health").json()["status"] == "ok"
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE) == 0
    finally:
        subprocess.run(["umount", small], check=False)
