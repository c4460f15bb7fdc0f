"""Clients that leave, do not read, or are too many; and a server that is quiet, full, or ends."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from serving import ASKED, NAME, Scripted, ids_of, post, serving

from mlx_gemma_mtp.server.limits import Limits
from mlx_gemma_mtp.server.pulse import Pulse

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED, "max_tokens": 2000}
PATIENCE = 60  # seconds after which a test fails; nothing is expected to take so long


def until(condition, what: str = "") -> None:
    """Waits until something holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def figure(url: str, name: str) -> float:
    """A figure of /metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"mlx_gemma_mtp:{name}"))


def ask(url: str, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Sends a request, and returns its socket: nothing of the answer is read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    content = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json"]
    head += [f"content-length: {len(content)}", "", ""]
    connection.sendall("\r\n".join(head).encode() + content)
    return connection


class Endless(Scripted):
    """An engine whose replies do not end; each round takes a moment."""

    def __init__(self, engine: Any, token: str = "x", pause: float = 0.01, first: float = 0.0):
        self.first, self.pause, self.rounds_done = first, pause, 0
        super().__init__(engine, lambda number: [ids_of(engine, token)] * 1900, self._round)

    def _round(self) -> Any:
        self.rounds_done += 1
        return asyncio.sleep(self.first if self.rounds_done == 1 and self.first else self.pause)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_ends_its_request(engine, streams, reset):
    scripted = Endless(engine)
    with serving(scripted) as url:
        connection = ask(url, BODY | {"stream": streams})
        until(lambda: scripted.open == 1)
        if streams:
            assert connection.recv(100)
        if reset:  # RST instead of FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        until(lambda: scripted.open == 0)
        until(lambda: figure(url, "request_cancelled_total") == 1)
        assert scripted.rounds_done < 1500 and figure(url, "num_requests_running") == 0


def test_a_client_that_resets_amid_a_fast_stream_is_no_warning(engine, caplog):
    """Many events are there at once, and their client is not any more: after one write that fails there is no other."""
    left, rounds = threading.Event(), []

    def wait() -> Any:
        rounds.append(None)
        if len(rounds) < 3:
            return asyncio.sleep(0.1)
        left.wait(PATIENCE)  # the loop with it, so that it learns nothing of its client
        return None

    scripted = Scripted(engine, lambda number: [ids_of(engine, "x")] * 500, wait)
    with serving(scripted) as url:
        connection = ask(url, BODY | {"stream": True})
        assert connection.recv(1000)
        until(lambda: len(rounds) == 3)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        left.set()
        until(lambda: scripted.open == 0)
        until(lambda: figure(url, "request_cancelled_total") == 1)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_a_client_that_leaves_the_real_engine(url, engine):
    """The engine's own rounds end, whoever left: streamed or not, waiting, or while its prompt is prefilled."""
    before = figure(url, "request_cancelled_total")
    long = {"model": NAME, "messages": [{"role": "user", "content": "x y " * 1500}], "max_tokens": 2000}
    bodies = [BODY | {"ignore_eos": True, "stream": True}, BODY | {"ignore_eos": True}, long | {"stream": True}, long]
    connections = [ask(url, body) for body in bodies * 3]
    until(lambda: figure(url, "num_requests_") >= len(connections))
    for connection in connections:
        connection.close()
    until(lambda: figure(url, "num_requests_") == 0, "all places are given back")
    assert figure(url, "request_cancelled_total") - before == len(connections)
    result = engine.generate("def f(x):")
    assert result.stats.drafted > 0 and result.stats.rows == 1  # nobody is left over, and drafts are still made


def test_a_client_that_does_not_read_is_ended(engine):
    scripted = Endless(engine, token=" and so on" * 50, pause=0.0)
    with serving(scripted, limits=Limits(reading=1.0)) as url:
        connection = ask(url, BODY | {"stream": True})
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda: scripted.open == 1)
        until(lambda: scripted.open == 0)
        assert scripted.rounds_done < 1900
        connection.close()


def test_comments_while_nothing_comes(engine):
    scripted = Endless(engine, first=1.5)
    scripted._rounds = lambda number: [ids_of(engine, "x"), ids_of(engine, "<turn|>")]
    with serving(scripted, limits=Limits(beat=0.2)) as url:
        text = post(url, CHAT, BODY | {"stream": True}).text
    assert text.count(": keepalive\n\n") >= 2 and "\nid:" not in text and "data: :" not in text
    quick = Scripted(engine, lambda number: [ids_of(engine, "x"), ids_of(engine, "<turn|>")])
    with serving(quick) as url:
        assert ": keepalive" not in post(url, CHAT, BODY | {"stream": True}).text


def test_the_first_byte_does_not_wait_for_the_prompt(engine):
    """Headers and the role come once the request is taken in."""
    scripted = Endless(engine, first=5.0)
    with serving(scripted) as url, httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}) as response:
        assert response.status_code == 200
        assert b'"role":"assistant"' in next(response.iter_raw()) and scripted.rounds_done <= 1


def test_too_many_are_refused_until_one_ends(engine):
    scripted = Endless(engine)
    with serving(scripted, limits=Limits(waiting=2)) as url:
        most = engine.max_rows + 2
        connections = [ask(url, BODY | {"stream": True}) for _ in range(most)]
        until(lambda: scripted.open == most)
        for path, body in ((CHAT, BODY), (CHAT, BODY | {"stream": True}), ("/v1/messages", BODY)):
            refused = post(url, path, body)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert "error" in refused.json()
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert figure(url, "request_refused_total") == 3
        connections.pop().close()
        until(lambda: scripted.open == most - 1)
        connections.append(ask(url, BODY | {"stream": True}))
        until(lambda: scripted.open == most)
        for connection in connections:
            connection.close()
        until(lambda: scripted.open == 0)


def test_a_request_that_takes_too_long_ends_with_what_it_has(url):
    answer = post(url, CHAT, BODY | {"ignore_eos": True, "timeout": 0.5}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] < 2000


def test_health_tells_of_an_engine_that_ended(engine):
    class Dead(Scripted):
        def call(self, function: Any) -> None:
            raise RuntimeError("the engine's worker failed: Bang; load it again")

    with serving(Dead(engine, lambda number: [])) as url:
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").json()["status"] == "failed"


def test_a_pulse_waits_for_a_long_round_but_not_for_ever(engine):
    block = threading.Event()

    class Hung(Scripted):
        def call(self, function: Any) -> None:
            block.wait(PATIENCE)

    async def feel(patience: float) -> str | None:
        return await Pulse(Hung(engine, lambda number: []), patience).trouble()

    assert asyncio.run(feel(100.0)) is None
    assert "no sign" in asyncio.run(feel(0.5))
    block.set()


def test_health_says_what_runs(url, engine):
    about = httpx.get(f"{url}/health").json()
    assert about["status"] == "ok" and about["computed"] == engine.description and about["model"] == NAME
    assert about["mtp"] == {"on": True, "reason": None} and httpx.get(f"{url}/ready").json() == {"ready": True}
