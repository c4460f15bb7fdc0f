"""The settings of a batch's rows as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import mlx.core as mx
import numpy as np

from .params import SamplingParams
from .penalties import Penalties

REACH = 256  # candidates of a row that has top-p or min-p without a top-k


@dataclass(frozen=True)
class Rules:
    """The resolved settings of all B rows of a batch, as arrays.

    temperature, top_k, rest, min_p: [B, 1, 1]; rest is what top-p leaves out of the probability, -1 where top-p is off.
    keys: uint32 [B, 2], of the noise. greedy: bool [B, 1]. suppressed: [V], -inf at tokens that no row may say;
    forbidden: int32 [S], these tokens. biased: int32 [B, 1, N], the tokens that a row's bias names, -1 in places that
    are empty; bias: [B, 1, N], what is added to their logits. These four and penalties are None where no row has any.
    reordered: bool [B, 1], rows in which bias or penalties change the order of logits; None where there is no such row.
    vocab: V.

    free: bool [B, 1], sampled rows without any filter. open: bool [B, 1], rows with top-p or min-p and no top-k that
    bounds how many tokens they keep. Both are None where there is no such row. open_top_p: whether an open row has
    top-p. filtered: whether a sampled row has a filter. widest: the largest top-k that bounds a sampled row, 1 at
    least. logprobs: how many likeliest tokens to
    report; None where no row wants a report.
    """

    temperature: mx.array
    top_k: mx.array
    rest: mx.array
    min_p: mx.array
    keys: mx.array
    greedy: mx.array
    suppressed: mx.array | None
    forbidden: mx.array | None
    biased: mx.array | None
    bias: mx.array | None
    penalties: Penalties | None
    reordered: mx.array | None
    free: mx.array | None
    open: mx.array | None
    all_greedy: bool
    open_top_p: bool
    filtered: bool
    widest: int
    logprobs: int | None
    vocab: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, suppress: Sequence[int] = ()) -> Rules:
        """Returns the rules of these settings. params: resolved, one a row; suppress: tokens that no row may say."""
        sampled = [p for p in params if p.temperature]
        shared = [p.top_p < 1 or bool(p.min_p) for p in params]
        bounded = [0 < p.top_k < vocab for p in params]
        rows = [bool(p.temperature) and not bound for p, bound in zip(params, bounded, strict=True)]
        open_ = [row and share for row, share in zip(rows, shared, strict=True)]
        free = [row and not share for row, share in zip(rows, shared, strict=True)]
        reordered = [p.penalised or bool(p.logit_bias) for p in params]
        column = lambda values, dtype: mx.array(values, dtype)[:, None, None]  # noqa: E731
        biased, bias = _listed([p.logit_bias for p in params])
        return cls(
            temperature=column([p.temperature or 1.0 for p in params], mx.float32),
            top_k=column([p.top_k if p.top_k > 0 else vocab for p in params], mx.int32),
            rest=column([1 - p.top_p if p.top_p < 1 else -1.0 for p in params], mx.float32),
            min_p=column([p.min_p or 0.0 for p in params], mx.float32),
            keys=mx.array([_key(p.seed) for p in params], mx.uint32),
            greedy=mx.array([not p.temperature for p in params])[:, None],
            suppressed=_suppressed(suppress, vocab) if suppress else None,
            forbidden=mx.array(sorted(set(suppress)), mx.int32) if suppress else None,
            biased=biased,
            bias=bias,
            penalties=Penalties.of(params),
            reordered=_flags(reordered),
            free=_flags(free),
            open=_flags(open_),
            all_greedy=not sampled,
            open_top_p=any(p.top_p < 1 for p, row in zip(params, open_, strict=True) if row),
            filtered=len(sampled) > sum(free),
            widest=max((p.top_k for p in sampled if 0 < p.top_k < vocab), default=1),
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            vocab=vocab,
        )

    def drafting(self, temperature: float) -> Rules:
        """Returns the drafter's rules: these with each temperature times `temperature`."""
        return self if temperature == 1 else replace(self, temperature=self.temperature * temperature)

    def of_rows(self, rows: slice | mx.array) -> Rules:
        """Returns the rules of these rows alone. What one of all rows needs is still looked at for them."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in OF_ROWS}
        some = {name: value[rows] for name, value in given.items() if value is not None}
        penalties = None if self.penalties is None else self.penalties.of_rows(rows)
        return replace(self, **some, penalties=penalties)


OF_ROWS = frozenset(
    ("temperature", "top_k", "rest", "min_p", "keys", "greedy", "biased", "bias", "reordered", "free", "open")
)


def _suppressed(tokens: Sequence[int], vocab: int) -> mx.array:
    vector = mx.zeros((vocab,))
    vector[mx.array(list(tokens))] = -mx.inf
    return vector


def _flags(rows: Sequence[bool]) -> mx.array | None:
    return mx.array(rows)[:, None] if any(rows) else None


def _listed(biases: Sequence[Mapping[int, float]]) -> tuple[mx.array, mx.array] | tuple[None, None]:
    """Returns the tokens that each row's bias names, int32 [B, 1, N], -1 in empty places, and what it adds to them."""
    if not any(biases):
        return None, None
    tokens = np.full((len(biases), 1, max(map(len, biases))), -1, np.int32)
    numbers = np.zeros(tokens.shape, np.float32)
    for row, each in enumerate(biases):
        tokens[row, 0, : len(each)] = sorted(each)
        numbers[row, 0, : len(each)] = [each[token] for token in sorted(each)]
    return mx.array(tokens), mx.array(numbers)


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32
