"""Clients that ask at once: this package's server against those of mlx-vlm and mlx-lm, on the same files.

All servers run at the same time, and calls go round all of them. A call is one stream of each client; its tokens are
what the texts encode to, so that nobody's own count decides. Nobody thinks: mlx-lm's server lets a model think unless
it is told otherwise, which is another prompt and another text. Everybody keeps beginnings of prompts in memory, with
room for those of all clients: mlx-lm's server keeps 10 unless it is told otherwise, mlx-vlm's none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.server.processes import THREADS, Readers, Serving
from benchmarks.serving.intervals import of_median
from benchmarks.workers import OURS, Failed
from mlx_gemma_mtp.files.hub import Pair

CHAT = "/v1/chat/completions"
AUTO = "auto"
BEGINNINGS = 4  # that a peer keeps for each client: of the system prompt, of a turn, of a reply, and of one before it
UNTHINKING = '{"enable_thinking": false}'


@dataclass
class Way:
    """A server, how it is started, and the name of its model for clients. calls: what each gave. environment: beside
    this process's own.
    """

    name: str
    command: list[str]
    model: str
    environment: dict[str, str] = field(default_factory=dict)
    server: Serving | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, readers: Readers, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
        bodies = [
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for prompt in prompts
        ]
        return readers.read(self.server.url, CHAT, bodies)


def ways(pair: Pair, drafts: Sequence[int], clients: int, threads: int = 1) -> list[Way]:
    """Every server, with each number of drafts that it is asked for. threads: of the peers' OpenBLAS."""
    target, drafter = str(pair.target), str(pair.drafter)
    ours = [
        "mlx_gemma_mtp.serve",
        "--model",
        target,
        "--draft-model",
        drafter,
        "--max-rows",
        str(clients),
        "--no-parent",
    ]
    lm = ["mlx_lm", "server", "--model", target, "--chat-template-args", UNTHINKING]
    lm += ["--decode-concurrency", str(clients), "--prompt-concurrency", str(clients)]
    beginnings = str(BEGINNINGS * clients + BEGINNINGS)
    lm += ["--prompt-cache-size", beginnings]
    cores = {THREADS: str(threads)}
    kept = cores | {"APC_ENABLED": "1", "APC_DISK_ENABLED": "0", "APC_CHECKPOINT_ENTRIES": beginnings}
    vlm = ["mlx_vlm.server", "--model", target, "--host", "127.0.0.1"]
    with_drafts = [
        Way(f"mlx-vlm, {count} drafts",
            [*vlm, "--draft-model", drafter, "--draft-kind", "mtp", "--draft-block-size", str(count + 1)], target, kept)
        for count in drafts
    ]  # fmt: skip
    return [
        Way(f"{OURS}, drafts {AUTO}", [*ours, "--num-draft-tokens", AUTO], ""),
        Way("mlx-lm", lm, "default_model", cores),
        Way("mlx-vlm", vlm, target, kept),
        *with_drafts,
    ]  # fmt: skip


def started(some: Sequence[Way], blas: str, note: Callable[[str], None]) -> list[Way]:
    """Those of the servers that answer. Raises Failed where this package's own does not."""
    running = []
    for way in some:
        note(f"starting {way.name}")
        try:
            way.server = Serving(way.command, blas, way.environment)
        except Failed as error:
            if way.name.startswith(OURS):
                raise
            note(f"failed: {way.name}: {error}")
            continue
        running.append(way)
    return running


def measure(
    some: list[Way], prompts: Sequence[str], tokens: int, repeats: int, note: Callable[[str], None]
) -> list[Way]:
    """Every server in turn, in an order that turns. The first round warms up, and drops those that fail."""
    readers = Readers()
    try:
        for repeat in range(-1, repeats):
            at = repeat % len(some)
            for way in some[at:] + some[:at]:
                try:
                    found = way.ask(readers, prompts, tokens)
                except Failed as error:
                    if way.name.startswith(OURS):
                        raise
                    note(f"failed: {way.name}: {error}")
                    some = [each for each in some if each is not way]
                    continue
                if repeat >= 0:
                    way.calls.append(found)
                    note(f"{repeat + 1} of {repeats}: {way.name}: {found['seconds']:.2f} s")
        return some
    finally:
        readers.close()


def judged(some: Sequence[Way], encode: Callable[[str], list[int]]) -> dict[str, Any]:
    """The record: tokens/s, first tokens, equal texts, and how much faster this package is than each."""
    ours = some[0]
    lines, ratios = [], {}
    texts = ours.calls[0]["texts"]
    for way in some:
        rates = [sum(len(encode(text)) for text in call["texts"]) / call["seconds"] for call in way.calls]
        firsts = [first for call in way.calls for first in call["firsts"]]
        equal = sum(a == b for a, b in zip(texts, way.calls[0]["texts"], strict=True))
        lines.append(
            {
                "server": way.name,
                "tokens_per_s": of_median(rates).as_list(),
                "first_text_s": of_median(firsts).as_list(),
                "equal_texts": equal,
            }
        )
        if way is not ours:
            mine = [sum(len(encode(text)) for text in call["texts"]) / call["seconds"] for call in ours.calls]
            ratios[way.name] = of_median([a / b for a, b in zip(mine, rates, strict=True)]).as_list()
    better = max(lines[1:], key=lambda line: line["tokens_per_s"][0])["server"] if ratios else None
    return {"servers": lines, "ratios": ratios, "better": better, "clients": len(texts)}
