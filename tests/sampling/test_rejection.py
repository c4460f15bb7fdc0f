"""Acceptance by rejection: block verification's own figures, rows of a batch, the bundled pair. Its exactness:
test_exactness.py.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import Stairs
from cost_tables import random_table
from held_out import PROMPTS

from benchmarks.acceptance import by_block, probabilities
from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.sampling import rejection
from mlx_gemma_mtp.sampling.distribution import Distribution, Rules, soft_cap
from mlx_gemma_mtp.sampling.noise import gumbel, keys_of_round
from mlx_gemma_mtp.sampling.params import REJECTION
from mlx_gemma_mtp.sampling.rejection import chances, residuals
from mlx_gemma_mtp.speculative.auto import Auto
from mlx_gemma_mtp.speculative.choice import CONFIDENCE
from mlx_gemma_mtp.speculative.drafting import Drafting

SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_k=64, top_p=0.95, seed=5, ignore_eos=True)
FILTERS = {
    "nothing": replace(SAMPLED, top_k=-1, top_p=1.0),  # whole rows, in order
    "top-k": replace(SAMPLED, top_k=6, top_p=0.9, min_p=0.02),  # shortlists, compared
    "top-p": replace(SAMPLED, top_k=-1, top_p=0.9),  # whole rows, sorted
}


def kept(drafts: np.ndarray, q: Distribution, p: Distribution, vocab: int) -> np.ndarray:
    """Expected drafts kept in each row."""
    h = np.array(chances(*residuals(mx.array(drafts), q, p, vocab)), np.float64)
    stays = np.concatenate([np.cumprod((1 - h[:, :0:-1]), axis=1)[:, ::-1][:, 1:], np.ones((len(h), 1))], axis=1)
    return (np.arange(1, h.shape[1]) * h[:, 1:] * stays).sum(axis=1)


@pytest.mark.parametrize("shortlist", [False, True], ids=["whole head", "shortlist"])
@pytest.mark.parametrize("name", FILTERS)
def test_as_many_are_kept_as_block_verification_keeps(name, shortlist):
    """Against another implementation, in float64, from logits; the drafter scores all tokens, or some in any order."""
    rows, count, vocab, params = 40, 4, 60, FILTERS[name]
    rng, rules = np.random.default_rng(3), Rules.of([params], vocab)
    logits = rng.normal(size=(rows, count + 1, vocab)).astype(np.float32) * 2
    scores = logits[:, :count] + rng.normal(size=(rows, count, vocab)).astype(np.float32) * 0.7
    ids = None
    if shortlist:
        ids = np.argsort(rng.random(scores.shape), axis=-1)[..., :35]
        whole = np.full_like(scores, -np.inf)
        np.put_along_axis(whole, ids, np.take_along_axis(scores, ids, -1), -1)
        scores, ids, whole = np.take_along_axis(scores, ids, -1), mx.array(ids), whole
    p, q = Distribution.of(mx.array(logits), rules), Distribution.of(mx.array(scores), rules, ids=ids)
    ps = [[probabilities(each, params) for each in row] for row in logits]
    qs = [[probabilities(each, params) for each in row] for row in (whole if shortlist else scores)]
    drafts = np.array([[rng.choice(vocab, p=each) for each in row] for row in qs])
    want = [by_block(list(drafts[row]), ps[row], qs[row]) for row in range(rows)]
    np.testing.assert_allclose(kept(drafts, q, p, vocab), want, atol=2e-5)
    assert 0.5 < np.mean(want) < count - 0.5


def test_probabilities_of_tokens_are_the_same_by_every_way():
    """Compared, gathered, scattered; 0 for what a filter leaves out."""
    logits = mx.array(np.random.default_rng(1).normal(size=(2, 3, 50)).astype(np.float32) * 2)
    ids = mx.array(np.random.default_rng(2).integers(0, 50, (2, 3, 8)))
    for params in FILTERS.values():
        p = Distribution.of(logits, Rules.of([params] * 2, 50))
        want = np.array([[probabilities(row, params) for row in rows] for rows in np.array(logits)])
        np.testing.assert_allclose(p.at(None, 50), want, atol=1e-6)
        assert p.first(0).at(None, 50).shape == (2, 0, 50) and p.first(0).at(ids[:, :0], 50).shape == (2, 0, 8)
        for some in (ids, ids[..., :1]):
            np.testing.assert_allclose(p.at(some, 50), np.take_along_axis(want, np.array(some), -1), atol=1e-6)


def test_the_noise_of_rounds_is_independent():
    """Of each other and of the noise of plain decoding, at the same positions."""
    keys, positions = mx.array([[7, 9]], mx.uint32), mx.arange(300)[None]
    own = [keys, *(keys_of_round(keys, mx.array([first])) for first in (1, 2, 3, 258))]
    noise = [np.array(gumbel(key, positions, mx.arange(300)[None, None])).ravel() for key in own]
    pairs = np.corrcoef(noise)[np.triu_indices(len(noise), 1)]
    assert np.abs(pairs).max() < 4 / np.sqrt(noise[0].size)
    many = keys_of_round(mx.broadcast_to(keys, (9999, 2)), mx.arange(9999))
    assert len({tuple(key) for key in many.tolist()}) == 9999


def test_where_the_drafter_is_the_target_every_draft_stays():
    """Nothing is left to draw from after fewer drafts, and 0 / 0 is 0."""
    rules, logits = Rules.of([FILTERS["nothing"]] * 3, 50), mx.random.normal((3, 5, 50), key=mx.random.key(2))
    p, q = Distribution.of(logits, rules), Distribution.of(logits[:, :4], rules)
    drafts = mx.random.randint(0, 50, (3, 4), key=mx.random.key(3))
    reach, rest = residuals(drafts, q, p, 50)
    assert mx.array_equal(reach, mx.ones((3, 5))) and not rest[:, :4].any()
    assert np.allclose(chances(reach, rest), [[0, 0, 0, 0, 1]] * 3)
    positions = mx.broadcast_to(mx.arange(7, 12), (3, 5))
    assert rejection.accept(drafts, q, p, rules, positions)[1].tolist() == [4] * 3


def test_a_refusal_by_rounding_draws_from_the_target(monkeypatch):
    """A draft refused though p is q leaves an empty residual: the token comes from p, not from what p forbids."""
    rules = Rules.of([FILTERS["nothing"]], 6)
    logits = mx.array([[[-mx.inf, -mx.inf, 1.0, 2.0, -mx.inf, 0.0]] * 2])
    p, q = Distribution.of(logits, rules), Distribution.of(logits[:, :1], rules)
    monkeypatch.setattr(rejection, "uniform", lambda keys, positions, tokens: mx.ones((1, 1, 1)))
    rounded = lambda drafts, q, p, vocab, real: (mx.array([[1.0, 1 - 6e-8]]), mx.zeros((1, 2, 6)))  # noqa: E731
    monkeypatch.setattr(rejection, "residuals", rounded)
    drawn = {int(rejection.accept(mx.array([[3]]), q, p, rules, mx.array([[i, i + 1]]))[2]) for i in range(40)}
    assert drawn == {2, 3, 5}


def test_rows_are_their_own_and_greedy_rows_are_plain():
    """At one draft length a row says what it says alone; without drafts it says what plain decoding says."""
    model = tiny.target("moe")
    drafter, batch = tiny.drafter(model), tiny.prompts(4)
    settings = [tiny.SAMPLED, tiny.GREEDY, tiny.PENALISED, replace(tiny.SAMPLED, seed=8)]
    texts = tiny.rejected(model, drafter, batch, settings, 3, 30)
    plain = [
        tiny.decode(model, None, [prompt], 0, 30, params)[0][0] for prompt, params in zip(batch, settings, strict=True)
    ]
    assert tiny.rejected(model, drafter, batch, settings, 0, 30) == plain
    assert texts[1] == plain[1] and all(texts[i] != plain[i] for i in (0, 2, 3))
    for row in range(4):
        assert (
            tiny.rejected(model, drafter, batch[row : row + 1], settings[row : row + 1], 3, 30) == texts[row : row + 1]
        )


def test_drafts_that_a_constraint_refuses_are_verified():
    """None is cut, for that would favour the others; and every token is allowed."""
    model = tiny.target("moe")
    parts = {"constraints": [Stairs()], "drafting": Drafting(accept=REJECTION)}
    loop = tiny.begun(model, tiny.drafter(model), tiny.prompts(1), tiny.SAMPLED, **parts)
    text = list(tiny.round_of(loop, 3).tokens[0])
    for _ in range(8):
        done = tiny.round_of(loop, 3)
        assert done.drafted == [3]
        text += done.tokens[0]
    assert [token % 7 for token in text] == [i % 7 for i in range(len(text))]


@pytest.fixture(scope="module")
def engine():
    return load(num_draft_tokens=4, dtype="float32", accept=REJECTION)


def test_the_bundled_pair_keeps_what_is_expected(engine, monkeypatch):
    """In its own rounds: drafts kept against their expectation; each round is within 0 to 4 (deviation at most 2)."""
    expected, seen, accept = [], [], rejection.accept

    def recorded(drafts, q, p, rules, positions, real):
        tokens, n, following = accept(drafts, q, p, rules, positions, real)
        expected.append(kept(np.array(drafts), q, p, rules.vocab).sum())
        seen.append(np.array(n).sum())
        return tokens, n, following

    monkeypatch.setattr(rejection, "accept", recorded)
    results = engine.generate(PROMPTS[:8], SAMPLED)
    rounds = sum(result.stats.rounds for result in results)
    assert rounds > 80 and abs(sum(seen) - sum(expected)) < 3.3 * 2 * rounds**0.5
    assert 1 + sum(expected) / rounds > 2.4 and all(r.stats.accept == REJECTION for r in results)


def test_logprobs_are_those_of_the_text(engine):
    """Of the tokens emitted: a pass over the finished text gives the same."""
    params = replace(SAMPLED, logprobs=2)
    result = engine.generate(PROMPTS[0], params)
    assert engine.generate(PROMPTS[0], params).tokens == result.tokens  # by seed
    text = [*engine.text.encode(PROMPTS[0]), *result.tokens]
    target = engine.target
    cache = Cache(target.config.kv, len(text), mx.float32)
    cache.open(len(text))
    logits = target.logits(target(mx.array([text]), cache.span(len(text))))[0, -41:-1]
    values = np.array(soft_cap(logits, target.config.softcap), np.float64)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    want = values[np.arange(40), result.tokens]
    np.testing.assert_allclose([each.logprob for each in result.logprobs], want, atol=1e-3)
    assert [each.token for each in result.logprobs] == result.tokens


def test_greedy_text_is_plain(engine):
    """And a batch whose sampled rows leave first goes on."""
    greedy = replace(SAMPLED, temperature=0.0)
    params = [replace(SAMPLED, max_tokens=9), greedy, replace(SAMPLED, max_tokens=15), greedy]
    results = engine.generate(PROMPTS[:4], params)
    assert [len(result.tokens) for result in results] == [9, 40, 15, 40]
    for row in (1, 3):
        assert results[row].tokens == engine.generate(PROMPTS[row], greedy, num_draft_tokens=0).tokens


def test_auto_never_cuts(engine):
    """Whatever the table says, all drafts that were made are verified; greedy text may still be cut."""
    lengths = set()
    for seed in (0, 2):
        engine.depth.autos["sampled"] = Auto(random_table(seed), confident=False, frozen=True)
        for result in engine.generate(PROMPTS[:2], SAMPLED, num_draft_tokens="auto"):
            lengths |= set(result.stats.depths)
            assert len(result.tokens) == 40
            assert CONFIDENCE not in {reason for each in result.stats.depths.values() for reason in each}
    assert len(lengths) > 2
    engine.depth.autos.clear()
    engine.depth.adopt({kind: random_table(0) for kind in ("sampled", "greedy")})
    assert not engine.depth.autos["sampled"].confident and engine.depth.autos["greedy"].confident
