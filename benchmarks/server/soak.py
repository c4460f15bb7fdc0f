"""Many clients for minutes: good requests of every kind, and among them those that leave, do not end, or are no
requests at all. Every good text is compared with its lone one.

The server is a process of its own, in float32 with MLX's own BLAS, where a text does not depend on its company. Of its
memory two figures must not rise: that of MLX's arrays, as /metrics tells it, and what is held, which is the process
without the buffers that MLX keeps unused and without what the allocator keeps of what was freed.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.prompts import MARKED
from benchmarks.server import allocator, rude
from benchmarks.server.processes import Serving
from benchmarks.serving.intervals import of_slope
from benchmarks.workers import Failed

CHAT, TEXT, CLAUDE = rude.PATHS[:3]
GROWTH = 20_000.0  # bytes a second that may be noise
EVERY = 2.0  # seconds between two looks at the memory
PATIENCE = 300.0  # seconds in which an answer must have come
KINDS = 40  # different good requests
STEADY = ("held", "arrays")  # figures of memory that must not rise
FIGURES = {"held": "held", "arrays": "MLX's arrays", "cached": "buffers that MLX keeps",
           "kept": "kept by the allocator", "resident": "resident"}  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    {"temperature": 1.0, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0, "stop": ["return", "zzz"]},
    {"temperature": 1.0, "seed": 11, "num_draft_tokens": 0},
    {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": {
        "type": "object", "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"], "additionalProperties": False}}}},
)  # fmt: skip


@dataclass
class Good:
    """A good request: its path and body, and its text where nobody else asks."""

    path: str
    body: dict[str, Any]
    text: str = ""


@dataclass
class Seen:
    """What came of a soak. others: requests that were no good ones, by kind and status. trimmed: bytes resident once
    the allocator has given back what it could.
    """

    good: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    sizes: list[dict[str, float]] = field(default_factory=list)
    trimmed: int = 0


def goods(count: int) -> list[Good]:
    """Good requests of all three routes, settings and lengths."""
    prompts = [entry["prompt"] for entry in json.loads(MARKED.read_text())]
    r, some = random.Random(0), []
    for i in range(count):
        prompt, settings = prompts[i % len(prompts)], dict(SETTINGS[i % len(SETTINGS)])
        path = (CHAT, CHAT, TEXT, CLAUDE)[i % 4] if "response_format" not in settings else CHAT
        body: dict[str, Any] = {"max_tokens": r.choice((1, 8, 24, 48)), "stream": r.random() < 0.6}
        if path == CLAUDE:
            settings = {key: value for key, value in settings.items() if key in ("temperature", "top_p", "seed")}
        if path == TEXT:
            settings.pop("top_logprobs", None)
            settings.pop("logprobs", None)
        asked = {"prompt": prompt} if path == TEXT else {"messages": [{"role": "user", "content": prompt}]}
        some.append(Good(path, asked | body | settings))
    return some


async def post(port: int, path: str, body: dict[str, Any], until: int | None = None) -> tuple[int, bytes]:
    """The status and the whole body of an answer. until: leaves after so many bytes, abruptly."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    try:
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        if until is not None:
            return 0, await reader.read(until) if until else b""
        line = await reader.readline()
        while await reader.readline() not in (b"\r\n", b""):
            pass
        return int(line.split()[1]), await reader.read()
    finally:
        writer.transport.abort() if until is not None else writer.close()


def text_of(good: Good, answer: bytes) -> str:
    """The text of an answer, whole or as events, whose end must be there."""
    if not good.body["stream"]:
        found = json.loads(answer)
        if good.path == CLAUDE:
            return "".join(block.get("text", "") for block in found["content"])
        choice = found["choices"][0]
        return choice["text"] if good.path == TEXT else choice["message"]["content"] or ""
    lines = answer.replace(b"\r\n", b"\n").decode()
    events = [json.loads(line[6:]) for line in lines.split("\n") if line.startswith("data: {")]
    if good.path == CLAUDE:
        if events[-1]["type"] != "message_stop":
            raise ValueError(f"ends with {events[-1]}")
        return "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")
    if "data: [DONE]" not in lines or any("error" in each for each in events):
        raise ValueError(f"ends with {events[-1:]}")
    choices = [each["choices"][0] for each in events]
    return "".join((each.get("text") if good.path == TEXT else each["delta"].get("content")) or "" for each in choices)


async def ask(port: int, good: Good) -> str:
    """The text of a good request. Raises ValueError for another answer than a whole one."""
    status, answer = await asyncio.wait_for(post(port, good.path, good.body), PATIENCE)
    if status != 200:
        raise ValueError(f"{status}: {answer[:200]!r}")
    return text_of(good, answer)


