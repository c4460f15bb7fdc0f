"""The draft length: chosen from literal tables of costs and histories of what was kept."""

import numpy as np
import pytest
from cost_tables import table

from benchmarks import replay
from mlx_gemma_mtp.speculative.auto import LEARN, UNTIMED, Auto
from mlx_gemma_mtp.speculative.choice import (
    BEST,
    CHECK,
    CHECK_MOST,
    CONFIDENCE,
    GRAMMAR,
    LIMIT,
    OFF,
    PROBE,
    PROBE_FROM,
    PROBE_SOON,
    PURSE_FIRST,
    PURSE_LEAST,
    PURSE_MOST,
    PURSE_ROUND,
    REASONS,
    SHORT,
    Choice,
    Pause,
    Purse,
    break_even,
    choose,
    worthwhile,
)
from mlx_gemma_mtp.speculative.correction import Correction, Prices
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, ROWS, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow
from mlx_gemma_mtp.speculative.history import FIRST, History, Trust, expected

FREE = 10**6  # room for drafts
ROW = DraftRow(0, AUTO, FREE, False)


def by(costs: CostTable, **options) -> Depth:
    return Depth(lambda kind, rows: costs, **options)


def known(depth: Depth) -> Auto:
    """What it knows of greedy text."""
    return depth.autos["greedy"]


def seen(drafted: int, accepted: int, times: int = 40) -> History:
    history = History()
    for _ in range(times):
        history = history.after(drafted, accepted, 0.9)
    return history


def prices(costs: CostTable, rows: int = 1) -> Prices:
    """A table that is taken as it is."""
    rounds = tuple(costs.rounds_at(rows, 100))
    return Prices(rounds, costs.draft_at(rows, 100), rounds)


RICH = Purse(100.0)


def chosen(costs: CostTable, history: History, room: int = FREE, pause: Pause | None = None) -> tuple[int, str]:
    choice = choose(prices(costs), [history], history, [room], pause or Pause(), RICH)
    return choice.drafts, choice.reason


def test_expected_tokens():
    assert expected([0.5, 0.5, 0.8], FREE) == pytest.approx([1, 1.5, 1.75, 1.95])
    assert expected([0.5, 0.5, 0.8], 1) == pytest.approx([1, 1.5, 1.5, 1.5])


def test_rates_are_conditional_and_follow_the_recent():
    history = seen(3, 1)  # the first is always kept, the second never, the third is never reached
    first, second, third = history.rates()[:3]
    assert first > 0.9 and second < 0.4 and third == pytest.approx(second, abs=0.05)
    for _ in range(30):
        history = history.after(3, 3, 0.9)
    assert min(history.rates()[:3]) > 0.85
    assert History().rates() == pytest.approx([FIRST] * MAX_DRAFTS)


def test_hopeful_rates_come_down_to_the_likely_ones():
    """With what was tried at a position, and, for a part, with what was tried before it."""
    new, some, many = (History(), seen(1, 1, 3), seen(1, 1, 200))
    for history in (new, some, many):
        assert all(hope > rate for hope, rate in zip(history.hopes(), history.rates(), strict=True))
    off = [history.hopes()[0] - history.rates()[0] for history in (new, some, many)]
    assert off == sorted(off, reverse=True) and off[0] > 3 * off[2]
    poor, unknown = seen(1, 0, 200).hopes(), new.hopes()
    assert poor[0] < 0.45 and poor[3] < 0.5 < unknown[3]  # nothing was tried there, yet it is not hoped for


def test_more_drafts_are_looked_at_where_little_is_known_of_them():
    """One draft pays and four would, but nobody tried them; once they were tried and refused, nobody does."""
    rounds = (1.0, 1.7, 2.5, 3.1, 3.3, 4.0, 4.7, 5.4, *(6.0 + k for k in range(8)))
    timed = Prices(rounds, 0.2, rounds, MAX_DRAFTS, True, timed=True)
    history = seen(1, 1, 12).after(4, 1, 0.98)
    due = Pause(drafting=7)
    assert choose(timed, [history], history, [FREE], due, Purse(4.0)).reason == PROBE
    assert choose(timed, [history], history, [FREE], Pause(drafting=8), Purse(4.0)) == choose(
        timed, [history], history, [FREE], Pause(drafting=4), Purse(4.0)
    )
    known = seen(1, 1, 12)
    for _ in range(12):
        known = known.after(4, 1, 0.98)
    assert choose(timed, [known], known, [FREE], due, Purse(4.0)).reason == BEST


