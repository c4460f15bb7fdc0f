"""Which of several ways is fastest in a sustained run: kernels that win for microseconds may lose for seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

Way = TypeVar("Way")
TURN = 0.1  # seconds


def race(
    ways: Mapping[Way, Callable[[], None]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[Way, float]:
    """Returns the seconds of a call of each way: the median over its turns.

    ways: each computes something and waits for it. seconds: that each of them runs, in turns of TURN, so that all meet
    the same clocks and the same heat. The first turns warm up and do not count.
    """
    turn = min(TURN, seconds)
    found: dict[Way, list[float]] = {way: [] for way in ways}
    for number in range(1 + max(1, math.ceil(seconds / TURN))):
        for way, call in ways.items():
            began, calls = clock(), 0
            while not calls or clock() - began < turn:
                call()
                calls += 1
            if number:
                found[way].append((clock() - began) / calls)
    return {way: median(each) for way, each in found.items()}
