"""Decisions are pure functions of arrays: tested from literals, brute force and statistics."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.sampling.distribution import Distribution, Rules, accept, logprobs, sample
from mlx_gemma_mtp.sampling.noise import gumbel, uniform
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts

VOCAB = 12


def params(temperature=1.0, top_p=1.0, top_k=-1, seed=0, **others) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, **others)


def distribution(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution after temperature, top-k, top-p and min-p, the slow way."""
    scaled = logits / p.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: p.top_k] if p.top_k > 0 else order
    weights = np.exp(scaled - scaled.max())
    total, before, chosen = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if before < p.top_p:
            chosen.append(i)
        before += weights[i] / total
    chosen = [i for i in chosen if weights[i] >= (p.min_p or 0.0) * weights[chosen[0]]]
    out = np.zeros(len(scaled))
    out[chosen] = weights[chosen] / weights[chosen].sum()
    return out


@pytest.mark.parametrize(
    "drafts, targets, kept, following",
    [
        ([[5, 6, 7]], [[5, 6, 7, 8]], [3], [8]),
        ([[5, 6, 7]], [[4, 6, 7, 8]], [0], [4]),
        ([[5, 6, 7], [1, 2, 3]], [[5, 9, 7, 8], [1, 2, 4, 3]], [1, 2], [9, 4]),
        ([[]], [[4]], [0], [4]),
    ],
)
def test_accept_keeps_the_agreeing_prefix(drafts, targets, kept, following):
    n, following_token = accept(mx.array(drafts, mx.int32).reshape(len(targets), -1), mx.array(targets))
    assert (n.tolist(), following_token.tolist()) == (kept, following)


def test_greedy_takes_the_first_of_equals_and_never_a_suppressed_token():
    logits = mx.array([[[0.0, 3.0, 3.0, 1.0]]])
    assert sample(logits, Rules.of([params(0.0)], 4), mx.array([[9]])).tolist() == [[1]]
    assert sample(logits, Rules.of([params(0.0)], 4, [1, 2]), mx.array([[9]])).tolist() == [[3]]
    ids = mx.array([[[3, 2, 1, 0]]])
    assert sample(logits, Rules.of([params(0.0)], 4, [2]), mx.array([[9]]), ids=ids).tolist() == [[1]]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [
        *((-1, 1.0, 0.0), (4, 1.0, 0.0), (-1, 0.7, 0.0), (5, 0.8, 0.0), (1, 1.0, 0.0), (20, 0.5, 0.0)),
        *((-1, 1.0, 0.2), (6, 0.9, 0.1)),
    ],
)
def test_samples_follow_the_filtered_distribution(temperature, top_k, top_p, min_p):
    """Chi-square over 40,000 positions, p > 1e-3; every token outside the filter has count 0."""
    count = 40_000
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 1.5
    p = params(temperature, top_p, top_k, seed=123, min_p=min_p)
    drawn = sample(mx.broadcast_to(mx.array(logits), (1, count, VOCAB)), Rules.of([p], VOCAB), mx.arange(count)[None])
    want = distribution(logits, p) * count
    seen = np.bincount(np.array(drawn)[0], minlength=VOCAB)
    assert seen[want == 0].sum() == 0
    cells = want > 0
    chi2 = ((seen - want)[cells] ** 2 / want[cells]).sum()
    freedom = cells.sum() - 1
    assert freedom == 0 or chi2 < freedom + 3.3 * np.sqrt(2 * freedom) + 4


def test_the_statistic_rejects_a_wrong_distribution():
    """The bound of the test above fails for samples of temperature 1 held against temperature 0.9."""
    count = 40_000
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 1.5
    rules = Rules.of([params(seed=123)], VOCAB)
    drawn = sample(mx.broadcast_to(mx.array(logits), (1, count, VOCAB)), rules, mx.arange(count)[None])
    want = distribution(logits, params(0.9)) * count
    chi2 = ((np.bincount(np.array(drawn)[0], minlength=VOCAB) - want) ** 2 / want).sum()
    assert chi2 > VOCAB - 1 + 3.3 * np.sqrt(2 * (VOCAB - 1)) + 4


