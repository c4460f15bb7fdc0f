"""A trained pair against numbers recorded from transformers (record_fixtures.py): float32, no torch needed."""

import mlx.core as mx
import numpy as np
import pytest
import reference
from trained import DATA, MOE

from mlx_gemma_mtp import SamplingParams, load

CLOSE = 1e-4  # absolute, on logits up to 30


@pytest.fixture(scope="module")
def engine():
    return load(MOE / "target", MOE / "drafter", num_draft_tokens=4, dtype="float32")


@pytest.fixture(scope="module")
def greedy():
    return np.load(DATA / "greedy.npz")


def ragged(arrays, name: str) -> list[list[int]]:
    ends = np.cumsum(arrays[f"{name}_lengths"])
    return [part.tolist() for part in np.split(arrays[name], ends[:-1])]


def assert_logits(ours: np.ndarray, recorded, name: str, *index) -> None:
    """Every eighth column and the best 16, within CLOSE."""
    np.testing.assert_allclose(ours[..., ::8], recorded[name][index], atol=CLOSE, rtol=0)
    top = np.take_along_axis(ours, recorded[f"{name}_top"][index], axis=-1)
    np.testing.assert_allclose(top, recorded[f"{name}_top_logits"][index], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("chunks", [(), (16, 7)], ids=["at once", "chunks, then token by token"])
def test_logits(engine, greedy, case, chunks):
    """Prefill and decoding past the window of 128."""
    prompt, text = ragged(greedy, "prompts")[case], greedy["tokens"][case].tolist()
    ours, _, _ = reference.forward(engine.target, prompt + text, chunks)
    assert_logits(ours[len(prompt) - 4 : len(prompt)], greedy, "prefill_logits", case)
    assert_logits(ours[len(prompt) - 1 + greedy["checked"]], greedy, "logits", case)


def test_greedy_text(engine, greedy):
    params = SamplingParams(max_tokens=160, temperature=0.0, ignore_eos=True)
    results = engine.generate(ragged(greedy, "prompts"), params)
    assert [r.tokens for r in results] == greedy["tokens"].tolist()


@pytest.mark.parametrize("case", range(3))
def test_drafts(engine, greedy, case):
    """Logits and carried hidden states of four draft steps, from five places before and past the window."""
    prompt, text = ragged(greedy, "prompts")[case], greedy["tokens"][case].tolist()
    for place, known in enumerate(greedy["drafted_after"]):
        tokens, scores, carried = reference.draft_steps(engine.target, engine.drafter, prompt + text[:known], 4)
        assert tokens == greedy["draft_tokens"][case, place].tolist()
        assert_logits(np.stack([logits for logits, _ in scores]), greedy, "draft_logits", case, place)
        np.testing.assert_allclose(np.stack(carried), greedy["draft_hidden"][case, place], atol=CLOSE, rtol=0)


def test_acceptance_is_that_of_transformers(engine):
    """Assisted generation, rejected keys dropped, on the 20 marked prompts: within one point at each position.

    They come one by one: whoever joins rows that are there begins with a round without drafts, which shifts all others.
    """
    recorded = np.load(DATA / "assisted.npz")
    params = SamplingParams(max_tokens=128, temperature=0.0)
    results = [engine.generate(prompt, params, num_draft_tokens=4) for prompt in ragged(recorded, "prompts")]
    for result, tokens in zip(results, ragged(recorded, "tokens"), strict=True):
        assert result.tokens == [token for token in tokens if token not in (1, 6)]
    offered = sum(r.stats.rounds for r in results)
    kept = [sum(r.stats.kept[i] for r in results if i < len(r.stats.kept)) / offered for i in range(4)]
    for rule in ("ours", "transformers"):
        rounds = recorded[f"accepted_{rule}"]
        theirs = [(rounds > i).mean() for i in range(4)]
        np.testing.assert_allclose(kept, theirs, atol=0.01)
    assert mx.default_device() == mx.gpu or abs(offered - len(recorded["accepted_ours"])) <= 4
