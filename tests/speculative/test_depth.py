"""The draft length: chosen from literal tables and histories, replayed on recorded traces, live in the loop."""

import json

import mlx.core as mx
import numpy as np
import pytest
from cost_tables import random_table, table

from benchmarks import replay
from mlx_gemma_mtp import SamplingParams, calibrate, load
from mlx_gemma_mtp.checks import speedup
from mlx_gemma_mtp.engine import calibration
from mlx_gemma_mtp.engine.calibration import KINDS, Costs
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.ops import expert_paths, kernels
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
    PURSE_FIRST,
    PURSE_LEAST,
    PURSE_MOST,
    PURSE_ROUND,
    REASONS,
    SHORT,
    Pause,
    Purse,
    break_even,
    choose,
    worthwhile,
)
from mlx_gemma_mtp.speculative.correction import Correction, Prices
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, ROWS, CostFile, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow
from mlx_gemma_mtp.speculative.history import History, Trust, expected

FREE = 10**6  # room for drafts
ROW = DraftRow(0, AUTO, FREE, False)


def by(costs: CostTable, **options) -> Depth:
    return Depth(lambda kind, idle: costs, **options)


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
    return Prices(rounds, costs.draft_at(rows), rounds)


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
    assert first > 0.9 and second < 0.25 and third == pytest.approx(second, abs=0.05)
    for _ in range(30):
        history = history.after(3, 3, 0.9)
    assert min(history.rates()[:3]) > 0.85
    assert History().rates() == [0.75] * MAX_DRAFTS


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


def test_drafting_follows_a_schema(engine):
    """JSON by the bundled pair, which drafts Python: most drafts are refused, and soon few are made."""
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    params = SamplingParams(max_tokens=60, temperature=0.0, json_schema=json.dumps(schema), seed=0)
    auto = with_table(engine, table(0.1, 0.1)).depth.autos["greedy"]
    made, choose = [], auto.choose
    auto.choose = lambda *about: made.append(choose(*about)) or made[-1]
    drafted, lengths = [], []
    for _ in range(3):
        made.clear()
        stats = engine.generate("Invent a user.", params).stats
        drafted.append((sum(each.drafts for each in made), stats.drafted))
        lengths.append(stats.depths)
    assert GRAMMAR in {reason for each in lengths for reasons in each.values() for reason in reasons}
    assert drafted[2][0] <= 2 * drafted[2][1] + 8, drafted


def run(depth: Depth, truth: CostTable, rounds: int, keep: float, late: float = 1.0, room: int = FREE) -> list[tuple]:
    """(drafts, reason) of rounds of one row that keeps this share of its drafts, in a batch's order; late: what the
    clock says over the truth.
    """
    verify, draft, found, rows = truth.verify_at(1, 100), truth.draft_at(1), [], [ROW._replace(useful=room)]
    [made] = depth.draft(rows, 100)
    for _ in range(rounds):
        width = depth.verify(rows, 100, [[0.9] * made], [made])
        now, [made] = made, depth.draft(rows, 100)
        depth.timed((verify[width] + made * draft) * late)
        found.append((now, depth.reason(0)))
        depth.observe({0: int(width * keep)})
    return found


def test_times_correct_the_table():
    """Every cell has the truth once it was timed, whatever the table says and whatever one outlier says."""
    truth, wrong, seen = table(0.3, 0.2), table(0.02, 0.02), Correction()
    for number in range(9):
        for width in (0, 1, 3):
            late = 10.0 if number == 4 else 1.0
            seen = seen.after(wrong, 1, 100, width, 0, truth.verify_at(1, 100)[width] * late)
        seen = seen.after(wrong, 1, 100, 0, 1, truth.verify_at(1, 100)[0] + truth.draft_at(1))
    found, right = seen.prices(wrong, 1, 100), truth.rounds_at(1, 100)
    assert [found.rounds[k] for k in (0, 1, 3)] == pytest.approx([right[k] for k in (0, 1, 3)], rel=0.06)
    assert found.draft == pytest.approx(truth.draft_at(1), rel=0.1) and found.verify(1) == pytest.approx(1.3, rel=0.03)
    assert found.rounds[2] == pytest.approx(right[2], rel=0.1)  # between its neighbours
    assert found.rounds[7] == pytest.approx(right[7], rel=0.1) and found.tried == 3  # beyond them, on their line
    assert list(found.rounds) == sorted(found.rounds) and found.anchored and found.live
    other = seen.prices(wrong, 8, 100)  # what one row says of the ratios holds for eight until they are timed
    assert other.rounds[3] / other.rounds[0] > 1.5 * wrong.rounds_at(8, 100)[3] / wrong.rounds_at(8, 100)[0]
    assert not other.anchored and other.tried == 0


