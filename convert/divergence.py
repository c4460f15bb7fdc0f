"""What two models of one graph say differently, computed layer by layer with the memory of one layer.

KL divergence of the next token's distribution, first choices, a drafter's first drafts, and what each layer differs by
itself, so that a layer that was damaged is named.
"""

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.errors import UserError

from .checkpoint import Checkpoint
from .layerwise import TABLE, Layered, Whole, opened, opened_drafter

CENTROIDS = "masked_embedding.centroids.weight"
ORDERING = "masked_embedding.token_ordering"
# A format rounds a tensor to about its own norm, and layers of one format lose about as much each.
NORMS = (0.8, 1.25)
APART, LEAST = 3.0, 0.02  # times the median of like layers, and of what a layer adds


@dataclass(frozen=True)
class Quality:
    """What a conversion changed.

    tokens: how many distributions were compared; mean, p99: of the KL divergence of the converted model's from the
    source's, nats; flips: share of tokens whose first choice is another one; drafts: shares of first drafts that are
    the target's first choice, before and after; None without a drafter. layers: of each layer the root mean square of
    the difference, as a share of what the layer adds to its input, where both read the source's input. findings: what
    is out of line, a sentence each.
    """

    tokens: int
    mean: float
    p99: float
    flips: float
    drafts: tuple[float, float] | None
    layers: tuple[float, ...]
    findings: tuple[str, ...]


def measure(
    model: Checkpoint, against: Checkpoint, drafters: tuple[Checkpoint, Checkpoint] | None, tokens: mx.array
) -> Quality:
    """Returns what a conversion changed on tokens [rows, length], which are ids of the vocabulary.

    drafters: before and after. Raises UserError for a source of another model, and for another target's drafter.
    """
    if {e.name: e.shape for e in model.entries} != {e.name: e.shape for e in against.entries}:
        raise UserError(f"{against.where} is another model than {model.where}; expected the source of the conversion")
    before, after = opened(against), opened(model)
    hidden, spans, layers = _through(before, after, tokens)
    divergence, first = _compare(before, after, hidden)
    drafts = None
    if drafters:
        pairs = zip((before, after), drafters, hidden, spans, first, strict=True)
        drafts = tuple(_agreement(target, each, tokens, *rest) for target, each, *rest in pairs)
    return Quality(
        tokens.size,
        float(divergence.mean()),
        float(np.quantile(divergence, 0.99)),
        float((first[0] != first[1]).mean()),
        drafts,
        tuple(layers),
        tuple(_findings(before, after, layers)),
    )


def _through(
    before: Layered, after: Layered, tokens: mx.array
) -> tuple[list[mx.array], tuple[Whole, Whole], list[float]]:
    """Hidden states after the last norm, [N, hidden], and the K/V of both sides; what each layer differs by itself."""
    rows, length = tokens.shape
    specs, flat = before.config.kv, tokens.reshape(-1)
    spans = tuple(Whole(rows, length, specs) for _ in range(2))
    tables = before.model.ropes.tables(spans[0].positions)
    x = [side.model.embed(flat) for side in (before, after)]
    inputs = [side.model.per_layer_inputs(flat, each) for side, each in zip((before, after), x, strict=True)]
    mx.eval(x, inputs)
    used = _last_uses(before)
    layers = []
    for index, spec in enumerate(before.config.layers):
        alone = Whole(rows, length, specs)
        alone.kept = dict(spans[0].kept)
        turn = tables[spec.kind]
        (source_out,) = _computed(before, index, [(x[0], spans[0], turn, inputs[0][index])])
        both = [(x[0], alone, turn, inputs[0][index]), (x[1], spans[1], turn, inputs[1][index])]
        apart, out = _computed(after, index, both)
        added = mx.square(source_out - x[0]).sum().item()
        layers.append(math.sqrt(mx.square(apart - source_out).sum().item() / added) if added else 0.0)
        x = [source_out, out]
        for span in spans:
            span.kept = {place: kept for place, kept in span.kept.items() if used[place] > index}
    hidden = [side.model.norm(each) for side, each in zip((before, after), x, strict=True)]
    mx.eval(hidden)
    return hidden, spans, layers


def _computed(side: Layered, index: int, calls: list[tuple]) -> list[mx.array]:
    """What a layer gives for each call's arguments. Its weights are gone when this returns."""
    layer = side.layer(index)
    out = [layer(*call) for call in calls]
    mx.eval(out, [call[1].kept for call in calls])
    del layer
    gc.collect()  # its compiled functions and it hold each other
    return out


def _last_uses(target: Layered) -> dict[int, int]:
    """Place in the cache -> the last layer that reads it; the last ones of each kind are the drafter's, too."""
    uses = {spec.kv_layer: index for index, spec in enumerate(target.config.layers)}
    for last in {spec.kind: spec.kv_layer for spec in target.config.layers}.values():
        uses[last] = len(target.config.layers)
    return uses


