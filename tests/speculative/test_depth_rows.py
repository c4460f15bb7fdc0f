"""The draft lengths of a batch whose rows join, leave and differ in what they ask for."""

from dataclasses import replace
from random import Random

import pytest
from cost_tables import random_table, table
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.speculative.choice import (
    BEST,
    CONFIDENCE,
    FIXED,
    GRAMMAR,
    JOINED,
    LIMIT,
    OFF,
    REASONS,
    Choice,
    Purse,
    affordable,
)
from mlx_gemma_mtp.speculative.correction import Correction, Prices
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, UNKNOWN, CostTable
from mlx_gemma_mtp.speculative.depth import AUTO, GREEDY, SAMPLED, Depth, DraftRow
from mlx_gemma_mtp.speculative.history import History

FREE = 10**6  # room for drafts
CHEAP = table(0.0, 0.001)  # drafts pay
FAIR = table(0.01, 0.001)  # so do drafts of which something is hoped


def by(costs: CostTable = CHEAP, **options) -> Depth:
    return Depth(lambda kind, rows: costs, **{"frozen": True} | options)


def auto(id: int, useful: int = FREE, sampled: bool = False) -> DraftRow:
    return DraftRow(id, AUTO, useful, sampled)


def fixed(id: int, drafts: int, useful: int = FREE, sampled: bool = False) -> DraftRow:
    return DraftRow(id, drafts, useful, sampled)


def verified(depth: Depth, rows: list[DraftRow], waiting: list[int], sure: float = 0.99) -> list[int]:
    """How many drafts of each row a round verifies of those that wait, all of one confidence."""
    width = depth.verify(rows, 100, [[sure] * each for each in waiting], waiting)
    return [each if width is None else min(each, width) for each in waiting]


def decode(depth: Depth, rows: list[DraftRow], rounds: int, keep: float = 1.0, sure: float = 0.99) -> list[list[int]]:
    """The counts of some rounds of one batch, which begins with these rows and keeps this share of its drafts."""
    counts = [depth.draft(rows, 100)]
    for _ in range(rounds):
        widths = verified(depth, rows, counts[-1], sure)
        counts.append(depth.draft(rows, 100))
        depth.timed(1.0)
        depth.observe({row.id: int(each * keep) for row, each in zip(rows, widths, strict=True)})
    return counts


def test_each_row_has_what_it_asked_for():
    """A number, none, or what pays; each as far as the row has room, and whatever its partners make."""
    depth = by()
    rows = [
        fixed(0, 0),
        fixed(1, 3),
        auto(2),
        fixed(3, 12),
        fixed(4, 3, useful=1),
        auto(5, useful=2),
        auto(6, useful=0),
    ]
    assert depth.draft(rows, 100) == [0, 3, 7, 12, 1, 2, 0]
    verified(depth, rows, [0, 3, 7, 12, 1, 2, 0])
    assert [depth.reason(row.id) for row in rows] == [FIXED, FIXED, BEST, FIXED, FIXED, LIMIT, LIMIT]
    depth.timed(1.0)  # longer than the table knows
    depth.observe(dict.fromkeys(range(7), 1))
    assert depth.draft([], 100) == []


def test_without_a_drafter_nothing_is_drafted():
    depth = Depth(None)
    rows = [fixed(0, 0), fixed(1, 3), auto(2)]
    assert depth.draft(rows, 100) == [0, 0, 0] and not depth.confident
    assert depth.verify(rows, 100, [[], [], []], [0, 0, 0]) is None
    assert {depth.reason(row.id) for row in rows} == {FIXED} and depth.learned() == {}


def test_a_batch_of_fixed_lengths_asks_for_no_costs():
    depth = Depth(lambda kind, rows: pytest.fail("nobody wants a table"))
    assert decode(depth, [fixed(0, 4), fixed(1, 4, sampled=True)], 9) == [[4, 4]] * 10
    assert not depth.confident and not depth.autos and not depth._own


@pytest.mark.parametrize("drafts", [0, 2, 7, 20])
def test_a_partners_length_is_no_argument(drafts):
    """The automatic row makes what it would make beside a plain row, in every round."""
    every = decode(by(table(0.02, 0.05)), [auto(0), fixed(1, 0)], 60, 0.6)
    beside = decode(by(table(0.02, 0.05)), [auto(0), fixed(1, drafts)], 60, 0.6)
    assert [row[0] for row in beside] == [row[0] for row in every] and {row[1] for row in beside} == {drafts}
    assert len({row[0] for row in every}) > 2


