"""Prompts in caches of their own: whatever the chunks and the company, states and K/V are those of each alone."""

from unittest.mock import Mock

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_gemma_mtp.cache.cache import Cache, Span
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.speculative.prefill import batch, chunk, prefill

KINDS = ("moe", "dense", "e2b", "e4b")


def whole(model: Gemma4, prompt: list[int]) -> tuple[np.ndarray, Cache]:
    """The hidden state of a prompt's last token in one forward of all its tokens, [H], and its cache."""
    cache = Cache(model.config.kv, len(prompt), mx.float32).open(len(prompt))
    hidden = model(mx.array([prompt]), cache.span(len(prompt)))
    cache.commit(mx.array([len(prompt)]), [len(prompt)])
    return np.array(hidden)[0, -1], cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [5, 16, 64])
def test_prompts_of_one_forward_are_prefilled_as_alone(kind, size):
    model, prompts = tiny.target(kind), tiny.prompts(8)
    done: list[int] = []
    caches, hidden = prefill(model, prompts, size, lookback=1, progress=done.append)
    assert done == [min(n, 41) for n in range(size, 41 + size, size)]
    for cache, state, prompt in zip(caches, hidden, prompts, strict=True):
        want, own = whole(model, prompt)
        np.testing.assert_allclose(np.array(state), want, atol=3e-4)
        assert cache.length_bound == cache.lengths.tolist() == [len(prompt)]
        for (keys, values), (own_keys, own_values) in zip(cache.save(0).layers, own.save(0).layers, strict=True):
            count = own_keys.shape[2]
            np.testing.assert_allclose(np.array(keys)[:, :, -count:], np.array(own_keys), atol=3e-4)
            np.testing.assert_allclose(np.array(values)[:, :, -count:], np.array(own_values), atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_at_any_time(kind):
    """Prompts that begin and end in different forwards; nothing is evaluated in between."""
    model, prompts = tiny.target(kind), tiny.prompts(5)
    caches = [Cache(model.config.kv, 16, mx.float32).open(len(prompt)) for prompt in prompts]
    rng, at, states = np.random.default_rng(0), [0] * 5, {}
    while any(n < len(prompt) for n, prompt in zip(at, prompts, strict=True)):
        part = [row for row in range(5) if at[row] < len(prompts[row]) and rng.random() < 0.6]
        if not part:
            continue
        pieces = [prompts[row][at[row] :][: rng.integers(1, 17)] for row in part]
        hidden = chunk(model, [caches[row] for row in part], pieces)
        for place, (row, piece) in enumerate(zip(part, pieces, strict=True)):
            states[row], at[row] = hidden[place], at[row] + len(piece)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(np.array(states[row]), whole(model, prompt)[0], atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_may_begin_before_all_is_built(kind, monkeypatch):
    """Each layer is on its way before the next one is built; states and K/V have the same bits, piece by piece."""
    model, prompts, found = tiny.target(kind), [each for each in tiny.prompts(5) if len(each) > 2], {}
    for at_once in (False, True):
        caches, states = [Cache(model.config.kv, 16, mx.float32).open(len(prompt)) for prompt in prompts], []
        for pieces in ([prompt[:2] for prompt in prompts], [prompt[2:18] for prompt in prompts]):
            with monkeypatch.context() as patched:
                patched.setattr(mx, "async_eval", counted := Mock(wraps=mx.async_eval))
                states.append(chunk(model, caches, pieces, at_once))
            assert counted.call_count == (len(model.layers) if at_once else 0)
        kept = [array for cache in caches for arrays in cache.save(0).layers for array in arrays]
        found[at_once] = [np.array(each) for each in [*states, *kept]]
    for one, other in zip(found[False], found[True], strict=True):
        np.testing.assert_array_equal(one, other)


def test_prompts_of_one_batch_go_on():
    """In a cache whose rings are shorter, after windows have wrapped: the next states, and where a drafter looks."""
    model, prompts = tiny.target("moe"), tiny.prompts(8)
    cache, hidden = batch(model, prompts, 16, 3, lookback=1)
    assert cache.block == 3 and hidden.shape == (8, 32)
    assert cache.lengths.tolist() == cache.length_bound == list(map(len, prompts))
    following = mx.array([[5, 6, 7]] * 8)
    states = np.array(model(following, cache.span(3)))
    for row, prompt in enumerate(prompts):
        for t in range(3):
            want, _ = whole(model, [*prompt, 5, 6, 7][: len(prompt) + t + 1])
            np.testing.assert_allclose(states[row, t], want, atol=3e-4)
    assert Span(cache, 0, -1).positions.tolist() == [[len(prompt) - 1] for prompt in prompts]


def test_tokens_that_came_with_others_count_alone():
    """What is computed token by token is computed for real tokens alone: as many as the prompts have."""
    model, seen = tiny.target("e2b"), []
    feedforward = type(model.layers[0]).feedforward

    class Counting(type(model.layers[0])):
        def feedforward(self, x: mx.array, beside: bool) -> mx.array:
            seen.append(x.shape[0])
            return feedforward(self, x, beside)

    for layer in model.layers:
        layer.__class__ = Counting
    prefill(model, tiny.prompts(4), 64)  # 3, 17, 9 and 1 tokens
    assert seen == [30] * (model.writers - 1) + [4] * (len(model.layers) - model.writers + 1)
