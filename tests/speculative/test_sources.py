"""Sources of drafts: each but the drafter, which has tests of its own, goes through the loop and the engine here, and
changes no text. A toy source shows what the loop asks of one.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny
from constraints import Stairs
from cost_tables import random_table

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.cache.spec import with_bits
from mlx_gemma_mtp.engine.calibration import KINDS, Bench, Costs
from mlx_gemma_mtp.engine.engine import Engine
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.sampling.params import ACCEPT, REJECTION
from mlx_gemma_mtp.speculative import drafting
from mlx_gemma_mtp.speculative import loop as loop_module
from mlx_gemma_mtp.speculative.auto import Auto
from mlx_gemma_mtp.speculative.copies import RowText
from mlx_gemma_mtp.speculative.drafting import MTP, SOURCES, Drafting, Drafts, DraftState, Embed

PROMPTS = ["def mean(values):\n    total = 0\n    for value in values:", "What is a list?"]
PARAMS = {
    "greedy": SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=24, temperature=1.0, top_k=64, top_p=0.95, seed=5, ignore_eos=True),
    "penalised": SamplingParams(
        max_tokens=24, temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.2, seed=2, ignore_eos=True
    ),
    "constrained": SamplingParams(max_tokens=24, temperature=0.7, regex="[a-z ]{40}", seed=1),
}


class Repeat:
    """Drafts the newest token again and again; how sure it is of that it cannot say."""

    def __init__(self, drafter, embed: Embed, drafting: Drafting):
        self.proposed = 0

    def propose(self, state: DraftState, count: int) -> Drafts:
        self.proposed += 1
        tokens = mx.repeat(state.newest[:, None], count, axis=1)
        return Drafts(tokens, mx.zeros((tokens.shape[0], 0)))


TOY = "the newest token again"


@pytest.fixture
def repeat(monkeypatch) -> Drafting:
    monkeypatch.setitem(SOURCES, TOY, Repeat)
    return Drafting(sources=TOY)


MIXTURES = ["mtp,copy,forced", "mtp,copy", "mtp,forced", "copy", "forced", f"{TOY},copy,forced"]


@pytest.fixture(params=[*(name for name in SOURCES if name != MTP), *MIXTURES, TOY])
def source(request, repeat) -> Drafting:
    return replace(repeat, sources=request.param)


def with_source(engine: Engine, source: Drafting) -> Engine:
    """The engine's models with another source of drafts."""
    return Engine(engine.target, engine.drafter, engine.text, engine.defaults, num_draft_tokens=3, drafting=source)


def skip_drawn(sources: Sequence[str], accept: str, sampled: bool) -> None:
    """Drafts that were drawn, and are accepted by rejection, leave the text's distribution alone, not the text."""
    if MTP in sources and accept == REJECTION and sampled:
        pytest.skip("the text is another one of the same distribution: tests/sampling/test_exactness.py")


@pytest.fixture(scope="module")
def engine():
    return load(num_draft_tokens=3, dtype="float32")


