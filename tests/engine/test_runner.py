"""What the runner does beside texts: what it counts, what it gives back, and what comes of a plan that broke off."""

from __future__ import annotations

from unittest import mock

import pytest
from schedules import CHUNK, Asked, Drive, Outcome, Schedule, check, engine_of

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.engine.lengths import Lengths
from mlx_gemma_mtp.engine.plan import Plan
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.scheduler import Scheduler
from mlx_gemma_mtp.machine.power import Awake
from mlx_gemma_mtp.machine.pressure import CRITICAL, NORMAL
from mlx_gemma_mtp.speculative.budget import Budget
from mlx_gemma_mtp.speculative.depth import Depth
from mlx_gemma_mtp.speculative.loop import Speculation
from mlx_gemma_mtp.speculative.rounds import Verify


class Broke(Exception):
    """What the faults raise."""


def drive(*requests: Asked, **others) -> Drive:
    return Drive(engine_of("bundled"), Schedule(requests, **others))


def turns(driven: Drive, count: int) -> None:
    for _ in range(count):
        driven.turn()


def outcomes(driven: Drive) -> list[Outcome]:
    return [*driven.outcomes.values()]


def test_a_failure_of_all_lets_the_machine_rest():
    """Nobody asks for another round then: the machine may sleep, and what rounds took is kept."""
    driven = drive(Asked(prompt=(0, 9)))
    with mock.patch.object(Awake, "off") as off:
        turns(driven, 3)
        assert not off.called
        driven.take(driven.runner.fail(Broke("x")))
        assert off.called
    assert not driven.runner.busy and outcomes(driven)[0].result.finish_reason == "error"