def test_where_rounds_were_timed_before_a_look_comes_sooner():
    """What drafts keep is not known then, but what they cost."""
    rounds = (1.0, 1.9, *(1.9 + 0.6 * k for k in range(1, 15)))
    for timed, wait in ((True, PROBE_SOON), (False, PROBE_FROM)):
        some = Prices(rounds, 0.2, rounds, 4, True, timed=timed)
        reasons = [choose(some, [History()], History(), [FREE], Pause(n), Purse(9.0)).reason for n in (wait - 1, wait)]
        assert reasons == [OFF, PROBE]


def test_a_new_row_is_taken_to_be_like_the_others():
    assert History().rates(seen(7, 0).rates())[0] < 0.25
    assert History().rates(seen(7, 7).rates())[6] > 0.9
    assert (
        seen(1, 0).rates([0.9] * MAX_DRAFTS)[1] < 0.3
    )  # as far as it is like them: what it drops early it drops later


@pytest.mark.parametrize(
    "verify, draft, history, best",
    [
        (0.0, 0.01, seen(7, 7), MAX_DRAFTS),  # drafts cost nothing and are kept
        (0.0, 0.4, seen(7, 0), 0),
        (1.0, 0.01, seen(7, 7), 0),  # a verified token costs a step: nothing can be won
        (0.2, 0.1, seen(4, 2), 2),  # two are kept, never the third
        (0.9, 0.5, seen(7, 7), 0),
    ],
)
def test_the_best_ratio_wins(verify, draft, history, best):
    assert chosen(table(verify, draft), history) == (best, BEST if best else OFF)


def test_room_and_limit():
    costs = table(0.0, 0.01)
    assert chosen(costs, seen(7, 7), room=3) == (3, BEST)
    assert chosen(costs, seen(7, 7), room=0) == (0, LIMIT)
    good = seen(7, 7)
    alone = choose(prices(costs, 2), [good, good], good, [2, 0], Pause(), RICH)
    assert (alone.drafts, alone.reason) == (2, BEST)  # the other row, at its end, has no say


def test_rows_share_one_length():
    """At a cost where a good row alone would draft 7 and a bad one none, together they draft something between."""
    costs, good, bad = table(0.05, 0.1), seen(7, 7), seen(7, 0)
    pool = History()
    alone = choose(prices(costs), [good], pool, [FREE], Pause(), RICH).drafts
    both = choose(prices(costs, 2), [good, bad], pool, [FREE, FREE], Pause(), RICH).drafts
    many_bad = choose(prices(costs, 8), [good, *[bad] * 7], pool, [FREE] * 8, Pause(), RICH).drafts
    assert alone == MAX_DRAFTS >= both > many_bad


def test_probes_back_off_and_find_the_way_back():
    depth, kept = by(table(0.1, 0.2), frozen=True), 0
    lengths, reasons = [], []
    for step in range(160):
        [drafts] = depth.draft([ROW], 100)
        width = depth.verify([ROW], 100, [[0.9] * drafts], [drafts])
        kept = 0 if step < 110 else width
        reasons.append(depth.reason(0))
        depth.observe({0: kept})
        lengths.append(width)
    probes = [i for i, reason in enumerate(reasons) if reason == PROBE and i < 110]
    gaps = np.diff(probes)
    assert len(probes) >= 3 and list(gaps) == sorted(gaps) and gaps[-1] > gaps[0] > 8
    assert sum(lengths[20:110]) <= 6  # a few probes, no more
    assert min(lengths[149:]) >= 5 and set(lengths[152:]) == {MAX_DRAFTS}
    assert set(reasons) <= set(REASONS)


def test_doubtful_drafts_are_cut():
    costs, trust = table(0.3, 0.05), Trust()
    width = lambda *row: worthwhile(prices(costs), trust, [list(row)], [FREE], 1.0)  # noqa: E731
    assert width(0.95, 0.95, 0.95) == 3
    assert width(0.95, 0.1, 0.95) == 1
    assert width(0.01, 0.9) == 1  # the first always stays
    assert width() == 0
    rows = [[0.95, 0.95], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1]]
    assert worthwhile(prices(costs, 4), trust, rows, [FREE] * 4, 1.0) == 1
    for _ in range(200):  # a drafter that is always sure and mostly wrong is not believed
        trust = trust.after([0.95], 0)
    assert worthwhile(prices(costs), trust, [[0.95, 0.95]], [FREE], 1.0) == 1


