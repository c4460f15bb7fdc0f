"""Random faults: whatever breaks, the other rows say what they say alone, nothing hangs, and all is given back.

Each runs always, once for each pair; a thousand are `python -m pytest -m slow tests/engine/test_faults.py`.
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import mlx.core as mx
import pytest
from schedules import (
    FREE,
    PAIRS,
    SAMPLED,
    Asked,
    Clock,
    Drive,
    Failing,
    Outcome,
    Schedule,
    alone,
    check,
    drawn,
    engine_of,
    expected,
    prompt_of,
    runner_of,
)
from watchdog import within

from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.scheduler import Scheduler
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.speculative.guide import Constraint
from mlx_gemma_mtp.speculative.loop import Speculation
from mlx_gemma_mtp.text.calling import Free
from mlx_gemma_mtp.text.reply import Piece, Reply

NAMES = ("greedy", "sampled", "penalised", "a stop string", "reported")
ROWS = ("mask", "advance", "copy", "push", "finish", "closed", "silent")  # what ends one request
ROUNDS = {  # what breaks a round, by name: whose method; every drive calls it EARLY times and most of them LATE times
    "target": (Gemma4, "__call__"),
    "drafter": (Drafter, "__call__"),
    "logits": (Gemma4, "logits"),
    "plan": (Scheduler, "plan"),
    "planned": (
        Scheduler,
        "plan",
    ),  # raises once the plan is made, which nobody gets: rows are chosen, and others let go
    "launch": (Speculation, "launch"),
    "step": (Speculation, "step"),
}
EARLY, LATE = 6, 25
FAULTS = (*ROWS, *ROUNDS)
TOLD = "it broke\nin two lines"
MEGABYTE = 1 << 20


class Broke(Exception):
    """What the faults raise."""


@dataclass
class Broken:
    """A constraint that raises in `where` once `after` tokens were taken in, its copies, too."""

    inner: Constraint
    where: str
    after: int
    advanced: int = 0

    def _at(self, where: str) -> None:
        if self.where == where and self.advanced >= self.after:
            raise Broke(TOLD)

    def copy(self) -> Broken:
        self._at("copy")
        return replace(self, inner=self.inner.copy())

    def mask(self):
        self._at("mask")
        return self.inner.mask()

    def advance(self, token: int) -> None:
        self._at("advance")
        self.inner.advance(token)
        self.advanced += 1


class Unreadable:
    """A reply whose tokens cannot be made text: raises in `where`, after so many of them."""

    def __init__(self, inner: Reply, where: str, after: int):
        self.inner, self.where, self.after = inner, where, after

    @property
    def stopped(self) -> bool:
        return self.inner.stopped

    def push(self, token: int) -> Piece:
        self.after -= 1
        if self.where == "push" and self.after < 0:
            raise Broke(TOLD)
        return self.inner.push(token)

    def finish(self, *args: bool) -> Piece:
        if self.where == "finish":
            raise Broke(TOLD)
        return self.inner.finish(*args)


@contextmanager
def breaking(owner: type, name: str, at: int) -> Iterator[None]:
    """The method raises at its call number `at`, and at no other."""
    usual, calls = getattr(owner, name), [0]

    def called(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise Broke(TOLD)
        return usual(self, *args, **kwargs)

    with mock.patch.object(owner, name, called):
        yield


class Faulty(Failing):
    """A schedule whose `victim` has a fault of this name, or one of whose rounds raises."""

    fault = Broke

    def __init__(self, engine, schedule: Schedule, name: str, victim: int, after: int, runner, clock: Clock):
        super().__init__(engine, schedule, runner, clock)
        self.name, self.victim, self.after = name, schedule.requests[victim], after

    def made(self, asked: Asked) -> Request:
        request = super().made(asked)
        if asked is self.victim and self.name in ("mask", "advance", "copy"):
            request.constraint = Broken(request.constraint or Free(), self.name, self.after)
        if asked is self.victim and self.name in ("push", "finish"):
            request.stream = Unreadable(request.stream, self.name, self.after)
        return request

    def tell(self, number: int, outcome: Outcome) -> None:
        super().tell(number, outcome)
        if outcome.asked is not self.victim or outcome.over:
            return
        since = self.now - outcome.asked.at
        if self.name == "silent" and since == self.after:
            self.runner.pause(number)
        if (self.name == "closed" and since == self.after) or (self.name == "silent" and self.last()):
            self.runner.cancel(number)

    def last(self) -> bool:
        """Whether the victim alone is left."""
        return not self.waiting and all(asked is self.victim for asked, _ in self.unfinished())


def trial(pair: str, fault: str, most: int, seed: int, runner, clock: Clock) -> bool:
    """One fault amid five requests, and what became of all of them. most: calls until a round raises. Returns whether
    one did.
    """
    r = random.Random(seed)
    schedule = drawn(seed, 5, NAMES)
    schedule = replace(schedule, requests=tuple(replace(each, at=each.at % 8) for each in schedule.requests))
    victim, after = r.randrange(5), r.randrange(12)
    drive = Faulty(engine_of(pair), schedule, fault, victim, after, runner, clock)
    if fault in ROUNDS:
        with breaking(*ROUNDS[fault], r.randint(1, most)):
            outcomes = drive.run()
    else:
        outcomes = drive.run()
    for outcome in outcomes:
        judge(pair, drive, outcome)
    assert len(drive.failed) <= 1
    return bool(drive.failed)


def judge(pair: str, drive: Faulty, outcome: Outcome) -> None:
    """Nobody but those whom the fault concerns fails; who fails has the beginning of its text, and one line of why."""
    hit = outcome.asked is drive.victim and drive.name in ROWS
    hit = hit or outcome.request.id in drive.present
    check(pair, outcome, cut=("error", "cancelled") if hit else ())
    result = outcome.result
    if result.finish_reason == "error":
        assert "it broke" in result.error and "\n" not in result.error
    if drive.name == "finish" and outcome.asked is drive.victim:
        assert result.finish_reason == "error"


def used(runner) -> int:
    """The bytes of all arrays but prefixes and the batch's own buffers, which grow in steps up to a bound."""
    return mx.get_active_memory() - runner.keeping.prefixes.bytes - runner._loop.cache.bytes