def test_partners_pay_for_a_round():
    """A verify of many drafts costs all rows: what pays for a row alone does not beside seven plain ones."""
    alone, beside = (decode(by(table(0.05, 0.05)), rows, 40)[20:] for rows in
                     ([auto(0)], [auto(0), *(fixed(row, 0) for row in range(1, 8))]))  # fmt: skip
    assert min(counts[0] for counts in alone) > 0 and sum(counts[0] for counts in beside) <= 2


def test_partners_share_the_risk():
    """In the worst case a round costs all rows, and its drafts gain tokens for some."""
    sure = History((1e6,) * MAX_DRAFTS, (1e6,) * MAX_DRAFTS)  # all is kept
    prices = Prices(tuple(1 + 0.5 * drafts for drafts in range(MAX_DRAFTS + 1)), 0.1, ())
    for share, most in ((1.0, MAX_DRAFTS), (0.5, MAX_DRAFTS), (0.4, 1), (0.1, 0)):
        assert len(affordable(prices, sure, FREE, Purse(0.11), share)) == most


def test_doubt_cuts_nobody_who_asked_for_a_number():
    depth, rows = by(FAIR), [auto(0), fixed(1, 3)]
    [made, three] = depth.draft(rows, 100)
    assert made > 4 and three == 3 and depth.confident
    assert verified(depth, rows, [made, three], sure=0.01) == [3, 3]  # alone it would be one
    assert (depth.reason(0), depth.reason(1)) == (CONFIDENCE, FIXED)
    depth.observe({0: 3, 1: 0})
    assert depth.autos[GREEDY].pool.tried[2] > 0.9  # what was verified for the partner's sake was seen all the same


@pytest.mark.parametrize("partners", [0, 1, 3])
def test_what_drafts_earn_is_everybodys(partners):
    """Tokens and costs of all rows against plain decoding of all."""
    depth, rows = by(FAIR), [auto(0), *(fixed(1 + row, 0) for row in range(partners))]
    made, *_ = counts = depth.draft(rows, 100)
    verified(depth, rows, counts)
    depth.observe(dict.fromkeys(range(len(rows)), 0) | {0: 2})
    cost = FAIR.rounds_at(len(rows), 128)
    assert made > 1
    assert depth.autos[GREEDY].purse == Purse().after(1 + 2 / len(rows) - cost[made] / cost[0])


@pytest.mark.parametrize("drafts, heard", [(0, True), (2, True), (7, False)])
def test_a_partners_drafts_are_no_loss_of_others(drafts, heard, monkeypatch):
    """The clock's word counts for a round that is as wide as the automatic rows made it."""
    depth, rows, told = by(frozen=False), [auto(0), fixed(1, drafts)], []
    decode(depth, rows, 6)
    known = depth.autos[GREEDY]
    monkeypatch.setattr(type(known), "choose", lambda *about: Choice(3, BEST, 1.0))
    monkeypatch.setattr(type(known), "earned", lambda *about: told.append(about[-1]))
    decode(depth, rows, 2)
    assert (told[-1] is not None) == heard


def test_each_grammar_cuts_its_own_row():
    depth, rows = by(), [auto(0), auto(1), auto(2)]
    assert depth.draft(rows, 100) == [7, 7, 7]
    assert verified(depth, rows, [7, 2, 0]) == [7, 2, 0]
    assert [depth.reason(row.id) for row in rows] == [BEST, GRAMMAR, GRAMMAR]
    depth.observe({0: 7, 1: 2, 2: 0})
    tried, kept = ([getattr(depth._own[row], name)[0] for row in range(3)] for name in ("tried", "kept"))
    assert tried == [1, 1, 1] and kept == [1, 1, 0]


def test_a_joiners_first_round_teaches_nothing():
    """It has no drafts in it, and the round's time has more in it than its verify."""
    depth, rows = by(frozen=False), [auto(0), auto(1)]
    decode(depth, rows[:1], 20)
    known = depth.autos[GREEDY]
    before, pool, waiting = known.correction, known.pool, depth._chosen.counts[0]
    width, none = verified(depth, rows, [waiting, 0], sure=1.0)
    counts = depth.draft(rows, 100)
    assert width > 0 == none and depth.reason(1) == JOINED and counts[0] == counts[1] > 0
    depth.timed(50.0)
    depth.observe({0: width, 1: 0})
    assert 1 not in depth._own and known.correction == before
    assert known.pool == pool.after(width, width, 0.98, [1.0] * (waiting - width))
    verified(depth, rows, counts)
    depth.draft(rows, 100)
    depth.timed(1.0)
    depth.observe({0: 1, 1: 1})
    assert depth._own[1].tried[0] == 1 and known.correction != before


