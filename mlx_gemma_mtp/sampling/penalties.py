"""What was said before, and how much less likely that gets: a pure function of the tokens, for every draft position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .params import SamplingParams


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

    def apply(self, logits: mx.array, token_counts: TokenCounts) -> mx.array:
        """Returns the logits, [B, T, C], lowered for tokens of the prompt (by repetition) and of the text (by all
        three).
        """
        counts = token_counts.text.astype(mx.float32)
        spoken = token_counts.text > 0
        repeated = mx.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = mx.where(token_counts.prompt | spoken, repeated, logits)
        return logits - self.presence * spoken - self.frequency * counts


@dataclass(frozen=True)
class TokenCounts:
    """Which tokens came before. prompt: bool [B, T, C], whether the prompt has a token. text: int32 [B, T, C], how
    often it was generated. Column c is token c, or the token of a shortlist. T is 1, or one for each position of a
    verify.
    """

    prompt: mx.array
    text: mx.array

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], vocab: int) -> TokenCounts:
        """Returns the counts after these prompts, before anything was generated."""
        prompt = mx.zeros((len(prompts), 1, vocab), mx.bool_)
        for row, tokens in enumerate(prompts):
            prompt[row, 0, mx.array(sorted(set(tokens)))] = True
        return cls(prompt, mx.zeros(prompt.shape, mx.int32))

    def followed_by(self, tokens: mx.array, counted: mx.array | int = 1) -> TokenCounts:
        """Returns the counts after one more token in each row. tokens: [B]; counted: how often it counts, [B] or a
        number, where 0 leaves a row as it was.
        """
        rows = mx.arange(tokens.shape[0])
        return replace(self, text=self.text.at[rows, 0, tokens].add(counted))

    def at_each(self, drafts: mx.array) -> TokenCounts:
        """Returns the counts before each position of a verify of these drafts, [B, K]: text becomes [B, K + 1, V]."""
        steps = [self]
        for i in range(drafts.shape[1]):
            steps.append(steps[-1].followed_by(drafts[:, i]))
        return replace(self, text=mx.concatenate([step.text for step in steps], axis=1))

    def after(self, emitted: mx.array, count: mx.array) -> TokenCounts:
        """Returns the counts after the first `count` [B] of the emitted tokens [B, T]."""
        token_counts = self
        for i in range(emitted.shape[1]):
            token_counts = token_counts.followed_by(emitted[:, i], (count > i).astype(mx.int32))
        return token_counts

    def of_rows(self, index: mx.array) -> TokenCounts:
        """Returns the counts of the rows index [n]."""
        return TokenCounts(self.prompt[index], self.text[index])

    def among(self, ids: mx.array | None) -> TokenCounts:
        """Returns the columns of a shortlist of token ids, [B, T, C]; for None all of them."""
        if ids is None:
            return self
        return TokenCounts(*(mx.take_along_axis(each, ids, axis=-1) for each in (self.prompt, self.text)))
