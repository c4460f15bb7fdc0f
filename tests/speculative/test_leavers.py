"""A row that leaves takes all that is its own with it: those that stay go on as if alone, whatever the others had."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import tiny
from batches import KINDS, Alone, Row, settings, take

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.engine.calibration import Costs
from mlx_gemma_mtp.speculative.costs import UNKNOWN
from mlx_gemma_mtp.speculative.loop import Speculation, compact
from mlx_gemma_mtp.speculative.prefill import batch


def run(model, drafter, rows: Sequence[Row], rng: np.random.Generator) -> None:
    """Every row to its count. Drawn: how many drafts each row makes, and whether a verify is narrow."""
    cache, hidden = batch(model, [row.prompt for row in rows], 16, 6)
    loop, live = Speculation(model, drafter, cache), list(rows)
    loop.begin(hidden, *settings(model, live))
    while True:
        take(live, loop.step(rng.integers(0, 6, len(live)).tolist()))
        stay = compact([not row.done for row in live])
        if not stay:
            break
        if len(stay) < len(live):
            live = [live[place] for place in stay]
            loop.arrange(stay, *settings(model, live))
        if rng.random() < 0.7:
            loop.launch(int(rng.integers(0, 6)))
    for row in rows:
        assert row.error is None
        del row.text[row.count :]


@pytest.fixture(scope="module")
def pair():
    model = tiny.target("moe")
    return model, tiny.drafter(model)


@pytest.fixture(scope="module")
def alone(pair):
    return Alone(pair[0], 36)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_who_stays_goes_on_as_if_alone(pair, alone, seed):
    """Seven kinds of rows in a drawn order with drawn ends, and widths that change each round."""
    rng, prompts = np.random.default_rng(seed), tiny.prompts(8)
    names = rng.permutation(list(KINDS)).tolist()
    counts = rng.permutation([3, 6, 10, 15, 21, 28, 36]).tolist()
    rows = [Row.of(kind, i, prompts[i], counts[i]) for i, kind in enumerate(names)]
    run(*pair, rows, rng)
    for row in rows:
        assert row.text == alone.text(names[row.name], row.prompt, row.count), names[row.name]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("leaver", [name for name in KINDS if name != "free"])
def test_a_free_row_outlives_every_kind(pair, alone, leaver, place):
    """Of three rows one of a kind leaves early, and then two free ones at once or one after the other."""
    prompts, kinds = tiny.prompts(3), ["free"] * 3
    kinds[place] = leaver
    for seed in range(2):
        counts = [5 if i == place else 14 + 2 * seed * i for i in range(3)]
        rows = [Row.of(kind, i, prompts[i], counts[i]) for i, kind in enumerate(kinds)]
        run(*pair, rows, np.random.default_rng(seed))
        for row in rows:
            assert row.text == alone.text(kinds[row.name], row.prompt, row.count), row.name


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


@pytest.mark.parametrize("drafts", [0, 3])
def test_what_is_done_meanwhile_is_done_once_and_beside_the_verify(pair, drafts):
    """Also where the verify runs already, and where there is none: the first tokens follow the prefill."""
    model, drafter = pair
    cache, hidden = batch(model, tiny.prompts(2), 16, 6)
    loop, done = Speculation(model, drafter, cache), []
    loop.begin(hidden, *settings(model, [Row.of("free", i, prompt, 9) for i, prompt in enumerate(tiny.prompts(2))]))
    for width in (None, None, 1 if drafts else None):
        loop.launch(width, lambda: done.append(loop._verify.dispatched))
        loop.launch(meanwhile=lambda: done.append("again"))
        loop.step([drafts, drafts])
    assert [each for each in done if each == "again"] == ["again"] * 3 and done[1::2] == ["again"] * 3
    assert done[0] is True and done[2] is done[4] is False  # of a prefill; amid a dispatch