@pytest.mark.parametrize("late", ["_end", "_grow", "_admit", "_arrange", "_pack", "_firsts"])
@pytest.mark.parametrize("at", (3, 4, 6))
def test_a_plan_that_breaks_off_loses_nobody(late, at):
    """It raises once it has moved requests, two of which are cancelled: all come to an end, and what comes later goes
    on as ever.
    """
    requests = [Asked(at=i // 2, prompt=(i % 3, (9, 150)[i % 2]), limit=12, drafts=1) for i in range(5)]
    driven = drive(*requests, rows=2, spare=1.2)
    usual, calls = getattr(Scheduler, late), [0]

    def broken(*args):
        result, _ = usual(*args), calls.append(calls.pop() + 1)
        if calls[0] == at:
            raise Broke("x")
        return result

    with mock.patch.object(Scheduler, late, broken):
        while driven.waiting or driven.unfinished():
            assert driven.now < 200, driven.unfinished()
            if calls[0] == at - 1 and not driven.waiting:
                for id in list(driven.outcomes)[1:3]:
                    driven.runner.cancel(id)
            try:
                driven.turn()
            except Broke as error:
                driven.take(driven.runner.fail(error))
                driven.now += 1
    assert not driven.runner.held and not driven.runner.busy
    for each in outcomes(driven):
        check("bundled", each, cut=("error", "cancelled"))
    again = Drive(driven.engine, Schedule((Asked(prompt=(0, 9)),)), driven.runner, driven.clock)
    check("bundled", again.run()[0])


@pytest.mark.parametrize("owner, name", [(Cache, "arrange"), (Cache, "save"), (Speculation, "_readback")])
def test_two_failures_in_a_row_change_nobodys_text(owner, name):
    """Whoever is not there goes on, and what comes later says what it says alone."""
    requests = [Asked(at=3 * i, prompt=(i % 3, (9, 150)[i % 2]), limit=8, drafts=i % 3) for i in range(8)]
    driven, hit, calls, usual = drive(*requests, rows=2), set(), [0], getattr(owner, name)

    def broken(*args):
        calls[0] += 1
        if calls[0] in (3, 4):
            raise Broke("x")
        return usual(*args)

    with mock.patch.object(owner, name, broken):
        while driven.waiting or driven.unfinished():
            try:
                driven.turn()
            except Broke as error:
                hit |= {id for id, each in driven.outcomes.items() if not each.over}
                driven.take(driven.runner.fail(error))
                driven.now += 1
    assert hit and not driven.runner.held
    for id, each in driven.outcomes.items():
        check("bundled", each, cut=("error",) if id in hit else ())
    assert any(each.result.finish_reason == "length" for each in outcomes(driven))


def test_memory_is_given_back_before_more_is_taken():
    """A round that saves a row and forgets K/V beside it: first these go."""
    driven, seen = drive(Asked(prompt=(0, 240)), Asked(at=3, prompt=(1, 240)), Asked(at=6, prompt=(2, 240)),
                         rows=2), []  # fmt: skip
    turns(driven, 14)
    runner = driven.runner
    ready = next(id for id in runner.held if id not in runner.rows)
    runner._read()
    assert runner.held[ready].saved is not None
    usual = runner._loop.save

    def save(row):
        seen.append(runner.held[ready].saved)
        return usual(row)

    runner.scheduler._forget(runner.scheduler.entries.find(ready))
    last = runner.rows[-1]
    runner.scheduler._save(runner.scheduler.entries.find(last))
    with mock.patch.object(runner._loop, "save", save):
        runner._arrange(Plan(forget=(ready,), save=(last,), places=(runner.rows[0],)))
    assert seen == [None]


def test_a_row_whose_kv_go_at_once_was_preempted():
    """Under critical pressure a row that must leave is not saved; it counts like any other."""
    level = [NORMAL]
    driven = drive(Asked(prompt=(0, 9)), Asked(prompt=(1, 9)))
    driven.runner.pressure = lambda: level[0]
    turns(driven, 4)
    first = next(iter(driven.outcomes))
    level[0] = CRITICAL
    driven.runner.pause(first)
    turns(driven, 1)
    assert driven.runner.held[first].saved is None and first not in driven.runner.rows
    level[0] = NORMAL
    driven.runner.resume(first)
    one, other = driven.run()
    assert (one.result.stats.preemptions, other.result.stats.preemptions) == (1, 0)
    for each in (one, other):
        check("bundled", each)


def test_time_without_rows_is_nobodys():
    """A reader rests for long while nothing else runs: the rates are those of the rounds."""
    driven = drive(Asked(prompt=(0, 9), limit=10), Asked(at=2, prompt=(1, 9), limit=10))
    turns(driven, 4)
    for id in driven.outcomes:
        driven.runner.pause(id)
    turns(driven, 1)
    assert not driven.runner.rows
    driven.now += 1000
    for id in driven.outcomes:
        driven.runner.resume(id)
    for each in driven.run():
        stats = each.result.stats
        assert stats.generation_tps >= 10 / (each.rounds + 2) and stats.batch_generation_tps >= stats.generation_tps
        assert stats.preemptions == 1


def test_who_waits_for_a_place_is_no_row():
    """Its first token comes beside the only row, which it then waits for: it shares one round, and has its own."""
    driven = drive(Asked(prompt=(0, 9), limit=24), Asked(at=2, prompt=(1, 9), limit=5), rows=1)
    one, other = driven.run()
    assert other.first < one.last < other.last
    stats = other.result.stats
    assert stats.host_syncs == 1 + stats.rounds == 5 and stats.rows == 1


def test_what_a_row_kept_in_its_last_round_is_learned():
    """Short requests, of a round or two each: all of their rounds teach, whoever stays or comes meanwhile."""
    requests = [Asked(at=2 * i, prompt=(i % 3, 9), limit=3 + i % 3, drafts="auto") for i in range(12)]
    driven = drive(*requests, rows=3)
    learned = []
    with mock.patch.object(Depth, "observe", autospec=True) as observe:
        observe.side_effect = lambda depth, kept: learned.append(len(kept.keys() & depth._pass.parts.keys()))
        depths = [each.result.stats.depths for each in driven.run()]
    steady = [n for by_reason in depths for whys in by_reason.values() for why, n in whys.items() if why != "joined"]
    assert sum(learned) == sum(steady) >= 12


def test_the_round_in_which_a_batch_begins_tells_the_budget_nothing():
    """It has no verify, and prefills nothing: another prompt's chunk falls into the rounds after it."""
    told = []

    class Listening(Budget):
        def took(self, rows, seconds, tokens, waited):
            told.append((rows, seconds > 0, tokens, waited))
            return super().took(rows, seconds, tokens, waited)

    driven = drive(Asked(prompt=(0, 9)), Asked(prompt=(1, 400), limit=4))
    driven.runner.budget = Listening(CHUNK, CHUNK // 4, CHUNK)
    turns(driven, 5)
    (begun, beside, *_) = (each for each in told if each[0])
    assert begun == (1, False, 0, False)
    assert beside[:2] == (1, True) and beside[2] > 0 and not beside[3]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_the_next_verify_begins_before_anything_is_taken_in(drafts):
    """In every round of rows that go on: neither the plan nor what is counted is waited for."""
    asked = [Asked(prompt=(i, 9), limit=20, drafts=drafts) for i in range(2)]
    driven, events = drive(*asked), []

    def told(owner: type, name: str):
        usual = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *args, **kw: (events.append(name), usual(*args, **kw))[1])

    with told(Verify, "begin"), told(Request, "take"), told(Lengths, "verify"), told(Scheduler, "plan"):
        one, other = driven.run()
    rounds = "".join({"begin": "b", "take": "t", "verify": "v", "plan": "p"}[each] for each in events)
    verified = max(one.result.stats.rounds, other.result.stats.rounds)
    assert rounds.count("b") == verified
    early = rounds.count("btt") + rounds.count("btv")
    assert early >= verified - 3, rounds  # all but those in which one comes or ends
    assert rounds.count("p") <= 4 + verified - early


def test_rows_that_may_end_are_taken_in_first():
    """A text that a stop string may end is looked at before the next verify begins."""
    began = []
    usual = Request.goes_on
    with mock.patch.object(Request, "goes_on", lambda *args: began.append(usual(*args)) or began[-1]):
        drive(Asked(prompt=(0, 9), limit=6, drafts=0)).run()
    assert began == [True] * 5 + [False]
