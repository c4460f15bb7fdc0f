"""Which drafts stay by block verification (Sun et al., arXiv 2403.10444, algorithm 2), and the token after them.

The text has the target's distribution, and on average more drafts stay than by coupling, or by rejection one by one
(arXiv 2211.17192); but it is another text for other drafts. What makes it exact: drafts are drawn from q with noise
that nothing else uses, and none is cut for what it is, or for what comes after it.
"""

from __future__ import annotations

import mlx.core as mx

from .distribution import Distribution, Rules
from .distribution import accept as agreeing
from .noise import uniform

NO_TOKEN = 2**32 - 1  # and below: what decides over drafts is noise of tokens that do not exist, others each round
TINY = 1.2e-38  # in a quotient 0 / 0, which is to be 0


def accept(
    drafts: mx.array,
    q: Distribution,
    p: Distribution,
    rules: Rules,
    positions: mx.array,
    real: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns tokens [B, K + 1], of which n + 1 count, n [B], how many drafts are kept, and the token after them, [B].

    drafts: [B, K], drawn from q under `noise.keys_of_round`; p: the target's, K + 1 positions; rules: the target's;
    positions: [B, K + 1], of the tokens to be drawn; real: int32 [B], how many of a row's drafts count, the others are
    pads (see `residuals`); None for all. Greedy rows keep drafts that agree. The token after the drafts is drawn with
    the noise of plain decoding, which nothing else uses here: each position gets one such token at most.
    """
    places = mx.arange(positions.shape[1])
    reach, rest = residuals(drafts, q, p, rules.vocab, real)
    nobody = NO_TOKEN - positions[:, :1, None].astype(mx.uint32)
    draw = uniform(rules.keys, positions, nobody)[..., 0]
    n = mx.where(draw <= chances(reach, rest, real), places, 0).max(axis=1)
    n = mx.where(rules.greedy[:, 0], agreeing(drafts, p.best, real)[0], n)[:, None]
    here = lambda array: mx.take_along_axis(array, n.reshape(-1, *[1] * (array.ndim - 1)), axis=1)  # noqa: E731
    left = here(rest)
    some = left.sum(axis=-1, keepdims=True) > 0  # rounding alone can refuse where p is q and nothing is left
    scores = mx.where(some, mx.log(left), here(p.scores))
    after = Distribution(here(p.best), scores, None if p.tokens is None else here(p.tokens))
    following = after.drawn(rules, here(positions))
    tokens = mx.where(places == n, following, mx.pad(drafts, ((0, 0), (0, 1))))
    return tokens, n[:, 0].astype(mx.int32), following[:, 0]


def residuals(
    drafts: mx.array, q: Distribution, p: Distribution, vocab: int, real: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Returns for each number of drafts kept, 0 to K, reach [B, K + 1] (the paper's p_i: 1 at first, then min(1,
    p_{i-1} p / q)), and what the token after them is drawn from but for a constant: max(0, reach p - q), [B, K + 1, C]
    in the columns of p. After the last draft nothing is drafted, so that q is 0.

    real: [B], how many of a row's drafts count; None for all. After the last of these nothing is drafted either:
    reach of more drafts means nothing.
    """
    count = drafts.shape[1]
    target = mx.softmax(p.scores, axis=-1, precise=True)
    drafted = q.at(None if p.tokens is None else p.tokens[:, :count], vocab)
    if real is not None:
        drafted = mx.where((mx.arange(count) < real[:, None])[..., None], drafted, 0.0)
    own = p.names()[:, :count] == drafts[..., None]  # the draft's column; none, if the target would not say it
    ratio = mx.where(own, target[:, :count], 0.0).sum(axis=-1)
    ratio = ratio / mx.maximum(mx.where(own, drafted, 0.0).sum(axis=-1), TINY)
    reach = [mx.ones((drafts.shape[0],))]
    for i in range(count):
        reach.append(mx.minimum(reach[-1] * ratio[:, i], 1.0))
    reach = mx.stack(reach, axis=1)
    return reach, mx.maximum(reach[..., None] * target - mx.pad(drafted, ((0, 0), (0, 1), (0, 0))), 0.0)


def chances(reach: mx.array, rest: mx.array, real: mx.array | None = None) -> mx.array:
    """Returns the paper's h_i, [B, K + 1]: the chance that the first i drafts stay where no more do. That of the last
    is its reach, and of more drafts than are real, [B], it is 0.
    """
    mass = rest.sum(axis=-1)
    h = mass / mx.maximum(mass + (1 - reach), TINY)
    return h if real is None else mx.where(mx.arange(h.shape[1]) <= real[:, None], h, 0.0)
