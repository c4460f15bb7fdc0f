"""Penalties are a pure function of the tokens before, for every draft position: against a loop over tokens."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.sampling.penalties import Penalties, TokenCounts

VOCAB = 9
PROMPTS = [[1, 2, 2], [5]]
TEXTS = [[3, 2], [5, 5]]
EVERY = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25),
    SamplingParams(repetition_penalty=0.8, frequency_penalty=-0.5),
]


def slow(logits: np.ndarray, prompt: list[int], text: list[int], p: SamplingParams) -> np.ndarray:
    out = logits.copy()
    for token in range(len(out)):
        if token in prompt or token in text:
            out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
        out[token] -= p.presence_penalty * (token in text) + p.frequency_penalty * text.count(token)
    return out


@pytest.fixture
def token_counts() -> TokenCounts:
    token_counts = TokenCounts.of(PROMPTS, VOCAB)
    for column in zip(*TEXTS, strict=True):
        token_counts = token_counts.followed_by(mx.array(column))
    return token_counts


def test_each_draft_counts_for_the_positions_after_it(token_counts):
    drafts = [[3, 1, 8], [5, 0, 0]]
    logits = np.random.default_rng(0).normal(size=(2, 4, VOCAB)).astype(np.float32) * 3
    ours = Penalties.of(EVERY).apply(mx.array(logits), *token_counts.at_each(mx.array(drafts)).among(None))
    for row in range(2):
        for i in range(4):
            want = slow(logits[row, i], PROMPTS[row], TEXTS[row] + drafts[row][:i], EVERY[row])
            np.testing.assert_allclose(np.array(ours[row, i]), want, rtol=1e-6)


def test_a_shortlist_has_the_penalties_of_its_tokens(token_counts):
    ids = mx.array([[[7, 2, 3]], [[0, 5, 1]]])
    logits = np.random.default_rng(1).normal(size=(2, 1, 3)).astype(np.float32)
    ours = Penalties.of(EVERY).apply(mx.array(logits), *token_counts.among(ids))
    for row in range(2):
        whole = np.zeros(VOCAB, np.float32)
        whole[np.array(ids[row, 0])] = logits[row, 0]
        want = slow(whole, PROMPTS[row], TEXTS[row], EVERY[row])[np.array(ids[row, 0])]
        np.testing.assert_allclose(np.array(ours[row, 0]), want, rtol=1e-6)


def test_only_what_was_emitted_is_said(token_counts):
    after = token_counts.after(mx.array([[4, 4, 6], [7, 8, 8]]), mx.array([2, 1]))
    assert np.array(after.among(None)[1][:, 0]).tolist() == [[0, 0, 1, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2, 0, 1, 0]]
    kept = after.of_rows(mx.array([1]))
    prompt, text = kept.among(None)
    assert text[0, 0, 5].item() == 2 and prompt[0, 0].tolist() == [i == 5 for i in range(VOCAB)]


def test_no_penalties_cost_nothing():
    assert Penalties.of([SamplingParams(logit_bias={1: 1.0}, min_p=0.1)] * 2) is None
