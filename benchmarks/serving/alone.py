"""One row alone: this checkout against another one, call by call in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.serving.intervals import of_median
from benchmarks.workers import Worker

TRACED = (8, 24)  # tokens of the two calls whose difference is counted
NOW, BEFORE = "now", "before"


def measure(
    workers: dict[str, Worker], prompts: Sequence[list[int]], drafts: Sequence[int | str], max_tokens: int,
    repeats: int, note: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Of each draft length the ratio of `before`'s seconds to those of `now`, of whole calls and of decoding."""
    found = {}
    for count in drafts:
        whole, decoding, differing = [], [], 0
        for repeat in range(-1, repeats):
            for i, prompt in enumerate(prompts):
                order = (NOW, BEFORE) if (repeat + i) % 2 else (BEFORE, NOW)
                request = {"prompts": [prompt], "drafts": count, "max_tokens": max_tokens, "seed": 0}
                took = {name: workers[name].ask("call", **request) for name in order}
                if repeat >= 0:  # the first round of all warms up
                    whole.append(took[BEFORE]["seconds"] / took[NOW]["seconds"])
                    seconds = {name: each["seconds"] - each["prefill_seconds"] for name, each in took.items()}
                    decoding.append(seconds[BEFORE] / seconds[NOW])
                    differing += took[NOW]["tokens"] != took[BEFORE]["tokens"]
        counted = {}
        if count != "auto":  # its rounds are not alike
            asked = {"tokens": TRACED, "prompts": [prompts[0]], "drafts": count, "seed": 0}
            counted = {name: workers[name].ask("trace", **asked) for name in (BEFORE, NOW)}
        found[str(count)] = {
            "whole_calls": of_median(whole).as_list(),
            "decoding": of_median(decoding).as_list(),
            "calls": len(whole),
            "differing_texts": differing,
            "counted": counted,
        }
        note(f"{count} drafts: {of_median(whole)} of whole calls, {of_median(decoding)} of decoding")
    return found
