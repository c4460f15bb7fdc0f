"""A server for tests: a real one on a port of its own, with the bundled pair or with scripted tokens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from mlx_gemma_mtp.engine.intake import Options
from mlx_gemma_mtp.engine.request import Chunk
from mlx_gemma_mtp.server.app import make_app
from mlx_gemma_mtp.server.connection import Connection
from mlx_gemma_mtp.server.security import Rules
from mlx_gemma_mtp.server.service import Served

NAME = "demo"
ASKED = [{"role": "user", "content": "def fibonacci(n):"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@contextmanager
def serving(engine: Any, keys: Sequence[str] = (), rules: dict[str, Any] | None = None, **served: Any) -> Iterator[str]:
    """Serves an engine in a thread. Yields the address, without /v1. served: options of Served."""
    told = Served(engine, NAME, **served)
    app = make_app(told, Rules.of("127.0.0.1", keys, told.limits.body, **(rules or {})))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Connection, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


class Scripted:
    """An engine whose rounds are written down: the real one's text, tools and limits, and no model.

    rounds: for a prompt's number in its call, lists of ids, one list a round. wait: seconds before each round; it may
    raise. open: calls that are not closed now.
    """

    def __init__(self, engine: Any, rounds: Callable[[int], Sequence[Sequence[int]]], wait: Any = lambda: None):
        self._engine, self._rounds, self._wait, self.open = engine, rounds, wait, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def astream(self, prompts: Any, params: Any, **options: Any) -> AsyncIterator[Chunk]:
        requests = self._engine._intake.requests(prompts, params, Options(**options))
        if options.get("cancel") is not None:
            options["cancel"].is_set()
        self.open += 1
        try:
            for number, request in enumerate(requests):
                for place, tokens in enumerate(self.rounds_of(number, request.prompt)):
                    if (pause := self._wait()) is not None:
                        await pause
                    if request.finish_reason is None:
                        drafted = len(tokens) - 1 if place else None
                        request.take(tokens, drafted, "fixed", [_logprob(token) for token in tokens])
                        yield request.chunk()
                if request.finish_reason is None:
                    request.cancel("length")
                    yield request.chunk()
        finally:
            self.open -= 1

    def rounds_of(self, number: int, prompt: list[int]) -> Sequence[Sequence[int]]:
        """The rounds of a prompt."""
        return self._rounds(number)

    async def agenerate(self, prompts: Any, params: Any, **options: Any) -> list[Any]:
        chunks = [chunk async for chunk in self.astream(prompts, params, **options)]
        results, n = [chunk.result for chunk in chunks if chunk.result is not None], options.get("n", 1)
        return results if n == 1 else [results[i : i + n] for i in range(0, len(results), n)]


class Noting(Scripted):
    """One that says the same whatever it is asked, and notes the prompts.

    seen: of all requests so far.
    """

    def __init__(self, engine: Any, said: Sequence[int]):
        super().__init__(engine, lambda number: [])
        self.said, self.seen = list(said), []

    def rounds_of(self, number: int, prompt: list[int]) -> Sequence[Sequence[int]]:
        self.seen.append(prompt)
        return [self.said]


def _logprob(token: int) -> Any:
    from mlx_gemma_mtp.speculative.readback import TokenLogprob

    return TokenLogprob(token, -1.0, [(token, -1.0), (5, -2.0)])


def ids_of(engine: Any, text: str) -> list[int]:
    """The ids of a reply, with the control tokens that it spells."""
    return engine.text.spelled(text)


def post(url: str, path: str, body: Any, **headers: str) -> httpx.Response:
    """Posts JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url + path, content=content, headers=told, timeout=120)


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream: JSON objects, and '[DONE]'."""
    response = post(url, path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