def test_one_time_alone_is_half_believed():
    costs, seen = table(0.1, 0.1), Correction()
    for _ in range(9):
        seen = seen.after(costs, 1, 100, 0, 0, 1.0)
    seen = seen.after(costs, 1, 100, 1, 1, 4 * costs.rounds_at(1, 100)[1])
    assert seen.prices(costs, 1, 100).rounds[1] == pytest.approx(2 * costs.rounds_at(1, 100)[1])
    seen = seen.after(costs, 1, 100, 1, 1, costs.rounds_at(1, 100)[1])
    assert seen.prices(costs, 1, 100).rounds[1] == pytest.approx(costs.rounds_at(1, 100)[1])  # of two the less


def test_the_machine_may_be_slower_than_the_table_throughout():
    """Only ratios matter: ten times the table's seconds, the same choices."""
    costs = table(0.1, 0.1)
    assert run(by(costs), costs, 60, 1.0, late=10.0) == run(by(costs), costs, 60, 1.0)
    assert run(by(costs), costs, 60, 1.0)[-1][0] == MAX_DRAFTS


def test_a_table_that_flatters_is_found_out():
    """A verify of many drafts no dearer than of one: by a frozen table drafting goes on, by times it stops."""
    truth = table(0.5, 0.3)
    flat = CostTable.of({(r, 100, w): 1.0 + 0.05 * (w > 0) for r in ROWS for w in range(MAX_DRAFTS + 1)}, {1: 0.01})
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
    assert seen.pace == pytest.approx(2.0)
    assert after.rounds[1] / after.rounds[0] == pytest.approx(before.rounds[1] / before.rounds[0])
    for _ in range(9):
        seen = seen.after(costs, 1, 100, 0, 0, right[0])
    assert seen.pace == pytest.approx(1.0) and seen.prices(costs, 1, 100).rounds == pytest.approx(before.rounds)


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
    """Busy for a while, then free, and so on: of 32 texts few lose more than 5 %, and most nothing."""
    traces, clock, found = replay.read_traces(), replay.Clock(0.1, 0.05, 4.0, slow, phase), []
    for machine in ("cpu-openblas", "m2pro-26b"):
        truth = replay.read_table(replay.DATA / "costs" / f"{machine}.json")
        for trace in traces.values():
            for rows in (1, 2, 4, 8):
                rounds = replay.against_plain(trace, truth, AUTO, truth, rows, 300, clock, rows)
                found.append(sum(plain for plain, _ in rounds) / sum(seconds for _, seconds in rounds))
    assert sorted(found)[1] > 0.95 and sorted(found)[len(found) // 2] > 0.985, sorted(found)


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
    assert depth.verify([ROW], 100, [[0.9] * made], [made]) == made == 2
    depth.observe({0: 1})
    assert known(depth).purse.left == pytest.approx(Purse().after(2 - costs.rounds_at(1, 100)[2]).left)

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
    assert lengths and {cell[:2] for cell in verified} == {(1, 100)} and set(drafted) == {1}
    assert verified[1, 100, 0] == 1.0
    for width in lengths:
        assert verified[1, 100, width] + width * drafted[1] == pytest.approx(truth.rounds_at(1, 100)[width], rel=0.1)
    assert depth.learned() == {"greedy": ({}, {})} and LEARN == 16


def test_break_even():
    even = break_even(table(0.25, 0.25), 1, 100)
    assert even[0] == pytest.approx(0.5, abs=1e-6)  # 1 + a = 1.5
    assert even[1] == pytest.approx((5**0.5 - 1) / 2, abs=1e-6)  # a + a^2 = 1
    assert break_even(table(1.0, 0.5), 1, 100) == [None] * MAX_DRAFTS


# On recorded traces, under four tables of costs.

TRACES = replay.read_traces()
TABLES = {path.stem: replay.read_table(path) for path in sorted((replay.DATA / "costs").glob("*.json"))}


def test_replay_emits_the_whole_text():
    """Every rule walks the same text; a fixed length's rate follows from counting by hand."""
    trace, costs = TRACES["code"], TABLES["m4max-26b"]
    for rule in (3, AUTO):
        run = replay.replay(trace, costs, rule)
        assert 0 <= run.tokens - len(trace.accepted) <= MAX_DRAFTS
    at = rounds = 0
    while at < len(trace.accepted):
        at, rounds = at + 1 + min(2, int(trace.accepted[at])), rounds + 1
    assert replay.fixed_rates(trace, costs)[2] == pytest.approx(at / rounds / costs.rounds_at(1, replay.CONTEXT)[2])


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("text", TRACES)
def test_auto_is_never_wrong_for_long(machine, text):
    """At least 0.97 of plain decoding, at least 0.95 of the best fixed length, never more than an oracle; and 32 rounds
    after a change of text, lengths that are right for the new one.
    """
    trace, costs = TRACES[text], TABLES[machine]
    fixed = replay.fixed_rates(trace, costs)
    run = replay.replay(trace, costs, AUTO)
    assert run.rate >= 0.97 * fixed[0]
    assert run.rate >= 0.95 * max(fixed)
    assert run.rate <= replay.oracle(trace, costs) * (1 + 1e-9)
    assert all(rounds <= 32 for rounds in replay.rounds_to_adapt(trace, run, costs))


@pytest.mark.parametrize("machine", TABLES)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_wrong_table_costs_little_and_not_for_long(machine, rows):
    """Whatever the table says, however noisy the times: 0.95 of plain decoding over the first 64 rounds (but one run
    in which chance and outliers meet), 0.97 from then on; and most of what drafts bring, where they pay.
    """
    for text in ("code", "shuffled"):
        lines = replay.astray(TRACES[text], TABLES[machine], machine + text, rows, scattered_tables=2)
        early = sorted(line["first"] for line in lines)
        assert early[0] >= 0.92 and early[1] >= 0.95, lines
        assert min(line["then"] for line in lines) >= 0.97, lines
        assert min(line["then"] / line["best"] for line in lines) >= 0.72, lines


@pytest.mark.slow
def test_wrong_tables_of_every_kind():
    """One run in a hundred may start worse, where chance and outliers come together."""
    lines = [
        line | {"machine": machine, "text": text, "rows": rows}
        for machine, table in TABLES.items()
        for text, trace in TRACES.items()
        for rows in ROWS
        for line in replay.astray(trace, table, machine + text, rows)
    ]
    assert min(line["first"] for line in lines) >= 0.87 and min(line["then"] for line in lines) >= 0.965
    assert sum(line["first"] < 0.95 or line["then"] < 0.97 for line in lines) <= len(lines) / 100
    assert np.median([line["then"] / line["best"] for line in lines]) >= 0.97


# In the loop.

SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True, seed=3)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, seed=0)
PROMPTS = ["def fibonacci(n):", "What is a list?", "import os", "Write a class.", "x = 1", "Why?", "for i in", "return"]


