"""The likeliest tokens at each position, after soft-cap, penalties and bias, and what filters leave of them.

Penalties and bias change few logits, so the likeliest are among the best of all others and those few. The order is
total, whatever else is in the batch: by score, then by the logit as it came, then by column. So the soft-cap, which
makes equals of large logits, need not be computed before the likeliest are known.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..ops.fused import compiled, number, numbers
from ..ops.topk import topk
from .penalties import NONE, TokenCounts, scattered
from .rules import Rules

LINE = 512  # probabilities that are summed one after the other; the same sums, to the bit, whatever follows of zeros
FEW = 64  # suppressed tokens that are looked for among the best, rather than taken out of all


def soft_cap(logits: mx.array, cap: float | None) -> mx.array:
    """Returns cap * tanh(logits / cap), or the logits as they are where there is no cap."""
    return logits if cap is None else mx.tanh(logits / cap) * cap


class Listed(NamedTuple):
    """Tokens with their logits as they came, `raw`, and their scores, not yet divided by the temperature, -inf where
    nobody may say them: [B, T, n] each.
    """

    raw: mx.array
    scores: mx.array
    columns: mx.array

    def ordered(self) -> Listed:
        """Returns them, the likeliest first."""
        order = mx.argsort(self.columns.astype(mx.int32), axis=-1)
        for keys in (-self.raw, -self.scores):  # MLX leaves equals in their order
            again = mx.argsort(mx.take_along_axis(keys, order, axis=-1), axis=-1)
            order = mx.take_along_axis(order, again, axis=-1)
        return Listed(*(mx.take_along_axis(each, order, axis=-1) for each in self))

    def part(self, start: int, end: int | None) -> Listed:
        """Returns the places from start to end."""
        return Listed(*(each[..., start:end] for each in self))


class Candidates(NamedTuple):
    """best: the k likeliest tokens, in order. touched: the tokens whose logits a bias or a penalty changes, some of
    them with a score of -inf, since they stand here twice; None where there is none. others: [B, T, C], the logits as
    they came, -inf at tokens that are touched or suppressed, where the caller asked for them. holes: whether `others`
    has any -inf. taken: the columns of the k best of others. left: what of these and the touched is not among the best;
    None where nothing is touched.
    """

    best: Listed
    touched: Listed | None
    left: Listed | None
    others: mx.array | None
    holes: bool
    taken: mx.array


def scored(raw: mx.array, cap: float | None) -> mx.array:
    """Returns the scores of untouched logits; what is -inf stays it."""
    return raw if cap is None else mx.where(raw > -mx.inf, soft_cap(raw, cap), -mx.inf)


def candidates(
    logits: mx.array,
    rules: Rules,
    cap: float | None,
    token_counts: TokenCounts | None,
    k: int,
    others: bool,
    holes: bool,
) -> Candidates:
    """Returns the k likeliest tokens of these rows at each position.

    logits: float32 [B, T, V], not capped, -inf at tokens that a grammar forbids, which `holes` says. others: return the
    other logits, too.
    """
    touched = None if rules.reordered is None else _touched(logits, rules, cap, token_counts)
    forbidden = rules.forbidden
    few = touched is None and not others and (forbidden is None or forbidden.size <= FEW)
    if few:
        raw, columns = topk(logits, k + (0 if forbidden is None else forbidden.size))
        best = Listed(raw, scored(raw, cap), columns)
        if forbidden is not None:
            never = (columns[..., None] == forbidden).any(axis=-1)
            order = mx.argsort(mx.where(never, mx.inf, -best.scores), axis=-1)[..., :k]
            best = best._replace(scores=mx.where(never, -mx.inf, best.scores))
            best = Listed(*(mx.take_along_axis(each, order, axis=-1) for each in best))
        return Candidates(best, None, None, None, holes, columns)
    for tokens in (rules.biased, None if rules.penalties is None else token_counts.tokens[:, None], forbidden):
        if tokens is not None:
            logits, holes = _without(logits, tokens), True
    raw, columns = topk(logits, k)
    best, left = Listed(raw, scored(raw, cap), columns), None
    if touched is not None:
        both = Listed(*(mx.concatenate(pair, axis=-1) for pair in zip(best, touched, strict=True))).ordered()
        best, left = both.part(0, k), both.part(k, None)
    return Candidates(best, touched, left, logits if others else None, holes, columns)


def _touched(logits: mx.array, rules: Rules, cap: float | None, token_counts: TokenCounts | None) -> Listed:
    """Returns the tokens that a bias or a penalty changes, at each position, each once with a score above -inf."""
    lists = []
    if rules.penalties is not None:
        tokens, live = token_counts.tokens[:, None], token_counts.tokens[:, None] != NONE
        raw, columns, scores = _scores(logits, tokens, live, rules, cap)
        scores = rules.penalties.apply(scores, token_counts.prompt[:, None], token_counts.text)
        if rules.bias is not None:
            dense = scattered(rules.biased, rules.bias, rules.vocab)
            scores = scores + mx.take_along_axis(dense, columns[:, :1], axis=-1)
        lists.append(Listed(raw, scores, columns))
    if rules.bias is not None:
        live = rules.biased != NONE
        if rules.penalties is not None:
            live &= ~(rules.biased[..., None] == token_counts.tokens[:, None, None]).any(axis=-1)
        raw, columns, scores = _scores(logits, rules.biased, live, rules, cap)
        lists.append(Listed(raw, scores + rules.bias, columns))
    return Listed(*(mx.concatenate(each, axis=-1) for each in zip(*lists, strict=True)))


def _scores(
    logits: mx.array, tokens: mx.array, live: mx.array, rules: Rules, cap: float | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the logits of these tokens as they came, the tokens, 0 for NONE, and the scores, -inf where a token is
    not live, or suppressed: [B, T, N] each. tokens: [B, 1, N].
    """
    columns = mx.broadcast_to(mx.maximum(tokens, 0), (*logits.shape[:2], tokens.shape[-1]))
    raw = mx.take_along_axis(logits, columns, axis=-1)
    if rules.suppressed is not None:
        live = live & (rules.suppressed[columns] == 0)
    return raw, columns.astype(mx.uint32), mx.where(live, scored(raw, cap), -mx.inf)


