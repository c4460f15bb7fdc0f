"""Several samples of one prompt: the texts of their seeds, in order, however they are asked for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from schedules import SAMPLED, engine_of

from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.sampling.params import MAX_SEED

PARAMS = replace(SAMPLED, max_tokens=24)
PROMPTS = ["def f(x):", "class A:"]


@pytest.fixture(scope="module")
def engine():
    return engine_of("bundled")


@pytest.fixture(scope="module")
def texts(engine) -> list[list[list[int]]]:
    """The tokens of each prompt with each seed, one call after another."""
    seeds = range(PARAMS.seed, PARAMS.seed + 3)
    return [[engine.generate(each, replace(PARAMS, seed=seed)).tokens for seed in seeds] for each in PROMPTS]


def test_samples_are_the_texts_of_their_seeds(engine, texts):
    one = engine.generate(PROMPTS[0], PARAMS, n=3)
    assert [each.tokens for each in one] == texts[0] and len({tuple(each) for each in texts[0]}) == 3
    assert [each.stats.seed for each in one] == [5, 6, 7]
    several = engine.generate(PROMPTS, PARAMS, n=3)
    assert [[each.tokens for each in of_one] for of_one in several] == texts
    assert engine.generate(PROMPTS[:1], PARAMS, n=2)[0][1].tokens == texts[0][1]
    assert engine.generate(PROMPTS[0], PARAMS, n=1).tokens == texts[0][0]
    assert [each.tokens for each in engine.generate(PROMPTS, PARAMS, n=np.int64(1))] == [texts[0][0], texts[1][0]]


def test_each_prompt_has_its_own_settings(engine, texts):
    results = engine.generate(PROMPTS, [PARAMS, replace(PARAMS, seed=6)], n=2)
    assert [[each.tokens for each in of_one] for of_one in results] == [texts[0][:2], texts[1][1:]]


def test_chunks_are_numbered_prompt_by_prompt(engine, texts):
    made: dict[int, list[int]] = {}
    for chunk in engine.stream(PROMPTS, PARAMS, n=3):
        made.setdefault(chunk.index, []).extend(chunk.tokens)
    assert [made[i] for i in range(6)] == [*texts[0], *texts[1]]


def test_coroutines_get_the_same(engine, texts):
    async def both():
        results = await engine.agenerate(PROMPTS[0], PARAMS, n=3)
        indices = {chunk.index async for chunk in engine.astream(PROMPTS[0], PARAMS, n=3)}
        return [each.tokens for each in results], indices

    assert asyncio.run(both()) == (texts[0], {0, 1, 2})


def test_without_a_seed_each_has_a_fresh_one(engine):
    results = engine.generate(PROMPTS[0], replace(PARAMS, seed=None), n=4)
    assert len({each.stats.seed for each in results}) == 4


def test_seeds_go_on_from_0_beyond_the_largest(engine):
    first, second = engine.generate(PROMPTS[0], replace(PARAMS, seed=MAX_SEED), n=2)
    assert (first.stats.seed, second.stats.seed) == (MAX_SEED, 0)


def test_samples_of_grammars_know_nothing_of_each_other(engine):
    pytest.importorskip("llguidance")
    params = replace(PARAMS, regex="[ab]{4}[0-9]{3}", ignore_eos=False)
    results = engine.generate(PROMPTS[0], params, n=4)
    alone = [engine.generate(PROMPTS[0], replace(params, seed=5 + i)).text for i in range(4)]
    assert [each.text for each in results] == alone and len(set(alone)) > 1


@pytest.mark.parametrize("n", [0, -1, 1001, 1.5, True, "2", None])
def test_other_numbers_are_named(engine, n):
    with pytest.raises(UserError) as raised:
        engine.generate(PROMPTS[0], PARAMS, n=n)
    assert str(raised.value).startswith("n is ") and "expected" in str(raised.value)