@pytest.fixture(scope="module")
def engine():
    return load(dtype="float32")


def with_table(engine, costs: CostTable):
    """The engine, its controllers new; no clock reaches them."""
    engine.depth.autos |= {kind: Auto(costs, frozen=True) for kind in KINDS}
    return engine


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 8])
def test_tokens_never_depend_on_it(engine, params, rows):
    """Equal to plain decoding, alone, in float32, whatever the table says."""
    plain = [engine.generate(prompt, params, num_draft_tokens=0).tokens for prompt in PROMPTS[:rows]]
    lengths = set()
    for seed in range(4):
        results = with_table(engine, random_table(seed)).generate(PROMPTS[:rows], params)
        assert [result.tokens for result in results] == plain
        lengths |= {length for result in results for length in result.stats.depths}
    assert len(lengths) >= 4


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 8])
def test_same_table_same_choices(engine, params, rows):
    ragged = [SamplingParams(**{**vars(params), "max_tokens": 12 + 5 * i}) for i in range(rows)]
    first, second = (
        [r.stats.depths for r in with_table(engine, table(0.1, 0.1)).generate(PROMPTS[:rows], ragged)] for _ in range(2)
    )
    assert first == second and sum(sum(r.values()) for d in first for r in d.values()) > rows


def test_mtp_that_cannot_pay_is_off_and_says_so(engine):
    result = with_table(engine, table(1.0, 0.5)).generate(
        PROMPTS[0], SamplingParams(**{**vars(GREEDY), "max_tokens": 8})
    )
    assert not result.stats.mtp and result.stats.mtp_reason == REASONS[OFF]
    assert result.stats.depths == {0: {OFF: 6, LIMIT: 1}}


