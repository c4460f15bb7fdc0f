"""The plan of rounds: a model of the runner does what plans say and checks that each could be done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.admission import Memory
from mlx_gemma_mtp.engine.scheduler import (
    AHEAD,
    Job,
    Plan,
    Scheduler,
)
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.machine.pressure import CRITICAL, NORMAL, WARNING

CHUNK, BLOCK, ROUND_S = 8, 4, 0.02
PLENTY = 10**9


def memory_of(limit: int = PLENTY, weights: int = 100) -> Memory:
    """A byte for each slot; rows and staged prompts have rings of 10 and 14 slots beside, and slots come in eights."""

    def up(tokens: int) -> int:
        return -(-tokens // 8) * 8

    return Memory(
        limit,
        weights,
        row=lambda tokens: 10 + up(tokens),
        staged=lambda tokens: 14 + up(tokens),
        saved=lambda tokens: 8 + tokens,
        chunk=lambda tokens, context: tokens + context // 4,
        verify=lambda rows, context: rows + context // 8,
        advance=4,
    )


@dataclass
class Kept:
    """What the model's runner keeps of a request. length: tokens at which its text ends."""

    job: Job
    length: int
    where: str = "nowhere"  # staged, saved, row
    fed: int = 0
    text: int = 0

    @property
    def tokens(self) -> int:
        return self.job.prompt + max(self.text - 1, 0)


@dataclass
class Model:
    """A runner without arrays: it does what a plan says, and asserts that it can be done."""

    scheduler: Scheduler
    memory: Memory
    requests: dict[int, Kept] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    paused: set[int] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    first: dict[int, int] = field(default_factory=dict)  # the round that drew a request's first token
    done: dict[int, int] = field(default_factory=dict)  # the round that ended it
    now: float = 0.0
    rounds: int = 0

    def submit(self, job: Job, length: int | None = None) -> None:
        self.scheduler.submit(job, self.now)
        self.requests[job.id] = Kept(job, job.limit if length is None else length)

    def pause(self, id: int) -> None:
        if id in self.requests:
            self.paused.add(id)
        self.scheduler.paused(id)

    def resume(self, id: int) -> None:
        self.paused.discard(id)
        self.scheduler.resumed(id)

    def round(self, budget: int | None = None, pressure: int = NORMAL, emit: int = 1) -> Plan:
        """Does a round in which every row emits `emit` tokens."""
        plan = self.scheduler.plan(self.now, budget, pressure)
        before = {id: kept.where for id, kept in self.requests.items()}
        self._leave(plan)
        self._arrange(plan)
        self._prefill(plan, budget)
        self._check_memory(plan)
        self._check_stages(plan, pressure, before)
        self.rounds += 1
        self.now += ROUND_S
        self._finish(plan, emit)
        return plan

    def run(self, most: int = 2_000, **options) -> int:
        """Does rounds until nothing is left to do. Returns how many."""
        began = self.rounds
        while self.scheduler.busy:
            assert self.rounds - began < most, f"{len(self.requests)} requests do not end: {self.requests}"
            self.round(**options)
        return self.rounds - began

    def _leave(self, plan: Plan) -> None:
        for id, reason in plan.ended:
            self._drop(id)
            self.ended[id] = reason
        for id in plan.forget:
            kept = self.requests[id]
            assert kept.where != "nowhere" and kept.fed, "nothing of it is kept"
            kept.where, kept.fed = "nowhere", 0
        for id in plan.save:
            assert self.requests[id].where == "row" and self.requests[id].text, "only a row with a text is saved"
            self.requests[id].where = "saved"
        assert not set(plan.save) & set(plan.forget)

    def _arrange(self, plan: Plan) -> None:
        places = list(plan.places)
        assert len(places) == len(set(places)) <= self.scheduler.max_rows
        stay = [id for id in self.rows if id in self.requests and self.requests[id].where == "row"]
        assert set(stay) <= set(places), "a row left without being saved, forgotten or ended"
        joiners = [id for id in places if id not in stay]
        holes = [place for place in range(len(places)) if place >= len(self.rows) or self.rows[place] not in stay]
        assert [places.index(id) for id in joiners] == holes[: len(joiners)], "holes go to joiners first"
        for id in stay:  # only rows beyond the end move
            assert places.index(id) == self.rows.index(id) or self.rows.index(id) >= len(places)
        undrawn = [id for id in joiners if not self.requests[id].text]
        assert plan.begins == bool(undrawn) and (not undrawn or (undrawn == joiners and not stay))
        for id in joiners:
            kept = self.requests[id]
            assert kept.where in ("staged", "saved") and kept.fed == kept.tokens, "its K/V are not complete"
            assert id not in self.paused
            kept.where = "row"
        assert not self.paused & set(places)
        self.rows = places

    def _prefill(self, plan: Plan, budget: int | None) -> None:
        grid, total = self.scheduler.grid, sum(piece.stop - piece.start for piece in plan.pieces)
        rows = self.scheduler.max_rows if not self.rows else 1
        assert total <= max(CHUNK * rows if budget is None else budget, grid)
        assert len({piece.id for piece in plan.pieces}) == len(plan.pieces)
        for piece in plan.pieces:
            kept = self.requests[piece.id]
            assert kept.where in ("nowhere", "staged") and piece.id not in self.paused
            assert piece.start == kept.fed < piece.stop <= kept.tokens
            assert (piece.stop - 1) // CHUNK == piece.start // CHUNK, "it crosses a border of chunks"
            assert piece.stop % grid == 0 or piece.stop == kept.tokens
            kept.where, kept.fed = "staged", piece.stop
        complete = {id for id, kept in self.requests.items() if kept.where == "staged" and kept.fed == kept.tokens}
        undrawn = {id for id in complete if not self.requests[id].text} - self.paused
        assert set(plan.firsts) == (undrawn if self.rows and not plan.begins else set())

    def _check_memory(self, plan: Plan) -> None:
        """What is held in this round fits, unless there is one request alone."""
        memory, total = self.memory, self.memory.weights
        held = [kept for kept in self.requests.values() if kept.where != "nowhere"]
        total += sum(memory.row(kept.tokens + BLOCK) for kept in held if kept.where == "row")
        total += sum(memory.staged(kept.tokens) for kept in held if kept.where == "staged")
        total += sum(memory.saved(kept.tokens) for kept in held if kept.where == "saved")
        if plan.pieces:
            fed = sum(piece.stop - piece.start for piece in plan.pieces)
            total += memory.chunk(fed, max(self.requests[piece.id].tokens for piece in plan.pieces))
        if self.rows:
            total += memory.verify(len(self.rows), max(self.requests[id].tokens for id in self.rows))
        assert total <= memory.limit or len(held) == 1

    def _check_stages(self, plan: Plan, pressure: int, before: dict[int, str]) -> None:
        fresh = [id for id, kept in self.requests.items() if kept.where == "staged" and before[id] == "nowhere"]
        if pressure > NORMAL:
            assert len(fresh) <= 1
        if pressure == CRITICAL:
            assert not any(kept.where == "saved" for kept in self.requests.values())
        staged = [id for id, kept in self.requests.items() if kept.where == "staged" and id not in self.paused]
        assert not fresh or len(staged) <= self.scheduler.max_rows - len(self.rows) + AHEAD

    def _finish(self, plan: Plan, emit: int) -> None:
        for piece in plan.pieces:
            self.scheduler.prefilled(piece.id, piece.stop)
            kept = self.requests[piece.id]
            if kept.text and kept.fed == kept.tokens:
                kept.where = "saved"
        for id in plan.firsts:
            self.scheduler.drawn(id)
            self.requests[id].where = "saved"
            self._emit(id, 1)
        for id in plan.places:
            more = 1 if plan.begins else min(emit, self.requests[id].length - self.requests[id].text)
            self.scheduler.emitted(id, more)
            self.requests[id].fed += more - (not self.requests[id].text)
            self._emit(id, more)

    def _emit(self, id: int, more: int) -> None:
        kept = self.requests[id]
        if not kept.text:
            self.first[id] = self.rounds
        kept.text += more
        if kept.text == kept.length:
            self.scheduler.finished(id)
            self.done[id] = self.rounds
            self._drop(id)

    def _drop(self, id: int) -> None:
        del self.requests[id]
        self.paused.discard(id)


