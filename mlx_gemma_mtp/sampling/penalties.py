"""What was said before, and how much less likely that gets: a pure function of the tokens, for every draft position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..ops.fused import numbers
from .params import SamplingParams

NONE = -1  # where a list of tokens has an empty place


@dataclass(frozen=True)
class Penalties:
    """The settings of all rows, [B, 1, 1] each (see SamplingParams)."""

    repetition: mx.array
    presence: mx.array
    frequency: mx.array

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Penalties | None:
        """Returns the rows' penalties, None where no row has any."""
        if not any(p.penalised for p in params):
            return None
        settings = [(p.repetition_penalty or 1.0, p.presence_penalty, p.frequency_penalty) for p in params]
        return cls(*(mx.array(column, mx.float32)[:, None, None] for column in zip(*settings, strict=True)))

    def apply(self, logits: mx.array, prompt: mx.array, text: mx.array) -> mx.array:
        """Returns the logits, [B, T, C], lowered for tokens of the prompt (by repetition) and of the text (by all
        three).

        prompt: bool, whether the prompt has a column's token; text: int32, how often it was generated. Both are
        broadcastable to [B, T, C].
        """
        spoken = text > 0
        repeated = mx.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = mx.where(prompt | spoken, repeated, logits)
        return logits - self.presence * spoken - self.frequency * text.astype(mx.float32)

    def of_rows(self, rows: slice | mx.array) -> Penalties:
        """Returns the penalties of these rows alone."""
        return Penalties(self.repetition[rows], self.presence[rows], self.frequency[rows])


@dataclass(frozen=True)
class TokenCounts:
    """Which tokens came before, as a list of those that did.

    tokens: int32 [B, N], each token once: the prompt's by id, then the text's as they came; NONE in the places after
    them. prompt: bool [B, N], whether the prompt has it. text: int32 [B, T, N], how often it was generated; T is 1, or
    one for each position of a verify. vocab: V.
    """

    tokens: mx.array
    prompt: mx.array
    text: mx.array
    vocab: int

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], vocab: int, texts: Sequence[Sequence[int]] | None = None
    ) -> TokenCounts:
        """Returns the counts after these prompts and what was generated after each. texts: None where nothing was."""
        lists = [_in_order(*each) for each in zip(prompts, texts or [()] * len(prompts), strict=True)]
        tokens = np.full((len(lists), max(len(each) for each, _, _ in lists)), NONE, np.int32)
        counts, prompt = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        for row, (listed, own, text) in enumerate(lists):
            tokens[row, : len(listed)], counts[row, : len(listed)], prompt[row, :own] = listed, text, True
        return cls(mx.array(tokens), mx.array(prompt), mx.array(counts)[:, None], vocab)

    @property
    def places(self) -> int:
        """N, the length of the list."""
        return self.tokens.shape[1]

    def first(self, places: int) -> TokenCounts:
        """Returns the counts with the first places of the list alone. The caller knows that the others are empty."""
        if places >= self.places:
            return self
        return replace(
            self, tokens=self.tokens[:, :places], prompt=self.prompt[:, :places], text=self.text[..., :places]
        )

    def followed_by(self, tokens: mx.array, counted: mx.array | int = 1) -> TokenCounts:
        """Returns the counts after one more token in each row. tokens: [B]; counted: how often it counts, [B] or a
        number, where 0 leaves a row as it was. The list is one place longer.
        """
        counted = mx.broadcast_to(mx.array(counted), tokens.shape)[:, None]
        wider = lambda array, value: mx.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 1)], constant_values=value)  # noqa: E731
        listed = wider(self.tokens, NONE)
        here = listed == tokens[:, None]
        new = (counted > 0) & ~here.any(axis=-1, keepdims=True)
        end = (listed != NONE).sum(axis=-1, keepdims=True)
        here |= new & (numbers(listed.shape[1]) == end)
        text = wider(self.text, 0) + (here * counted)[:, None]
        return replace(
            self, tokens=mx.where(here & new, tokens[:, None], listed), prompt=wider(self.prompt, False), text=text
        )

    def at_each(self, drafts: mx.array) -> TokenCounts:
        """Returns the counts before each position of a verify of these drafts, [B, K]: text becomes [B, K + 1, N + K].
        The list has all drafts; those that come later count 0.
        """
        steps = [self]
        for i in range(drafts.shape[1]):
            steps.append(steps[-1].followed_by(drafts[:, i]))
        last = steps[-1]
        text = [mx.pad(step.text, ((0, 0), (0, 0), (0, last.places - step.places))) for step in steps]
        return replace(last, text=mx.concatenate(text, axis=1))

    def after(self, emitted: mx.array, count: mx.array) -> TokenCounts:
        """Returns the counts after the first `count` [B] of the emitted tokens [B, T]."""
        token_counts = self
        for i in range(emitted.shape[1]):
            token_counts = token_counts.followed_by(emitted[:, i], (count > i).astype(mx.int32))
        return token_counts

    def of_rows(self, index: slice | mx.array) -> TokenCounts:
        """Returns the counts of the rows index [n]."""
        return replace(self, tokens=self.tokens[index], prompt=self.prompt[index], text=self.text[index])

    def of_positions(self, positions: slice) -> TokenCounts:
        """Returns the counts before these positions alone."""
        return self if self.text.shape[1] == 1 else replace(self, text=self.text[:, positions])

    def at_place(self, rows: mx.array, places: mx.array) -> TokenCounts:
        """Returns the counts at one position each of the rows [n], of which there are as many."""
        return replace(self.of_rows(rows), text=self.text[rows, places][:, None])

    def among(self, ids: mx.array | None) -> tuple[mx.array, mx.array]:
        """Returns whether the prompt has each column's token, bool [B, 1 or T, C], and how often it was generated,
        int32 [B, T, C]. ids: [B, T, C], the columns' tokens; None where column i is token i, C = V.
        """
        each = tuple(
            scattered(self.tokens[:, None], counts, self.vocab)
            for counts in (self.prompt.astype(mx.int32)[:, None], self.text)
        )
        if ids is not None:
            rows = [mx.broadcast_to(dense, (*ids.shape[:2], self.vocab)) for dense in each]
            each = tuple(mx.take_along_axis(dense, ids, axis=-1) for dense in rows)
        return each[0] > 0, each[1]