def test_frozen_costs_give_equal_calls_equal_lengths(engine, monkeypatch):
    """Also after other calls; without them the second call knows more than the first."""
    monkeypatch.setattr(engine.depth, "frozen", True)
    depths = [with_table(engine, table(0.1, 0.1)).generate(PROMPTS[0], GREEDY).stats.depths]
    engine.generate(PROMPTS[1:3], SAMPLED)
    depths += [engine.generate(PROMPTS[0], GREEDY).stats.depths for _ in range(2)]
    assert depths[0] == depths[1] == depths[2]
    assert all(auto.frozen for auto in engine.depth.autos.values())


def test_frozen_costs_from_load_and_from_the_command_line(monkeypatch):
    from mlx_gemma_mtp import generate

    frozen, usual = load(dtype="float32", frozen_costs=True), load(dtype="float32")
    assert frozen.settings.frozen_costs and frozen.depth.frozen and not usual.depth.frozen
    asked = []
    monkeypatch.setattr("mlx_gemma_mtp.engine.load.load", lambda *a, **options: asked.append(options["frozen_costs"]))
    for flags in ([], ["--frozen-costs"]):
        generate.load_engine(generate.parser().parse_args(["--prompt", "x", *flags]), 1)
    assert asked == [False, True]


def test_where_nothing_is_drafted_noise_is_no_speedup(engine):
    off = speedup.measure(with_table(engine, table(1.0, 0.5)), PROMPTS[:1], GREEDY)
    assert off.drafted == 0 and off.tokens == 40
    assert str(off).startswith("MTP: off, drafts do not pay") and "x)" not in str(off)
    on = speedup.measure(with_table(engine, table(0.01, 0.01)), PROMPTS[:1], GREEDY)
    assert on.drafted > 0 and f"({on.ratio:.2f}x) over 40 tokens, the same text" in str(on)


def test_a_number_pins_it(engine):
    result = engine.generate(PROMPTS[0], GREEDY, num_draft_tokens=2)
    assert {length: set(why) for length, why in result.stats.depths.items() if length == 2} == {2: {"fixed"}}


def test_costs_are_measured_kept_and_moved_by_use(tmp_path, engine):
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path), notices.append, seconds=1e9)
    prompt = engine.text.encode("def f(x):\n    return x\n")
    first = costs.table(engine.target, engine.drafter, prompt)
    assert costs.file.path.exists() and costs.table(engine.target, engine.drafter, prompt) == first
    assert notices == []
    context = first.contexts[0]
    costs.learn({(1, context, 0): 1.0, (1, context, 5): 2.5}, {1: 0.25})  # overwrites, whatever there was
    verified, drafted = costs.file.read()
    assert (verified[1, context, 0], verified[1, context, 5], drafted[1]) == (1.0, 2.5, 0.25)
    assert (1, context, 4) in verified  # what was not met stays
    costs.file.path.unlink()
    costs.learn({}, {})
    assert not costs.file.path.exists()
    costs.learn({(2, context, 0): 1.0, (2, context, 1): 1.5}, {2: 0.25})  # starts a file
    assert costs.kept().rounds_at(2, context)[:2] == pytest.approx([1.0, 1.75]) and notices == []


class StubBench:
    """A machine whose plain step takes `step` seconds, half as much again for each further token of a verify."""

    step = 0.0
    clock = 0.0

    def __init__(self, target, drafter, prompt, params, rows, context, drafting, specs):
        self.rows, self.context, self.widths = rows, context, []

    def rounds(self, width):
        self.widths.append(width)
        verify = self.step * (1 + width / 2)
        StubBench.clock += 4 * verify
        return verify + width * self.step / 10, verify


@pytest.mark.parametrize("milliseconds", [1, 30, 40, 60, 200, 1000, 30000])
def test_a_slow_machine_is_measured_too(tmp_path, monkeypatch, milliseconds):
    """One pass over two widths is enough; what was compiled on the way is not counted."""
    monkeypatch.setattr(calibration, "Bench", StubBench)
    monkeypatch.setattr("time.perf_counter", lambda: StubBench.clock)
    monkeypatch.setattr(StubBench, "step", milliseconds / 1000)
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path), notices.append)
    table = costs.table(None, None, [5, 6, 7])
    assert len(notices) == (milliseconds > 75)  # what takes over a second says what it does
    verified, drafted = costs.file.read()
    assert {(1, 3, 0), (1, 3, 1)} <= set(verified) and set(drafted) == {1}
    assert [each / table.verify_at(1, 3)[0] for each in table.rounds_at(1, 3)[:5]] == pytest.approx(
        [1, 1.6, 2.2, 2.8, 3.4]
    )
    assert costs.table(None, None, [5, 6, 7]) == table  # from the file
    assert (len(verified) == 3) == (milliseconds <= 60)


