"""Sampling is exact: the joint distribution of three tokens through the real loop, against enumeration.

A toy target (the next token's logits depend on the last token) with a good, a bad and an adversarial drafter: 200,000
rows, one seed each, three drafts a round; chi-square, p > 1e-3.
"""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_sampling import distribution

from mlx_gemma_mtp import speculative
from mlx_gemma_mtp.cache import Cache
from mlx_gemma_mtp.drafter import drawn
from mlx_gemma_mtp.params import SamplingParams
from mlx_gemma_mtp.sampling import Rules, accept
from mlx_gemma_mtp.speculative import Speculation

VOCAB, ROWS, SOME, FIRST = 5, 200_000, 20_000, 2
TABLE = np.random.default_rng(5).normal(size=(VOCAB, VOCAB)).astype(np.float32) * 0.7
DRAFTERS = {
    "good": TABLE + np.random.default_rng(6).normal(size=TABLE.shape).astype(np.float32) * 0.3,
    "bad": np.random.default_rng(7).normal(size=TABLE.shape).astype(np.float32) * 2,
    "adversarial": -3 * TABLE,  # sure of what the target thinks least likely
}
SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=0)
    for temperature in (0.3, 0.7, 1.0, 1.5)
    for top_k, top_p in ((-1, 1.0), (3, 0.8))
]


class ToyTarget:
    """Hidden states are the tokens themselves; logits are rows of a table."""

    class config:
        softcap = None

    def embed(self, tokens):
        return tokens

    def __call__(self, tokens, span):
        return tokens[..., None]

    def logits(self, hidden):
        return mx.array(TABLE)[hidden[..., 0]]


class NoCache(Cache):
    """Lengths alone."""

    def reserve(self, tokens):
        pass


class ToyDrafter:
    def __init__(self, table: np.ndarray):
        self.table, self.ropes = mx.array(table), self

    def at(self, positions):
        return {}

    def __call__(self, embedded, hidden, span, rotations):
        return embedded, hidden

    def pick(self, tokens, rules, positions, said, confident):
        return drawn(self.table[tokens], None, rules, positions, said), None


def draw(drafter: np.ndarray, params: SamplingParams, count: int = ROWS) -> tuple[np.ndarray, float]:
    """Three tokens of `count` rows, [count, 3]; drafts kept a round."""
    cache = NoCache((), count, 1, 4, mx.float32)
    cache.commit(slice(0, count), mx.ones((count,), mx.int32))
    seeds = np.stack([np.arange(count), np.full(count, 77)], axis=1).astype(np.uint32)
    rows = lambda value: mx.broadcast_to(value, (count, *value.shape[1:]))  # noqa: E731
    rules = Rules.of([params], VOCAB)
    each = {name: rows(getattr(rules, name)) for name in ("temperature", "top_k", "top_p", "min_p", "greedy")}
    loop = Speculation(
        ToyTarget(),
        ToyDrafter(drafter),
        cache,
        replace(rules, **each, keys=mx.array(seeds)),
        mx.full((count, 1), FIRST),
    )
    texts = loop.start(3, 1).tokens
    first = loop.step(3).tokens
    for text, more in zip(texts, first, strict=True):
        text += more
    while min(map(len, texts)) < 3:
        for text, more in zip(texts, loop.step(3).tokens, strict=True):
            text += more
    return np.array([text[:3] for text in texts]), float(np.mean([len(row) - 1 for row in first]))


def deviation(drawn: np.ndarray, params: SamplingParams) -> float:
    """Standard deviations of the chi-square statistic (Wilson and Hilferty); 3.09 is p = 1e-3. Infinite for a token
    outside the filter.
    """
    rows = [distribution(row, params) for row in TABLE]
    joint = [rows[FIRST][a] * rows[a][b] * rows[b][c] for a, b, c in itertools.product(range(VOCAB), repeat=3)]
    want = np.array(joint) * ROWS
    seen = np.bincount(drawn @ [VOCAB**2, VOCAB, 1], minlength=VOCAB**3)
    if seen[want == 0].any():
        return np.inf
    large = want >= 5
    want, seen = np.append(want[large], want[~large].sum()), np.append(seen[large], seen[~large].sum())
    want, seen = want[want > 0], seen[want > 0]
    freedom = len(want) - 1
    chi2 = ((seen - want) ** 2 / want).sum()
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}")
def test_joint_distribution_with_any_drafter(params):
    drawn, good = draw(DRAFTERS["good"], params)
    assert deviation(drawn, params) < 3.09
    kept = []
    for name in ("bad", "adversarial"):  # stronger than a statistic: the very same tokens
        same, share = draw(DRAFTERS[name], params, SOME)
        assert np.array_equal(same, drawn[:SOME]), name
        kept.append(share)
    assert good > 3 * max(kept)


@pytest.mark.parametrize("params", SETTINGS[2:4], ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}")
def test_a_broken_rule_is_rejected(params, monkeypatch):
    """Drafts that are kept where they are next to the target's token: what follows them has the wrong condition."""

    def lenient(drafts, targets):
        return accept(mx.where(mx.abs(drafts - targets[:, :-1]) <= 1, targets[:, :-1], drafts), targets)

    monkeypatch.setattr(speculative, "accept", lenient)
    assert deviation(draw(DRAFTERS["bad"], params)[0], params) > 3.09
