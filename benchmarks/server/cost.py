"""What HTTP costs: streams of a scripted engine, read by its own coroutines and through the server, in turn.

The engine's rounds take a given time whatever happens; what its throughput loses is what the server takes from it. CPU
is the serving process's alone: the clients are another one.
"""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from benchmarks.server.processes import Readers
from benchmarks.server.scripted import scripted
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.server.app import make_app
from mlx_gemma_mtp.server.connection import Connection
from mlx_gemma_mtp.server.security import Rules
from mlx_gemma_mtp.server.service import Served

TEXT = " return value"  # of a round, in a few tokens
PROMPT = [{"role": "user", "content": "def f(x):"}]
CHAT = "/v1/chat/completions"


@contextmanager
def serving(engine: Any) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Serves an engine in a thread. Yields the address and the thread's loop."""
    served = Served(engine, "scripted")
    app = make_app(served, Rules.of("127.0.0.1", (), served.limits.body))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Connection, log_level="error", lifespan="off", ws="none"))
    begun, found = threading.Event(), []

    async def serve() -> None:
        found.append(asyncio.get_running_loop())
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        begun.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    begun.wait()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", found[0]
    finally:
        server.should_exit = True
        thread.join(30)


def cpu() -> float:
    """Seconds of CPU that this process has taken."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(streams: int, seconds: float, tokens: int, repeats: int, note: Callable[[str], None]) -> list[dict]:
    """Pairs of calls: the engine's own, and the same through the server. The first pair warms up."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    body = {"messages": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with load() as real:
        engine = scripted(real, seconds, TEXT)
        readers = Readers()
        try:
            with serving(engine) as (url, loop):
                pairs = []
                for repeat in range(-1, repeats):
                    calls = [lambda: _own(engine, loop, params, streams), lambda: _http(readers, url, [body] * streams)]
                    if repeat % 2:
                        calls.reverse()
                    found: dict[str, Any] = {}
                    for call in calls:
                        before = cpu()
                        name, took, made = call()
                        found[name] = {
                            "seconds": took,
                            "tokens": made,
                            "cpu_ms_per_token": 1e3 * (cpu() - before) / made,
                        }
                    if repeat >= 0:
                        pairs.append(found)
                        note(f"{repeat + 1} of {repeats}: {found['own']['seconds'] / found['http']['seconds']:.3f}")
                return pairs
        finally:
            readers.close()
            engine._worker.close()


def _own(engine: Any, loop: asyncio.AbstractEventLoop, params: SamplingParams, streams: int) -> tuple[str, float, int]:
    async def one() -> int:
        made = 0
        async for chunk in engine.astream(PROMPT, params):
            made += len(chunk.tokens)
        return made

    async def every() -> tuple[float, int]:
        began = loop.time()
        made = await asyncio.gather(*(one() for _ in range(streams)))
        return loop.time() - began, sum(made)

    return "own", *asyncio.run_coroutine_threadsafe(every(), loop).result()


def _http(readers: Readers, url: str, bodies: list[dict[str, Any]]) -> tuple[str, float, int]:
    found = readers.read(url, CHAT, bodies)
    return "http", found["seconds"], sum(found["tokens"])
