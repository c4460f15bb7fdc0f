"""From logits to tokens: pure functions of arrays, all rows at once.

Sampling is Gumbel-coupled (Daliri, Musco, Suresh, arXiv 2408.07978): token = argmax(log p + g), where the noise g
depends on (seed, absolute position, token id) and on nothing else. Target and drafter use the same noise, so that they
agree often; the emitted token never depends on a draft, so that one seed gives one text for every draft length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .noise import gumbel
from .params import SamplingParams
from .penalties import Penalties, TokenCounts


@dataclass(frozen=True)
class Rules:
    """The resolved settings of all B rows of a batch, as arrays.

    temperature, top_k, rest, min_p: [B, 1, 1]; rest is what top-p leaves out of the probability, -1 where top-p is off.
    keys: uint32 [B, 2], of the noise. greedy: bool [B, 1]. suppressed: [V], -inf at tokens that no row may say. bias:
    [B, 1, V]. These two and penalties are None where no row has any. reordered: bool [B, 1], rows in which bias or
    penalties change the order of logits; None where there is no such row. candidates: how many of the best tokens any
    row may need; 0 where no row is filtered, -1 for all, sorted. logprobs: how many likeliest tokens to report; None
    where no row wants a report. vocab: V.
    """

    temperature: mx.array
    top_k: mx.array
    rest: mx.array
    min_p: mx.array
    keys: mx.array
    greedy: mx.array
    suppressed: mx.array | None
    bias: mx.array | None
    penalties: Penalties | None
    reordered: mx.array | None
    all_greedy: bool
    candidates: int
    logprobs: int | None
    vocab: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, suppress: Sequence[int] = ()) -> Rules:
        """Returns the rules of these settings. params: resolved, one a row; suppress: tokens that no row may say."""
        sampled = [p for p in params if p.temperature]
        filtered = [p for p in sampled if p.top_k > 0 or p.top_p < 1 or p.min_p]
        unbounded = any(not 0 < p.top_k < vocab for p in sampled)
        widest = max((p.top_k for p in sampled), default=0)
        reordered = [p.penalised or bool(p.logit_bias) for p in params]
        column = lambda values, dtype: mx.array(values, dtype)[:, None, None]  # noqa: E731
        return cls(
            temperature=column([p.temperature or 1.0 for p in params], mx.float32),
            top_k=column([p.top_k if p.top_k > 0 else vocab for p in params], mx.int32),
            rest=column([1 - p.top_p if p.top_p < 1 else -1.0 for p in params], mx.float32),
            min_p=column([p.min_p or 0.0 for p in params], mx.float32),
            keys=mx.array([_key(p.seed) for p in params], mx.uint32),
            greedy=mx.array([not p.temperature for p in params])[:, None],
            suppressed=_vector(dict.fromkeys(suppress, -mx.inf), vocab) if suppress else None,
            bias=_stacked([p.logit_bias for p in params], vocab),
            penalties=Penalties.of(params),
            reordered=mx.array(reordered)[:, None] if any(reordered) else None,
            all_greedy=not sampled,
            candidates=0 if not filtered else -1 if unbounded else widest,
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            vocab=vocab,
        )

    def drafting(self, temperature: float) -> Rules:
        """Returns the drafter's rules: these with each temperature times `temperature`."""
        return self if temperature == 1 else replace(self, temperature=self.temperature * temperature)


def _vector(biases: Mapping[int, float], vocab: int) -> mx.array:
    vector = mx.zeros((vocab,))
    if biases:
        vector[mx.array(list(biases))] = mx.array(list(biases.values()), mx.float32)
    return vector


def _stacked(biases: Sequence[Mapping[int, float]], vocab: int) -> mx.array | None:
    return mx.stack([_vector(each, vocab) for each in biases])[:, None] if any(biases) else None


