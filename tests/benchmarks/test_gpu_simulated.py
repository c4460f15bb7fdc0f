"""Drafts at a stated rate: that many are kept, and the text is plain's."""

import math
from dataclasses import replace

import pytest

from benchmarks.gpu.simulated import NAME, Kept, Script
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.cli.prompts import PROMPTS
from mlx_gemma_mtp.speculative import drafting

BASE = SamplingParams(max_tokens=64, ignore_eos=True, seed=3, top_k=-1, top_p=1.0)


@pytest.fixture(scope="module")
def scripted():
    """(engine, its script)."""
    script = Script()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(drafting.SOURCES, NAME, None)  # and out again behind the tests
        script.enter()
        with load(draft_sources=NAME, num_draft_tokens=0, max_rows=4) as engine:
            script.engine = engine
            yield engine, script


EVERY = [(temperature, rate) for temperature in (0.0, 1000.0) for rate in (0.0, 0.6, 0.7, 0.8, 0.9, 1.0)]
FEW = [(0.0, 0.8), (1000.0, 0.6)]


@pytest.mark.parametrize(
    "temperature, rate", [pytest.param(*each, marks=() if each in FEW else pytest.mark.slow) for each in EVERY]
)
def test_the_rate_is_what_was_stated_and_the_text_is_plain(scripted, temperature, rate):
    engine, script = scripted
    params = replace(BASE, temperature=temperature)
    prompts = [engine.text.encode(prompt) for prompt in PROMPTS[:4]]
    plain = [result.tokens for result in engine.generate(prompts, params, num_draft_tokens=0)]
    script.tell(prompts, plain, rate)
    kept, texts = Kept(), {}
    for chunk in engine.stream(prompts, params, num_draft_tokens=4):
        if chunk.result is None:
            kept.count(chunk.drafted, chunk.accepted)
        else:
            texts[chunk.index] = chunk.result.tokens
    assert [texts[row] for row in range(4)] == plain
    assert kept.looked > 60
    assert abs(kept.rate - rate) <= 4 * math.sqrt(rate * (1 - rate) / kept.looked)


def test_rows_that_nobody_told_of_have_the_drafters_drafts(scripted):
    """Which this trained drafter is often right about."""
    engine, script = scripted
    params, prompt = replace(BASE, temperature=0.0, max_tokens=24), engine.text.encode(PROMPTS[5])
    plain, told = [], []
    script.tell([], [], 0.0)
    for drafts, results in ((0, plain), (2, told)):
        results.append(engine.generate(prompt, params, num_draft_tokens=drafts))
    assert told[0].tokens == plain[0].tokens and told[0].stats.accepted > 0


def test_looked_at_are_those_up_to_the_first_refused():
    kept = Kept()
    for drafted, accepted in ((4, 4), (4, 0), (4, 2), (0, 0)):
        kept.count(drafted, accepted)
    assert (kept.looked, kept.kept, kept.rate) == (4 + 1 + 3, 6, 0.75)
    assert Kept().rate is None
