"""A short request that arrives while seven streams decode and a long prompt is prefilled: what the others notice.

Driven round by round, so that waiting is counted in rounds; the time of each round is plotted beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

LONG, SHORT = "long", "short"
ROUNDS_TO_FIRST = 3  # beside its own chunks
LONGEST_GAP = 2  # rounds, of a running stream: 1 is a token in every round


def summary(rounds: Sequence[dict[str, Any]], streams: Sequence[int], arrivals: dict[str, int], chunks: int) -> dict:
    """rounds: of each {"seconds": when it ended, "tokens": {request: how many}, "prompt": prompt tokens in it}.
    streams: the requests that decode all along. arrivals: the first round of LONG's and SHORT's requests, and under
    "ids" their numbers. chunks: of the short prompt.
    """
    first = {
        name: next(i for i, each in enumerate(rounds) if each["tokens"].get(arrivals["ids"][name]))
        for name in (LONG, SHORT)
    }
    found = gaps(rounds, streams)
    busy = range(arrivals[LONG], first[LONG] + 1)
    beside = [gap for gap in found if gap["round"] in busy]
    before = [gap for gap in found if gap["round"] < arrivals[LONG]]
    waited = first[SHORT] - arrivals[SHORT] + 1
    seconds = [b["seconds"] - a["seconds"] for a, b in pairwise(rounds)]
    return {
        "rounds_to_first_token": waited,
        "rounds_allowed": ROUNDS_TO_FIRST + chunks,
        "first_token_ms": round(1000 * (rounds[first[SHORT]]["seconds"] - rounds[arrivals[SHORT] - 1]["seconds"]), 2),
        "long_prompt_rounds": first[LONG] - arrivals[LONG] + 1,
        "longest_gap_rounds": max(gap["rounds"] for gap in found),
        "longest_gap_ms": round(max(gap["ms"] for gap in beside), 2),
        "median_gap_ms_beside_the_prompt": round(_median([gap["ms"] for gap in beside]), 2),
        "median_gap_ms_before": round(_median([gap["ms"] for gap in before]), 2),
        "most_prompt_tokens_in_a_round": max(each["prompt"] for each in rounds[arrivals[LONG] :]),
        "longest_round_ms": round(1000 * max(seconds), 2),
        "gaps": found,
    }


def gaps(rounds: Sequence[dict[str, Any]], streams: Sequence[int]) -> list[dict[str, Any]]:
    """From one token to the next of every stream: the round in which the gap ends, its rounds and milliseconds."""
    found = []
    for stream in streams:
        seen = [i for i, each in enumerate(rounds) if each["tokens"].get(stream)]
        for last, now in pairwise(seen):
            ms = 1000 * (rounds[now]["seconds"] - rounds[last]["seconds"])
            found.append({"stream": stream, "round": now, "rounds": now - last, "ms": ms})
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")
