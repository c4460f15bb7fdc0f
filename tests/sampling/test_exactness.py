"""Sampling is exact: the joint distribution of some tokens through the real loop, against enumeration.

A toy target (the next token's logits depend on the last token) with a good, a bad and an adversarial drafter: 60,000
rows, 200,000 in the slow tests, one seed each, three drafts a round; chi-square, p > 1e-3. Coupled sampling says the
same with any drafter; rejection says something else with each, so each is held against enumeration.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from test_sampling import distribution

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.sampling import rejection
from mlx_gemma_mtp.sampling.distribution import Rules, accept
from mlx_gemma_mtp.sampling.noise import uniform
from mlx_gemma_mtp.sampling.params import COUPLED, REJECTION, SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.sampling.rejection import residuals
from mlx_gemma_mtp.speculative import drafting, rounds
from mlx_gemma_mtp.speculative.drafting import MTP, Drafting
from mlx_gemma_mtp.speculative.guide import guide, only
from mlx_gemma_mtp.speculative.loop import Joiner, Speculation

VOCAB, ROWS, FEWER, SOME, FIRST = 5, 200_000, 60_000, 20_000, 2
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


class Lengths(Cache):
    """Rows without keys and values, after one token each."""

    def __init__(self, rows: int):
        super().__init__((), 8, mx.float32)
        super().arrange([Saved(1, ())])  # one stands for all
        self.lengths, self.length_bound = mx.ones((rows,), mx.int32), [1] * rows
        self._written = self._settled = [1] * rows

    def span(self, tokens: int) -> Span:
        return Span(self, tokens)

    def arrange(self, places: Sequence[int | Saved]) -> None:
        old = self.length_bound
        self.length_bound = [each.tokens if isinstance(each, Saved) else old[each] for each in places]
        self.lengths = mx.array(self.length_bound)
        self._written = self._settled = self.length_bound


class ToyDrafter:
    def __init__(self, table: np.ndarray):
        self.table, self.ropes, self.masked_embedding = mx.array(table), self, None

    def tables(self, positions):
        return {}

    def __call__(self, embedded, hidden, span, rotations):
        return embedded, hidden

    def scores(self, tokens):
        return self.table[tokens], None


def draw(
    drafter: np.ndarray,
    params: SamplingParams,
    count: int = ROWS,
    accept: str = COUPLED,
    drafts: Sequence[int | Sequence[int]] = (3,),
    **settings,
) -> tuple[np.ndarray, float]:
    """Three tokens of `count` rows, [count, 3]; drafts kept in the first round. drafts: of the rounds, in turn, for all
    rows, or one for each; length: tokens instead of three; settings: of Speculation.begin.
    """
    length, drafts = settings.pop("length", 3), map(partial(spread, count), itertools.cycle(drafts))
    loop = Speculation(
        ToyTarget(),
        ToyDrafter(drafter),
        Lengths(count),
        Drafting(temperature=settings.pop("draft_temperature", 1.0), accept=accept, sources=MTP),
    )
    rules = with_seeds(Rules.of([params], VOCAB), np.arange(count))
    loop.begin(mx.full((count, 1), FIRST), rules, **settings)
    texts = loop.step(next(drafts)).tokens
    first = loop.step(next(drafts)).tokens
    for text, more in zip(texts, first, strict=True):
        text += more
    while min(map(len, texts)) < length:
        for text, more in zip(texts, loop.step(next(drafts)).tokens, strict=True):
            text += more
    return np.array([text[:length] for text in texts]), float(np.mean([len(row) - 1 for row in first]))


def with_seeds(rules: Rules, seeds: np.ndarray) -> Rules:
    """Rules of one row as those of many, each with its own seed."""
    rows = lambda value: mx.broadcast_to(value, (len(seeds), *value.shape[1:]))  # noqa: E731
    names = ("temperature", "top_k", "rest", "min_p", "greedy", "free", "open")
    each = {name: rows(value) for name in names if (value := getattr(rules, name)) is not None}
    keys = np.stack([seeds, np.full(len(seeds), 77)], axis=1).astype(np.uint32)
    return replace(rules, **each, keys=mx.array(keys))


def spread(count: int, drafts: int | Sequence[int]) -> list[int]:
    """The drafts of each row; those that are given one by one come again and again."""
    return [drafts] * count if isinstance(drafts, int) else list(itertools.islice(itertools.cycle(drafts), count))


def joint(params: SamplingParams, length: int, table: np.ndarray = TABLE) -> np.ndarray:
    """The probability of each text of this length, the first token's digit first."""
    rows = np.array([distribution(row, params) for row in table])
    chances = rows[FIRST]
    for _ in range(length - 1):
        chances = (chances.reshape(-1, VOCAB, 1) * rows).ravel()
    return chances