def test_no_first_pass_is_counted_where_there_is_another(monkeypatch):
    """The first pass of every width is slow, as where kernels are compiled."""

    class Cold(StubBench):
        def rounds(self, width):
            factor = 1 if width in self.widths else 10
            return tuple(factor * each for each in super().rounds(width))

    monkeypatch.setattr(calibration, "Bench", Cold)
    monkeypatch.setattr(StubBench, "step", 0.001)
    timings = calibration.measure(None, None, [5], KINDS["greedy"], (1,), (1,), (0, 1), 2)
    assert timings.alone == {(1, 1, 0): [0.001, 0.001], (1, 1, 1): [0.0015, 0.0015]}
    few = calibration.measure(None, None, [5], KINDS["greedy"], (1,), (1,), (0, 1), 2, seconds=0.0)
    assert few.alone == {(1, 1, 0): [0.01], (1, 1, 1): [0.015]}


def test_a_table_is_of_the_kernels_that_run(engine, monkeypatch):
    """A switch, a failed check, the doctor's rules, another BLAS: other costs, so another file."""
    pair = hub.find_pair(None, "auto", None)
    key = lambda: json.dumps(calibration._key(pair, engine.target, engine.drafter))  # noqa: E731
    keys = [key()]
    try:
        kernels.switch_off("grouping", "a finding")
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: True)
            keys.append(key())
            patch.setenv(kernels.SWITCH, "0")
            keys.append(key())
        steps = ((1, expert_paths.ExpertPath.PAIRS), (48, expert_paths.ExpertPath.SORTED))
        expert_paths.adopt((expert_paths.Rule("", "", "", steps, expert_paths.EQUAL),))
        keys.append(key())
    finally:
        kernels.forget_failures()
        expert_paths.adopt(())
    with monkeypatch.context() as patch:
        patch.setattr(calibration.blas, "name", lambda: "another")
        keys.append(key())
        patch.setenv("OPENBLAS_NUM_THREADS", "17")
        keys.append(key())
        patch.setattr(calibration, "format_of", lambda model: "affine4")
        keys.append(key())
        patch.setattr(mx, "__version__", "99")
        keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[0]


@pytest.mark.parametrize("broken", ["corrupt", "foreign", "unwritable"])
def test_a_file_that_is_no_use_is_measured_anew(tmp_path, engine, broken):
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path / "costs"), notices.append, seconds=1e9)
    prompt = engine.text.encode("def f(x):\n    return x\n")
    if broken == "unwritable":
        (tmp_path / "costs").write_text("a file where the folder should be")
    else:
        costs.file.path.parent.mkdir()
        costs.file.path.write_text("{" if broken == "corrupt" else json.dumps({"format": 1, "key": {"a": 2}}))
    assert len(costs.table(engine.target, engine.drafter, prompt).verify_at(1, 50)) == MAX_DRAFTS + 1
    assert len(notices) >= 1 and str(costs.file.path) in notices[0]
    assert (costs.file.read() is not None) if broken != "unwritable" else not costs.file.path.exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    """On a small grid: measured, kept, shown again without measuring."""
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "ROWS", (1,))
    monkeypatch.setattr(calibration, "LONG", 64)
    assert calibrate.main(["--show"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: nothing was measured before")
    assert calibrate.main(["--repeats", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for kind in KINDS:
        assert [each["rows"] for each in shown[kind]][: len(ROWS)] == list(ROWS)
        assert all(len(each["break_even"]) == MAX_DRAFTS for each in shown[kind])
        assert all(len(each["seconds"]) == MAX_DRAFTS + 1 and min(each["seconds"]) > 0 for each in shown[kind])
    assert mx.metal.is_available() or "CPU" in shown["measured"]
    assert calibrate.main(["--show"]) == 0
    text = capsys.readouterr().out
    assert "greedy text" in text and "sampled text" in text and f"{1e3 * shown['greedy'][0]['seconds'][0]:8.2f}" in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--draft-model", "none"], "it is drafts whose cost is measured"),
        (["--plot", "nowhere/x.png"], "--plot"),
        (["--plot", "x.jpg"], "--plot"),
        (["--model", "nowhere"], "there is no model"),
    ],
)
def test_bad_input(capsys, argv, message):
    assert calibrate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    calibrate.plot({"greedy": table(0.1, 0.1)}, "a machine", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


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
