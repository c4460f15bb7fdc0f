"""A row that leaves takes all that is its own with it: those that stay go on as if alone, whatever the others had."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import Stairs, thinking

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.engine.calibration import Costs
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.penalties import TokenCounts
from mlx_gemma_mtp.speculative.costs import UNKNOWN
from mlx_gemma_mtp.speculative.guide import Constraint, guide
from mlx_gemma_mtp.speculative.loop import Speculation, compact
from mlx_gemma_mtp.speculative.prefill import prefill

FREE = tiny.GREEDY
CLOSE = 91
# What a row may have of its own, by name; each leaves in every position, and stays in every position.
KINDS = {
    "free": (FREE, lambda: None),
    "sampled": (tiny.SAMPLED, lambda: None),
    "penalised": (tiny.PENALISED, lambda: None),
    "biased": (replace(FREE, logit_bias={5: 3.0, 6: -mx.inf}), lambda: None),
    "reported": (replace(FREE, logprobs=3), lambda: None),
    "stairs": (FREE, Stairs),
    "thinking": (replace(FREE, logit_bias={CLOSE: -1e4}), lambda: thinking(4, None, inside=True)),
}


@dataclass
class Row:
    name: int
    prompt: list[int]
    params: SamplingParams
    constraint: Constraint | None
    count: int
    text: list[int] = field(default_factory=list)
    reported: int = 0


def run(model, drafter, rows: Sequence[Row], rng: np.random.Generator | None) -> None:
    """Every row to its count; rng draws the drafts of each round and the width of each verify, None decodes plainly."""
    vocab, everybody = model.config.vocab_size, slice(0, len(rows))
    cache = Cache(model.config.kv, len(rows), 48, 16, mx.float32)
    rules = Rules.of([row.params for row in rows], vocab)
    token_counts = TokenCounts.of([row.prompt for row in rows], vocab) if rules.penalties else None
    hidden = prefill(model, cache, everybody, [row.prompt for row in rows])
    constraints = guide([row.constraint for row in rows], vocab)
    loop, live = (
        Speculation(model, drafter, cache, rules, hidden, token_counts=token_counts, guide=constraints),
        list(rows),
    )
    drafts = lambda: 0 if rng is None else int(rng.integers(0, 6))  # noqa: E731
    take(live, loop.start(drafts()))
    while stay := compact([len(row.text) < row.count for row in live]):
        if len(stay) < len(live):
            live = [live[place] for place in stay]
            loop.retain(stay, Rules.of([row.params for row in live], vocab))
        if rng is not None and rng.random() < 0.7:
            loop.launch(int(rng.integers(0, 6)))
        take(live, loop.step(drafts()))
    for row in rows:
        del row.text[row.count :]


def take(live: Sequence[Row], done) -> None:
    for i, row in enumerate(live):
        row.text += done.tokens[i]
        if row.params.logprobs is not None:
            assert [each.token for each in done.logprobs[i]] == done.tokens[i]
            assert all(len(each.top) >= row.params.logprobs for each in done.logprobs[i])
        elif all(other.params.logprobs is None for other in live):
            assert done.logprobs is None


@pytest.fixture(scope="module")
def pair():
    model = tiny.target("moe")
    return model, tiny.drafter(model)


@pytest.fixture(scope="module")
def alone(pair):
    """The texts of every kind of row after every prompt, each by itself and without drafts."""
    batch, texts = tiny.prompts(8), {}

    def of(kind: str, prompt: int, count: int) -> list[int]:
        if (kind, prompt) not in texts:
            row = Row(0, batch[prompt], KINDS[kind][0], KINDS[kind][1](), 36)
            run(pair[0], None, [row], None)
            texts[kind, prompt] = row.text
        return texts[kind, prompt][:count]

    return of


@pytest.mark.parametrize("seed", range(5))
def test_who_stays_goes_on_as_if_alone(pair, alone, seed):
    """Seven kinds of rows in a drawn order with drawn ends, and widths that change each round."""
    rng, batch = np.random.default_rng(seed), tiny.prompts(8)
    names = rng.permutation(list(KINDS)).tolist()
    counts = rng.permutation([3, 6, 10, 15, 21, 28, 36]).tolist()
    rows = [Row(i, batch[i], KINDS[k][0], KINDS[k][1](), counts[i]) for i, k in enumerate(names)]
    run(*pair, rows, rng)
    for row in rows:
        assert row.text == alone(names[row.name], row.name, row.count), names[row.name]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("leaver", [name for name in KINDS if name != "free"])
def test_a_free_row_outlives_every_kind(pair, alone, leaver, place):
    """Of three rows one of a kind leaves early, and then two free ones at once or one after the other."""
    batch, kinds = tiny.prompts(3), ["free"] * 3
    kinds[place] = leaver
    for seed in range(2):
        counts = [5 if i == place else 14 + 2 * seed * i for i in range(3)]
        rows = [Row(i, batch[i], KINDS[k][0], KINDS[k][1](), counts[i]) for i, k in enumerate(kinds)]
        run(*pair, rows, np.random.default_rng(seed))
        for row in rows:
            assert row.text == alone(kinds[row.name], row.name, row.count), row.name


@pytest.mark.parametrize("drafts", [4, "auto"])
def test_a_free_row_outlives_a_constrained_one_in_the_engine(drafts, monkeypatch):
    """On the bundled pair, for lengths whose last rounds narrow in every way, and before costs are known."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(Costs, "table", lambda *args: UNKNOWN)
    engine, prompts = load(num_draft_tokens=drafts), ["def area(width, height):", "Describe the function open()."]
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    bound = SamplingParams(temperature=0.0, regex="[ab]{5}")
    whole = engine.generate(prompts[0], free, num_draft_tokens=0).tokens
    for count in range(8, 41, 2):
        results = engine.generate(prompts, [replace(free, max_tokens=count), bound])
        assert results[0].tokens == whole[:count] and len(results[1].text) == 5, count