async def client(port: int, some: Sequence[Good], seen: Seen, end: float, seed: int) -> None:
    """One client: asks for something, well or not, until the time is over."""
    r = random.Random(seed)
    while time.monotonic() < end:
        good, way = r.choice(some), r.random()
        try:
            if way < 0.7:
                await _well(port, good, seen)
            elif way < 0.85:  # leaves at once, amid its stream, or before the answer to a long request
                body = good.body | {"stream": r.random() < 0.7, "max_tokens": 400}
                await post(port, good.path, body, r.choice((0, 1, 200, 2000)) if body["stream"] else 0)
                seen.others["left"] += 1
            elif way < 0.88:
                long = {"messages": [{"role": "user", "content": "x " * r.choice((20_000, 10_000_000))}]}
                status, _ = await post(port, CHAT, long)
                seen.others[f"oversized: {status}"] += 1
            else:
                await _rudely(port, rude.draw(r), seen)
        except (OSError, asyncio.IncompleteReadError, LookupError) as error:  # LookupError: there was no answer
            seen.others[type(error).__name__] += 1


async def _well(port: int, good: Good, seen: Seen) -> None:
    seen.good += 1
    try:
        text = await ask(port, good)
    except (OSError, ValueError, LookupError, TimeoutError) as error:
        seen.failed.append(f"{good.path} {good.body}: {type(error).__name__}: {error}")
        return
    if text != good.text:
        seen.wrong.append(f"{good.path} {good.body}: {text!r}, alone {good.text!r}")


async def _rudely(port: int, one: rude.Rude, seen: Seen) -> None:
    status, answer = await asyncio.to_thread(rude.send, ("127.0.0.1", port), one, PATIENCE)
    seen.others[f"rude: {status}"] += 1
    if status is not None and status >= 500:
        seen.faults.append(f"{one.kind}: {one.content[:300]!r}: {answer[:300]!r}")


async def watch(server: Serving, socket: str, seen: Seen, end: float) -> None:
    """Looks at the server's memory until the time is over. socket: where its allocator answers."""
    while time.monotonic() < end:
        await asyncio.sleep(EVERY)
        told = await asyncio.to_thread(allocator.ask, socket, "look")
        figures = await asyncio.to_thread(rude.send, ("127.0.0.1", server.port), METRICS)
        seen.sizes.append(sizes_of(told, figures[1]))
    seen.trimmed = (await asyncio.to_thread(allocator.ask, socket, "trim"))["resident"]


def sizes_of(told: dict[str, int], figures: bytes) -> dict[str, float]:
    """What a server has of memory, in bytes. told: by its allocator. figures: of /metrics."""
    named = dict(line.rsplit(b" ", 1) for line in figures.split(b"\n") if line.startswith(b"mlx_gemma_mtp:memory"))
    arrays, cached = (float(named[b"mlx_gemma_mtp:memory_%s_bytes" % name]) for name in (b"active", b"cache"))
    return told | {"arrays": arrays, "cached": cached, "held": told["resident"] - told["kept"] - cached}


METRICS = rude.Rude("metrics", b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")


def measure(clients: int, seconds: float, note: Callable[[str], None]) -> dict[str, Any]:
    """The record of a soak. Raises Failed where the server cannot be started."""
    flags = ["--no-parent", "--num-draft-tokens", "3", "--max-output-tokens", "400", "--max-waiting", "1000"]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        socket = str(Path(folder) / "allocator")
        server = Serving(["benchmarks.server.allocator", socket, *flags])
        try:
            some = goods(KINDS)
            for i, good in enumerate(some):
                good.text = asyncio.run(ask(server.port, good))
                note(f"alone: {i + 1} of {len(some)}")
            seen = asyncio.run(_soaked(server, socket, some, clients, seconds, note))
            if server.process.poll() is not None:
                raise Failed(f"the server ended: {server.said()[-500:]}")
            log = [line for line in server.said().splitlines() if " ERROR " in line or "Traceback" in line]
        finally:
            server.close()
    return record(seen, log)


async def _soaked(
    server: Serving, socket: str, some: Sequence[Good], clients: int, seconds: float, note: Callable[[str], None]
) -> Seen:
    seen, end = Seen(), time.monotonic() + seconds
    looking = asyncio.create_task(watch(server, socket, seen, end))
    asking = [asyncio.create_task(client(server.port, some, seen, end, seed)) for seed in range(clients)]
    while time.monotonic() < end:
        await asyncio.sleep(min(10.0, max(end - time.monotonic(), 0.01)))
        bad = f"{len(seen.failed)} failed, {len(seen.wrong)} wrong"
        note(f"{seen.good} good requests, {bad}, {seen.others.total()} others")
    await asyncio.gather(looking, *asking)
    return seen


def record(seen: Seen, log: Sequence[str]) -> dict[str, Any]:
    """What a soak has found: counts, and of each figure of memory its slope, in bytes a second."""
    settled = seen.sizes[len(seen.sizes) // 3 :]
    found: dict[str, Any] = {
        "good": seen.good,
        "others": dict(seen.others),
        "failed": len(seen.failed),
        "wrong": len(seen.wrong),
        "faults": len(seen.faults),
        "examples": [*seen.failed[:3], *seen.wrong[:3], *seen.faults[:3], *log[:3]],
        "errors_in_the_log": len(log),
        "sizes": seen.sizes,
        "trimmed": f"{seen.trimmed / 1e6:.1f}",
    }
    for key in FIGURES:
        values = [each[key] for each in settled]
        found[f"{key}_slope"] = of_slope([value / EVERY for value in values]).as_list()
        found[key] = f"{values[0] / 1e6:.1f}, {values[-1] / 1e6:.1f}"
    return found
