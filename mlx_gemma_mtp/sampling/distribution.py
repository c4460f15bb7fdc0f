"""From logits to tokens: pure functions of arrays, all rows at once.

Sampling is Gumbel-coupled (Daliri, Musco, Suresh, arXiv 2408.07978): token = argmax(log p + g), where the noise g
depends on (seed, absolute position, token id) and on nothing else. Target and drafter use the same noise, so that they
agree often; the emitted token never depends on a draft, so that one seed gives one text for every draft length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from ..machine import device
from ..ops.bits import expand
from ..ops.fused import number
from ..ops.sums import sum_of_exponentials
from ..ops.topk import topk
from .candidates import candidates, filtered, scored, shares, soft_cap
from .noise import drawn
from .penalties import TokenCounts, scattered
from .rules import Rules

PART = 1 << 19  # logits that a CPU works on at once where it writes as many: larger arrays come from fresh memory
SURE = 64  # largest terms of a sum of exponentials that are computed as exactly as float32 can


@dataclass(frozen=True)
class Distribution:
    """What rows may say at T positions, after soft-cap, penalties, bias, temperature, top-k, top-p and min-p
    (transformers' order).

    best: int32 [B, T], the likeliest token. scores: float32 [B, T, C], log-probabilities but for a constant, -inf where
    a filter leaves a token out; None where all rows are greedy. tokens: [B, T, C], the token ids of the columns; None
    where column i is token i. peak: float32 [B, T], the best token's score before the temperature, -inf where no token
    is allowed; None where no row has a bias or a mask.
    """

    best: mx.array
    scores: mx.array | None = None
    tokens: mx.array | None = None
    peak: mx.array | None = None

    @classmethod
    def of(
        cls,
        logits: mx.array,
        rules: Rules,
        cap: float | None = None,
        ids: mx.array | None = None,
        token_counts: TokenCounts | None = None,
        mask: mx.array | None = None,
    ) -> Distribution:
        """Returns what these rows may say after these logits.

        logits: float32 [B, T, C], not capped. cap: the soft-cap, None for none. ids: [B, T, C], token ids of the
        columns; None where column i is token i. token_counts: the tokens before each position, where the rules have
        penalties. mask: uint32 [B, T, words], bit t % 32 of word t // 32 is set where a grammar allows token t.
        """
        allowed = logits if mask is None else logits + _columns(expand(mask, rules.vocab), ids)
        told = mask is not None or rules.bias is not None
        plain = rules.all_greedy and rules.reordered is None
        if ids is None and rules.free is None and rules.open is None and not plain:
            found = candidates(allowed, rules, cap, token_counts, rules.widest, False, mask is not None).best
            best, peak = found.columns[..., 0].astype(mx.int32), found.scores[..., 0] if told else None
            if rules.all_greedy:
                return cls(best, peak=peak)
            scores = filtered(*shares(found.scores / rules.temperature, rules.top_k), rules).scores
            return cls(best, scores, found.columns, peak)
        if rules.suppressed is not None:
            allowed = allowed + _columns(rules.suppressed, ids)
        best = mx.argmax(allowed, axis=-1)
        if plain:
            return cls(_named(best, ids), peak=_at(allowed, best) if told else None)
        scores = _of_all(allowed, rules, cap, ids, token_counts)
        if rules.reordered is not None:
            most = scores == scores.max(axis=-1, keepdims=True)
            best = mx.where(rules.reordered, mx.argmax(mx.where(most, allowed, -mx.inf), axis=-1), best)
        peak = _at(scores, best) if told else None
        if rules.all_greedy:
            return cls(_named(best, ids), peak=peak)
        scaled, tokens = scores / rules.temperature, ids
        if rules.filtered:
            columns = _order(allowed, scores, rules)
            scaled = mx.take_along_axis(scaled, columns, axis=-1)
            scaled = filtered(*shares(scaled, rules.top_k), rules).scores
            tokens = columns if ids is None else mx.take_along_axis(ids, columns, axis=-1)
        return cls(_named(best, ids), scaled, tokens, peak)

    @classmethod
    def joined(cls, each: Sequence[Distribution]) -> Distribution:
        """Returns distributions of one position each as one of T positions, without their peaks."""
        parts = zip(*((one.best, one.scores, one.tokens) for one in each), strict=True)
        return cls(*(None if part[0] is None else mx.concatenate(part, axis=1) for part in parts))

    def names(self) -> mx.array:
        """Returns the token of each column, [B, T, C] or [1, 1, C]."""
        return mx.arange(self.scores.shape[-1])[None, None] if self.tokens is None else self.tokens

    def drawn(self, rules: Rules, positions: mx.array) -> mx.array:
        """Returns the likeliest token in greedy rows, a coupled sample in others: int32 [B, T].

        positions: [B, T], absolute, of the tokens to be drawn.
        """
        if self.scores is None:
            return self.best
        return mx.where(rules.greedy, self.best, drawn(self.scores, rules.keys, positions, self.names())[0])

    def at(self, ids: mx.array | None, vocab: int) -> mx.array:
        """Returns the probabilities of the tokens ids, [B, T, n]; for None those of the whole vocabulary, [B, T,
        vocab].
        """
        p = mx.softmax(self.scores, axis=-1, precise=True)
        if self.tokens is None:
            return p if ids is None else mx.take_along_axis(p, ids, axis=-1)
        if ids is not None and ids.shape[-1] * p.shape[-1] <= vocab:  # two shortlists are less than a whole row
            same = ids[..., None] == self.tokens[..., None, :]
            return mx.where(same, p[..., None, :], 0.0).sum(axis=-1)
        whole = scattered(self.tokens, p, vocab)
        return whole if ids is None else mx.take_along_axis(whole, ids, axis=-1)

    def of_rows(self, index: mx.array) -> Distribution:
        """Returns the distributions of the rows index [n], without their peaks."""
        return Distribution(*(None if a is None else a[index] for a in (self.best, self.scores, self.tokens)))

    def first(self, positions: int) -> Distribution:
        """Returns the distributions at the first positions, without their peaks."""
        return Distribution(*(None if a is None else a[:, :positions] for a in (self.best, self.scores, self.tokens)))


def sample(
    logits: mx.array,
    rules: Rules,
    positions: mx.array,
    cap: float | None = None,
    ids: mx.array | None = None,
    token_counts: TokenCounts | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """Returns a token for each position, int32 [B, T]: the likeliest in greedy rows, a coupled sample in others.

    positions: [B, T], absolute, of the tokens to be drawn. The others: see Distribution.of.
    """
    return Distribution.of(logits, rules, cap, ids, token_counts, mask).drawn(rules, positions)


def logprobs(logits: mx.array, tokens: mx.array, cap: float | None, top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the model's own log-probabilities, before temperature, filters and penalties: of each token, [B, T]; then
    the `top` likeliest token ids, best first and equals by id, and their log-probabilities, [B, T, top] each.

    logits: float32 [B, T, V], not capped; tokens: [B, T]; cap: the soft-cap, None for none.
    """
    parts = []
    at_once = logits.shape[0] if device.traits().wide else max(PART // (logits.shape[1] * logits.shape[2]), 1)
    for start in range(0, logits.shape[0], at_once):
        rows = slice(start, start + at_once)
        parts.append(_logprobs(logits[rows], tokens[rows], cap, top))
    return tuple(mx.concatenate(each, axis=0) for each in zip(*parts, strict=True))


def _logprobs(logits: mx.array, tokens: mx.array, cap: float | None, top: int) -> tuple[mx.array, mx.array, mx.array]:
    # The sum is near, but its largest terms, which are most of it, are put right.
    largest, columns = topk(logits, max(top, SURE))
    values = soft_cap(largest, cap)
    peak = values[..., :1]
    whole, powers = sum_of_exponentials(logits, cap, False, number(1.0), peak)
    rest = whole[..., None] - mx.take_along_axis(powers, columns, axis=-1).sum(axis=-1, keepdims=True)
    total = peak + mx.log(mx.exp(values - peak).sum(axis=-1, keepdims=True) + mx.maximum(rest, 0.0))
    own = soft_cap(mx.take_along_axis(logits, tokens[..., None], axis=-1), cap) - total
    return own[..., 0], columns[..., :top], values[..., :top] - total


def _columns(bias: mx.array, ids: mx.array | None) -> mx.array:
    """Returns a bias, [V] or [B, T, V], at the columns' tokens."""
    if ids is None:
        return bias
    return bias[ids] if bias.ndim == 1 else mx.take_along_axis(bias, ids, axis=-1)


def _at(values: mx.array, columns: mx.array) -> mx.array:
    """Returns values [B, T, C] at one column each, [B, T]."""
    return mx.take_along_axis(values, columns[..., None], axis=-1)[..., 0]


def _named(columns: mx.array, ids: mx.array | None) -> mx.array:
    if ids is not None:
        columns = mx.take_along_axis(ids, columns[..., None], axis=-1)[..., 0]
    return columns.astype(mx.int32)


def _of_all(
    allowed: mx.array, rules: Rules, cap: float | None, ids: mx.array | None, token_counts: TokenCounts | None
) -> mx.array:
    """Returns the scores of all columns, before the temperature. allowed: -inf at tokens that nobody may say."""
    scores = scored(allowed, cap)
    if rules.penalties is not None:
        scores = rules.penalties.apply(scores, *token_counts.among(ids))
    if rules.bias is not None:
        scores = scores + _columns(scattered(rules.biased, rules.bias, rules.vocab), ids)
    return scores


def _order(allowed: mx.array, scores: mx.array, rules: Rules) -> mx.array:
    """Returns the columns that filters may keep, the likeliest first: by score, then by the logit as it came, then by
    column.
    """
    if rules.open is None and rules.free is None:  # a shortlist, whose equals may come by column
        return topk(allowed if rules.reordered is None else scores, rules.widest)[1]
    order = mx.argsort(-allowed, axis=-1)  # MLX leaves equals in their order
    if rules.reordered is None:
        return order
    return mx.take_along_axis(order, mx.argsort(-mx.take_along_axis(scores, order, axis=-1), axis=-1), axis=-1)


@lru_cache(maxsize=64)
def _none_kept(rows: int) -> mx.array:
    """Returns zeros, int32 [rows], that are made once and kept, so that they are no part of any graph."""
    return mx.array([0] * rows, mx.int32)


def accept(drafts: mx.array, targets: mx.array, real: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Returns n [B], how many drafts are kept, and the token after them, [B].

    A draft is kept while it and all before it equal the target's tokens. drafts: [B, K]; targets: [B, K + 1], drawn
    without a look at the drafts, which is why the text does not depend on them. real: int32 [B], how many of a row's
    drafts count, the others are pads; None for all.
    """
    rows, width = drafts.shape
    if not width:
        return _none_kept(rows), targets[:, 0]
    same = (drafts == targets[:, :-1]).astype(mx.int32)
    n = mx.cumprod(same, axis=1).sum(axis=1).astype(mx.int32)
    if real is not None:
        n = mx.minimum(n, real)
    return n, mx.take_along_axis(targets, n[:, None], axis=1)[:, 0]
