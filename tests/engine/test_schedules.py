"""Random schedules of joins, leaves, cancels, time-outs, preemptions and pauses: every request says what it says alone.

Driven round by round, so that hypothesis can make a failing schedule smaller. A few dozen always run; the rest is
`python -m pytest -m slow tests/engine/test_schedules.py`.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from schedules import (
    CHUNK,
    DRAFTS,
    EVERY,
    FREE,
    LONGEST,
    PAIRS,
    QUANTISED,
    SETTINGS,
    Asked,
    Drive,
    Schedule,
    alone,
    check,
    check_all,
    engine_of,
    prompt_of,
    schedules,
    scores,
)
from watchdog import within

from benchmarks.trace import Trace
from mlx_gemma_mtp.cache import cache
from mlx_gemma_mtp.speculative.rounds import Verify

pytest.importorskip("llguidance")

CACHE = str(Path(cache.__file__).parent)
FEW, MANY = 10, 125  # examples of each test and pair
HALF = [list(QUANTISED)[place] for place in (0, 3, 5, 6)]  # each pair with each number of bits and kind of rings
common = settings(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
always = settings(common, max_examples=FEW, derandomize=True)
often = settings(common, max_examples=MANY)


@pytest.mark.parametrize("pair", PAIRS)
@always
@given(schedule=schedules())
def test_some_schedules(pair, schedule):
    with within(3600):
        check_all(pair, schedule)


@pytest.mark.parametrize("pair", HALF)
@settings(always, max_examples=2)
@given(schedule=schedules())
def test_some_schedules_over_few_bits(pair, schedule):
    """K/V in 8 and 4 bits: whatever is drafted, and whoever is beside, the text is that of plain decoding alone over
    the same bits.
    """
    with within(3600):
        check_all(pair, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("pair", QUANTISED)
@settings(often, max_examples=MANY // 5)
@given(schedule=schedules())
def test_many_schedules_over_few_bits(pair, schedule):
    with within(3600):
        check_all(pair, schedule)


@pytest.mark.parametrize("pair", (HALF[1], HALF[3]))
def test_a_crowd_over_few_bits_has_drafts_kept(pair):
    """Three rows where there is hardly room for one, past the wrapped window; their drafts are kept."""
    requests = tuple(Asked(at=3 * i, prompt=(i, 140 + 60 * i), limit=LONGEST, drafts=i % 2 * 4) for i in range(3))
    with within(300):
        drive = check_all(pair, Schedule(requests, spare=1.1))
    stats = [each.result.stats for each in drive.outcomes.values()]
    assert sum(each.accepted for each in stats) > 0
    assert any(spec.bits for spec in drive.runner.specs)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@often
@given(schedule=schedules())
def test_many_schedules(pair, schedule):
    with within(3600):
        check_all(pair, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
@often
@given(schedule=schedules(("greedy", "sampled"), most=16))
def test_many_schedules_of_many_free_requests(pair, schedule):
    with within(3600):
        check_all(pair, schedule)


def crowd(**others) -> Schedule:
    """Every setting with every draft length, in three rows: each joins rows that are there, and leaves others."""
    requests = tuple(
        Asked(at=i // 2, prompt=(i % 3, 5 + 9 * (i % 5)), settings=name, limit=6 + i % 7, drafts=DRAFTS[i % 4])
        for i, name in enumerate(EVERY)
    )
    return Schedule(requests, **others)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_setting_in_one_crowd(pair):
    """Whatever may be asked for at once: nobody notices the others, and each has what it asked for."""
    with within(3600):
        drive = check_all(pair, crowd(rows=3))
    drafted = Counter()
    for each in drive.outcomes.values():
        drafted[each.asked.drafts] += each.result.stats.drafted
    assert drafted[0] == 0 and drafted[1] > 0 and drafted[4] > 0
    ends = Counter(each.result.finish_reason for each in drive.outcomes.values())
    assert ends["length"] and ends["stop"]


def test_the_driver_would_notice():
    """A text that is not the lone one fails the check: the tests above can fail."""
    drive = Drive(engine_of("bundled"), Schedule((Asked(limit=6),)))
    (outcome,) = drive.run()
    outcome.chunks[-1].result.tokens[-1] += 1
    with pytest.raises(AssertionError):
        check("bundled", outcome)


@pytest.mark.parametrize("name", ["greedy", "sampled, the whole vocabulary", "penalised, greedy", "biased"])
def test_scores_are_those_that_are_drawn_by(name):
    """What near-ties are judged by: the token of the lone text has the highest one at every place."""
    asked = Asked(prompt=(0, 33), settings=name)
    tokens = alone("bundled", asked).tokens
    assert [scores("bundled", asked, at).argmax().item() for at in range(12)] == tokens[:12]


def test_alone_is_the_engines_text():
    """What requests are compared with is what `generate` says, with and without drafts."""
    engine, asked = engine_of("bundled"), Asked(prompt=(0, 200))
    for drafts in (0, 4):
        result = engine.generate(prompt_of(engine, *asked.prompt), FREE, num_draft_tokens=drafts)
        assert result.tokens[:LONGEST] == alone("bundled", asked).tokens


class Readbacks(Trace):
    """Counts waits for values. Copies that the cache has evaluated, so that the next write is in place, are none."""

    readbacks = 0

    def _count(self, function, waits, args, kwargs):
        before = self.syncs
        result = super()._count(function, waits, args, kwargs)
        copied = function is self._module["eval"] and CACHE in sys._getframe(2).f_code.co_filename
        self.readbacks += self.syncs > before and not copied
        return result


@pytest.mark.parametrize("drafts", [0, 4])
def test_one_readback_a_round_with_joins_and_leaves(drafts):
    """Twelve requests in four rows, each of another length: first tokens of joiners come with the others'."""
    requests = tuple(Asked(at=i, prompt=(0, 20 + i), limit=4 + i, drafts=drafts) for i in range(12))
    with within(300):
        drive = Drive(engine_of("bundled"), Schedule(requests, rows=4))
        syncs = []
        while drive.waiting or any(not each.over for each in drive.outcomes.values()):
            before = drive.ran
            with Readbacks() as trace:
                drive.turn()
            syncs.append((drive.ran - before, trace.readbacks))
    assert all(reads <= ran for ran, reads in syncs), syncs
    for outcome in drive.outcomes.values():
        check("bundled", outcome)
        stats = outcome.result.stats
        assert stats.rounds <= stats.host_syncs <= outcome.rounds


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_that_must_give_way_come_back(pair):
    """Memory for little more than one long text, three of them: who gives way is requeued, no text changes."""
    requests = tuple(Asked(at=3 * i, prompt=(i, 240), limit=LONGEST, drafts=i % 2 * 4) for i in range(3))
    with within(300):
        drive = check_all(pair, Schedule(requests, spare=1.1))
    assert all(outcome.result.finish_reason == "length" for outcome in drive.outcomes.values())


