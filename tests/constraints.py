"""Constraints for tests."""

from dataclasses import dataclass, replace

import tiny

from mlx_gemma_mtp.speculative.guide import only
from mlx_gemma_mtp.text.calling import Calling
from mlx_gemma_mtp.text.thinking import Thinking

VOCAB = tiny.VOCAB
OPEN, CLOSE, END = 90, 91, 1


@dataclass
class Stairs:
    """A constraint: token t is followed by one whose remainder by 7 is one more than its own."""

    step: int = 0
    advanced: int = 0

    def copy(self):
        return replace(self)

    def mask(self):
        return only([t for t in range(VOCAB) if t % 7 == self.step], VOCAB)

    def advance(self, token):
        assert token % 7 == self.step
        self.step, self.advanced = (self.step + 1) % 7, self.advanced + 1


def thinking(budget, reply=None, **state) -> Thinking:
    """One as the engine makes it: a thought before a bound reply cannot end the text."""
    return Thinking(OPEN, CLOSE, VOCAB, budget, reply, (END,) if reply is not None else (), **state)


CALL, CALL_END, OTHER_END = 92, 93, 2


@dataclass
class Steps:
    """A constraint: the i-th token is one of steps[i]; behind them the text ends."""

    steps: tuple[tuple[int, ...], ...]
    at: int = 0

    def copy(self):
        return replace(self)

    def mask(self):
        return only(self.steps[self.at] if self.at < len(self.steps) else (END, OTHER_END), VOCAB)

    def advance(self, token):
        assert token in (self.steps[self.at] if self.at < len(self.steps) else (END, OTHER_END))
        self.at += 1


ONE_CALL = Steps(((CALL,), (10, 11), tuple(range(20, 60)), (CALL_END,)))


def calling(call=ONE_CALL, **settings) -> Calling:
    return Calling(CALL, CALL_END, VOCAB, (END, OTHER_END), call, **settings)
