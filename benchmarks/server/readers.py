"""Clients in a process of their own: `python -m benchmarks.server.readers`.

Each line of standard input, {"url", "path", "bodies"}, is answered with a line: the texts of the streams, the seconds
until the last one ended, the seconds until each one's first text, and the tokens that each one's usage tells: made, of
the prompt, and those of the prompt that were known. What it takes to read them burdens no server.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def stream(host: str, port: int, path: str, body: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """The text of a stream, when its first piece came (its end, where none did), and its usage."""
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    if b" 200 " not in (status := await reader.readline()):
        raise ValueError(f"{status!r}: {await reader.read()!r}")
    text, first, usage = [], 0.0, {"completion_tokens": 0}
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(event["error"])
        if event["choices"]:
            piece = event["choices"][0]["delta"].get("content") or ""
            first = first or (time.perf_counter() if piece else 0.0)
            text.append(piece)
        if event.get("usage"):
            usage = event["usage"]
    writer.close()
    return "".join(text), first or time.perf_counter(), usage


async def read(url: str, path: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    host, _, port = url.removeprefix("http://").partition(":")
    began = time.perf_counter()
    found = await asyncio.gather(*(stream(host, int(port), path, body) for body in bodies))
    seconds = time.perf_counter() - began
    texts, firsts, usages = zip(*found, strict=True)
    return {
        "texts": texts,
        "seconds": seconds,
        "firsts": [first - began for first in firsts],
        "tokens": [usage["completion_tokens"] for usage in usages],
        "prompts": [usage.get("prompt_tokens", 0) for usage in usages],
        "known": [(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages],
    }


def main() -> None:
    for line in sys.stdin:
        try:
            answer = asyncio.run(read(**json.loads(line)))
        except (OSError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
