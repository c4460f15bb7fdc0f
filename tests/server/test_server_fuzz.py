"""Rude requests beside good ones: never a fault of the server, and nobody else's text changes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ASKED, NAME, events, post, serving

from benchmarks.server.rude import Rude, draw, send
from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.server.limits import Limits

CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": ASKED, "max_tokens": 24, "temperature": 0}
AT_ONCE = 8
GROWTH = 40e6  # bytes that the last two thirds of many requests may add to the process
LIMITS = Limits(output_tokens=24, prompt_tokens=300, seconds=900.0)  # the last for a machine that is busy


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_same_number_gives_the_same_request():
    first, again = ([draw(random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert first == again and len({each.content for each in first}) > 150 and len({each.kind for each in first}) >= 8


async def pelt(url: str, rudes: Iterator[Rude], text: str, caplog) -> Counter:
    """Sends requests, some at once, with streams beside them whose text must be `text`. Returns how often each status
    came. Fails for a fault of the server.
    """
    host, port = url.removeprefix("http://").split(":")
    seen: Counter = Counter()
    left = asyncio.Event()

    async def throw() -> None:
        for rude in rudes:
            status, answer = await asyncio.to_thread(send, (host, int(port)), rude)
            assert status is None or status < 500, (rude, answer)
            seen[status] += 1

    async def read() -> None:
        while not left.is_set():
            found = await asyncio.to_thread(events, url, CHAT, BODY)
            assert "".join(each["choices"][0]["delta"].get("content", "") for each in found[:-1]) == text

    reading = asyncio.create_task(read())
    try:
        await asyncio.gather(*(throw() for _ in range(AT_ONCE)))
    finally:
        left.set()
        await reading
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not loud, loud[:3]
    return seen


def check(engine, caplog, count: int, seed: int) -> None:
    r = random.Random(seed)
    text = engine.generate(ASKED, SamplingParams(max_tokens=24, temperature=0.0)).text
    with serving(engine, limits=LIMITS) as url:
        third = count // 3
        seen = asyncio.run(pelt(url, (draw(r) for _ in range(third)), text, caplog))
        before = resident()
        seen += asyncio.run(pelt(url, (draw(r) for _ in range(count - third)), text, caplog))
        grown = resident() - before
        assert post(url, CHAT, BODY).json()["choices"][0]["message"]["content"] == text
        assert seen[400] > count / 4 and seen[200] and grown < GROWTH, (seen, grown)
    print(f"{count} requests: {dict(seen)}; {grown / 1e6:.1f} MB more after the first third")


def test_rude_requests_harm_nobody(engine, caplog):
    check(engine, caplog, 120, seed=0)


@pytest.mark.slow
def test_ten_thousand_rude_requests_harm_nobody(engine, caplog):
    check(engine, caplog, 10_000, seed=1)
