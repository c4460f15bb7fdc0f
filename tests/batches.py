"""Rows of many kinds, and what each says alone: for tests of batches whose rows leave and join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import tiny
from constraints import Stairs, thinking

from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.speculative.guide import Constraint
from mlx_gemma_mtp.speculative.readback import Round

CLOSE = 91
# What a row may have of its own, by name.
KINDS: dict[str, tuple[SamplingParams, Callable[[], Constraint | None]]] = {
    "free": (tiny.GREEDY, lambda: None),
    "sampled": (tiny.SAMPLED, lambda: None),
    "penalised": (tiny.PENALISED, lambda: None),
    "biased": (replace(tiny.GREEDY, logit_bias={5: 3.0, 6: -mx.inf}), lambda: None),
    "reported": (replace(tiny.GREEDY, logprobs=3), lambda: None),
    "stairs": (tiny.GREEDY, Stairs),
    "thinking": (replace(tiny.GREEDY, logit_bias={CLOSE: -1e4}), lambda: thinking(4, None, inside=True)),
}


@dataclass
class Row:
    """A text that is decoded to `count` tokens or more. reports: its log-probabilities, where it asks for them."""

    name: int
    prompt: list[int]
    params: SamplingParams
    constraint: Constraint | None
    count: int
    text: list[int] = field(default_factory=list)
    reports: list = field(default_factory=list)
    error: str | None = None

    @classmethod
    def of(cls, kind: str, name: int, prompt: list[int], count: int) -> Row:
        params, constraint = KINDS[kind]
        return cls(name, prompt, params, constraint(), count)

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.text) >= self.count


def settings(model: Gemma4, rows: Sequence[Row]):
    """Rules, token counts and guide of these rows, after their texts."""
    parts = [[getattr(row, name) for row in rows] for name in ("params", "prompt", "text", "constraint")]
    return tiny.settings(model, *parts)


def take(live: Sequence[Row], done: Round) -> None:
    """Hands a round's tokens to the rows."""
    for i, row in enumerate(live):
        row.text += done.tokens[i]
        row.error = done.errors[i]
        if row.params.logprobs is not None:
            assert [each.token for each in done.logprobs[i]] == done.tokens[i]
            assert all(len(each.top) >= row.params.logprobs for each in done.logprobs[i])
            row.reports += done.logprobs[i]
        elif all(other.params.logprobs is None for other in live):
            assert done.logprobs is None


class Alone:
    """What rows say by themselves, without drafts."""

    def __init__(self, model: Gemma4, longest: int):
        self.model, self.longest = model, longest
        self._texts: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def text(self, kind: str, prompt: Sequence[int], count: int) -> list[int]:
        assert count <= self.longest
        key = kind, tuple(prompt)
        if key not in self._texts:
            row = Row.of(kind, 0, list(prompt), self.longest)
            loop = tiny.begun(self.model, None, [row.prompt], row.params, constraints=[row.constraint])
            while not row.done:
                take([row], tiny.round_of(loop, 0))
            self._texts[key] = row.text
        return self._texts[key][:count]