def _without(logits: mx.array, tokens: mx.array) -> mx.array:
    """Returns the logits [B, T, V] with -inf at these tokens: [B, 1, N] with NONE in empty places, or [S]."""
    rows, positions, vocab = logits.shape
    index = mx.maximum(tokens, 0) + numbers(rows * positions).reshape(rows, positions, 1) * vocab
    limit = mx.broadcast_to(mx.where(tokens == NONE, mx.inf, -mx.inf), index.shape)
    return logits.reshape(-1).at[index.reshape(-1)].minimum(limit.reshape(-1)).reshape(logits.shape)


class Filtered(NamedTuple):
    """scores: [B, T, k], -inf where a filter leaves a token out. near: bool [B, T, k], where a token is so near the
    border of top-p or min-p that another order of adding might keep it or not.
    """

    scores: mx.array
    near: mx.array


def shares(scores: mx.array, limit: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the scores within top-k, -inf elsewhere, and their probabilities. scores: [B, T, k], divided by the
    temperature, the likeliest first; limit: top-k, [B, 1, 1].
    """
    scores = _within(scores, numbers(scores.shape[-1]), limit)
    return scores, mx.softmax(scores, axis=-1, precise=True)


def filtered(scores: mx.array, p: mx.array, rules: Rules, left: mx.array | None = None) -> Filtered:
    """Returns what top-p and min-p keep: the likeliest whatever rounding makes of the sums.

    scores, p: from `shares`. left: [B, T, 1], what all other tokens have of the probability; None for nothing.
    """
    after = _shares_from_the_end(p)
    left = number(0.0) if left is None else left
    places = numbers(scores.shape[-1])
    return Filtered(*_kept(scores, places, p, after, left, rules.rest, rules.min_p, p[..., :1], scores[..., :1]))


def _shares_from_the_end(p: mx.array) -> mx.array:
    """Returns for each place what share of all is in itself and those after it, [B, T, n].

    It is summed from the least likely up, where float32 is exact enough: from the top the sum is 1 long before the end.
    Over a vocabulary one sum, and what MLX's softmax divides by, are off by 1e-3.
    """
    n = p.shape[-1]
    if n <= LINE:
        sums = mx.cumsum(p, axis=-1, reverse=True)
        return sums / sums[..., :1]
    lines = mx.pad(p, [(0, 0), (0, 0), (0, -n % LINE)]).reshape(*p.shape[:2], -1, LINE)
    sums = mx.cumsum(lines, axis=-1, reverse=True)
    later = mx.cumsum(sums[..., 0], axis=-1, reverse=True, inclusive=False)
    sums = (sums + later[..., None]).reshape(*p.shape[:2], -1)[..., :n]
    return sums / sums[..., :1]


@compiled
def _within(scores: mx.array, places: mx.array, limit: mx.array) -> mx.array:
    return mx.where(places < limit, scores, -mx.inf)


@compiled
def _kept(
    scores: mx.array,
    places: mx.array,
    p: mx.array,
    after: mx.array,
    left: mx.array,
    rest: mx.array,
    min_p: mx.array,
    largest: mx.array,
    best: mx.array,
) -> tuple[mx.array, mx.array]:
    """Returns the parts of Filtered. min-p: a share of the likeliest, the same before and after top-p."""
    after, least = after * (1 - left) + left, min_p * largest
    rounded = 3e-7 * mx.abs(best)  # of a probability: its exponent is the difference of two such scores
    near = mx.abs(after - rest) <= 3e-6 + (3e-5 + rounded) * rest
    near |= (min_p > 0) & (mx.abs(p - least) <= (1e-5 + rounded) * least)
    return mx.where((places == 0) | ((after > rest) & (p >= least)), scores, -mx.inf), near
