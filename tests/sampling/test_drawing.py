"""What the loop draws, from a few candidates, against a full sort of the whole vocabulary in float64.

The reference below is written for nothing but to be plain: every score, every probability, every token's noise.
"""

from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import Stairs

from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.ops import topk as topk_module
from mlx_gemma_mtp.ops.sums import sum_of_exponentials
from mlx_gemma_mtp.sampling import candidates, drawing
from mlx_gemma_mtp.sampling.distribution import Rules, logprobs, sample
from mlx_gemma_mtp.sampling.drawing import UNDECIDED, draw, settled
from mlx_gemma_mtp.sampling.noise import gumbel, gumbel_bound
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.speculative.drafting import Drafts, DraftState, Mtp
from mlx_gemma_mtp.speculative.loop import Speculation

VOCAB, CAP, COUNT = 12_000, 30.0, 10
SUPPRESSED = [3, 5000, 11_999]
PROMPT, TEXT = [1, 2, 7, 2, 9000], [7, 7, 4, 2, 10_000]


def params(**settings) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "seed": 5} | settings)


EVERY = {
    "greedy": params(temperature=0.0),
    "default": params(top_k=64, top_p=0.95),
    "wide top-k": params(top_k=700, top_p=0.9),
    "top-p": params(top_p=0.95),
    "cool top-p": params(temperature=0.5, top_p=0.8),
    "nearly all": params(top_p=1 - 1e-6),
    "min-p": params(min_p=0.05),
    "both": params(top_p=0.9, min_p=0.02),
    "free": params(),
    "hot and free": params(temperature=2.0),
    "biased": params(top_k=64, top_p=0.95, logit_bias={2: 3.0, 6: -np.inf, 8000: 12.0}),
    "biased greedy": params(temperature=0.0, logit_bias={8000: 40.0}),
    "biased and free": params(logit_bias={2: 3.0, 6: -np.inf, 8000: 12.0}),
    "penalised": params(top_k=64, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25),
    "penalised top-p": params(top_p=0.9, repetition_penalty=1.2),
    "penalised and free": params(frequency_penalty=-1.0),
    "everything": params(top_p=0.9, min_p=0.01, repetition_penalty=1.3, logit_bias={2: 3.0, 7: 1.0, 9: -4.0}),
}
RNG = np.random.default_rng(3)
PEAKED = RNG.normal(size=(1, COUNT, VOCAB)) * 3
PEAKED[RNG.random(PEAKED.shape) < 40 / VOCAB] += 14
LOGITS = {
    "peaked": PEAKED,
    "flat": RNG.normal(size=(1, COUNT, VOCAB)) * 0.3,
    "as bf16 rounds": np.array(mx.array(PEAKED).astype(mx.bfloat16).astype(mx.float32)),
    "far into the cap": PEAKED * 12,
    "all equal": np.zeros((1, COUNT, VOCAB)),
}


def scores_of(logits: np.ndarray, p: SamplingParams, counts: tuple[list[int], list[int]]) -> np.ndarray:
    """The scores of one position, in float64."""
    scores = CAP * np.tanh(logits.astype(np.float64) / CAP)
    prompt, text = counts
    for token in {*prompt, *text}:
        factor = p.repetition_penalty or 1.0
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        said = text.count(token)
        scores[token] -= p.presence_penalty * (said > 0) + p.frequency_penalty * said
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    scores[SUPPRESSED] = -np.inf
    return scores


def drawn_plainly(
    logits: np.ndarray, p: SamplingParams, position: int, allowed: np.ndarray | None = None, counts=(PROMPT, TEXT)
) -> set[int]:
    """The tokens of one position that are right: one, but for sums that lie on the border of top-p or min-p."""
    scores = scores_of(logits, p, counts)
    if allowed is not None:
        scores[~allowed] = -np.inf
    order = np.lexsort((np.arange(len(scores)), -logits, -scores))
    if p.temperature == 0:
        return {int(order[0])}
    scores = scores[order] / p.temperature
    if p.top_k > 0:
        scores[p.top_k :] = -np.inf
    chances = np.exp(scores - scores[0])
    chances /= chances.sum()
    noise = np.array(gumbel(Rules.of([p], VOCAB).keys, mx.array([[position]]), mx.array(order)[None, None]), np.float64)
    right = set()
    for slack in (-2e-6, 0.0, 2e-6):
        kept = np.cumsum(chances[::-1])[::-1] > (1 - p.top_p) * (1 + 1e-5) + slack if p.top_p < 1 else chances > 0
        kept &= chances >= p.min_p * chances[0] * (1 + slack)
        noisy = np.where(kept, scores + noise[0, 0], -np.inf)
        right |= set(order[np.flatnonzero(noisy >= noisy.max() - 1e-5)].tolist())
    return right