def test_why_a_joiner_drafts_nothing():
    """Because it has just joined, unless it asked for nothing."""
    depth, rows = by(), [fixed(0, 4), auto(1), fixed(2, 4), fixed(3, 0)]
    depth.draft(rows[:1], 100)
    assert depth.verify(rows, 100, [[], [], [], []], [4, 0, 0, 0]) is None
    assert [depth.reason(row.id) for row in rows] == [FIXED, JOINED, JOINED, FIXED]


def test_drafts_that_were_lost_are_no_failure():
    """A row is saved while its drafts wait, and comes back without them."""
    depth, rows = by(), [auto(0)]
    decode(depth, rows, 5)
    own = depth._own[0]
    depth.leave([0])
    assert verified(depth, rows, [0]) == [0] and depth.reason(0) == JOINED
    depth.draft(rows, 100)
    depth.observe({0: 0})
    assert depth._own == {0: own}


def test_what_a_row_kept_goes_with_it_from_kind_to_kind():
    """Drafts that were made among sampled rows are judged by what is known of these, whoever has left since."""
    depth, one, other = by(), auto(0), auto(1, sampled=True)
    counts = decode(depth, [one, other], 3)[-1]
    assert set(depth.autos) == {SAMPLED}
    sampled, own = depth.autos[SAMPLED].pool, depth._own[0]
    depth.forget([1])
    verified(depth, [one], counts[:1])
    depth.draft([one], 100)
    depth.timed(1.0)  # of both kinds: not believed
    depth.observe({0: counts[0]})
    assert depth.autos[GREEDY].pool == History() and depth.autos[SAMPLED].pool != sampled
    assert depth._own[0] == own.after(counts[0], counts[0], 0.9)


def test_a_time_between_two_kinds_is_not_believed():
    depth, one, other = by(frozen=False), auto(0), auto(1, sampled=True)
    decode(depth, [one], 3)
    known = depth.autos[GREEDY].correction
    verified(depth, [one], [depth._chosen.counts[0]])
    depth.draft([one, other], 100)
    depth.timed(9.0)
    assert depth.autos[GREEDY].correction == known and depth.autos[SAMPLED].correction == Correction()


@pytest.mark.parametrize("kind", [GREEDY, SAMPLED])
def test_drafts_by_rejection_are_cut_in_greedy_text_alone(kind):
    depth, rows = by(table(0.3, 0.01), rejection=True), [auto(0, sampled=kind == SAMPLED)]
    [made] = depth.draft(rows, 100)
    assert depth.confident == (kind == GREEDY)
    assert verified(depth, rows, [made], sure=0.01) == [1 if kind == GREEDY else made]


def test_where_no_confidences_come_nothing_is_cut():
    """The loop was made for a batch that wants none."""
    depth, rows = by(FAIR), [auto(0), auto(1)]
    counts = depth.draft(rows, 100)
    assert min(counts) > 1 and depth.verify(rows, 100, [[], []], counts) == counts[0]
    depth.observe({0: 1, 1: 0})
    assert len(depth._own) == 2 and sum(depth.autos[GREEDY].trust.tried) == 0