def test_a_probe_of_more_drafts_is_not_cut_by_what_they_cost_at_worst(monkeypatch):
    """Else what it is to find out would never be timed."""
    auto, few = Auto(table(0.3, 0.05)), 1
    worst, hope = (1.0, 1.8, *(1.8 + 0.9 * k for k in range(1, 15))), (1.0, 1.8, *(1.8 + 0.3 * k for k in range(1, 15)))
    monkeypatch.setattr(auto, "prices", lambda rows, context: Prices(worst, 0.05, hope, few, True))
    width = lambda reason: auto.width(Choice(3, reason, 1.0), 1, 0, [[0.9, 0.9, 0.9]], [3], [FREE])  # noqa: E731
    assert (width(BEST), width(PROBE)) == (few, 3)


def test_drafts_behind_a_refused_one_say_nothing_of_confidence():
    trust = Trust().after([0.95, 0.15, 0.55, 0.55], 1)
    assert [i for i, tried in enumerate(trust.tried) if tried] == [1, 9] and trust.kept[9] == 1 and trust.kept[1] == 0


def test_a_cut_is_said():
    depth = by(table(0.3, 0.01), frozen=True)
    [made] = depth.draft([ROW], 100)
    assert made > 1 and depth.verify([ROW], 100, [[0.9] + [0.01] * (made - 1)], [made]) == 1
    depth.draft([ROW], 100)
    assert depth.reason(0) == CONFIDENCE
    depth.observe({0: 1})


@pytest.mark.parametrize("confident", [True, False])
def test_what_a_grammar_cuts_was_drafted_in_vain(confident):
    """A sure drafter, whose first draft a grammar refuses every time: after some rounds nothing is drafted."""
    depth, made, reasons = by(table(0.1, 0.1), rejection=not confident, frozen=True), [], []
    rows = [DraftRow(7, AUTO, FREE, sampled=True)]
    for _ in range(60):
        [drafts] = depth.draft(rows, 100)
        assert depth.confident == confident
        assert depth.verify(rows, 100, [[0.99] * drafts if confident else []], [0]) == 0
        made.append(drafts)
        reasons.append(depth.reason(7))
        depth.observe({7: 0})
    assert made[0] > 0 and reasons[0] == GRAMMAR and sum(made[:8]) <= 20 and sum(made[8:]) <= 8
    assert {OFF, GRAMMAR} == set(reasons) and all(
        (each == GRAMMAR) == bool(n) for each, n in zip(reasons, made, strict=True)
    )


def test_a_grammar_cuts_before_doubt_does():
    """Of five drafts the grammar leaves three and doubt two: the third is a doubt, the fourth a failure."""
    depth = by(table(0.1, 0.01), frozen=True)
    [made] = depth.draft([ROW], 100)
    assert made >= 5
    assert depth.verify([ROW], 100, [[0.9, 0.9, 0.01, 0.9, 0.9] + [0.9] * (made - 5)], [3]) == 2
    assert depth.reason(0) == CONFIDENCE
    depth.observe({0: 2})
    pool = known(depth).pool
    first, second, third, fourth = pool.tried[:4]
    assert (first, second, third) == (1, 1, 1) and fourth == pytest.approx(0.01) and pool.kept[3] == 0


def run(
    depth: Depth,
    truth: CostTable,
    rounds: int,
    keep: float,
    late: float = 1.0,
    room: int = FREE,
    outlier: int | None = None,
) -> list[tuple]:
    """(drafts, reason) of rounds of one row that keeps this share of its drafts, in a batch's order; late: what the
    clock says over the truth. outlier: a round that takes 4.5 times as long as it should.
    """
    verify, draft, found, rows = truth.verify_at(1, 100), truth.draft_at(1, 100), [], [ROW._replace(useful=room)]
    [made] = depth.draft(rows, 100)
    for i in range(rounds):
        width = depth.verify(rows, 100, [[0.9] * made], [made])
        now, [made] = made, depth.draft(rows, 100)
        depth.timed((verify[width] + made * draft) * (4.5 if i == outlier else late))
        found.append((now, depth.reason(0)))
        depth.observe({0: int(width * keep)})
    return found


def test_after_a_long_text_fewer_drafts_pay():
    """Attention makes a wide verify dear; between the contexts that were measured costs are linear."""
    costs, made = table(0.02, 0.02, attention=1.0), []
    for context in (100, 4096, 16384, 32768):
        depth = by(costs, frozen=True)
        depth.autos["greedy"] = auto = Auto(costs, frozen=True)
        auto.pool, auto.purse = seen(7, 4), RICH
        made += depth.draft([ROW], context)
    assert made[0] >= 4 and made == sorted(made, reverse=True) and made[-1] < made[1] <= made[0]