def _in_order(prompt: Sequence[int], text: Sequence[int]) -> tuple[np.ndarray, int, np.ndarray]:
    """Returns each token once, the prompt's by id and then the text's as they came, how many are the prompt's, and how
    often the text has each.
    """
    own = np.unique(np.asarray(prompt, np.int32))
    said, first, counts = np.unique(np.asarray(text, np.int32), return_index=True, return_counts=True)
    by_first = np.argsort(first)
    said, counts = said[by_first], counts[by_first]
    new = ~np.isin(said, own)
    text_counts = np.zeros(len(own) + new.sum(), np.int32)
    text_counts[np.searchsorted(own, said[~new])] = counts[~new]
    text_counts[len(own) :] = counts[new]
    return np.concatenate([own, said[new]]), len(own), text_counts


def scattered(tokens: mx.array, values: mx.array, vocab: int) -> mx.array:
    """Returns the values at their tokens, and 0 elsewhere: [B, T, vocab].

    tokens: int32 [B, 1, N], each once, NONE in empty places, whose values are 0; values: [B, T, N].
    """
    rows, positions, count = values.shape
    if not rows * positions * count:  # MLX scatters nothing into nothing with an error
        return mx.zeros((rows, positions, vocab), values.dtype)
    index = mx.maximum(tokens, 0) + numbers(rows * positions).reshape(rows, positions, 1) * vocab
    flat = mx.zeros((rows * positions * vocab,), values.dtype)
    return flat.at[index.reshape(-1)].add(values.reshape(-1)).reshape(rows, positions, vocab)