def trials(pair: str, seeds: Sequence[int]) -> None:
    """The faults, one after the other, on one runner; at the end it is as good as new, and gives all back."""
    clock, raised, settled = Clock(), set(), None
    runner = runner_of(engine_of(pair), clock, Schedule(()))
    threads = threading.active_count()
    for number, seed in enumerate(seeds):
        cycle, which = divmod(number, len(FAULTS))
        fault = FAULTS[which]
        with within(1800):
            if trial(pair, fault, LATE if cycle else EARLY, seed, runner, clock):
                raised.add(fault)
        clock.now += 1000.0
        if number == len(seeds) // 2:
            gc.collect()
            settled = used(runner)
    assert raised == set(ROUNDS)
    with within(1800):
        for outcome in Drive(engine_of(pair), drawn(1, 6, NAMES), runner, clock).run():
            check(pair, outcome)
    gc.collect()
    assert used(runner) <= settled + MEGABYTE
    assert runner.close() == [] and not runner.busy
    assert threading.active_count() == threads


@pytest.mark.parametrize("pair", ["bundled", pytest.param("e2b", marks=pytest.mark.slow)])
def test_every_fault_once(pair):
    trials(pair, range(len(FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_a_thousand_faults(pair):
    trials(pair, range(100, 600))


def test_a_runner_gives_its_memory_back():
    """With its rows in the middle of their texts: those end, and the bytes of their K/V go."""
    engine, clock = engine_of("bundled"), Clock()
    alone("bundled", Asked())  # whatever is made once is there
    gc.collect()
    before = mx.get_active_memory()
    runner = runner_of(engine, clock, Schedule(()))
    drive = Drive(engine, Schedule(tuple(Asked(prompt=(i % 3, 420)) for i in range(8))), runner, clock)
    for _ in range(12):
        drive.turn()
    assert mx.get_active_memory() > before + MEGABYTE
    deliveries = runner.close()
    reasons = [each.chunk.result.finish_reason for each in deliveries if each.chunk is not None]
    assert reasons == ["cancelled"] * 8
    del drive, runner, deliveries
    gc.collect()
    assert mx.get_active_memory() <= before + MEGABYTE


# ---- through the engine, in threads


class Callers:
    """Threads that call one engine: good ones, whose texts are checked, and bad ones, each with a fault of its own."""

    def __init__(self, engine, seed: int):
        self.engine, self.random, self.lock = engine, random.Random(seed), threading.Lock()
        self.wrong: list[str] = []
        self.kept = []  # streams that nobody reads

    def draw(self, choices: Sequence) -> object:
        with self.lock:
            return self.random.choice(choices)

    def good(self) -> None:
        settings, params = self.draw((("greedy", FREE), ("sampled", SAMPLED)))
        prompt, limit = (self.draw(range(3)), self.draw((5, 65, 129))), self.draw((3, 9, 24))
        result = self.engine.generate(prompt_of(self.engine, *prompt), replace(params, max_tokens=limit))
        if result.tokens != expected("bundled", Asked(prompt=prompt, settings=settings, limit=limit))[0]:
            self.wrong.append(f"{settings} {prompt} {limit}: {result.finish_reason} {result.error} {result.tokens}")

    def bad(self) -> None:
        self.draw((self.breaks, self.closes, self.drops, self.never_reads, self.is_late, self.is_cancelled))()

    def _stream(self, **options):
        ids = prompt_of(self.engine, self.draw(range(3)), self.draw((5, 129)))
        return self.engine.stream(ids, replace(FREE, max_tokens=200), **options)

    def breaks(self) -> None:
        """A callback raises."""

        def broken(done: int, total: int) -> None:
            raise Broke(TOLD)

        try:
            list(self._stream(progress=broken))
        except Broke:
            return
        self.wrong.append("a callback's exception got lost")

    def closes(self) -> None:
        stream = self._stream()
        for _ in range(self.draw(range(4))):
            next(stream)
        stream.close()

    def drops(self) -> None:
        next(self._stream())

    def never_reads(self) -> None:
        stream = self._stream()
        with self.lock:
            self.kept.append(stream)

    def is_late(self) -> None:
        (*_, last) = self._stream(timeout=1e-4)
        if last.result.finish_reason not in ("timeout", "length"):
            self.wrong.append(f"late, but {last.result.finish_reason}")

    def is_cancelled(self) -> None:
        cancel = threading.Event()
        for chunk in self._stream(cancel=cancel):
            cancel.set()
            if chunk.result is not None and chunk.result.finish_reason not in ("cancelled", "length"):
                self.wrong.append(f"cancelled, but {chunk.result.finish_reason}")

    def run(self, calls: int) -> None:
        def each(work: Callable[[], None]) -> None:
            try:
                for _ in range(calls):
                    work()
            except Exception as error:
                self.wrong.append(f"{work.__name__}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=each, args=(work,)) for work in (self.good, self.bad) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def callers(calls: int, seed: int) -> None:
    engine = engine_of("bundled")
    for prompt in range(3):
        for length in (5, 65, 129):
            for settings in ("greedy", "sampled"):
                alone("bundled", Asked(prompt=(prompt, length), settings=settings))  # in this thread, before the others
    engine.generate("warm", replace(FREE, max_tokens=2))
    threads = threading.active_count()
    with within(3600):
        crowd = Callers(engine, seed)
        crowd.run(calls)
        assert crowd.wrong == []
        for stream in crowd.kept:
            stream.close()
        crowd.kept.clear()
        gc.collect()
        crowd.run(2)
        assert crowd.wrong == []
    assert threading.active_count() <= threads


def test_callers_with_faults():
    callers(calls=5, seed=0)


@pytest.mark.slow
def test_many_callers_with_faults():
    callers(calls=80, seed=1)


@pytest.mark.parametrize("bad", [{"timeout": -1}, {"timeout": 0}, {"timeout": "soon"}, {"priority": "high"}])
def test_bad_options_are_told_in_a_line(bad):
    with pytest.raises(UserError) as raised:
        engine_of("bundled").generate("x", FREE, **bad)
    assert "\n" not in str(raised.value) and next(iter(bad)) in str(raised.value)