def test_what_a_round_took_counts_for_its_context():
    """After a long text a flat table is off; a short one is none the wiser, and the file learns where it was."""
    flat, truth = table(0.02, 0.05), table(0.02, 0.05, attention=1.0)
    depth = by(flat)
    for context in (100, 32768):
        verify, draft = truth.verify_at(1, context), truth.draft_at(1, context)
        depth.forget([0])
        [made] = depth.draft([ROW], context)
        for _ in range(80):
            width = depth.verify([ROW], context, [[0.9] * made], [made])
            [made] = depth.draft([ROW], context)
            depth.timed(verify[width] + made * draft)
            depth.observe({0: width})
    auto = known(depth)
    short, long = auto.prices(1, 100), auto.prices(1, 32768)
    assert short.rounds[7] / short.rounds[0] == pytest.approx(truth.rounds_at(1, 100)[7], rel=0.05)
    rounds = truth.rounds_at(1, 32768)
    assert long.rounds[7] / long.rounds[0] == pytest.approx(rounds[7] / rounds[0], rel=0.2)  # one plain time alone
    verified, drafted = depth.learned()["greedy"]
    assert {cell[:2] for cell in verified} == set(drafted) == {(1, 0), (1, 32768)}


def test_a_text_that_grows_goes_on_as_it_was_across_a_border():
    """What was timed after a shorter text holds until there are times of its own."""
    truth, wrong, seen = table(0.3, 0.2), table(0.02, 0.02), Correction()
    for _ in range(9):
        for width in (0, 1, 3):
            seen = seen.after(wrong, 1, 2000, width, width, truth.rounds_at(1, 100)[width])
    before, after = seen.prices(wrong, 1, 2000), seen.prices(wrong, 1, 2200)
    assert after == before and after.anchored and after.tried == 3
    assert not seen.prices(wrong, 1, 32768).anchored and seen.prices(wrong, 1, 32768).tried == 0


def test_times_correct_the_table():
    """Every cell has the truth once it was timed, whatever the table says and whatever one outlier says."""
    truth, wrong, seen = table(0.3, 0.2), table(0.02, 0.02), Correction()
    for number in range(9):
        for width in (0, 1, 3):
            late = 10.0 if number == 4 else 1.0
            seen = seen.after(wrong, 1, 100, width, 0, truth.verify_at(1, 100)[width] * late)
        seen = seen.after(wrong, 1, 100, 0, 1, truth.verify_at(1, 100)[0] + truth.draft_at(1, 100))
    found, right = seen.prices(wrong, 1, 100), truth.rounds_at(1, 100)
    assert [found.rounds[k] for k in (0, 1, 3)] == pytest.approx([right[k] for k in (0, 1, 3)], rel=0.08)
    assert 1.5 < found.draft / 0.1 < 2.1 and found.verify(1) == pytest.approx(1.3, rel=0.06)  # the table's is 0.1
    assert found.rounds[2] == pytest.approx(right[2], rel=0.1)  # between its neighbours
    assert found.rounds[7] == pytest.approx(right[7], rel=0.15) and found.tried == 3  # beyond them, on their line
    assert list(found.rounds) == sorted(found.rounds) and found.anchored and found.live
    other = seen.prices(wrong, 8, 100)  # what one row says of the ratios holds for eight until they are timed
    assert other.rounds[3] / other.rounds[0] > 1.5 * wrong.rounds_at(8, 100)[3] / wrong.rounds_at(8, 100)[0]
    assert not other.anchored and other.tried == 0


def test_one_time_alone_is_half_believed():
    costs, seen = table(0.1, 0.1), Correction()
    for _ in range(9):
        seen = seen.after(costs, 1, 100, 0, 0, 1.0)
    right = costs.rounds_at(1, 100)[1]
    seen = seen.after(costs, 1, 100, 1, 1, 4 * right)
    assert 1.2 * right < seen.prices(costs, 1, 100).rounds[1] < 2.5 * right
    for _ in range(3):
        seen = seen.after(costs, 1, 100, 1, 1, right)
    assert seen.prices(costs, 1, 100).rounds[1] == pytest.approx(right, rel=0.05)