@pytest.mark.parametrize("params", [tiny.GREEDY, tiny.SAMPLED, tiny.PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("accept", ACCEPT)
def test_the_loop_says_what_plain_decoding_says(source, params, accept):
    """Free and constrained rows, and one readback a round."""
    skip_drawn(source.sources, accept, params.temperature > 0)
    model, batch = tiny.target("moe"), tiny.prompts(3)
    rows = lambda: [Stairs(), None, None]  # noqa: E731
    plain, _ = tiny.decode(model, None, batch, 0, 24, params, constraints=rows())
    drafts, source = tiny.drafter(model), replace(source, accept=accept)
    texts, loop = tiny.decode(model, drafts, batch, 3, 24, params, constraints=rows(), drafting=source)
    assert texts == plain
    assert loop.proposer is None if source.source is None else type(loop.proposer) is SOURCES[source.source]
    syncs = loop.host_syncs
    tiny.round_of(loop, 3)
    assert loop.host_syncs == syncs + 1
    loop = tiny.begun(model, drafts, batch, params, constraints=rows(), drafting=source)
    texts = [[] for _ in batch]
    while min(map(len, texts)) < 24:  # and where the host's sources reach beyond the drafter's
        for text, tokens in zip(texts, loop.step([2, 0, 1], reach=[12, 5, 1]).tokens, strict=True):
            text += tokens
    assert [text[:24] for text in texts] == plain


def test_a_source_is_asked_once_a_round(repeat):
    model, batch = tiny.target("moe"), tiny.prompts(2)
    _, loop = tiny.decode(model, object(), batch, 3, 8, drafting=repeat)  # without a look at the drafter
    assert loop.proposer.proposed == loop.host_syncs


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("accept", ACCEPT)
def test_the_engine_says_what_plain_decoding_says(engine, source, name, accept):
    if PARAMS[name].grammars:
        pytest.importorskip("llguidance")
    skip_drawn(source.sources, accept, PARAMS[name].temperature > 0)
    source = with_source(engine, replace(source, accept=accept))
    plain = [result.tokens for result in engine.generate(PROMPTS, PARAMS[name], num_draft_tokens=0)]
    results = source.generate(PROMPTS, PARAMS[name])
    assert [result.tokens for result in results] == plain
    if source.settings.drafting.source is not None:
        assert sum(result.stats.drafted for result in results) > (10 if PARAMS[name].grammars else 20)  # which cut some
    for result in results:
        counts = result.stats.sources.values()
        assert sum(each["drafted"] for each in counts) == result.stats.drafted
        assert sum(each["accepted"] for each in counts) == result.stats.accepted


@pytest.mark.parametrize("seed", [0, 2])
def test_auto_judges_a_source_without_confidences_by_what_was_kept(engine, repeat, seed):
    """Drafts that are never kept are soon made no more, and the text is the same."""
    source = with_source(engine, repeat)
    auto = source.depth.autos["greedy"] = Auto(random_table(seed), frozen=True)
    params = replace(PARAMS["greedy"], max_tokens=64)
    results = source.generate(PROMPTS, params, num_draft_tokens="auto")
    assert [r.tokens for r in results] == [r.tokens for r in engine.generate(PROMPTS, params, num_draft_tokens=0)]
    assert auto.confident and auto.trust.rate(1.0) < 0.6 and sum(auto.trust.tried) > 2


def test_confidences_that_are_missing_are_ones(repeat):
    model, batch = tiny.target("moe"), tiny.prompts(2)
    _, loop = tiny.decode(model, object(), batch, 3, 8, drafting=repeat, confident=True)
    assert loop.confidences == [[1.0] * 3] * 2
    _, loop = tiny.decode(model, object(), batch, 3, 8, drafting=repeat)
    assert loop.confidences == [[], []]  # nobody asked


def test_a_confidence_that_is_nan_is_none(monkeypatch):
    """A damaged drafter's NaN reaches no choice of a width."""
    model, batch = tiny.target("moe"), tiny.prompts(2)
    pick = drafting.pick

    def damaged(*args):
        token, sure, q = pick(*args)
        return token, mx.where(mx.arange(sure.shape[0]) == 1, mx.nan, sure), q

    monkeypatch.setattr(drafting, "pick", damaged)
    parts = {"confident": True, "drafting": Drafting(sources=MTP)}
    _, loop = tiny.decode(model, tiny.drafter(model), batch, 3, 8, **parts)
    assert loop.confidences[1] == [0.0] * 3 and all(0 < each <= 1 for each in loop.confidences[0])


@pytest.mark.parametrize("source", ["repeat last", "", "mtp,", None, ["copies"], 1, []])
def test_an_unknown_source_is_refused_before_anything_is_read(source):
    message = f"^draft_sources is .*, expected some of {', '.join(SOURCES)}, copy, forced, with commas$"
    with pytest.raises(UserError, match=message):
        Drafting(sources=source)
    with pytest.raises(UserError, match=message):
        load("no such folder", draft_sources=source)


def test_names_of_sources_are_taken_as_text_and_as_a_list(repeat):
    assert Drafting(sources="copy, mtp,copy".replace(" ", "")).sources == ("copy", "mtp")
    assert Drafting(sources=["forced"]).source is None and Drafting().source == MTP
    with pytest.raises(UserError, match=f"^draft_sources is .*, expected one of {', '.join(SOURCES)} at most$"):
        Drafting(sources=(MTP, TOY))


def test_a_source_has_costs_of_its_own(engine, repeat, monkeypatch):
    """Its drafts are the ones that are timed, and another source's table is another file."""
    parts = hub.find_pair(None, "auto", None), engine.target, engine.drafter, lambda message: None
    ours, theirs = (Costs.of_pair(*parts, each)["greedy"] for each in (Drafting(), repeat))
    assert ours.file.path != theirs.file.path and theirs.drafting == repeat
    asked, propose = [], Repeat.propose
    monkeypatch.setattr(Repeat, "propose", lambda *args: asked.append(args[-1]) or propose(*args))
    Bench(engine.target, engine.drafter, [2, 10, 20], KINDS["greedy"], 1, 0, repeat).rounds(2)
    assert 2 in asked


def test_bits_of_kv_have_costs_of_their_own(engine):
    """Rounds over packed K/V take other times; K/V of the model's type keep the file that they had."""
    parts = hub.find_pair(None, "auto", None), engine.target, engine.drafter, lambda message: None, Drafting()
    specs = [with_bits(engine.target.config.kv, bits) for bits in (None, 8, 4)]
    costs = [Costs.of_pair(*parts, each)["greedy"] for each in specs]
    assert len({each.file.path for each in costs}) == 3 and [each.specs for each in costs] == specs
    assert Costs.of_pair(*parts)["greedy"].file.path == costs[0].file.path


def test_a_built_verify_stays_where_copies_are_not_verified(monkeypatch):
    """Copies that are found and cut again cost no second verify; those that are verified do."""
    built = []

    class Counted(loop_module.Verify):
        def __init__(self, *parts):
            built.append(parts)
            super().__init__(*parts)

    monkeypatch.setattr(loop_module, "Verify", Counted)
    model, prompts = tiny.target("moe"), [[5, 6, 7, 8] * 6] * 2
    plain, _ = tiny.decode(model, None, prompts, 0, 16)
    for width, most in ((0, 0), (None, 1)):
        built.clear()
        loop = tiny.begun(model, tiny.drafter(model), prompts, tiny.GREEDY, drafting=Drafting(sources="mtp,copy"))
        loop.mixture.begin([RowText(prompt, text) for prompt, text in zip(prompts, plain, strict=True)])
        found, rounds, texts = 0, 0, [[], []]
        while min(map(len, texts)) < 16:
            found += any(loop.waiting)
            if rounds:  # the first tokens have no verify
                loop.launch(width)
            for text, tokens in zip(texts, loop.step([0, 0], reach=[6, 6]).tokens, strict=True):
                text += tokens
            rounds += 1
        assert [text[:16] for text in texts] == plain
        assert found and (len(built) == rounds if not most else len(built) > rounds)
