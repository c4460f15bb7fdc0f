"""How many tokens of waiting prompts a round may prefill, so that nobody who reads along waits long for the next word.

The chunk is to take about as long as the round itself, or GAP where that is longer: a reader does not notice it, and
those who wait for their first word wait for less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low

KEEP = 32  # times of rounds, and of chunks; what is older may be of another load
GAP = 0.1  # seconds by which a text may always be held up
OF_EACH = 5  # times of like rounds, or of like chunks, that count


class Budget:
    """The prompt tokens that a round may prefill while rows decode.

    It learns what rounds of so many rows take without prompts, and what chunks of so many tokens add. A chunk of a size
    that was not seen is taken to be in proportion to the nearest that was; so a size that was guessed wrongly is tried
    once, and known from then on.
    """

    def __init__(self, chunk: int, grid: int, fixed: int | None = None, gap: float = GAP):
        """Starts with nothing known.

        chunk: the most tokens. grid: the least, and the step between sizes. fixed: always so many, by no clock. gap:
        seconds that a chunk may take however short the round is.
        """
        self.chunk, self.grid, self.fixed, self.gap = chunk, grid, fixed, gap
        self._rounds: deque[tuple[int, float]] = deque(maxlen=KEEP)  # (rows, seconds)
        self._chunks: deque[tuple[int, float]] = deque(maxlen=KEEP)  # (tokens, a multiple of grid; seconds)
        self._queued = 0  # tokens that the device prefills after the last readback

    def tokens(self, rows: int) -> int:
        """Returns how many prompt tokens the next round may prefill, a multiple of `grid`.

        rows: that decode in it. Without any it is a chunk: of prompts that come together the shortest has its first
        token soon, and the last one its own no later.
        """
        if rows == 0:
            return self.chunk
        if self.fixed is not None:
            return self.fixed
        if not (self._rounds and self._chunks):
            return self.grid
        seconds, known = max(self._round(rows), self.gap), _medians(self._chunks)
        sizes = range(self.chunk // self.grid * self.grid, self.grid, -self.grid)
        return next((size for size in sizes if _between(known, size) <= seconds), self.grid)

    def took(self, rows: int, seconds: float, tokens: int, waited: bool) -> bool:
        """Takes in the time of a round, and returns whether no prompt was prefilled in it: then it is the time of its
        verify and drafts alone, and the draft length may learn from it.

        rows: that decoded in it. seconds: from the readback before to its own. tokens: of prompts, whose prefill it
        queued. waited: its readback waited for that, because first tokens came with it or because no row decoded; else
        it falls into the next round's time.
        """
        inside = self._queued + (tokens if waited else 0)
        self._queued = 0 if waited else tokens
        if seconds > 0:
            self._learn(rows, seconds, inside)
        return inside == 0

    def _learn(self, rows: int, seconds: float, tokens: int) -> None:
        """Takes in the time of a round of these rows, in which so many prompt tokens were prefilled."""
        if not tokens:
            if rows:
                self._rounds.append((rows, seconds))
            return
        size = max(1, round(tokens / self.grid)) * self.grid
        seen = any(each == rows for each, _ in self._rounds)
        if rows and self._chunks and not seen:  # the chunk is known, and the rest is the round's
            rest = seconds - _between(_medians(self._chunks), size)
            if rest > 0:
                self._rounds.append((rows, rest))
        elif not rows or self._rounds:
            self._chunks.append((size, max(0.0, seconds - (self._round(rows) if rows else 0.0))))

    def _round(self, rows: int) -> float:
        """Returns the seconds of a round of these rows, or of the nearest number of rows that was seen."""
        known = _medians(self._rounds)
        return known[min(known, key=lambda each: (abs(each - rows), each))]


def _medians(times: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Returns for each size the median of its last times. times: (size, seconds), the oldest first."""
    by_size: dict[int, list[float]] = {}
    for size, seconds in times:
        by_size.setdefault(size, []).append(seconds)
    return {size: median_low(seconds[-OF_EACH:]) for size, seconds in by_size.items()}


def _between(known: dict[int, float], size: int) -> float:
    """Returns the seconds of a size: linear between known ones, and beyond them in proportion to the nearest."""
    below, above = (max((each for each in known if each <= size), default=None),
                    min((each for each in known if each >= size), default=None))  # fmt: skip
    if below is None or above is None:
        nearest = above if below is None else below
        return known[nearest] * size / nearest
    if below == above:
        return known[size]
    share = (size - below) / (above - below)
    return known[below] * (1 - share) + known[above] * share