def test_long_rows_are_written_in_place_while_others_come_and_go():
    """Over a hundred rounds no buffer of the long rows is copied, whoever joins, leaves or moves; but for a row that
    moves, itself.
    """
    long = [Asked(prompt=(i % 3, 1100), limit=60 + 8 * i, drafts=i % 2) for i in range(7)]
    short = [Asked(at=200 + 3 * i, prompt=(i % 3, 5 + i), limit=3 + i % 5, drafts=i % 3) for i in range(40)]
    with within(3600):
        drive = Drive(engine_of("bundled"), Schedule((*long, *short), rows=8))
        while len(drive.runner.rows) < len(long):
            drive.turn()
        for each in drive.waiting:
            drive.waiting[drive.waiting.index(each)] = replace(each, at=each.at - 200 + drive.now)
        buffer = max(keys.nbytes for keys, _ in drive.runner._loop.cache.buffers)
        peaks = []
        for _ in range(100):
            mx.eval(drive.runner._loop.cache.buffers)
            before, rows = mx.get_active_memory(), {id: row for row, id in enumerate(drive.runner.rows)}
            mx.reset_peak_memory()
            drive.turn()
            moved = sum(rows.get(id, row) != row for row, id in enumerate(drive.runner.rows))
            peaks.append(mx.get_peak_memory() - before - moved * drive.runner.scheduler.memory.saved(1100))
    assert sum(each.over for each in drive.outcomes.values()) > 20
    assert max(peaks) < buffer, (buffer, peaks)