def counts_of(rows: int) -> TokenCounts:
    counts = TokenCounts.of([PROMPT] * rows, VOCAB)
    for token in TEXT:
        counts = counts.followed_by(mx.array([token] * rows))
    return counts


def both(logits: np.ndarray, rows: list[SamplingParams], mask: mx.array | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What rows draw from the same logits, and with UNDECIDED places settled."""
    rules, count = Rules.of(rows, VOCAB, SUPPRESSED), len(rows)
    logits = mx.array(np.repeat(logits.astype(np.float32), count, axis=0))
    positions = mx.broadcast_to(mx.arange(logits.shape[1]), logits.shape[:2])
    counts = counts_of(count) if rules.penalties else None
    mask = None if mask is None else mx.broadcast_to(mask, (count, *mask.shape[1:]))
    found = draw(logits, rules, positions, CAP, token_counts=counts, mask=mask)
    tokens = np.array(found.tokens)
    full = np.array(settled(logits, rules, positions, CAP, counts, mask))
    assert not found.certain or (tokens != UNDECIDED).all()
    return tokens, np.where(tokens == UNDECIDED, full, tokens)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", EVERY)
def test_the_token_is_that_of_a_full_sort(name, logits):
    p, values = EVERY[name], LOGITS[logits].astype(np.float32)
    tokens, full = both(values, [p])
    for i in range(COUNT):
        right = drawn_plainly(values[0, i], p, i)
        assert full[0, i] in right, (i, full[0, i], tokens[0, i], right)
    if logits == "peaked" and name not in ("nearly all",):
        assert (tokens == UNDECIDED).mean() <= 0.1, "that is what the short way is for"


ROUNDED = LOGITS["as bf16 rounds"][:, :6]


@cache
def alone(name: str) -> np.ndarray:
    """The tokens of a row of these settings by itself."""
    return both(ROUNDED, [EVERY[name]])[0][0]


@pytest.mark.parametrize("name", EVERY)
def test_partners_change_nothing(name):
    """Neither a row's token nor whether it is decided: each setting beside every other, and all at once."""
    for other in list(EVERY)[list(EVERY).index(name) :]:
        first, second = both(ROUNDED, [EVERY[name], EVERY[other]])[0]
        assert np.array_equal(first, alone(name)) and np.array_equal(second, alone(other)), other
    assert np.array_equal(both(ROUNDED, [*EVERY.values(), EVERY[name]])[0][-1], alone(name))


@pytest.mark.parametrize("name", ["top-p", "default", "biased"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-4])
def test_partners_change_nothing_where_float32_loses_the_noise(name, temperature):
    """Scores at the cap, so large after the temperature that several tokens have the same sum with their noise."""
    values, cold = RNG.normal(size=(1, 50, VOCAB)) * 1000 + 500, params(temperature=temperature)
    alone = both(values, [cold])[1]
    assert np.array_equal(both(values, [cold, EVERY[name]])[1][0], alone[0])


@pytest.mark.parametrize("vocab", [1023, 12_000])
def test_the_least_top_p_keeps_the_likeliest(vocab):
    """Though the sum of all probabilities is below 1 in float32 by more than top-p."""
    values = RNG.normal(size=(1, 200, vocab)).astype(np.float32)
    rules, positions = Rules.of([params(top_p=1e-6)], vocab), mx.arange(200)[None]
    tokens = np.array(settled(mx.array(values), rules, positions, CAP))
    assert np.array_equal(tokens[0], values[0].argmax(axis=-1))


def test_sums_over_a_vocabulary_are_exact_enough():
    """And of a shortlist they are the same beside a longer one."""
    values = RNG.normal(size=(1, 3, 200_000)) * np.array([0.02, 1.0, 3.0])[:, None]
    scores = mx.array(-np.sort(-values, axis=-1).astype(np.float32))
    after = np.array(candidates._shares_from_the_end(candidates.shares(scores, mx.array([[[200_000]]]))[1]))
    want = np.exp(np.array(scores, np.float64))
    want = np.cumsum(want[..., ::-1], axis=-1)[..., ::-1] / want.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(after, want, rtol=1e-5)
    for few in (300, 512, 513, 1000):
        short, long = (
            np.array(candidates._shares_from_the_end(candidates.shares(scores[..., :n], mx.array([[[few]]]))[1]))
            for n in (few, 5000)
        )
        assert np.array_equal(short, long[..., :few])


def test_a_border_is_near_as_far_as_scores_are_rounded():
    """Scores of 10,000,000 after the temperature are right to 1: a border that is nearer is left open."""
    values = 1e5 + RNG.normal(size=(1, 200, VOCAB)) * 0.01
    values[..., :60] += 0.08
    values, positions = mx.array(values.astype(np.float32)), mx.arange(200)[None]
    rules = Rules.of([params(top_p=0.5, temperature=0.01)], VOCAB)
    tokens, full = (
        np.array(each) for each in (draw(values, rules, positions).tokens, settled(values, rules, positions))
    )
    assert np.array_equal(tokens, np.where(tokens == UNDECIDED, UNDECIDED, full))


@pytest.mark.parametrize("bias", [1.0, -np.inf])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_logit_makes_a_token_that_does_not_exist(bad, bias):
    """What is drawn is looked up before anybody has read that the logits are not finite."""
    values, bits = np.zeros((1, 1, VOCAB), np.float32), np.zeros((1, 1, VOCAB // 32), np.uint32)
    values[..., 3], bits[..., 0] = bad, 15
    for p in EVERY.values():
        rules = Rules.of([replace(p, logit_bias={3: bias})], VOCAB)
        counts = counts_of(1) if rules.penalties else None
        found = draw(mx.array(values), rules, mx.array([[3]]), token_counts=counts, mask=mx.array(bits))
        assert UNDECIDED <= found.tokens.item() < VOCAB, p


def test_parts_of_a_batch_are_those_of_the_whole(monkeypatch):
    rows = list(EVERY.values())
    whole = both(PEAKED[:, :3], rows)[0]
    monkeypatch.setattr(drawing, "PART", 1)
    assert np.array_equal(both(PEAKED[:, :3], rows)[0], whole)


@pytest.mark.parametrize("name", EVERY)
def test_only_allowed_tokens_are_drawn(name):
    """Each position has a mask of its own; also where fewer tokens are allowed than candidates looked at."""
    p, values = EVERY[name], PEAKED[:, :6].astype(np.float32)
    allowed = np.random.default_rng(1).random((6, VOCAB)) < np.array([0.5, 0.5, 0.01, 0.01, 0.0005, 0.0005])[:, None]
    allowed[:, 100], allowed[:, SUPPRESSED] = True, True
    bits = np.packbits(allowed, axis=-1, bitorder="little")
    mask = mx.array(np.frombuffer(bits.tobytes(), np.uint32).reshape(1, 6, -1))
    _, full = both(values, [p], mask)
    for i in range(6):
        assert full[0, i] in drawn_plainly(values[0, i], p, i, allowed[i]), i


def test_a_border_that_float32_may_not_find_is_left_open():
    """Four tokens of a quarter each, and a top-p on their sums."""
    values = np.full((1, 4, VOCAB), -20.0)
    values[:, :, 100:104] = 20.0
    tokens, full = both(values, [params(top_p=0.5)])
    assert (tokens == UNDECIDED).all() and set(full[0].tolist()) <= {100, 101}
    assert (both(values, [params(top_p=0.6)])[0] != UNDECIDED).all()


def test_noise_is_below_its_bound():
    keys, positions = mx.array([[5, 6], [7, 8]], mx.uint32), mx.arange(100, 106).reshape(2, 3)
    noise = np.array(gumbel(keys, positions, mx.arange(50_000)[None, None]))
    over = np.array(gumbel_bound(keys, positions, 50_000)) - noise
    assert over.min() >= 0 and over[noise > 2].max() < 0.07


@pytest.mark.parametrize("cap", [30.0, None])
def test_sums_of_exponentials_are_near(cap):
    logits = RNG.normal(size=(2, 3, 8192)).astype(np.float32) * 60
    logits[0, 0, ::7], logits[1, 2, 5] = -np.inf, 1e4
    scores = (
        logits.astype(np.float64)
        if cap is None
        else np.where(np.isinf(logits), -np.inf, cap * np.tanh(logits.astype(np.float64) / cap))
    )
    scale = np.array([[[0.5]], [[1.0]]])
    largest = (scores * scale).max(axis=-1, keepdims=True)
    want = np.exp(scores * scale - largest)
    total, each = sum_of_exponentials(
        mx.array(logits), cap, True, mx.array(scale, mx.float32), mx.array(largest, mx.float32)
    )
    np.testing.assert_allclose(np.array(total), want.sum(axis=-1), rtol=5e-5)
    np.testing.assert_allclose(np.array(each), want, rtol=2e-4, atol=1e-30)


def test_log_probabilities_of_a_large_vocabulary():
    values = LOGITS["far into the cap"].astype(np.float32)[:, :3]
    tokens = np.array([[0, 77, 11_999]])
    own, best, of_best = (np.array(each) for each in logprobs(mx.array(values), mx.array(tokens), CAP, 20))
    scores = CAP * np.tanh(values.astype(np.float64) / CAP)
    want = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(own, np.take_along_axis(want, tokens[..., None], -1)[..., 0], atol=1e-5)
    assert np.array_equal(best, np.argsort(-values, axis=-1, kind="stable")[..., :20])
    np.testing.assert_allclose(of_best, np.take_along_axis(want, best.astype(int), -1), atol=1e-5)


@pytest.fixture
def short(monkeypatch):
    """The short way for the toy's vocabulary, with so few candidates that many places stay open."""
    monkeypatch.setattr(drawing, "FEW", 0)
    monkeypatch.setattr(drawing, "REACH", 8)
    monkeypatch.setattr(drawing, "NOISY", 2)
    monkeypatch.setattr(topk_module, "SMALL", 0)


IN_THE_LOOP = {
    "top-p": params(top_p=0.9),
    "min-p": params(min_p=0.2),
    "free": params(temperature=0.8),
    "penalised": params(top_p=0.9, repetition_penalty=1.3, presence_penalty=0.4, logprobs=2),
}


@pytest.mark.parametrize("name", IN_THE_LOOP)
@pytest.mark.parametrize("guided", [False, True])
def test_open_places_are_settled_in_the_loop(name, guided, short, monkeypatch):
    """The text of rows with places that stayed open is the one that a full look at each position gives, for every
    draft length; a round has at most one host sync more.
    """
    model, batch, p = tiny.target("moe"), tiny.prompts(3), IN_THE_LOOP[name]
    rules = lambda: {"constraints": [Stairs(), None, Stairs(3)]} if guided else {}  # noqa: E731
    texts, loops = zip(
        *(tiny.decode(model, tiny.drafter(model), batch, k, 25, p, **rules()) for k in (0, 1, 4)), strict=True
    )
    monkeypatch.setattr(drawing, "FEW", 1 << 30)
    plain, loop = tiny.decode(model, None, batch, 0, 25, p, **rules())
    assert list(texts) == [plain] * 3
    assert loop.host_syncs == 25 < loops[0].host_syncs <= 50


def loop_of(model: Gemma4, p: SamplingParams, rows: int) -> Speculation:
    return tiny.begun(model, tiny.drafter(model), tiny.prompts(rows), p)


def test_a_settled_token_is_reported(short, monkeypatch):
    """The log-probability is that of the token which was emitted, not of what stood in for it."""
    model, p = tiny.target("moe"), replace(IN_THE_LOOP["top-p"], logprobs=3)

    def reports() -> list:
        loop = loop_of(model, p, 2)
        rounds = [tiny.round_of(loop, 0) for _ in range(13)]
        return [each for done in rounds for each in done.logprobs[0]][:12]

    short_way = reports()
    monkeypatch.setattr(drawing, "FEW", 1 << 30)
    for ours, want in zip(short_way, reports(), strict=True):
        assert ours.token == want.token and ours.logprob == pytest.approx(want.logprob, abs=1e-5)


@pytest.mark.parametrize(("name", "share"), [("top-p", 0.35), ("free", 1.0)])
def test_drafts_are_made_after_a_guess(name, share, short, monkeypatch):
    """Where the newest token is open, they are made after the one that it probably is: of top-p the best of 8 tokens
    here, and the same without filters.
    """
    guessed, propose = [], Mtp.propose

    def spied(self, state: DraftState, count: int) -> Drafts:
        guessed.append(state.newest)
        return propose(self, state, count)

    monkeypatch.setattr(Mtp, "propose", spied)
    loop = loop_of(tiny.target("moe"), replace(IN_THE_LOOP[name], temperature=1.5), 3)
    rounds = [tiny.round_of(loop, 1) for _ in range(21)]
    right = np.array(mx.stack(guessed)) == [[row[-1] for row in done.tokens] for done in rounds]
    assert loop.host_syncs - len(rounds) >= 5 and right.mean() >= share


def test_the_whole_way_draws_the_same(short):
    """Where a place is decided, what Distribution draws is the same token."""
    values = LOGITS["peaked"].astype(np.float32)
    for p in EVERY.values():
        rules = Rules.of([p], VOCAB)
        counts = counts_of(1) if rules.penalties else None
        at = mx.arange(COUNT)[None]
        quick = np.array(draw(mx.array(values), rules, at, CAP, token_counts=counts).tokens)
        whole = np.array(sample(mx.array(values), rules, at, CAP, token_counts=counts))
        assert np.array_equal(np.where(quick == UNDECIDED, whole, quick), whole)