def soft_cap(logits: mx.array, cap: float | None) -> mx.array:
    """Returns cap * tanh(logits / cap), or the logits as they are where there is no cap."""
    return logits if cap is None else mx.tanh(logits / cap) * cap


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
        penalties. mask: [B, T, V], -inf at tokens that a grammar forbids.
        """
        forbidden = [_columns(bias, ids) for bias in (rules.suppressed, mask) if bias is not None]
        allowed = sum(forbidden, logits)
        best = mx.argmax(allowed, axis=-1)
        if rules.all_greedy and rules.reordered is None:
            return cls(_named(best, ids), peak=None if mask is None else _at(allowed, best))
        logits = soft_cap(logits, cap)
        if rules.penalties is not None:
            logits = rules.penalties.apply(logits, token_counts.among(ids))
        if rules.bias is not None:
            logits = logits + _columns(rules.bias, ids)
        logits = sum(forbidden, logits)
        if rules.reordered is not None:
            best = mx.where(rules.reordered, mx.argmax(logits, axis=-1), best)
        peak = None if mask is None and rules.bias is None else _at(logits, best)
        if rules.all_greedy:
            return cls(_named(best, ids), peak=peak)
        scaled, tokens = logits / rules.temperature, ids
        if rules.candidates:
            scaled, columns = _filtered(scaled, rules)
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
        names = self.names()
        column = mx.argmax(self.scores + gumbel(rules.keys, positions, names), axis=-1, keepdims=True)
        token = mx.take_along_axis(mx.broadcast_to(names, self.scores.shape), column, axis=-1)[..., 0]
        return mx.where(rules.greedy, self.best, token.astype(mx.int32))

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
        whole = mx.put_along_axis(mx.zeros((*p.shape[:-1], vocab)), self.tokens, p, axis=-1)
        return whole if ids is None else mx.take_along_axis(whole, ids, axis=-1)

    def of_rows(self, index: mx.array) -> Distribution:
        """Returns the distributions of the rows index [n], without their peaks."""
        return Distribution(*(None if a is None else a[index] for a in (self.best, self.scores, self.tokens)))


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

    positions: [B, T], absolute, of the tokens to be drawn. logits: float32 [B, T, C], not capped. cap: the soft-cap,
    None for none. ids: [B, T, C], token ids of the columns; None where column i is token i. token_counts: the tokens
    before each position, where the rules have penalties. mask: [B, T, V], -inf at tokens that a grammar forbids.
    """
    return Distribution.of(logits, rules, cap, ids, token_counts, mask).drawn(rules, positions)


def logprobs(logits: mx.array, tokens: mx.array, cap: float | None, top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the model's own log-probabilities, before temperature, filters and penalties: of each token, [B, T]; then
    the `top` likeliest token ids, best first and equals by id, and their log-probabilities, [B, T, top] each.

    logits: float32 [B, T, V], not capped; tokens: [B, T]; cap: the soft-cap, None for none.
    """
    values = soft_cap(logits, cap)
    values = values - mx.logsumexp(values, axis=-1, keepdims=True)
    own = mx.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
    best = _best(values, top) if top else mx.zeros((*tokens.shape, 0), mx.uint32)
    return own, best, mx.take_along_axis(values, best, axis=-1)


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


def _filtered(scaled: mx.array, rules: Rules) -> tuple[mx.array, mx.array]:
    """Returns the scores of the best candidates, best first, -inf where a filter leaves them out, and their columns:
    [B, T, k] each. scaled: [B, T, C], divided by the temperature.
    """
    columns = _best(scaled, rules.candidates)
    scaled = mx.take_along_axis(scaled, columns, axis=-1)
    scaled = mx.where(mx.arange(scaled.shape[-1]) < rules.top_k, scaled, -mx.inf)
    p = mx.softmax(scaled, axis=-1, precise=True)
    # Summed from the least likely up, where float32 is exact enough: from the top the sum is 1 long before the end.
    kept = mx.cumsum(p, axis=-1, reverse=True) > rules.rest
    kept &= p >= rules.min_p * p[..., :1]  # a share of the likeliest: the same before and after top-p
    return mx.where(kept, scaled, -mx.inf), columns


def _best(values: mx.array, count: int) -> mx.array:
    """Returns the columns of the `count` largest (-1: all), best first: [..., count].

    Of equals the lower column comes first, whatever the count is, so that a partner's top-k changes no row's.
    """
    negated = -values  # MLX orders equals by column, so that the lower one comes before
    if not 0 < count < values.shape[-1]:
        return mx.argsort(negated, axis=-1)
    columns = mx.sort(mx.argpartition(negated, kth=count - 1, axis=-1)[..., :count], axis=-1)
    order = mx.argsort(mx.take_along_axis(negated, columns, axis=-1), axis=-1)
    return mx.take_along_axis(columns, order, axis=-1)


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32


def accept(drafts: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Returns n [B], how many drafts are kept, and the token after them, [B].

    A draft is kept while it and all before it equal the target's tokens. drafts: [B, K]; targets: [B, K + 1], drawn
    without a look at the drafts, which is why the text does not depend on them.
    """
    same = (drafts == targets[:, :-1]).astype(mx.int32)
    n = mx.cumprod(same, axis=1).sum(axis=1).astype(mx.int32)
    return n, mx.take_along_axis(targets, n[:, None], axis=1)[:, 0]