def test_a_rows_slots_follow_from_its_length(monkeypatch):
    """Whatever it drafts, beside whom, and whether it had to give way: sums over its slots, which some devices split by
    their number, are the same.
    """
    found, dispatch = defaultdict(set), Verify.dispatch

    def probe(self: Verify, *meanwhile: Callable[[], None]) -> None:
        for length, slots in zip(self._cache.lengths.tolist(), self._cache.classes, strict=True):
            found[length].add(slots)
        dispatch(self, *meanwhile)

    monkeypatch.setattr(Verify, "dispatch", probe)
    free = [Asked(prompt=(0, 210 + 9 * i), drafts=drafts) for i, drafts in enumerate((4, 0, "auto", 4))]
    bound = [replace(each, settings="an expression") for each in free]
    with within(300):
        for requests, spare in (((*free, *bound), None), (free[:3], None), (free, 1.1)):
            Drive(engine_of("bundled"), Schedule(tuple(requests), spare=spare)).run()
    assert all(len(slots) == 1 for slots in found.values()), found
    assert set().union(*found.values()) == {256, 512}


def test_priority_is_first_and_nobody_starves():
    """In one row: the urgent ones overtake those that wait, which still come to their end."""
    plain = [Asked(at=0, prompt=(0, 9), limit=8) for _ in range(4)]
    urgent = Asked(at=2, prompt=(1, 9), limit=8, priority=5)
    drive = Drive(engine_of("bundled"), Schedule((*plain, urgent), rows=1))
    outcomes = drive.run()
    ends = sorted((each.last, each.asked.priority) for each in outcomes)
    assert ends[1][1] == 5, ends
    for outcome in outcomes:
        check("bundled", outcome)


def arrival(budget: int = CHUNK) -> Schedule:
    """Seven streams, a prompt of 4,000 tokens, and a short request in the midst of both."""
    streams = [Asked(prompt=(i % 3, 20), limit=100, drafts=0) for i in range(7)]
    return Schedule((*streams, Asked(at=10, prompt=(0, 4000), limit=2), Asked(at=15, prompt=(1, 30), limit=4)),
                    budget=budget)  # fmt: skip


def test_a_short_request_does_not_wait_for_a_long_prompt():
    """Its first token comes within 3 rounds and its own chunks, and no stream has a round without a token."""
    with within(300):
        drive = Drive(engine_of("bundled"), arrival())
        outcomes = drive.run()
    *streams, long, short = outcomes
    assert short.first - short.asked.at <= 3 + 1 and short.first < long.first
    assert all(each.rounds <= 100 + 5 for each in streams)  # their prompts are four forwards, two in each
    assert all(each.last - each.first <= 100 for each in streams)  # a token a round, but for that of joining


def test_rows_are_in_use_while_somebody_waits():
    """Twenty requests of mixed lengths, four rows: a hole is filled at once."""
    requests = tuple(Asked(prompt=(i % 3, 10 + i), limit=4 + 5 * i % 20, settings="greedy") for i in range(20))
    with within(300):
        drive = Drive(engine_of("bundled"), Schedule(requests, rows=4))
        drive.run()
    tokens = sum(len(each.tokens) for each in drive.outcomes.values())
    assert tokens >= 0.9 * 4 * (drive.ran - 20)  # the last requests leave holes that nobody waits for


def test_settings_are_all_met():
    """The palette has what the tests promise: drafts of every kind, and every way to end."""
    assert {0, 1, 4, "auto"} == set(DRAFTS) and len(SETTINGS) >= 12