def test_outliers_among_the_few_times_of_one_kind_are_not_taken_for_the_truth():
    """Plain rounds that make drafts and those that make none are kinds of their own: three of five may be late."""
    costs, seen = table(0.1, 0.1), Correction()
    for made, late in [(0, 1.0)] * 2 + [(1, 1.0)] * 4 + [(0, 3.8)] * 3:
        seen = seen.after(costs, 1, 100, 0, made, late * (1.0 + 0.1 * made))
    for _ in range(4):
        seen = seen.after(costs, 1, 100, 1, 1, costs.rounds_at(1, 100)[1])
    assert seen.prices(costs, 1, 100).rounds[1] / seen.prices(costs, 1, 100).rounds[0] > 1.1


def test_a_table_that_is_far_off_is_not_taken_for_noise():
    """Times that agree with each other are believed, however far they are from what the table says."""
    for factor in (0.8, 2.0, 4.0):
        costs, seen = table(0.1, 0.1), Correction()
        for _ in range(6):
            for width, off in ((0, 1.0), (2, factor)):
                seen = seen.after(costs, 1, 100, width, width, off * costs.rounds_at(1, 100)[width])
        found = seen.prices(costs, 1, 100)
        assert found.rounds[2] / found.rounds[0] == pytest.approx(factor * 1.4, rel=0.15), factor


def test_the_time_of_a_round_tells_its_verify_from_the_drafts_made_after_it():
    """Where both change from round to round, each finds its own time; noise makes neither free."""
    truth, draws, seen = table(0.05, 0.3), np.random.default_rng(0), Correction()
    wrong = table(0.2, 0.15)
    for width, made in [(0, 0), (0, 3), (3, 3), (3, 1), (1, 3), (3, 0)] * 8:
        seconds = truth.verify_at(1, 100)[width] + made * truth.draft_at(1, 100)
        seen = seen.after(wrong, 1, 100, width, made, seconds * np.exp(0.1 * draws.standard_normal()))
    found = seen.prices(wrong, 1, 100)
    assert found.draft / found.rounds[0] == pytest.approx(0.3, rel=0.2)
    assert found.verify(3) / found.rounds[0] == pytest.approx(1.15, rel=0.15)


def test_where_more_drafts_cost_less_than_the_first_one_does_none_is_stuck_at_one():
    """Experts: the first draft wakes many, each further one few. A line through the first makes no second look good."""
    steep = CostTable.of(
        {(r, 0, w): 1 + 0.72 * (w > 0) + 0.25 * max(0, w - 1) for r in ROWS for w in range(MAX_DRAFTS + 1)},
        {(r, 0): 0.1 for r in ROWS},
    )
    assert min(drafts for drafts, why in run(by(table(0.7, 0.1)), steep, 80, 1.0)[50:] if why == BEST) >= 5


def test_a_look_at_more_drafts_does_not_keep_plain_rounds_from_being_timed():
    pause = Pause()
    for reason in (BEST, BEST, BEST, PROBE, BEST):
        pause = pause.chosen(reason)
    assert pause.drafting == 5 and pause.chosen(CHECK).drafting == 0


@pytest.mark.parametrize("outlier", range(9))
def test_one_late_round_at_the_start_stops_no_drafts_that_pay(outlier):
    """The fourth round is the first that makes drafts: the only one that tells what a draft takes."""
    truth = table(0.02, 0.3)
    made = [drafts for drafts, _ in run(by(truth), truth, 60, 1.0, outlier=outlier)]
    assert sum(drafts > 0 for drafts in made) > 45 and min(made[30:34]) >= 3


def test_an_outlier_as_the_only_time_of_drafts_makes_no_draft_dearer_than_a_plain_round():
    """And later times that say nothing of drafts make nothing of it either."""
    costs, seen = table(0.02, 0.3), Correction()
    for late, rounds in ((1.0, 4), (4.5, 1)):
        for _ in range(rounds):
            seen = seen.after(costs, 1, 100, 0, int(late > 1), late * (1 + 0.3 * (late > 1)))
    assert seen.prices(costs, 1, 100).draft < 0.6
    for width in (1, 0, 0, 0, 0, 0, 0):
        seen = seen.after(costs, 1, 100, width, 0, costs.verify_at(1, 100)[width])
        found = seen.prices(costs, 1, 100)
        assert found.draft < 0.6 * found.rounds[0]


def test_prices_follow_a_slow_change():
    """They are computed anew only where times say something else; many steps that say nearly the same are one."""
    costs = table(0.1, 0.1)
    auto = Auto(costs)
    for i in range(200):
        for width in (0, 2):
            seconds = costs.rounds_at(1, 128)[width] * (1.001**i if width else 1.0)
            auto.timed(1, 128, width, width, True, seconds)
    assert auto.prices(1, 128).rounds[2] == pytest.approx(auto.correction.prices(costs, 1, 128).rounds[2], rel=0.03)


