"""Sources of drafts on recorded texts: never far under the drafter alone, nor under plain decoding."""

import numpy as np
import pytest

from benchmarks import mixtures, replay
from benchmarks.mixtures import ALL, ALONE, CLASSES, Along, Costs, Course, Ratio, Recorded
from mlx_gemma_mtp.speculative.guide import allows, sole

TEXTS = mixtures.read()
TABLES = {path.stem: replay.read_table(path) for path in sorted((replay.DATA / "costs").glob("*.json"))}
BOUND = "json", "tools"


def test_every_class_is_recorded():
    """Bound texts say at each token what their schema forces, and how many of the drafts it allows."""
    assert set(TEXTS) == set(CLASSES)
    for name, some in TEXTS.items():
        for text in some:
            count, drafts = text.drafts.shape
            assert len(text.tokens) >= count + drafts and text.confidences.shape == text.drafts.shape
            assert (text.forced is None, text.allowed is None) == (name not in BOUND,) * 2
            if name in BOUND:
                assert len(text.forced) == len(text.tokens) and 0.1 < text.forced.mean() < 0.9
                agree = np.cumprod(text.drafts == [text.tokens[i + 1 : i + 1 + drafts] for i in range(count)], axis=1)
                assert all(text.allowed >= agree.sum(1))  # what the text says, its schema allows


def test_a_text_is_emitted_whole_whoever_drafts():
    """A fixed length of the drafter's takes the rounds that counting by hand gives."""
    text, table = TEXTS["code"][0], TABLES["m4max-26b"]
    at = rounds = 0
    while at < len(text.drafts):
        agree = np.cumprod(text.drafts[at][:3] == text.tokens[at + 1 : at + 4])
        at, rounds = at + 1 + int(agree.sum()), rounds + 1
    found = mixtures.run([text], Costs(table), ALONE, 3)
    assert (found.tokens, found.passes) == ([at], [rounds])
    assert found.ends[0] == pytest.approx(rounds * table.rounds_at(1, 512)[3], rel=0.05)
    for sources in (ALONE, ALL):
        found = mixtures.run([text] * 2, Costs(table), sources)
        assert min(found.tokens) >= len(text.drafts) and min(found.ends) > 0


def test_a_verify_that_waits_for_the_host_costs_more():
    """Each round of copies, and each of a bound text, whoever drafts."""
    costs, free = Costs(TABLES["m4max-26b"], rebuild=0.5), Costs(TABLES["m4max-26b"], rebuild=0.0)
    plain = free.table.rounds_at(1, 512)[0]
    for name, sources, drafts in (("edit", ("copy",), 3), ("json", ALONE, 0)):
        dear, cheap = (mixtures.run(TEXTS[name][:1], each, sources, drafts) for each in (costs, free))
        extra = (dear.ends[0] - cheap.ends[0]) / plain
        assert 0.3 * dear.passes[0] < extra <= 0.5 * dear.passes[0] + 1e-9
    assert free.of(1, 2, 3, True) < costs.of(1, 2, 3, True) == pytest.approx(costs.of(1, 2, 3, False) + plain / 2)


def test_a_recorded_schema_forces_and_refuses_along_its_text():
    tokens, drafts = np.arange(10, 20), np.array([[11, 7, 8], [12, 13, 9]])
    forced = np.zeros(10, bool)
    forced[2] = True
    text = Recorded(np.array([1]), tokens, drafts, np.ones((2, 3)), forced, np.array([1, 3]))
    state = Along(text, 0)
    assert state.mask() is None
    state.advance(11)
    ahead = state.copy()
    assert sole(state.mask()) == 12  # and not 7, which the drafter says
    ahead.advance(5)
    assert ahead.mask() is None and sole(state.mask()) == 12
    refused = Along(Recorded(text.prompt, tokens, drafts, text.confidences, np.zeros(10, bool), text.allowed), 0, [11])
    assert not allows(refused.mask(), 7) and allows(refused.mask(), 12) and sole(refused.mask()) is None
    last = Along(text, 1, list(range(12, 20)))  # at the end of what is recorded
    assert last.mask() is None


@pytest.mark.parametrize("rows", [1, 4])
def test_after_a_long_text_copies_lose_nothing(rows):
    """Where each query reads all K/V anew, a wide verify is dear."""
    [(_, table), *_] = replay.after_long_texts({"m4max-26b": TABLES["m4max-26b"]}).items()
    for name, some in TEXTS.items():
        plain, alone, _ = mixtures.ratios(some, Costs(table, replay.LONG), rows, 2)
        assert min(plain.mean, alone.mean) >= 0.97, name


@pytest.mark.parametrize("machine", ["cpu-openblas", "m4max-26b"])
@pytest.mark.parametrize("name", CLASSES)
def test_sources_cost_nothing_where_they_have_nothing_and_pay_where_they_have(machine, name):
    """Never far under plain decoding, nor under the drafter alone, and under 0.97 of them by no whole interval; an edit
    and a bound text take far less. Courses of code differ by 5 %: it takes some of them until a mean says something.
    """
    for rows in (1, 4):
        found = mixtures.ratios(TEXTS[name], Costs(TABLES[machine]), rows, 2 if name in (*BOUND, "edit") else 8)
        least, high = (min(getattr(each, end) for each in (found.plain, found.alone)) for end in ("mean", "high"))
        assert least >= 0.95 and high >= 0.97, found
        assert (name != "edit" or least > 1.4) and (name not in BOUND or least > 1.2), found


def test_an_editor_gains_and_its_partners_lose_nothing():
    """In seconds, by tables of a wide verify that is cheap and of one that is dear."""
    gains = {}
    for machine in ("cpu-openblas", "m2pro-26b"):
        found = mixtures.edited(TEXTS, Costs(TABLES[machine]))
        gains[machine] = found.editor.mean
        assert found.editor.mean > 1.0 and found.others.mean >= 0.97
    assert max(gains.values()) > 1.1


def test_tokens_at_a_time_lie_between_those_of_two_rounds():
    course = Course([3, 6], [2, 2], [2.0, 4.0], [(2.0, (3, 2)), (4.0, (3, 6))])
    assert [course.tokens_at(seconds, 1) for seconds in (0.0, 1.0, 3.0, 9.0)] == [0.0, 1.0, 4.0, 6.0]


def test_a_ratio_of_means_has_an_interval():
    """One course says nothing of the spread; equal courses have none."""
    assert Ratio.of([2.0], [1.0]) == (2.0, 2.0, 2.0)
    found = Ratio.of([1.0, 3.0], [1.0, 1.0])
    assert found.mean == 2.0 and found.low < 2.0 < found.high and str(found) == "2.000 [0.751, 5.329]"


def test_nothing_is_recorded_of_a_class_that_is_not_known(capsys):
    with pytest.raises(SystemExit, match="2"):
        mixtures.main(["--record", "poems"])
    assert "invalid choice: 'poems'" in capsys.readouterr().err
