"""Greedy with MTP equals plain greedy token for token on the trained pair: 50 held-out prompts, float32, near-ties
counted as near_ties.py says.

300 tokens each, past the window of 128, alone and in ragged batches of 8, draft lengths 1 to 7, with the real drafter
and with oracle drafters. `python -m pytest -m slow tests/speculative/test_equality.py` runs it all, in half an hour to
an hour; a few cells of it run always.
"""

import mlx.core as mx
import pytest
import tiny
from held_out import PROMPTS
from near_ties import NearTies

from mlx_gemma_mtp import SamplingParams, load

COUNT = 300
PARAMS = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def engine():
    return load(num_draft_tokens=4, dtype="float32")


@pytest.fixture(scope="module")
def plain(engine):
    """Plain greedy decoding of every prompt, alone; made once, on demand."""
    known: dict[str, list[int]] = {}

    def text(prompt: str) -> list[int]:
        if prompt not in known:
            known[prompt] = engine.generate(prompt, PARAMS, num_draft_tokens=0).tokens
        return known[prompt]

    return text


@pytest.fixture(scope="module")
def ties():
    return NearTies()


@slow
@pytest.mark.parametrize("num_draft", range(1, 8))
def test_alone(engine, plain, ties, num_draft):
    for prompt in PROMPTS:
        text = engine.generate(prompt, PARAMS, num_draft_tokens=num_draft).tokens
        ties.found(engine, [prompt], [plain(prompt)], [text])


@slow
@pytest.mark.parametrize("num_draft", range(8))
def test_ragged_batches_of_eight(engine, plain, ties, num_draft):
    for start in range(0, len(PROMPTS), 8):
        batch = PROMPTS[start : start + 8]
        results = engine.generate(batch, PARAMS, num_draft_tokens=num_draft)
        ties.found(engine, batch, [plain(prompt) for prompt in batch], [r.tokens for r in results])


def oracle(engine, plain, prompts: list[str], rate: float) -> tuple[list[list[int]], tiny.OracleDrafter]:
    encoded = [engine.text.encode(prompt) for prompt in prompts]
    texts = [tokens + plain(prompt) for tokens, prompt in zip(encoded, prompts, strict=True)]
    width = max(map(len, texts)) + 8
    mx.random.seed(11)
    hit = mx.random.uniform(shape=(len(texts), width)) < rate
    padded = mx.array([text + [0] * (width - len(text)) for text in texts])
    return encoded, tiny.OracleDrafter(padded, hit, engine.target.config.vocab_size)


@slow
@pytest.mark.parametrize("rate", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("num_draft", [1, 3, 7])
def test_oracle_drafters(engine, plain, ties, num_draft, rate):
    for start in range(0, len(PROMPTS), 8):
        batch = PROMPTS[start : start + 8]
        encoded, drafter = oracle(engine, plain, batch, rate)
        texts, _ = tiny.decode(engine.target, drafter, encoded, num_draft, COUNT, block=64)
        ties.found(engine, batch, [plain(prompt) for prompt in batch], texts)


def test_a_few_cells(engine, plain):
    """What always runs of the above: a prompt alone, and two in a ragged batch with a 70 % oracle, past the window."""
    assert engine.generate(PROMPTS[20], PARAMS, num_draft_tokens=6).tokens == plain(PROMPTS[20])
    encoded, drafter = oracle(engine, plain, PROMPTS[20:22], 0.7)
    texts, _ = tiny.decode(engine.target, drafter, encoded, 5, COUNT, block=64)
    assert texts == [plain(prompt) for prompt in PROMPTS[20:22]]