def test_a_table_is_measured_when_no_row_runs():
    """Until then another kind's stands for it, or what nobody measured; then what was learned of texts stays."""
    asked, file, cheap = [], {}, replace(CHEAP, timed=frozenset([(1, 0, 0)]))

    def tables(kind: str, rows: int) -> CostTable | None:
        asked.append((kind, rows))
        return file.get(kind) or (cheap if rows else None)

    depth = Depth(tables)
    decode(depth, [fixed(0, 2)], 2)
    decode(depth, [fixed(0, 2), auto(1)], 3)  # joins
    depth.forget([0])
    decode(depth, [auto(1)], 20)
    assert asked == [(GREEDY, 0)] and depth.autos[GREEDY].table is UNKNOWN and depth.autos[GREEDY].borrowed
    assert depth.learned() == {GREEDY: ({}, {})}
    pool = depth.autos[GREEDY].pool
    depth.forget([1])
    decode(depth, [auto(2)], 0)
    assert asked[1:] == [(GREEDY, 1)] and depth.autos[GREEDY].table is cheap and not depth.autos[GREEDY].borrowed
    assert depth.autos[GREEDY].pool == pool != History()
    decode(depth, [auto(2), auto(3, sampled=True)], 3)
    assert asked[2:] == [(SAMPLED, 0)] and depth.autos[SAMPLED].table is cheap and depth.autos[SAMPLED].borrowed
    depth.forget([2, 3])
    file[SAMPLED] = table(0.2, 0.2)
    decode(depth, [auto(4, sampled=True)], 3)
    assert asked[3:] == [(SAMPLED, 1)] and depth.autos[SAMPLED].table is file[SAMPLED]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_of_more_rows_than_were_timed_is_timed_before_it_begins(frozen):
    """What was learned stays. Without learning the first table stays: equal calls are chosen for alike."""
    asked = []

    def tables(kind: str, rows: int) -> CostTable | None:
        asked.append(rows)
        return replace(FAIR, timed=frozenset((each, 0, 0) for each in {*asked} - {0}))

    depth = Depth(tables, frozen=frozen)
    decode(depth, [auto(0)], 9)
    decode(depth, [auto(0), auto(1)], 3)  # joins: nothing is timed while a row runs
    auto_of, pool, timed = depth.autos[GREEDY], depth.autos[GREEDY].pool, depth.autos[GREEDY].correction
    depth.forget([0, 1])
    assert asked == [1] and (frozen or timed.rounds)
    depth.draft([auto(2), auto(3), auto(4), auto(5)], 100)
    assert asked == [1] if frozen else asked == [1, 4]
    if not frozen:
        assert depth.autos[GREEDY] is auto_of and auto_of.table.knows(4)
        assert auto_of.pool == pool and auto_of.correction == timed
    decode(depth, [auto(2), auto(3), auto(4), auto(5)], 2)
    depth.forget([2, 3, 4, 5])
    depth.draft([auto(6), auto(7), auto(8)], 100)  # three are near enough to four
    assert len(asked) == (1 if frozen else 2)


def test_rows_that_return_to_an_empty_batch_measure_nothing():
    """Their verify is under way when drafts are chosen."""
    asked = []
    depth = Depth(lambda kind, rows: asked.append(rows))
    rows = [auto(5)]
    assert verified(depth, rows, [0]) == [0]
    depth.draft(rows, 100)
    depth.observe({5: 0})
    assert asked == [0]


def test_new_tables_in_the_middle_of_a_round():
    depth, rows = by(frozen=False), [auto(0)]
    made = decode(depth, rows, 9)[-1]
    verified(depth, rows, made)
    depth.adopt({GREEDY: table(2.0, 1.0)})
    depth.draft(rows, 100)
    depth.timed(1.0)
    depth.observe({0: made[0]})
    assert depth.autos[GREEDY].correction == Correction() and depth.autos[GREEDY].pool == History()
    assert max(counts[0] for counts in decode(depth, rows, 30, 0.5)) <= 1


def test_frozen_batches_are_chosen_for_alike():
    """One that begins anew knows nothing of those before it; one that was never empty does not begin."""
    depth = by(random_table(1))
    first = decode(depth, [auto(0), fixed(1, 2)], 30, 0.4)
    depth.forget([0, 1])
    decode(depth, [auto(2, sampled=True), auto(3)], 20, 0.9)
    depth.forget([2, 3])
    assert decode(depth, [auto(4), fixed(5, 2)], 30, 0.4) == first
    depth.forget([4])
    decode(depth, [fixed(5, 2), auto(6)], 1)
    assert depth.autos[GREEDY].pool.tried[0] > 2


