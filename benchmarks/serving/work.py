"""The requests that are measured."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import cycle, islice

from benchmarks.prompts import MARKED


def prompts(encode, count: int) -> list[list[int]]:
    """Chat turns in token ids: those of tests/data, the first ones again where there are too few."""
    texts = [entry["prompt"] for entry in json.loads(MARKED.read_text())]
    return [encode(text) for text in islice(cycle(texts), count)]


def limits(count: int, least: int, most: int, seed: int = 0) -> list[int]:
    """How many tokens each text has: drawn evenly, and the same for equal seeds."""
    r = random.Random(seed)
    return [r.randint(least, most) for _ in range(count)]


def filled(some: Sequence[list[int]], length: int) -> list[int]:
    """A prompt of exactly so many tokens, of several turns."""
    joined = (token for turn in cycle(some) for token in turn)
    return list(islice(joined, length))
