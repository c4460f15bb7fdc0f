"""Block verification of copies: what they were drawn from is one token with certainty. Exact, by enumeration."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.sampling.distribution import Distribution, Rules
from mlx_gemma_mtp.sampling.rejection import chances, residuals
from mlx_gemma_mtp.speculative.drafting import COPY, MTP, Drafts
from mlx_gemma_mtp.speculative.mixture import Chain, mixed

VOCAB, COPIED = 3, (1, 0, 2)
PARAMS = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, seed=1)


def softmax(rows):
    e = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def outcome(own: int, gated: bool, shortlist: bool, spoil: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each text of K + 1 tokens, by the loop's drafts and by the target alone.

    own: drafts that the drafter draws before copies go on. gated: whether they go on only where it drew the same.
    """
    rng, length = np.random.default_rng(own), len(COPIED)
    p = {
        text: softmax(rng.normal(size=VOCAB) * 1.5)
        for n in range(length + 1)
        for text in product(range(VOCAB), repeat=n)
    }
    q = {text: softmax(rng.normal(size=VOCAB)) for text in p}
    drawn = list(product(range(VOCAB), repeat=own))
    chains, chance = [], []
    for text in drawn:
        goes_on = not gated or text == COPIED[:own]
        more = list(COPIED[own:]) if goes_on else []
        chains.append(Chain([*text, *more], [MTP] * own + [COPY] * len(more), [0.5] * (own + len(more))))
        chance.append(np.prod([q[text[:i]][text[i]] for i in range(own)]))
    scores = np.log([[q[text[:i]] for i in range(own)] for text in drawn]).reshape(len(drawn), own, VOCAB)
    ids = mx.broadcast_to(mx.array([2, 0, 1]), scores.shape) if shortlist else None
    scores = mx.array(scores.astype(np.float32))
    given = Distribution(
        mx.zeros(scores.shape[:2], mx.int32), scores if ids is None else scores[..., mx.array([2, 0, 1])], ids
    )
    drafts = mixed(Drafts(mx.array(drawn, mx.int32).reshape(len(drawn), own), mx.zeros((len(drawn), 0)), given),
                   [list(text) for text in drawn], chains)  # fmt: skip
    if spoil:
        drafts = drafts._replace(q=Distribution(drafts.q.best, mx.zeros_like(drafts.q.scores), drafts.q.tokens))
    width = drafts.tokens.shape[1]
    tokens = [chain.tokens + [0] * (width - len(chain.tokens)) for chain in chains]
    logits = np.log([[p[tuple(row[:i])] for i in range(width + 1)] for row in tokens]).astype(np.float32)
    rules = Rules.of([PARAMS] * len(drawn), VOCAB)
    reach, rest = residuals(drafts.tokens, drafts.q, Distribution.of(mx.array(logits), rules), VOCAB, drafts.real)
    h, rest = np.array(chances(reach, rest, drafts.real), np.float64), np.array(rest, np.float64)
    texts = list(product(range(VOCAB), repeat=length + 1))
    target = np.array([np.prod([p[text[:i]][text[i]] for i in range(length + 1)]) for text in texts])
    found = np.zeros(len(texts))
    for row, chain in enumerate(chains):
        for n in range(len(chain.tokens) + 1):
            stays = (h[row, n] if n else 1.0) * np.prod(1 - h[row, n + 1 : len(chain.tokens) + 1])
            after = rest[row, n] / max(rest[row, n].sum(), 1e-30)
            for i, text in enumerate(texts):
                if list(text[:n]) == chain.tokens[:n]:
                    rest_of = np.prod([p[text[:j]][text[j]] for j in range(n + 1, length + 1)])
                    found[i] += chance[row] * stays * after[text[n]] * rest_of
    return found, target


@pytest.mark.parametrize("shortlist", [False, True], ids=["whole head", "shortlist"])
@pytest.mark.parametrize("own, gated", [(1, True), (2, True), (1, False), (2, False)])
def test_texts_with_copies_have_the_targets_distribution(own, gated, shortlist):
    found, target = outcome(own, gated, shortlist)
    np.testing.assert_allclose(found, target, atol=2e-6)


def test_another_q_than_certainty_is_seen():
    found, target = outcome(1, True, False, spoil=True)
    assert np.abs(found - target).max() > 1e-3
