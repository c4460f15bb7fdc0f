"""A token for each position without a look at the whole distribution: what the loop draws by.

The token is the one that Distribution draws, from the likeliest candidates alone. Where they do not suffice, the place
says so, and the caller asks Distribution there (`settled`): a nucleus of more than REACH tokens, or one whose border
float32 may not find. Nothing here waits for the device, and whether a place is decided depends on its own logits and
settings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..machine import device
from ..ops.bits import expand
from ..ops.fused import compiled
from ..ops.sums import sum_of_exponentials, with_noise
from ..ops.topk import topk
from .candidates import Candidates, candidates, filtered, scored, shares
from .distribution import PART, Distribution
from .noise import drawn, gumbel_bound
from .penalties import TokenCounts
from .rules import REACH, Rules

UNDECIDED = -1  # in place of a token
FEW = 8192  # columns of which Distribution looks at all without much ado
NOISY = 64  # tokens of the largest bounds whose noise is computed, where no filter is


class Drawn(NamedTuple):
    """What was drawn at T positions of each row.

    tokens: int32 [B, T], UNDECIDED at places that are to be `settled`. guess: int32 [B, T], the same tokens, and at
    these places the one that they probably get. peak: see Distribution. certain: whether there are no such places,
    whatever the logits.
    """

    tokens: mx.array
    guess: mx.array
    peak: mx.array | None
    certain: bool


def draw(
    logits: mx.array,
    rules: Rules,
    positions: mx.array,
    cap: float | None = None,
    ids: mx.array | None = None,
    token_counts: TokenCounts | None = None,
    mask: mx.array | None = None,
) -> Drawn:
    """Returns a token for each position: the likeliest in greedy rows, a coupled sample in others.

    positions: [B, T], absolute, of the tokens to be drawn. The others: see Distribution.of.
    """
    if ids is not None or logits.shape[-1] <= FEW or (rules.all_greedy and rules.reordered is None and mask is None):
        p = Distribution.of(logits, rules, cap, ids, token_counts, mask)
        tokens = p.drawn(rules, positions)
        return Drawn(tokens, tokens, p.peak, True)
    rows, length, vocab = logits.shape
    at_once = rows, length
    if not device.traits().wide and (mask is not None or _looks_at_all(rules) or rules.reordered is not None):
        at_once = max(PART // (length * vocab), 1), max(PART // vocab, 1)
    lines = []
    for row in range(0, rows, at_once[0]):
        part = slice(row, row + at_once[0])
        of_part = rules if at_once[0] >= rows else rules.of_rows(part)
        line = []
        for position in range(0, length, at_once[1]):
            here = part, slice(position, position + at_once[1])
            counts = token_counts and token_counts.of_rows(part).of_positions(here[1])
            of_mask = None if mask is None else mask[here]
            line.append(_drawn(logits[here], of_part, positions[here], cap, counts, of_mask))
        lines.append([_joined(each, 1) for each in zip(*line, strict=True)])
    guess, sure, peak = (_joined(each, 0) for each in zip(*lines, strict=True))
    if mask is None and rules.bias is None:
        peak = None
    if rules.free is None and rules.open is None:
        return Drawn(guess, guess, peak, True)
    return Drawn(mx.where(sure, guess, UNDECIDED), guess, peak, False)


def _joined(parts: Sequence[mx.array], axis: int) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def _looks_at_all(rules: Rules) -> bool:
    return rules.open_top_p or rules.free is not None


def _drawn(
    logits: mx.array,
    rules: Rules,
    positions: mx.array,
    cap: float | None,
    token_counts: TokenCounts | None,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns the tokens of these rows, whether each is sure, and the score of the likeliest: [B, T] each."""
    if mask is not None:
        logits = logits + expand(mask, logits.shape[-1])
    k = max(rules.widest, REACH if rules.open is not None else 1)
    found = candidates(logits, rules, cap, token_counts, k, _looks_at_all(rules), mask is not None)
    tokens, peak = found.best.columns[..., 0].astype(mx.int32), found.best.scores[..., 0]
    sure = mx.ones(tokens.shape, mx.bool_)
    if rules.filtered:
        others = _of_candidates(found, rules, positions, cap)
        tokens, sure = (mx.where(rules.greedy, *each) for each in zip((tokens, sure), others, strict=True))
    if rules.free is not None:
        free = _of_all(found, rules, positions, cap)
        tokens, sure = (mx.where(rules.free, *each) for each in zip(free, (tokens, sure), strict=True))
    return tokens, sure, peak