def test_times_that_say_what_was_expected_move_nothing():
    """Each fit and each new estimate of prices takes time of the CPU."""
    costs, seen = table(0.1, 0.1), Correction()
    rounds = costs.rounds_at(1, 100)
    for _ in range(20):
        for width in (0, 2):
            seen = seen.after(costs, 1, 100, width, width, rounds[width])
    later = seen.after(costs, 1, 100, 2, 2, 1.01 * rounds[2])
    assert later.factors is seen.factors and later.says_the_same(seen, (1, 0))
    for _ in range(5):
        later = later.after(costs, 1, 100, 2, 2, 1.2 * rounds[2])
    assert later.factors is not seen.factors and not later.says_the_same(seen, (1, 0))


def test_a_first_time_of_drafts_moves_prices_however_many_plain_times_there_are():
    costs, seen = table(0.1, 0.1), Correction()
    for _ in range(20):
        seen = seen.after(costs, 1, 100, 0, 0, 1.0)
    later = seen.after(costs, 1, 100, 0, 1, 1.5)
    assert later.prices(costs, 1, 100).draft > 1.1 * seen.prices(costs, 1, 100).draft


def test_a_single_time_of_drafts_that_is_far_too_long_makes_no_verify_free():
    """Others' drafts are priced by the verify alone; a single such time is hardly believed."""
    costs, seen = table(0.1, 0.1), Correction()
    for _ in range(3):
        seen = seen.after(costs, 1, 100, 0, 0, 1.0)
    seen = seen.after(costs, 1, 100, 0, 1, 1.55)
    found = seen.prices(costs, 1, 100)
    assert 0.1 < found.draft < 0.2 and found.verify(7) >= 0.9 * costs.verify_at(1, 100)[7]
    for _ in range(4):
        for made, seconds in ((0, 1.0), (1, 1.55)):
            seen = seen.after(costs, 1, 100, 0, made, seconds)
    assert seen.prices(costs, 1, 100).draft > 0.35


def test_the_machine_may_be_slower_than_the_table_throughout():
    """Only ratios matter: ten times the table's seconds, the same choices."""
    costs = table(0.1, 0.1)
    assert run(by(costs), costs, 60, 1.0, late=10.0) == run(by(costs), costs, 60, 1.0)
    assert run(by(costs), costs, 60, 1.0)[-1][0] == MAX_DRAFTS


def test_a_table_that_flatters_is_found_out():
    """A verify of many drafts no dearer than of one: by a frozen table drafting goes on, by times it stops."""
    truth = table(0.5, 0.3)
    flat = CostTable.of(
        {(r, 100, w): 1.0 + 0.05 * (w > 0) for r in ROWS for w in range(MAX_DRAFTS + 1)}, {(1, 100): 0.01}
    )
    assert sum(drafts for drafts, _ in run(by(flat), truth, 80, 0.4)[20:]) <= 12
    assert sum(drafts for drafts, _ in run(by(flat, frozen=True), truth, 80, 0.4)[20:]) > 40


def test_a_table_that_deters_is_found_out():
    truth, dear = table(0.02, 0.05), table(0.9, 0.6)
    assert min(drafts for drafts, why in run(by(dear), truth, 200, 1.0)[150:] if why != CHECK) >= 4
    assert max(drafts for drafts, _ in run(by(dear, frozen=True), truth, 200, 1.0)) <= 1


def test_plain_rounds_are_timed_first_and_now_and_then():
    found = run(by(table(0.1, 0.1)), table(0.1, 0.1), 300, 1.0)
    assert [why for _, why in found[:4]] == [CHECK] * 4 and found[4] == (1, BEST)
    checks = [i for i, (_, why) in enumerate(found) if why == CHECK]
    assert 2 <= len(checks) - 4 <= 20 and all(found[i][0] == 0 for i in checks)


def test_where_no_round_is_timed_the_table_holds():
    """A caller that takes its time with every chunk: then no times come."""
    depth, lengths = by(table(0.05, 0.05)), []
    for _ in range(UNTIMED + 12):
        [made] = depth.draft([ROW], 100)
        lengths.append(depth.verify([ROW], 100, [[0.9] * made], [made]))
        depth.observe({0: lengths[-1]})
    assert lengths[:CHECK_MOST] == [0] * CHECK_MOST and lengths[-1] == MAX_DRAFTS


