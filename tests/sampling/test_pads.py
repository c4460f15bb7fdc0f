"""Rows of one batch with fewer drafts than others: what lies behind a row's real drafts changes nothing."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.sampling import rejection
from mlx_gemma_mtp.sampling.distribution import Distribution, Rules, accept
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.sampling.rejection import chances, residuals

VOCAB, DRAFTS, FIRST = 4, 3, 2
SAMPLED = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, seed=0)
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, seed=0)
FILTERED = SamplingParams(temperature=0.8, top_k=3, top_p=0.9, seed=0)
RNG = np.random.default_rng(4)
TARGET = RNG.normal(size=(VOCAB, VOCAB)).astype(np.float32)  # logits after each token
DRAFTER = RNG.normal(size=(VOCAB, VOCAB)).astype(np.float32) * 2


def test_a_pad_is_not_kept_though_it_is_right():
    drafts, targets = mx.array([[5, 6, 7]] * 4), mx.array([[5, 6, 7, 8]] * 4)
    kept, newest = accept(drafts, targets, mx.array([0, 1, 2, 3]))
    assert kept.tolist() == [0, 1, 2, 3] and newest.tolist() == [5, 6, 7, 8]
    kept, newest = accept(mx.array([[5, 0, 7]] * 2), targets[:2], mx.array([2, 0]))
    assert kept.tolist() == [1, 0] and newest.tolist() == [6, 5]


def blocks(real: int, params: SamplingParams) -> tuple[np.ndarray, Distribution, Distribution, mx.array]:
    """Every block of `real` drafts with whatever pads behind it, the distributions along it, q and p, and how many
    drafts are real.
    """
    drafts = np.array(list(itertools.product(range(VOCAB), repeat=real)), int).reshape(VOCAB**real, real)
    pads = np.random.default_rng(real).integers(0, VOCAB, (len(drafts), DRAFTS - real))
    drafts = np.concatenate([drafts, pads], axis=1)
    before = np.concatenate([np.full((len(drafts), 1), FIRST), drafts], axis=1)
    rules = Rules.of([params] * len(drafts), VOCAB)
    q = Distribution.of(mx.array(DRAFTER[before[:, :-1]]), rules)
    p = Distribution.of(mx.array(TARGET[before]), rules)
    return drafts, q, p, mx.full((len(drafts),), real)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """[VOCAB, VOCAB]: of each token after each."""
    d = Distribution.of(mx.array(logits)[:, None], Rules.of([params] * VOCAB, VOCAB))
    return np.array(d.at(None, VOCAB), np.float64)[:, 0]


@pytest.mark.parametrize("params", [SAMPLED, FILTERED], ids=["whole", "filtered"])
@pytest.mark.parametrize("real", range(DRAFTS + 1))
def test_rejection_with_fewer_real_drafts_is_exact(real, params):
    """By enumeration: over all drafts, all numbers of them that stay and all tokens behind these, the next real + 1
    tokens have the target's joint distribution.
    """
    drafts, q, p, count = blocks(real, params)
    reach, rest = residuals(mx.array(drafts), q, p, VOCAB, count)
    h = np.array(chances(reach, rest, count), np.float64)
    names = np.broadcast_to(np.array(p.names()), rest.shape)
    after = np.zeros((*rest.shape[:2], VOCAB))
    np.put_along_axis(after, names, np.array(rest, np.float64), axis=-1)
    after /= np.maximum(after.sum(axis=-1, keepdims=True), 1e-30)
    target, drafter = probabilities(TARGET, params), probabilities(DRAFTER, params)
    got = dict.fromkeys(itertools.product(range(VOCAB), repeat=real + 1), 0.0)
    for row, block in enumerate(drafts):
        before = [FIRST, *block]
        drawn = np.prod([drafter[before[i], block[i]] for i in range(real)])
        for n in range(DRAFTS + 1):
            chance = drawn * h[row, n] * np.prod(1 - h[row, n + 1 :])
            assert n <= real or chance == 0
            for rest_of in itertools.product(range(VOCAB), repeat=max(real + 1 - n, 0)):
                then = after[row, n, rest_of[0]] if rest_of else 0.0
                text = (*block[:n], *rest_of)
                then *= np.prod([target[text[i - 1], text[i]] for i in range(n + 1, real + 1)])
                if chance:
                    got[text] += chance * then
    for text, chance in got.items():
        want = np.prod([target[a, b] for a, b in zip((FIRST, *text), text, strict=False)])
        assert chance == pytest.approx(want, abs=3e-6), text


@pytest.mark.parametrize("luck, stay", [(2.0**-33, [0, 1, 3]), (1.0, [0, 0, 0])])
def test_rejection_keeps_no_pad(luck, stay, monkeypatch):
    """With all luck every real draft stays, without any none does; a row without drafts draws as plain decoding."""
    rules = Rules.of([SAMPLED] * 3, VOCAB)
    logits = mx.broadcast_to(mx.array(TARGET)[FIRST], (3, DRAFTS + 1, VOCAB))
    p, q = (Distribution.of(each, rules) for each in (logits, logits[:, :DRAFTS] * 0.5))
    positions = mx.broadcast_to(mx.arange(9, 9 + DRAFTS + 1), (3, DRAFTS + 1))
    monkeypatch.setattr(rejection, "uniform", lambda keys, positions, tokens: mx.full((3, DRAFTS + 1, 1), luck))
    unlikely = mx.argmin(p.scores[0, 0] - q.scores[0, 0]).item()  # what q would say too often
    drafts = mx.full((3, DRAFTS), unlikely)
    tokens, kept, newest = rejection.accept(drafts, q, p, rules, positions, mx.array([0, 1, 3]))
    assert kept.tolist() == stay
    assert newest.tolist() == [tokens[row, n].item() for row, n in enumerate(stay)]
    assert newest[0].item() == p.drawn(rules, positions)[0, 0].item()


def test_greedy_rows_keep_their_real_drafts_where_others_are_sampled():
    rules = Rules.of([GREEDY, GREEDY, SAMPLED], VOCAB)
    logits = mx.broadcast_to(mx.array(TARGET)[FIRST], (3, DRAFTS + 1, VOCAB))
    p, q = (Distribution.of(each, rules) for each in (logits, logits[:, :DRAFTS]))
    drafts, positions = mx.full((3, DRAFTS), p.best[0, 0].item()), mx.zeros((3, DRAFTS + 1), mx.int32)
    assert rejection.accept(drafts, q, p, rules, positions, mx.array([2, 0, 0]))[1].tolist() == [2, 0, 0]


@pytest.mark.parametrize("texts", [[[3, 2, 3], [5, 5]], [[], [8, 6, 8, 5]], [[], []]])
def test_counts_of_a_text_are_those_that_followed_it(texts):
    """A row that comes back, or joins after its first token, counts as one that was here all the time."""
    prompts = [[1, 2, 2], [5]]
    after = TokenCounts.of(prompts, 9)
    for i in range(max(map(len, texts))):
        here = mx.array([int(i < len(text)) for text in texts])
        after = after.followed_by(mx.array([text[i] if i < len(text) else 0 for text in texts]), here)
    counts = TokenCounts.of(prompts, 9, texts)
    for got, want in zip(counts.among(None), after.among(None), strict=True):
        assert mx.array_equal(got, want)
    listed = [[token for token in row if token >= 0] for row in after.tokens.tolist()]
    assert [[token for token in row if token >= 0] for row in counts.tokens.tolist()] == listed
    assert counts.places == max(map(len, listed))
