"""One row alone: this checkout against another one, call by call in turn, in several processes of each.

Where a process's memory lies, and what else the processor does while it lives, changes its speed by a tenth. So each
pair of processes gives one ratio, the median of its calls', and the interval is that of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.serving.intervals import of_median
from benchmarks.workers import Worker

TRACED = (8, 24)  # tokens of the two calls whose difference is counted
NOW, BEFORE = "now", "before"


def measure(
    workers: dict[str, Worker], prompts: Sequence[list[int]], drafts: Sequence[int | str], max_tokens: int,
    repeats: int, note: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Of each draft length the ratio of `before`'s seconds to those of `now`, of whole calls and of decoding, in one
    pair of processes.
    """
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
            "whole_calls": median(whole),
            "decoding": median(decoding),
            "calls": len(whole),
            "differing_texts": differing,
            "counted": counted,
        }
        note(f"{count} drafts: {median(whole):.3f} of whole calls, {median(decoding):.3f} of decoding")
    return found


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what `measure` found in several pairs of processes, with intervals."""
    first = found[0]
    return {
        drafts: first[drafts]
        | {name: of_median([each[drafts][name] for each in found]).as_list() for name in ("whole_calls", "decoding")}
        | {name: sum(each[drafts][name] for each in found) for name in ("calls", "differing_texts")}
        for drafts in first
    }