def model(max_rows: int = 2, limit: int = PLENTY, **options) -> Model:
    memory = memory_of(limit)
    return Model(Scheduler(max_rows, CHUNK, memory, block=BLOCK, **options), memory)


jobs = st.lists(
    st.tuples(
        st.integers(0, 12),  # rounds before it comes
        st.integers(1, 40),  # prompt
        st.integers(1, 60),  # limit
        st.integers(0, 59),  # how much shorter than the limit its text is
        st.sampled_from([0, 0, 0, -100, -1, 3, 100]),
        st.none() | st.none() | st.integers(0, 40),  # rounds until its deadline
        st.none() | st.none() | st.integers(0, 20),  # rounds until it is cancelled
        st.none() | st.tuples(st.integers(0, 12), st.integers(1, 12)),  # rounds until its reader pauses, for how many
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(
    jobs,
    st.integers(1, 4),
    st.sampled_from([CHUNK, 4, 2]),
    st.sampled_from([230, 260, 330, 420, PLENTY]),
    st.lists(st.sampled_from([None, 1, 2, 5, 8, 20]), min_size=1, max_size=5),
    st.lists(st.sampled_from([NORMAL, NORMAL, NORMAL, WARNING, CRITICAL]), min_size=1, max_size=8),
    st.lists(st.integers(1, BLOCK), min_size=1, max_size=5),
)
def test_random_schedules(jobs, max_rows, grid, limit, budgets, pressures, emits):
    """Whatever comes, pauses, is cancelled or late: every plan can be done, and every request ends."""
    run = model(max_rows, limit, grid=grid)
    events: dict[int, list] = {}
    taken = []

    def offer(job: Job, length: int) -> None:
        with suppress(UserError):  # of what never fits
            run.submit(job, length)
            taken.append(job.id)

    for id, (start, prompt, most, less, priority, deadline, cancel, pause) in enumerate(jobs):
        job = Job(id, prompt, most, priority, None if deadline is None else (start + deadline) * ROUND_S)
        events.setdefault(start, []).append((offer, job, max(1, most - less)))
        if cancel is not None:
            events.setdefault(start + cancel, []).append((run.scheduler.cancel, id))
        if pause is not None:
            events.setdefault(start + pause[0], []).append((run.pause, id))
            events.setdefault(start + sum(pause), []).append((run.resume, id))
    for now in range(max(events) + 1):
        for call, *args in events.get(now, ()):
            call(*args)
        run.round(budgets[now % len(budgets)], pressures[now % len(pressures)], emits[now % len(emits)])
    run.run(budget=budgets[0], pressure=pressures[0], emit=emits[0])
    assert run.done.keys() | run.ended.keys() == set(taken) and not run.scheduler.busy
