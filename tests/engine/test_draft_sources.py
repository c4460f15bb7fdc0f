"""Sources of drafts from end to end: copies, forced spans, a prediction; figures by source; no text changes."""

import re
from unittest import mock

import pytest
from cost_tables import table
from trained import OF_MOE

pytest.importorskip("llguidance")

from mlx_gemma_mtp import SamplingParams, UserError, load
from mlx_gemma_mtp.engine.tables import Tables

CODE = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"
AGAIN = SamplingParams(max_tokens=80, temperature=0.0, regex=re.escape(CODE), seed=0)
FREE = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)


@pytest.fixture(scope="module", autouse=True)
def known_costs():
    """What the machine does besides changes no choice."""
    with mock.patch.object(Tables, "__call__", lambda self, kind, rows: table(verify=0.1, draft=0.1)):
        yield


@pytest.fixture(scope="module")
def engine(known_costs):
    with load(**OF_MOE, dtype="float32", learning=False, draft_sources="mtp,copy,forced") as engine:
        yield engine


def rounds(results) -> int:
    return sum(result.stats.rounds for result in results)


@pytest.mark.parametrize("sources, name", [("mtp,copy", "copy"), ("mtp,forced", "forced")])
def test_a_text_that_the_prompt_holds_takes_few_passes(sources, name):
    with load(**OF_MOE, dtype="float32", learning=False, draft_sources=sources) as engine:
        plain, found = (engine.generate([f"Say again:\n{CODE}"], [AGAIN], num_draft_tokens=k) for k in (0, "auto"))
    assert found[0].tokens == plain[0].tokens and found[0].error is None
    counts = found[0].stats.sources[name]
    assert counts["accepted"] > 10 and rounds(found) < 0.6 * rounds(plain)
    assert found[0].stats.depths and any(name in reasons for reasons in found[0].stats.depths.values())


def test_a_prediction_is_copied_from():
    """The prompt holds nothing of it."""
    with load(**OF_MOE, dtype="float32", learning=False, draft_sources="mtp,copy") as engine:
        without = list(engine.stream("Write it.", AGAIN))[-1].result
        result = list(engine.stream("Write it.", AGAIN, prediction=CODE))[-1].result
        with pytest.raises(UserError, match=r"^prediction is 3, expected text"):
            engine.stream("x", FREE, prediction=3)
        with pytest.raises(UserError, match=r"^the prediction has '.udcff' at 1, which is no character"):
            engine.stream("x", FREE, prediction="a\udcff")
    assert result.tokens == without.tokens and result.stats.rounds < 0.6 * without.stats.rounds


@pytest.mark.parametrize("way", [{"prediction": "<turn|>"}, {"chat_template": False}, {}], ids=str)
def test_no_two_threads_encode_at_once(engine, monkeypatch, way):
    """The tokenizer keeps whether control strings are text: one thread's would be control tokens by another's call."""
    kind, locked = type(engine.text.fast_tokenizer), []
    encode = kind._encode_plus

    def watched(self, *args, **kwargs):
        locked.append(engine.text.template.lock.locked())
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(kind, "_encode_plus", watched)
    engine.stream(f"<turn|>Hello {way}", FREE, **way).close()  # a text that was not encoded before
    assert locked and all(locked)


EDIT = [f"Say again:\n{CODE}", *(f"What is {i}?" for i in range(7))], [AGAIN, *[FREE] * 7]


def test_partners_of_an_edit_lose_nothing(engine):
    """Seven free rows take as many passes as without the editor's drafts, at most, where a wide verify is dear."""
    plain, found = (engine.generate(*EDIT, num_draft_tokens=drafts) for drafts in (0, "auto"))
    assert [each.tokens for each in found] == [each.tokens for each in plain]
    assert all(a.stats.rounds <= b.stats.rounds for a, b in zip(found, plain, strict=True))


def test_an_editor_among_seven_gains_where_a_wide_verify_pays():
    """It takes half of the passes that the drafter alone leaves it, and no other row takes more."""
    found = []
    with mock.patch.object(Tables, "__call__", lambda self, kind, rows: table(verify=0.002, draft=0.1)):
        for sources in ("mtp", "mtp,copy", "mtp,copy,forced"):
            with load(**OF_MOE, dtype="float32", learning=False, draft_sources=sources) as engine:
                found.append(engine.generate(*EDIT, num_draft_tokens="auto"))
    alone, *others = found
    for each in others:
        assert [result.tokens for result in each] == [result.tokens for result in alone]
        passes, before = ([result.stats.rounds for result in results] for results in (each, alone))
        assert 2 * passes[0] <= before[0] and all(a <= b for a, b in zip(passes[1:], before[1:], strict=True))


def test_equal_calls_have_equal_rounds_where_costs_are_frozen(engine):
    first, second = (engine.generate([f"Say again:\n{CODE}"], [AGAIN])[0].stats for _ in range(2))
    assert (first.depths, first.sources) == (second.depths, second.sources)