def test_noise_is_a_function_of_key_position_and_token_alone():
    keys, positions = mx.array([[1, 2], [3, 4]], mx.uint32), mx.array([[7, 8, 9], [7, 8, 9]])
    whole = gumbel(keys, positions, mx.arange(50)[None, None])
    assert mx.array_equal(whole[:, 1:2, 10:20], gumbel(keys, positions[:, 1:2], mx.arange(10, 20)[None, None]))
    assert mx.array_equal(whole[1:], gumbel(keys[1:], positions[1:], mx.arange(50)[None, None]))
    flat = np.array(whole).ravel()
    assert len(np.unique(flat)) == flat.size


def test_noise_is_gumbel_and_independent():
    noise = np.array(gumbel(mx.array([[5, 6]], mx.uint32), mx.arange(400)[None], mx.arange(500)[None, None]))[0]
    uniform = np.sort(np.exp(-np.exp(-noise.ravel())))
    gap = np.abs(uniform - (np.arange(uniform.size) + 0.5) / uniform.size).max()
    assert gap < 1.95 / np.sqrt(uniform.size)  # Kolmogorov-Smirnov, p > 1e-3
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:]), (noise[:, :-4], noise[:, 4:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_rows_do_not_depend_on_their_batch():
    """Settings of other rows (greedy, another top-k, penalties, a bias) change nothing."""
    rng = np.random.default_rng(0)
    every = [params(0.7, 0.9, 10, 1), params(0.0), params(1.3, 1.0, 40, 2), params(1.0, 0.6, -1, 3)]
    every += [params(0.0, repetition_penalty=1.5), params(0.9, logit_bias={3: 4.0}, min_p=0.1)]
    every += [params(0.0, logit_bias={5: 30.0}), params(0.8, presence_penalty=2.0, frequency_penalty=-0.5)]
    count = len(every)
    logits = mx.array(rng.normal(size=(count, 3, 200)).astype(np.float32)) * 40  # far into the cap, where it makes ties
    positions = mx.array([[4, 5, 6]] * count)
    token_counts = TokenCounts.of(rng.integers(0, 200, (count, 60)).tolist(), 200)
    together = sample(logits, Rules.of(every, 200), positions, 30.0, token_counts=token_counts)
    for i, p in enumerate(every):
        of_row = token_counts.of_rows(mx.array([i]))
        alone = sample(logits[i : i + 1], Rules.of([p], 200), positions[i : i + 1], 30.0, token_counts=of_row)
        assert mx.array_equal(alone, together[i : i + 1]), i


def test_a_shortlist_is_sampled_like_the_whole():
    """Scores of a few token ids, in any order, give the token that the whole vocabulary gives if the rest is -inf."""
    rng = np.random.default_rng(2)
    ids = mx.array(rng.permutation(300)[:40])[None, None]
    scores = mx.array(rng.normal(size=(1, 1, 40)).astype(np.float32))
    whole = mx.full((1, 1, 300), -mx.inf)
    whole[0, 0, ids[0, 0]] = scores[0, 0]
    for p in (params(), params(0.8, 0.9, 7, 9), params(0.0)):
        rules = Rules.of([p], 300)
        for position in range(20):
            at = mx.array([[position]])
            assert sample(scores, rules, at, ids=ids).tolist() == sample(whole, rules, at).tolist()


def test_a_bias_is_added_after_the_cap_and_forbids():
    logits = mx.array([[[50.0, 40.0, 0.0]]])  # capped at 30: 27.95, 26.1, 0
    biased = lambda bias: sample(logits, Rules.of([params(0.0, logit_bias=bias)], 3), mx.array([[0]]), 30.0).item()  # noqa: E731
    assert (biased({1: 1.0}), biased({1: 3.0}), biased({0: -mx.inf}), biased({2: 27.0}), biased({2: 29.0})) == (
        0,
        1,
        1,
        0,
        2,
    )


def test_a_mask_forbids_at_each_position_on_its_own():
    logits = mx.array([[[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    mask = mx.array([[[0b110], [0b001]]], mx.uint32)
    for p in (params(0.0), params(0.1, seed=4)):
        assert sample(logits, Rules.of([p], 3), mx.array([[0, 1]]), mask=mask).tolist() == [[1, 0]]


def test_logprobs_are_those_of_the_model_alone():
    """Soft-capped, whatever the settings; equals come in the order of their ids."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 50)).astype(np.float32) * 20
    logits[0, 0, 7] = logits[0, 0, 3] = 60.0
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    capped = 30 * np.tanh(logits / 30)
    want = capped - np.log(np.exp(capped).sum(axis=-1, keepdims=True))
    own, best, values = (np.array(a) for a in logprobs(mx.array(logits), mx.array(tokens), 30.0, 5))
    np.testing.assert_allclose(own, np.take_along_axis(want, tokens[..., None], -1)[..., 0], atol=2e-5)
    assert (best == np.argsort(-capped, axis=-1, kind="stable")[..., :5]).all() and best[0, 0, :2].tolist() == [3, 7]
    np.testing.assert_allclose(values, np.take_along_axis(want, best, -1), atol=2e-5)
    assert [a.shape for a in logprobs(mx.array(logits), mx.array(tokens), None, 0)] == [(2, 3), (2, 3, 0), (2, 3, 0)]


ROWS = {
    "off": SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, seed=5),
    "greedy": SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, seed=5),
    "cool": SamplingParams(temperature=0.3, top_p=1.0, top_k=-1, seed=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.5, top_k=-1, seed=5),
    "nearly all": SamplingParams(temperature=1.0, top_p=1 - 1e-6, top_k=-1, seed=5),
    "top-k": SamplingParams(temperature=1.0, top_p=1.0, top_k=3, seed=5),
    "wide top-k": SamplingParams(temperature=1.0, top_p=0.9, top_k=60, seed=5),
    "min-p": SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.05, seed=5),
    "penalised": SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.5, presence_penalty=0.5, seed=5
    ),
    "biased": SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, logit_bias={3: 2.0, 4: -mx.inf}, seed=5),
}


def outcome(names: list[str], logits: mx.array) -> tuple[mx.array, list[dict[int, float]]]:
    """The tokens of rows with these settings, all from the same logits [1, T, V], and what each may say at all."""
    params, vocab = [ROWS[name] for name in names], logits.shape[-1]
    rules = Rules.of(params, vocab)
    token_counts = TokenCounts.of([[1, 2, 3]] * len(names), vocab) if rules.penalties else None
    positions = mx.broadcast_to(mx.arange(logits.shape[1]), (len(names), logits.shape[1]))
    found = Distribution.of(
        mx.broadcast_to(logits, (len(names), *logits.shape[1:])), rules, 30.0, token_counts=token_counts
    )
    allowed = []
    for row in range(len(names)):
        if found.scores is None or ROWS[names[row]].temperature == 0:
            allowed.append(None)
            continue
        scores = np.array(found.scores[row])
        columns = np.broadcast_to(np.array(found.names())[row if found.tokens is not None else 0], scores.shape)
        allowed.append([set(c[np.isfinite(s)].tolist()) for s, c in zip(scores, columns, strict=True)])
    return found.drawn(rules, positions), allowed


@pytest.mark.parametrize("one", ROWS)
def test_a_partner_changes_nothing(one):
    """Every pair of settings, in both places: the same tokens, and the same tokens to draw from, as alone.

    Logits of deviation 4 over 4,096 tokens: summed from the top, float32 makes 1 of them long before the last.
    """
    logits = 4 * mx.random.normal((1, 24, 4096), key=mx.random.key(3))
    tokens, allowed = outcome([one], logits)
    for other in ROWS:
        for place, names in enumerate([[one, other], [other, one]]):
            beside, also = outcome(names, logits)
            assert beside[place].tolist() == tokens[0].tolist(), other
            assert also[place] == allowed[0], other


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1 - 1e-6])
def test_top_p_is_exact_near_one(top_p):
    """Against float64: the smallest set of likeliest tokens with so much probability, up to what float32 rounds."""
    logits = 2 * mx.random.normal((1, 4, 50_000), key=mx.random.key(1))
    rules = Rules.of([SamplingParams(temperature=1.0, top_p=top_p, top_k=-1, seed=0)], 50_000)
    kept = np.isfinite(np.array(Distribution.of(logits, rules).scores)).sum(axis=-1)[0]
    p = np.sort(np.exp(np.array(logits, np.float64)[0]), axis=-1)[:, ::-1]
    p /= p.sum(axis=-1, keepdims=True)
    want = (np.cumsum(p, axis=-1) - p < top_p).sum(axis=-1)
    assert np.abs(kept - want).max() <= 0.002 * want.max(), (kept, want)


TIES = {
    "all equal": np.zeros((1, 3, 300), np.float32),
    "a few values": np.random.default_rng(4).integers(-3, 3, (1, 3, 300)).astype(np.float32),
    "as bf16 rounds": np.array(
        (8 * mx.random.normal((1, 3, 300), key=mx.random.key(5))).astype(mx.bfloat16).astype(mx.float32)
    ),
}


@pytest.mark.parametrize("top_k", [1, 3, 10, 64])
@pytest.mark.parametrize("name", TIES)
def test_of_equal_logits_the_lower_tokens_are_kept(name, top_k):
    """At the border of top-k, whatever top-k a partner in the batch has."""
    logits, row = TIES[name], params(1.0, top_k=top_k, seed=3)
    want = np.argsort(-logits[0], axis=-1, kind="stable")[:, :top_k]
    for partner in (None, params(0.0), params(top_k=2), params(top_k=65), params(top_p=0.9), params(min_p=0.01)):
        both = [row] if partner is None else [row, partner]
        found = Distribution.of(mx.array(np.repeat(logits, len(both), axis=0)), Rules.of(both, 300))
        tokens, scores = np.array(found.tokens[0]), np.array(found.scores[0])
        for position in range(3):
            kept = tokens[position][np.isfinite(scores[position])]
            assert kept.tolist() == want[position].tolist(), (partner, position)


@pytest.mark.parametrize("name", TIES)
def test_reported_equals_come_by_id(name):
    logits = mx.array(TIES[name])
    best = logprobs(logits, mx.zeros((1, 3), mx.int32), None, 20)[1]
    assert np.array_equal(best[0], np.argsort(-TIES[name][0], axis=-1, kind="stable")[:, :20])


@pytest.mark.parametrize("top_p, kept", [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_top_p_keeps_no_token_that_it_does_not_need(top_p, kept):
    """Four tokens of 1/4 each: their sums are exact, and the first ones reach top-p itself."""
    found = Distribution.of(mx.zeros((1, 1, 4)), Rules.of([params(top_p=top_p)], 4))
    assert np.isfinite(found.scores).sum() == kept


def test_large_noise_is_exact():
    """Of a million draws the largest come from the smallest u, where 1 - u would have rounded most of it away."""
    keys, positions, tokens = mx.array([[5, 6]], mx.uint32), mx.arange(1000)[None], mx.arange(1000)[None, None]
    u = np.array(uniform(keys, positions, tokens), np.float64).ravel()
    noise = np.array(gumbel(keys, positions, tokens)).ravel()
    largest = np.argsort(u)[:20]
    assert u[largest].max() < 1e-4
    np.testing.assert_allclose(noise[largest], -np.log(-np.log1p(-u[largest])), rtol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [{"logit_bias": {0: 3.0}}, {"repetition_penalty": 4.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}],
    ids=lambda changed: next(iter(changed)),
)
def test_greedy_rows_follow_what_reorders_their_own_logits_alone(changed):
    """A bias or a penalty changes its row's likeliest token; a partner's row keeps its own, though the cap ties it."""
    logits = mx.array([[[70.0, 500.0, 600.0, 0.0]]])  # capped at 30: 29.4, and 1 and 2 are equal
    counts = TokenCounts.of([[1, 2]], 4).followed_by(mx.array([1])).followed_by(mx.array([2]))

    def likeliest(*rows: SamplingParams) -> list[int]:
        same = mx.array([0] * len(rows))
        rules = Rules.of(rows, 4)
        return Distribution.of(logits[same], rules, 30.0, token_counts=counts.of_rows(same)).best[:, 0].tolist()

    mine, plain = params(0.0, **changed), params(0.0)
    assert likeliest(mine) == [0] and likeliest(plain) == [2]
    assert likeliest(mine, plain) == [0, 2] and likeliest(plain, mine, params(1.0))[:2] == [2, 0]