def test_a_machine_that_changes_pace_takes_the_other_lengths_with_it():
    """Plain rounds alone are made, and take twice as long: what rounds with drafts took before counts twice, too."""
    costs, seen = table(0.3, 0.2), Correction()
    right = costs.rounds_at(1, 100)
    for width in (0,) * 9 + (1,) * 5:
        seen = seen.after(costs, 1, 100, width, width, right[width])
    before = seen.prices(costs, 1, 100)
    for _ in range(9):
        seen = seen.after(costs, 1, 100, 0, 0, 2 * right[0])
    after = seen.prices(costs, 1, 100)
    assert seen.pace == pytest.approx(2.0, rel=0.05)
    assert after.rounds[1] / after.rounds[0] == pytest.approx(before.rounds[1] / before.rounds[0], rel=0.05)
    for _ in range(9):
        seen = seen.after(costs, 1, 100, 0, 0, right[0])
    assert seen.pace == pytest.approx(1.0, rel=0.05)
    assert seen.prices(costs, 1, 100).rounds == pytest.approx(before.rounds, rel=0.05)


def test_a_few_late_rounds_are_no_change_of_pace():
    costs, seen = table(0.3, 0.2), Correction()
    for number in range(60):
        late = 4.0 if number % 5 in (0, 1, 2) and number > 9 else 1.0  # three of five
        seen = seen.after(costs, 1, 100, 0, 0, late)
    assert seen.pace == 1.0


def test_when_rounds_with_drafts_change_plain_ones_are_timed_anew():
    depth, truth = by(table(0.1, 0.1)), table(0.1, 0.1)
    assert run(depth, truth, 60, 1.0)[-1][0] == MAX_DRAFTS
    later = [why for _, why in run(depth, truth, 12, 1.0, late=3.0)]
    assert later.count(CHECK) >= 3, later


