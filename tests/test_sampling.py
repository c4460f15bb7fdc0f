"""Decisions are pure functions of arrays: tested from literals, brute force and statistics."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.config import GenerationDefaults
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.sampling import Rules, SamplingParams, accept, gumbel, sample

VOCAB = 12


def params(temperature=1.0, top_p=1.0, top_k=0, seed=0) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def distribution(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution after temperature, top-k and top-p, the slow way."""
    scaled = logits / p.temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: p.top_k or len(order)]
    weights = np.exp(scaled - scaled.max())
    total, before, chosen = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if before < p.top_p:
            chosen.append(i)
        before += weights[i] / total
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
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.7), (5, 0.8), (1, 1.0), (20, 0.5)])
def test_samples_follow_the_filtered_distribution(temperature, top_k, top_p):
    """Chi-square over 40,000 positions, p > 1e-3; every token outside the filter has count 0."""
    count = 40_000
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 1.5
    p = params(temperature, top_p, top_k, seed=123)
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
    """Settings of other rows (greedy, another top-k, none) change nothing."""
    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(4, 3, 200)).astype(np.float32))
    every = [params(0.7, 0.9, 10, 1), params(0.0), params(1.3, 1.0, 40, 2), params(1.0, 0.6, 0, 3)]
    positions = mx.array([[4, 5, 6]] * 4)
    together = sample(logits, Rules.of(every, 200), positions)
    for i, p in enumerate(every):
        alone = sample(logits[i : i + 1], Rules.of([p], 200), positions[i : i + 1])
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


def test_settings_come_from_the_folder_where_none_are_given():
    defaults = GenerationDefaults.from_dict({"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 64})
    p = SamplingParams(top_k=5).resolved(defaults)
    assert (p.temperature, p.top_p, p.top_k) == (0.7, 0.95, 5) and p.seed is not None
    greedy = SamplingParams().resolved(GenerationDefaults.from_dict({"do_sample": False, "temperature": 0.7}))
    assert greedy.temperature == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)