def _of_candidates(
    found: Candidates, rules: Rules, positions: mx.array, cap: float | None
) -> tuple[mx.array, mx.array]:
    """Returns a token for each position, drawn from the best candidates, and whether it is sure."""
    scores, columns = found.best.scores / rules.temperature, found.best.columns
    if rules.open is None:
        kept = filtered(*shares(scores, rules.top_k), rules)
    else:
        is_open = rules.open[..., None]
        scores, p = shares(scores, mx.where(is_open, REACH, rules.top_k))
        left = None
        if rules.open_top_p:
            left = mx.where(is_open, _left(found, p[..., :1], rules, cap), 0.0)
        kept = filtered(scores, p, rules, left)
    tokens, _ = drawn(kept.scores, rules.keys, positions, columns)
    if rules.open is None:
        return tokens, mx.ones(tokens.shape, mx.bool_)
    # An open row is decided where its border is among the candidates, and no sum is too near to it.
    near = kept.near if columns.shape[-1] == REACH else kept.near[..., :REACH]
    return tokens, _sure(rules.open, kept.scores[..., REACH - 1], near.any(axis=-1))


@compiled
def _sure(is_open: mx.array, last: mx.array, near: mx.array) -> mx.array:
    return ~(is_open & (near | (last > -mx.inf)))


def _left(found: Candidates, first: mx.array, rules: Rules, cap: float | None) -> mx.array:
    """Returns which share of the probability is not in the best REACH candidates, [B, T, 1]. first: which share of
    theirs the likeliest has, [B, T, 1]; all are counted in multiples of the likeliest.
    """
    largest = found.best.scores[..., :1] / rules.temperature
    whole, powers = sum_of_exponentials(found.others, cap, found.holes, 1 / rules.temperature, largest)
    rest = whole[..., None] - mx.take_along_axis(powers, found.taken, axis=-1).sum(axis=-1, keepdims=True)
    beyond = [found.best.scores[..., REACH:]] if found.best.scores.shape[-1] > REACH else []
    for scores in beyond + ([] if found.left is None else [found.left.scores]):
        rest += mx.exp(scores / rules.temperature - largest).sum(axis=-1, keepdims=True)
    return _share(rest, first)


@compiled
def _share(rest: mx.array, first: mx.array) -> mx.array:
    rest = mx.maximum(rest, 0.0) * first
    return rest / (1 + rest)


def _of_all(found: Candidates, rules: Rules, positions: mx.array, cap: float | None) -> tuple[mx.array, mx.array]:
    """Returns a token for each position, drawn from the whole vocabulary, and whether it is sure. Noise is computed for
    the tokens whose scores with the most noise that they may have are the largest. The best of them is the best of all
    if it is above the bound of the last.
    """
    noise = gumbel_bound(rules.keys, positions, found.others.shape[-1])
    bounds = with_noise(found.others, cap, found.holes, 1 / rules.temperature, noise)
    bounds, columns = topk(bounds, NOISY)
    scores = scored(mx.take_along_axis(found.others, columns, axis=-1), cap) / rules.temperature
    last = bounds[..., -1] + 1e-4 * (1 + 1 / rules.temperature[..., 0])  # the bounds' scores are near
    if found.touched is not None:
        columns = mx.concatenate([columns, found.touched.columns], axis=-1)
        scores = mx.concatenate([scores, found.touched.scores / rules.temperature], axis=-1)
    tokens, most = drawn(scores, rules.keys, positions, columns)
    return tokens, (most >= last) | (last == -mx.inf)


def settled(
    logits: mx.array,
    rules: Rules,
    positions: mx.array,
    cap: float | None = None,
    token_counts: TokenCounts | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """Returns the tokens of places that `draw` left undecided, from all that rows may say there: int32 [B, T]."""
    return Distribution.of(logits, rules, cap, None, token_counts, mask).drawn(rules, positions)
