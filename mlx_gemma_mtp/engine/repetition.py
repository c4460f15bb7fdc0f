"""When a text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


class Repetition:
    """Finds the first token with which the last `length` tokens of a text are one block, again and again, the last time
    cut off anywhere: they have a period of at most half of them.

    length: 4 or more.
    """

    def __init__(self, length: int):
        self.length = length
        self._step = length // 4  # tokens from one look at all periods to the next
        self._near: list[int] = []  # the periods that may end the text before the next look

    def ends(self, tokens: Sequence[int]) -> bool:
        """Returns whether the text ends here. tokens: all of it so far; every token is asked about, in order."""
        if len(tokens) % self._step == 0:
            self._near = self._periods(tokens, self.length - self._step + 1)
        return any(_has_period(tokens, self.length, period) for period in self._near)

    def _periods(self, tokens: Sequence[int], length: int) -> list[int]:
        """Returns the periods of the last `length` tokens. Multiples of others are left out: where such a period ends
        the text, the other one does.
        """
        found: list[int] = []
        for period in range(1, min(self.length // 2, len(tokens) - 1) + 1):
            if tokens[-1 - period] == tokens[-1] and not any(period % each == 0 for each in found):
                found += [period] if _has_period(tokens, length, period) else []
        return found


def _has_period(tokens: Sequence[int], length: int, period: int) -> bool:
    """Whether each of the last `length` tokens equals the one that is `period` places after it, where there is one."""
    return len(tokens) >= length and tokens[period - length :] == tokens[-length:-period]