class Schedule:
    """A runner by chance: rows join, end, are saved and come back between any two calls."""

    def __init__(self, draws: Random):
        self.draws, self.ids = draws, iter(range(10**6))
        self.asked: list[bool] = []
        self.live: list[DraftRow] = []
        self.saved: list[DraftRow] = []
        self.waiting: dict[int, int] = {}
        costs = random_table(draws.randrange(99))
        options = {"rejection": draws.random() < 0.3, "frozen": draws.random() < 0.3}
        self.depth = Depth(lambda kind, rows: self._table(costs, rows), **options)

    def _table(self, costs: CostTable, rows: int) -> CostTable | None:
        assert not rows or not self.running
        return costs if rows or self.draws.random() < 0.5 else None

    def disturb(self) -> None:
        """Ends or saves rows, now and then."""
        for row in list(self.live):
            if self.draws.random() < 0.06:
                self.live.remove(row)
                self.waiting.pop(row.id, None)
                if self.draws.random() < 0.4:
                    self.saved.append(row)
                    self.depth.leave([row.id])
                else:
                    self.depth.forget([row.id])
        self.check()

    def check(self) -> None:
        here, depth = {row.id for row in (*self.live, *self.saved)}, self.depth
        kept = (depth._own, depth._chosen.counts, depth._pass.parts, depth._pass.reasons)
        assert all(each.keys() <= here for each in kept)
        assert all(depth.reason(id) in {*REASONS, ""} for id in here)

    def arrange(self) -> None:
        draws = self.draws
        while draws.random() < (0.3 if self.live else 0.8):
            drafts = draws.choice([AUTO, AUTO, AUTO, 0, 2, 7, 40])
            self.live.append(DraftRow(next(self.ids), drafts, draws.choice([FREE, 3, 0]), draws.random() < 0.3))
        while self.saved and draws.random() < 0.5:
            self.live.append(self.saved.pop())
        draws.shuffle(self.live)

    def round(self) -> None:
        depth, draws = self.depth, self.draws
        self.running = any(row.id in self.waiting for row in self.live)
        self.arrange()
        begins = not self.running and all(row.id not in depth._own for row in self.live)
        self.running = not begins
        left = {row.id: draws.randint(0, self.waiting.get(row.id, 0)) for row in self.live}
        widths = {}
        if not begins:
            confidences = [[draws.random()] * (left[row.id] if draws.random() < 0.9 else 0) for row in self.live]
            width = depth.verify(self.live, 50, confidences, [left[row.id] for row in self.live])
            fixed_ones = [left[row.id] for row in self.live if row.drafts != AUTO]
            assert width is None or max(fixed_ones, default=0) <= width <= max(left.values(), default=0)
            widths = {id: each if width is None else min(each, width) for id, each in left.items()}
        self.disturb()
        counts = depth.draft(self.live, 50)
        assert all(0 <= count <= row.useful for count, row in zip(counts, self.live, strict=True))
        assert all(
            count == min(row.drafts, row.useful)
            for count, row in zip(counts, self.live, strict=True)
            if row.drafts != AUTO
        )
        self.waiting = {row.id: count for row, count in zip(self.live, counts, strict=True)}
        self.disturb()
        if draws.random() < 0.8:
            depth.timed(draws.choice([1.0, 1.1, 30.0]))
        self.disturb()
        depth.observe({id: draws.randint(0, each) for id, each in widths.items()})
        self.disturb()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_rows_come_and_go_between_any_two_calls(seed):
    """Nothing breaks, nobody gets what was not asked for, and nothing is kept of who is gone."""
    schedule = Schedule(Random(seed))
    for _ in range(12):
        schedule.round()
    schedule.depth.forget([row.id for row in (*schedule.live, *schedule.saved)])
    schedule.live, schedule.saved = [], []
    schedule.check()
    assert not schedule.depth._own


def test_the_schedules_meet_everything():
    """Long ones by fixed seeds, which are known to reach what the short ones are for."""
    met = set()
    for seed in range(30):
        schedule = Schedule(Random(seed))
        for _ in range(120):
            schedule.round()
            met |= set(schedule.depth._pass.reasons.values()) | set(schedule.depth.autos)
    assert met >= {FIXED, BEST, OFF, LIMIT, JOINED, GRAMMAR, CONFIDENCE, GREEDY, SAMPLED}


def test_what_rounds_took_counts_where_the_table_stays():
    """Two rows took what an interpolated table said of them times some factor; then they are measured."""
    one = {(1, 0, width): 1 + 0.1 * width for width in (0, 1, 4, 15)}
    two = {(2, 0, width): 3 + 0.1 * width for width in (0, 1, 4)}
    drafts = {(1, 0): 0.05}
    first = CostTable.of(one, drafts, timed=one)
    then = CostTable.of(one | two, drafts | {(2, 0): 0.1}, timed=one | two)
    depth = Depth(lambda kind, rows: then if rows == 2 else first)
    decode(depth, [auto(0)], 20)
    decode(depth, [auto(0), auto(1)], 20)
    depth.forget([0, 1])
    known = depth.autos[GREEDY]
    assert set(known.correction.rounds) == {(1, 0), (2, 0)} == set(known.correction.factors)
    timed = known.correction.rounds[1, 0]
    depth.draft([auto(2), auto(3)], 100)
    assert known.table is then and set(known.correction.factors) == {(1, 0)}
    assert known.correction.rounds == {(1, 0): timed} and {cell[:2] for cell in known._rounds} == {(1, 0)}
    decode(depth, [auto(2), auto(3)], 20)
    assert set(known.correction.rounds) == {(1, 0), (2, 0)}