@pytest.mark.parametrize(("slow", "phase"), [(2.0, 50), (3.0, 35), (0.5, 40)])
def test_a_machine_that_comes_and_goes(slow, phase):
    """Busy for a while, then free, and so on: of 32 texts few lose more than 5 %, by chance, and most nothing."""
    traces, clock, found = replay.read_traces(), replay.Clock(0.1, 0.05, 4.0, slow, phase), []
    for machine in ("cpu-openblas", "m2pro-26b"):
        truth = replay.read_table(replay.DATA / "costs" / f"{machine}.json")
        for trace in traces.values():
            for rows in (1, 2, 4, 8):
                rounds = replay.against_plain(trace, truth, AUTO, truth, rows, 300, clock, rows)
                found.append(sum(plain for plain, _ in rounds) / sum(seconds for _, seconds in rounds))
    found.sort()
    assert found[0] > 0.9 and found[3] > 0.95 and found[len(found) // 2] > 0.985, found


def test_no_clock_reaches_a_frozen_table():
    costs = table(0.1, 0.1)
    assert run(by(costs, frozen=True), costs, 80, 0.7, late=9.0) == run(by(costs, frozen=True), costs, 80, 0.7)
    slow = by(costs, frozen=True)
    run(slow, table(2.0, 2.0), 40, 1.0)
    assert known(slow).correction == Correction() and slow.learned() == {"greedy": ({}, {})}


def test_a_purse_bounds_what_drafts_lose():
    assert Purse().left == PURSE_FIRST and Purse().after(-50.0).left == PURSE_LEAST
    assert Purse().after(50.0).left == PURSE_MOST and Purse(0.0).after(0.0).left > 0
    costs, none = table(0.1, 0.1), History()
    poor, rich = (choose(prices(costs), [none], none, [FREE], Pause(), Purse(left)) for left in (PURSE_LEAST, 9.0))
    assert poor.drafts == 0 and poor.reason == OFF and rich.drafts > 1
    some = choose(prices(costs), [none], none, [FREE], Pause(), Purse(0.45)).drafts
    assert some == 2  # 0.2 a draft, if none is kept
    good = seen(7, 7)
    assert choose(prices(costs), [good], good, [FREE], Pause(), Purse(0.0)).drafts == MAX_DRAFTS  # kept for certain


def test_a_length_that_was_not_timed_is_affordable_by_what_the_timed_ones_keep():
    rounds = tuple(1 + 0.8 * drafts for drafts in range(MAX_DRAFTS + 1))
    good, known = seen(7, 7), Prices(rounds, 0.1, rounds, tried=1, live=True)
    pause = Pause(checks=8)
    assert choose(known, [good], good, [FREE], pause, Purse(0.5)).drafts == 1
    assert choose(known, [good], good, [FREE], pause, Purse(9.0)).drafts == 3  # no more than twice and one
    assert choose(known, [good], good, [FREE], Pause(checks=8, drafting=1000), Purse(0.5)).reason == CHECK


def test_the_purse_is_told_what_a_round_earned():
    """Verify and drafts by the table where it is frozen; by the clock else; a plain round earns none."""
    costs = table(0.1, 0.2)
    depth = by(costs, frozen=True)
    [made] = depth.draft([ROW], 100)
    assert depth.verify([ROW], 100, [[0.9] * made], [made]) == made > 1
    depth.observe({0: 1})
    assert known(depth).purse.left == pytest.approx(Purse().after(2 - costs.rounds_at(1, 100)[made]).left)

    def left(late: float) -> float:
        depth = by(costs)
        run(depth, costs, 4, 0.0)
        assert known(depth).purse.left == pytest.approx(PURSE_FIRST + 4 * PURSE_ROUND)  # plain so far
        assert depth.verify([ROW], 100, [[0.9]], [1]) == 1
        depth.draft([ROW], 100)
        depth.timed(late * 1.3)
        depth.observe({0: 1})
        return known(depth).purse.left

    assert left(1.0) > left(1.3) + 0.2 > left(1.6) + 0.4


def test_everybodys_history_lasts_longer_than_a_requests_own():
    depth = by(table(0.02, 0.02), frozen=True)
    run(depth, table(0.02, 0.02), 60, 1.0)
    assert known(depth).pool.tried[0] > 25 and 9 < depth._own[0].tried[0] < 11
    depth.forget([0])
    assert not depth._own and known(depth).pool.tried[0] > 25


def test_a_short_text_tries_nothing_new():
    costs = table(0.01, 0.01)
    rounds = run(by(costs), costs, 30, 1.0, room=SHORT - 1)
    assert not any(drafts for drafts, _ in rounds)
    depth = by(costs)
    run(depth, costs, 60, 1.0)
    assert run(depth, costs, 5, 1.0, room=SHORT - 1)[-1][0] == MAX_DRAFTS  # what is known to pay is done
    waiting = Pause(rounds=1000)
    assert chosen(table(0.9, 0.5), seen(7, 0), SHORT - 1, waiting) == (0, OFF)
    assert chosen(table(0.9, 0.5), seen(7, 0), SHORT, waiting) == (1, PROBE)


def test_what_was_learned_stands_in_proportion_to_the_tables_plain_round():
    depth, truth = by(table(0.02, 0.02)), table(0.3, 0.2)
    run(depth, truth, 100, 1.0, late=5.0)
    verified, drafted = depth.learned()["greedy"]
    lengths = {width for _, _, width in verified} - {0}
    assert lengths and {cell[:2] for cell in verified} == set(drafted) == {(1, 0)}  # a short text
    assert verified[1, 0, 0] == 1.0
    for width in lengths:
        assert verified[1, 0, width] + width * drafted[1, 0] == pytest.approx(truth.rounds_at(1, 100)[width], rel=0.1)
    assert depth.learned() == {"greedy": ({}, {})} and LEARN == 16


def test_break_even():
    even = break_even(table(0.25, 0.25), 1, 100)
    assert even[0] == pytest.approx(0.5, abs=1e-6)  # 1 + a = 1.5
    assert even[1] == pytest.approx((5**0.5 - 1) / 2, abs=1e-6)  # a + a^2 = 1
    assert break_even(table(1.0, 0.5), 1, 100) == [None] * MAX_DRAFTS


def test_plain_rounds_that_were_timed_amid_noise_do_not_make_drafts_look_free():
    """Most plain times are four times too long: a round that does more and took less says so."""
    truth = table(0.5, 0.1)
    correction = Correction()
    for factor in (1.0, 4.0, 4.1, 4.2):
        correction = correction.after(truth, 2, 128, 0, 0, factor * truth.verify_at(2, 128)[0])
    assert correction.prices(truth, 2, 128).rounds[0] > 3 * truth.verify_at(2, 128)[0]
    for width in (1, 1, 2):
        correction = correction.after(truth, 2, 128, width, width, truth.rounds_at(2, 128)[width])
    prices = correction.prices(truth, 2, 128)
    assert prices.rounds[0] < 1.3 * truth.rounds_at(2, 128)[1]