def _compare(before: Layered, after: Layered, hidden: list[mx.array]) -> tuple[np.ndarray, list[np.ndarray]]:
    """KL divergence [N] and both first choices [N], in one pass over the vocabulary.

    KL(p, q) = sum p (a - b) - lse(a) + lse(b), each sum as it grows, under the largest logit so far.
    """
    tops = [mx.full((hidden[0].shape[0], 1), -mx.inf) for _ in range(2)]
    sums = [mx.zeros(tops[0].shape) for _ in range(2)]
    apart, first, start = mx.zeros(tops[0].shape), [mx.zeros((hidden[0].shape[0],), mx.int32) for _ in range(2)], 0
    squares = [0.0, 0.0]
    for pair in zip_longest(before.table(), after.table()):
        logits = [
            side.capped(states @ rows.T) for side, states, rows in zip((before, after), hidden, pair, strict=True)
        ]
        for side in range(2):
            best = logits[side].max(axis=-1, keepdims=True)
            here = mx.argmax(logits[side], axis=-1).astype(mx.int32) + start
            first[side] = mx.where(best[:, 0] > tops[side][:, 0], here, first[side])
            top = mx.maximum(tops[side], best)
            shrink, share = mx.exp(tops[side] - top), mx.exp(logits[side] - top)
            if side == 0:
                apart = apart * shrink + (share * (logits[0] - logits[1])).sum(axis=-1, keepdims=True)
            sums[side] = sums[side] * shrink + share.sum(axis=-1, keepdims=True)
            tops[side] = top
            squares[side] += mx.square(pair[side]).sum().item()
        start += pair[0].shape[0]
        mx.eval(apart, sums, tops, first)
    for side, square in zip((before, after), squares, strict=True):
        side.weights.norms[TABLE] = math.sqrt(square)
    lse = [top + mx.log(total) for top, total in zip(tops, sums, strict=True)]
    divergence = apart / sums[0] - lse[0] + lse[1]
    return np.maximum(np.array(divergence[:, 0]), 0.0), [np.array(each) for each in first]


def _agreement(
    target: Layered, model: Checkpoint, tokens: mx.array, hidden: mx.array, span: Whole, first: np.ndarray
) -> float:
    """The share of tokens at which a drafter's first draft is the target's first choice, the text given up to it."""
    drafter = opened_drafter(model, target.config)
    rows, length = tokens.shape
    newest = target.model.embed(tokens[:, 1:].reshape(-1))
    states = hidden.reshape(rows, length, -1)[:, :-1].reshape(newest.shape)
    ahead = Whole(rows, length - 1, target.config.kv, ahead=1)
    ahead.kept = {place: (keys[:, :, :-1], values[:, :, :-1]) for place, (keys, values) in span.kept.items()}
    tables = drafter.model.ropes.tables(ahead.positions)
    x = drafter.model.pre_projection(mx.concatenate([newest, states], axis=-1))
    for index, spec in enumerate(drafter.config.layers):
        (x,) = _computed(drafter, index, [(x, ahead, tables[spec.kind])])
    y = drafter.model.norm(x)
    drafts = _first_draft(drafter, y)
    wanted = first.reshape(rows, length)[:, 1:].reshape(-1)
    return float((drafts == wanted).mean())


def _first_draft(drafter: Layered, y: mx.array) -> np.ndarray:
    """The token with the largest score, of those that a centroid head looks at."""
    allowed = None
    if drafter.config.centroids:
        scores = y @ drafter.weights.read(CENTROIDS).T
        kth = drafter.config.centroid_top_k
        best = mx.argpartition(scores, kth=-kth, axis=-1)[:, -kth:]
        allowed = mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), best, mx.array(True), axis=-1)
        order = np.array(drafter.weights.read(ORDERING)).reshape(scores.shape[-1], -1)
        homes = np.empty(order.size, np.int32)
        homes[order] = np.arange(len(order), dtype=np.int32)[:, None]
    top, first, start = mx.full((y.shape[0],), -mx.inf), mx.zeros((y.shape[0],), mx.int32), 0
    for rows in drafter.table():
        scores = y @ rows.T
        if allowed is not None:
            scores = mx.where(allowed[:, mx.array(homes[start : start + rows.shape[0]])], scores, -mx.inf)
        best = scores.max(axis=-1)
        first = mx.where(best > top, mx.argmax(scores, axis=-1).astype(mx.int32) + start, first)
        top = mx.maximum(top, best)
        start += rows.shape[0]
        mx.eval(first, top)
    return np.array(first)


def _findings(before: Layered, after: Layered, layers: list[float]) -> Iterator[str]:
    """What no format explains: a tensor of another size than its source's, a layer that differs more than its like."""
    for name, norm in before.weights.norms.items():
        ratio = after.weights.norms[name] / norm if norm else 1.0
        if not NORMS[0] <= ratio <= NORMS[1]:
            yield f"{name} is {ratio:.3g} times as large as in the source; expected about 1: it is no rounding of it"
    for index, (form, lost) in enumerate(zip(after.forms, layers, strict=True)):
        alike = [other for place, other in enumerate(layers) if after.forms[place] == form and place != index]
        if not math.isfinite(lost):
            yield f"layer {index} gives NaN or infinity; convert it again"
        elif alike and lost > LEAST and lost > APART * median(alike):
            yield f"layer {index} differs by {lost:.3g} of what it adds, layers like it by {median(alike):.3g}"