def deviation(drawn: np.ndarray, params: SamplingParams, table: np.ndarray = TABLE) -> float:
    """Standard deviations of the chi-square statistic (Wilson and Hilferty); 3.09 is p = 1e-3. Infinite for a token
    outside the filter.
    """
    return chi_square(joint(params, drawn.shape[1], table), drawn)


def chi_square(joint: np.ndarray, drawn: np.ndarray) -> float:
    """See `deviation`; joint: [VOCAB ** length]."""
    count, length = drawn.shape
    want = joint * count
    seen = np.bincount(drawn @ VOCAB ** np.arange(length)[::-1], minlength=VOCAB**length)
    if seen[want == 0].any():
        return np.inf
    large = want >= 5
    want, seen = np.append(want[large], want[~large].sum()), np.append(seen[large], seen[~large].sum())
    want, seen = want[want > 0], seen[want > 0]
    freedom = len(want) - 1
    chi2 = ((seen - want) ** 2 / want).sum()
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize("count", [FEWER, pytest.param(ROWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}")
def test_joint_distribution_with_any_drafter(params, count):
    drawn, good = draw(DRAFTERS["good"], params, count)
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

    def lenient(drafts, targets, real):
        return accept(mx.where(mx.abs(drafts - targets[:, :-1]) <= 1, targets[:, :-1], drafts), targets, real)

    monkeypatch.setattr(rounds, "accept", lenient)
    assert deviation(draw(DRAFTERS["bad"], params, FEWER)[0], params) > 3.09


UNEVEN = ((3, 0, 1, 2), (0, 3, 3, 1), (2, 2, 0, 0, 3))  # of each row, so that most have pads
SCHEDULES = ((3,), (1,), (5,), (1, 3, 0, 2), UNEVEN)  # of drafts, round by round


@pytest.mark.parametrize(
    "index", range(len(SETTINGS)), ids=lambda i: f"T{SETTINGS[i].temperature}-k{SETTINGS[i].top_k}"
)
def test_joint_distribution_by_rejection(index):
    """Four tokens, so that most texts draft a position again after a refusal. The slow test has all combinations."""
    drafter, schedule = list(DRAFTERS.values())[index % 3], SCHEDULES[index % 5]
    factor = 1.0 + 0.3 * (index % 2)
    drawn, _ = draw(drafter, SETTINGS[index], 2 * SOME, REJECTION, schedule, length=4, draft_temperature=factor)
    assert deviation(drawn, SETTINGS[index]) < 3.09


@pytest.mark.slow
@pytest.mark.parametrize("params", SETTINGS, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", DRAFTERS)
def test_joint_distribution_by_rejection_everywhere(params, schedule, name):
    drawn, _ = draw(DRAFTERS[name], params, ROWS, REJECTION, schedule, draft_temperature=1.3)
    assert deviation(drawn, params) < 3.09


@pytest.mark.parametrize("params", SETTINGS[4:6], ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}")
@pytest.mark.parametrize("name", ["good", "bad"])
def test_joint_distribution_by_rejection_of_rows_that_join(name, params):
    """Rows whose partners come after their drafts were made, and these partners, which have none at first."""
    half = SOME // 2
    rules = with_seeds(Rules.of([params], VOCAB), np.arange(2 * half))
    loop = Speculation(ToyTarget(), ToyDrafter(DRAFTERS[name]), Lengths(half), Drafting(accept=REJECTION, sources=MTP))
    loop.begin(mx.full((half, 1), FIRST), rules.of_rows(slice(0, half)))
    texts = loop.step(spread(half, (3, 1, 2))).tokens
    joiners = [Joiner(Saved(0, ()), FIRST)] * half
    loop.arrange([*joiners, *range(half)], rules.of_rows(mx.concatenate([mx.arange(half, 2 * half), mx.arange(half)])))
    texts = [[] for _ in joiners] + texts
    for drafts in ((2, 3, 0), (3, 1), (1, 3), (3,), (3,)):
        for text, more in zip(texts, loop.step(spread(2 * half, drafts)).tokens, strict=True):
            text += more
    drawn = np.array([text[:3] for text in texts])
    assert deviation(drawn[:half], params) < 3.09 and deviation(drawn[half:], params) < 3.09


def _target_alone(drafts, q, p, vocab, real):
    """What follows refused drafts is drawn from p, not from the residual."""
    reach, rest = residuals(drafts, q, p, vocab, real)
    plain = mx.broadcast_to(mx.softmax(p.scores, axis=-1), rest.shape)
    return reach, plain * rest.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "owner, name, broken",
    [
        (rejection, "residuals", _target_alone),
        (
            rejection,
            "chances",
            lambda reach, rest, real: reach,
        ),  # each draft by itself: what block verification must not do
        (drafting, "keys_of_round", lambda keys, first: keys ^ 1),  # drafts meet the noise of refused ones again
        (drafting, "keys_of_round", lambda keys, first: keys),  # and that of the token after them
        (rejection, "uniform", lambda keys, positions, tokens: uniform(keys, positions, tokens * 0 + VOCAB)),
    ],
    ids=["no residual", "no block", "noise of another round", "noise of the residual", "luck of another round"],
)
def test_a_broken_rejection_is_rejected(owner, name, broken, monkeypatch):
    monkeypatch.setattr(owner, name, broken)
    params = SETTINGS[6]
    assert deviation(draw(DRAFTERS["bad"], params, FEWER, REJECTION, length=4)[0], params) > 3.09


def test_penalties_by_rejection():
    """They follow the drafts of each position, and what was emitted."""
    params = replace(SETTINGS[4], frequency_penalty=1.5, presence_penalty=-0.5)
    token_counts = TokenCounts.of([[FIRST]] * SOME, VOCAB)
    drawn, _ = draw(DRAFTERS["bad"], params, SOME, REJECTION, token_counts=token_counts)
    chances = []
    for text in itertools.product(range(VOCAB), repeat=3):
        chance, last = 1.0, FIRST
        for i, token in enumerate(text):
            counts = np.bincount(text[:i], minlength=VOCAB)
            chance *= distribution(TABLE[last] - 1.5 * counts + 0.5 * (counts > 0), params)[token]
            last = token
        chances.append(chance)
    assert chi_square(np.array(chances), drawn) < 3.09


class Never:
    """A constraint: this token may never be said."""

    def __init__(self, token: int):
        self.token = token

    def copy(self):
        return self

    def mask(self):
        return only([t for t in range(VOCAB) if t != self.token], VOCAB)

    def advance(self, token):
        assert token != self.token


def test_constraints_by_rejection():
    """Drafts that a constraint refuses are not cut: what follows them has to come from the residual."""
    params, count = SETTINGS[4], SOME // 2
    drawn, _ = draw(DRAFTERS["bad"], params, count, REJECTION, guide=guide([Never(1)] * count, VOCAB))
    masked = np.where(np.arange(VOCAB) == 1, -np.inf, TABLE)
    assert deviation(drawn, params, masked) < 3.09
