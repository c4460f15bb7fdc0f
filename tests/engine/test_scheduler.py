"""The plan of rounds: a model of the runner does what plans say and checks that each could be done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.admission import Memory
from mlx_gemma_mtp.engine.plan import Job, Known, Piece, Plan
from mlx_gemma_mtp.engine.scheduler import AHEAD, PATIENCE_S, Scheduler
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
    """What the model's runner keeps of a request. length: tokens at which its text ends. keep: what is to be kept of
    its prompt, beside what the plan finds. began: whether any of it was prefilled since it was staged.
    """

    job: Job
    length: int
    where: str = "nowhere"  # staged, saved, row
    fed: int = 0
    text: int = 0
    keep: tuple[int, ...] = ()
    began: bool = False

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
    prefixes: set[int] = field(default_factory=set)  # keys of the beginnings that are kept
    keeps: bool = True  # whether any are
    beyond: int = 0  # tokens that are found behind a key: those of a reply
    computed: dict[int, int] = field(default_factory=dict)  # tokens that were prefilled, by request, done or not
    now: float = 0.0
    rounds: int = 0
    ahead: int = 0  # rounds whose plan was made ahead

    def submit(self, job: Job, length: int | None = None, keep: tuple[int, ...] = ()) -> None:
        self.scheduler.submit(job, self.now)
        self.requests[job.id] = Kept(job, job.limit if length is None else length, keep=keep)
        self.computed[job.id] = 0

    def known(self, id: int) -> Known:
        """What is kept of a request that is staged: the plan may count on it from then on. One that had not begun may
        be staged anew.
        """
        kept, grid = self.requests[id], self.scheduler.grid
        assert kept.where == "nowhere" or (kept.where == "staged" and not kept.began)
        kept.where, kept.fed, kept.began = "nowhere", 0, False
        found = max((i + 1 for i, key in enumerate(kept.job.keys) if key in self.prefixes), default=0) * grid
        if found:
            found = min(found + self.beyond, kept.tokens - 1)
            kept.where, kept.fed = "staged", found
        return Known(found, kept.keep)

    def pause(self, id: int) -> None:
        if id in self.requests:
            self.paused.add(id)
        self.scheduler.paused(id)

    def resume(self, id: int) -> None:
        self.paused.discard(id)
        self.scheduler.resumed(id)

    def round(self, budget: int | None = None, pressure: int = NORMAL, emit: int = 1) -> Plan:
        """Does a round in which every row emits `emit` tokens."""
        before = {id: kept.where for id, kept in self.requests.items()}
        ahead = self.scheduler.ahead(self.now)
        plan = self.scheduler.plan(self.now, budget, pressure, known=self.known)
        assert ahead is None or ahead == plan
        self.ahead += ahead is not None
        self._leave(plan)
        self._arrange(plan)
        self._prefill(plan, budget)
        self._check_memory(plan)
        self._check_stages(plan, pressure, before)
        self.scheduler.foresee(self.now)
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
        assert not (plan.begins and plan.pieces)
        for id in joiners:
            kept = self.requests[id]
            assert kept.where in ("staged", "saved") and kept.fed == kept.tokens, "its K/V are not complete"
            assert id not in self.paused
            kept.where = "row"
        assert not self.paused & set(places)
        self.rows = places

    def _is_end(self, piece: Piece) -> bool:
        return piece.stop == self.requests[piece.id].tokens

    def _prefill(self, plan: Plan, budget: int | None) -> None:
        grid, total = self.scheduler.grid, sum(piece.stop - piece.start for piece in plan.pieces)
        rows = self.scheduler.max_rows if not self.rows else 1
        most = max(CHUNK * rows if budget is None else budget, grid)
        assert total <= most or (total <= CHUNK and total < most + grid and self._is_end(plan.pieces[-1]))
        assert len({piece.id for piece in plan.pieces}) == len(plan.pieces)
        for piece in plan.pieces:
            kept = self.requests[piece.id]
            assert kept.where in ("nowhere", "staged") and piece.id not in self.paused
            assert piece.start == kept.fed < piece.stop <= kept.tokens
            assert piece.stop - piece.start <= CHUNK
            assert piece.stop % grid == 0 or piece.stop == kept.tokens
            assert list(piece.keep) == sorted({each for each in piece.keep if piece.start < each <= piece.stop})
            kept.where, kept.fed, kept.began = "staged", piece.stop, True
            self.computed[piece.id] += piece.stop - piece.start
            self.prefixes |= {kept.job.keys[each // grid - 1] for each in piece.keep if self.keeps}
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
        assert not self.scheduler.spare or total + self.scheduler.spare <= memory.limit

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


def keys(prompt: int, own: int, common: int = 0, text: int = -1, grid: int = CHUNK) -> tuple[int, ...]:
    """Keys of a prompt that begins with the first `common` tokens of a text, and goes on as no other does."""
    borders = range(1, (prompt - 1) // grid + 1)
    return tuple(hash((text, i)) if i * grid <= common else hash(("own", own, i)) for i in borders)


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
        st.tuples(st.integers(0, 1), st.integers(0, 40)),  # the text that it begins with, for how many tokens
        st.sets(st.integers(0, 40), max_size=2),  # what is to be kept of it
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    jobs,
    st.integers(1, 4),
    st.sampled_from([CHUNK, 4, 2]),
    st.sampled_from([230, 260, 330, 420, PLENTY]),
    st.lists(st.sampled_from([None, 1, 2, 5, 8, 20]), min_size=1, max_size=5),
    st.lists(st.sampled_from([NORMAL, NORMAL, NORMAL, WARNING, CRITICAL]), min_size=1, max_size=8),
    st.lists(st.integers(1, BLOCK), min_size=1, max_size=5),
    st.sampled_from([True, True, False]),
    st.integers(0, 3),
    st.none() | st.integers(1, 9),
)
def test_random_schedules(jobs, max_rows, grid, limit, budgets, pressures, emits, keeps, beyond, forgets):
    """Whatever comes, pauses, is cancelled or late: every plan can be done, and every request ends."""
    run = model(max_rows, limit, grid=grid)
    run.keeps, run.beyond = keeps, beyond
    events: dict[int, list] = {}
    taken = []

    def offer(job: Job, length: int, keep: tuple[int, ...]) -> None:
        with suppress(UserError):  # of what never fits
            run.submit(job, length, keep)
            taken.append(job.id)

    for id, (start, prompt, most, less, priority, deadline, cancel, pause, (text, common), keep) in enumerate(jobs):
        late = None if deadline is None else (start + deadline) * ROUND_S
        job = Job(id, prompt, most, priority, late, keys(prompt, id, common, text, grid))
        kept = tuple({grid * i for i in range(1, len(job.keys) + 1)} & {each // grid * grid for each in keep})
        events.setdefault(start, []).append((offer, job, max(1, most - less), kept))
        if cancel is not None:
            events.setdefault(start + cancel, []).append((run.scheduler.cancel, id))
        if pause is not None:
            events.setdefault(start + pause[0], []).append((run.pause, id))
            events.setdefault(start + sum(pause), []).append((run.resume, id))
    for now in range(max(events) + 1):
        for call, *args in events.get(now, ()):
            call(*args)
        if forgets and now % forgets == 0:
            run.prefixes.clear()
        run.round(budgets[now % len(budgets)], pressures[now % len(pressures)], emits[now % len(emits)])
    run.run(budget=budgets[0], pressure=pressures[0], emit=emits[0])
    assert run.done.keys() | run.ended.keys() == set(taken) and not run.scheduler.busy


def test_the_life_of_a_request():
    """Alone it begins the batch: its first token is drawn by the round that it joins in."""
    run = model()
    run.submit(Job(7, prompt=11, limit=3))
    assert run.round() == Plan(pieces=(Piece(7, 0, 8),))
    assert run.round() == Plan(pieces=(Piece(7, 8, 11),))
    assert run.round() == Plan(places=(7,), begins=True)
    assert run.round() == run.round() == Plan(places=(7,))
    assert run.first == {7: 3} and run.done == {7: 5} and not run.scheduler.busy


def test_one_that_comes_while_others_decode_joins_with_its_first_token():
    run = model()
    run.submit(Job(1, 3, 50))
    run.round()
    run.submit(Job(2, 10, 50))
    assert run.round() == Plan(places=(1,), begins=True)
    assert run.round() == Plan(places=(1,), pieces=(Piece(2, 0, 8),))
    assert run.round() == Plan(places=(1,), pieces=(Piece(2, 8, 10),), firsts=(2,))
    assert run.round() == Plan(places=(1, 2))


def test_prompts_that_are_ready_together_begin_together():
    run = model(3)
    for id, prompt in enumerate((5, 8, 3)):
        run.submit(Job(id, prompt, 9))
    assert {piece.id for piece in run.round().pieces} == {0, 1, 2}
    plan = run.round()
    assert set(plan.places) == {0, 1, 2} and plan.begins and plan.firsts == ()


def test_a_first_token_that_can_be_drawn_waits_for_no_prompt():
    """The round that begins prefills nothing, whoever waits."""
    run = model(3)
    run.submit(Job(1, 3, 50))
    run.round()
    run.submit(Job(2, 4, 50))
    assert run.round() == Plan(places=(1,), begins=True)
    assert run.round() == Plan(places=(1,), pieces=(Piece(2, 0, 4),), firsts=(2,))


def test_a_forward_that_has_half_a_chunk_takes_no_other_prompt():
    """Two prompts of a chunk and a half have their first tokens one after the other: the second waits for the first,
    and the first for nobody. Less than half of a chunk is filled up, and so is a small budget.
    """
    run = model(2)
    for id in (1, 2):
        run.submit(Job(id, 12, 50))
    assert run.round(CHUNK) == Plan(pieces=(Piece(1, 0, 8),))
    assert run.round(CHUNK) == Plan(pieces=(Piece(1, 8, 12),))
    assert run.round(CHUNK) == Plan(places=(1,), begins=True)
    assert run.round(CHUNK) == Plan(places=(1,), pieces=(Piece(2, 0, 8),))
    run = model(3)
    for id in (1, 2, 3):
        run.submit(Job(id, 3, 50))
    assert run.round(CHUNK) == Plan(pieces=(Piece(1, 0, 3), Piece(2, 0, 3)))
    run = model(3, grid=2)
    for id in (1, 2):
        run.submit(Job(id, 3, 50))
    assert run.round(4) == Plan(pieces=(Piece(1, 0, 3),))  # a step of the grid is two tokens
    run = model(3, grid=1)
    for id in (1, 2):
        run.submit(Job(id, 3, 50))
    assert run.round(4) == Plan(pieces=(Piece(1, 0, 3), Piece(2, 0, 1)))


@pytest.mark.parametrize("grid", [8, 4, 2, 1])
def test_a_short_prompt_never_waits_for_long_ones(grid):
    """All rows decode, long prompts stand in line, the budget is a step of the grid: a prompt of one chunk is drawn
    within the plans that its own pieces take, and one for every three of them that the long ones get.
    """
    pieces = CHUNK // grid
    for before in range(6):
        run = model(2, grid=grid)
        for id in range(2):
            run.submit(Job(id, 3, 10_000))
        for _ in range(3):
            run.round(CHUNK)
        for id in range(2, 12):
            run.submit(Job(id, 4000, 10))
        for _ in range(before):
            run.round(grid)
        run.now += 100.0  # the long ones have waited, and are due first
        run.submit(Job(99, CHUNK, 10))
        came = run.rounds
        while 99 not in run.first:
            run.round(grid)
        assert run.first[99] - came <= pieces + -(-pieces // 3)


@pytest.mark.parametrize("priority", [0, 100])
@pytest.mark.parametrize("limit", [PLENTY, 700])
def test_a_long_request_ends_however_many_short_ones_come(priority, limit):
    """One comes every round, of the same or the highest priority: more than the rows and the budget can take."""
    run = model(2, limit, max_waiting=10**6)
    run.submit(Job(0, prompt=20 * CHUNK, limit=40, priority=-100))
    for id in range(1, 100_000):
        run.submit(Job(id, 5, 4, priority))
        run.round(CHUNK)
        run.now += 10.0  # the clock runs faster than rounds, so that the test is short
        if 0 in run.done:
            break
    assert 0 in run.done and run.done[0] < 1000
    assert len(run.done) > run.done[0] / 8, "the others went on meanwhile"


def test_a_long_prompt_is_prefilled_beside_short_ones_that_take_the_whole_budget():
    """A prompt of a chunk and one token of text comes every round: every fourth round is the long one's."""
    run = model(2, max_waiting=10**6)
    run.submit(Job(-1, 4, 10_000))
    run.round()
    run.submit(Job(0, prompt=10 * CHUNK, limit=1))
    for id in range(1, 1000):
        run.submit(Job(id, CHUNK, 1))
        run.round(CHUNK)
        if 0 in run.done:
            break
    assert 0 in run.done and run.done[0] <= 4 * (10 + 2)


def test_the_highest_priority_goes_first_and_then_the_shortest_prompt():
    run = model(1)
    run.submit(Job(0, 4, 30))
    run.round()
    for id, prompt, priority in ((1, 30, 0), (2, 20, 0), (3, 40, 5), (4, 8, -5)):
        run.submit(Job(id, prompt, 3, priority))
    run.run(budget=CHUNK)
    assert sorted((1, 2, 3, 4), key=run.first.get) == [3, 2, 1, 4]


def test_waiting_counts_for_more_than_priority_in_the_end():
    """A level is worth ten seconds: who waits longer than that goes before a newcomer of one level more."""
    for waited, first in ((9.0, 2), (11.0, 1)):
        run = model(1)
        run.submit(Job(0, 4, 4000))
        run.submit(Job(1, 30, 3, 0))
        for _ in range(2):
            run.round(pressure=WARNING)  # only one goes on
        run.now = waited
        run.submit(Job(2, 30, 3, 1))
        assert min((1, 2), key=lambda id: run.scheduler.entries.find(id).due) == first


def test_holes_go_to_joiners_first_and_then_to_the_last_row():
    run = model(4)
    for id in range(4):
        run.submit(Job(id, 4, 50))
    run.round()
    assert run.round().places == (0, 1, 2, 3)
    run.submit(Job(4, 4, 50))
    run.round()
    for id in (0, 1):
        run.scheduler.finished(id)
        run._drop(id)
    assert run.round().places == (4, 3, 2)
    run.scheduler.finished(4)
    run._drop(4)
    assert run.round().places == (2, 3)


def test_the_batch_never_begins_beside_rows():
    """A prompt that was prefilled while nothing decoded waits for its first token once a saved row has come back."""
    run = model(2)
    run.submit(Job(1, 4, 50))
    run.round()
    run.round()
    run.pause(1)
    run.submit(Job(2, 4, 50))
    assert run.round() == Plan(save=(1,), pieces=(Piece(2, 0, 4),))
    run.resume(1)
    assert run.round() == Plan(places=(1,), firsts=(2,))
    assert run.round() == Plan(places=(1, 2))


def test_without_rows_what_is_due_first_decides_whether_the_batch_begins():
    """A saved row waits where a prefilled prompt of a higher priority has no first token yet."""
    run = model(2)
    run.submit(Job(1, 4, 50))
    run.round()
    run.round()
    run.pause(1)
    run.submit(Job(2, 4, 50, priority=1))
    run.round()
    run.resume(1)
    assert run.round() == Plan(places=(2,), begins=True)
    assert run.round() == Plan(places=(2, 1))


def decoding(limit: int, *priorities: int, text: int = 1) -> Model:
    """Rows of 8 prompt tokens each that have drawn `text` tokens."""
    run = model(len(priorities), limit)
    for id, priority in enumerate(priorities):
        run.submit(Job(id, 8, 60, priority))
    run.round()
    for _ in range(text):
        run.round()
    assert set(run.rows) == set(range(len(priorities)))
    return run


@pytest.mark.parametrize(("priorities", "leaves"), [((0, 0, 0), 2), ((0, -1, 0), 1), ((-5, 5, 0), 0)])
def test_growth_takes_the_row_of_the_youngest_of_the_lowest_priority(priorities, leaves):
    run = decoding(260, *priorities)
    while len(run.rows) == 3:
        plan = run.round()
    assert plan.save == (leaves,) or plan.forget == (leaves,)
    assert set(plan.places) == {0, 1, 2} - {leaves}
    run.run()
    assert run.done.keys() == {0, 1, 2} and run.done[leaves] == max(run.done.values())


def test_a_row_whose_kv_are_kept_comes_back_as_it_was():
    """It is saved where that is enough, and restored once there is room: nothing of it is prefilled again."""
    run = decoding(273, 0, 0, 0)
    while len(run.rows) == 3:
        plan = run.round()
    assert plan.save == (2,) and plan.forget == ()
    text = run.requests[2].text
    run.scheduler.cancel(1)
    plan = run.round()
    assert plan == Plan(ended=((1, "cancelled"),), places=(0, 2)) and run.requests[2].text == text + 1


def test_a_row_is_not_saved_where_that_is_not_enough():
    run = decoding(285, 0, 0, 0)
    while len(run.rows) == 3:
        plan = run.round()
    assert plan.forget == (2,) and plan.save == ()


def test_a_row_whose_kv_went_is_prefilled_with_its_text():
    """Its newest token is not fed: its first verify does that. No token is drawn anew."""
    run = decoding(PLENTY, 0, 0, text=6)
    run.pause(1)
    assert run.round().save == (1,)
    plan = run.round(pressure=CRITICAL)
    assert plan.forget == (1,) and plan.places == (0,)
    run.resume(1)
    assert run.round(pressure=CRITICAL).pieces == ()
    run.scheduler.finished(0)
    run._drop(0)
    plans = [run.round(pressure=CRITICAL) for _ in range(3)]
    assert [plan.pieces for plan in plans] == [(Piece(1, 0, 8),), (Piece(1, 8, 13),), ()]
    assert plans[2] == Plan(places=(1,)) and run.requests[1].text == 7


def test_the_last_row_is_never_taken():
    """However little memory is left."""
    run = decoding(PLENTY, 0, 0)
    run.scheduler.demand.memory = run.memory = replace(run.memory, limit=110)
    run.scheduler.ahead(0.0)  # the plan that was made with more
    for _ in range(3):
        assert len(run.round().places) == 1


def test_a_large_request_is_not_overtaken_for_ever_by_what_fits_beside_others():
    """Memory for two small ones, or the large one alone. Small ones keep coming."""
    run = model(2, memory_of().alone(60, 30, CHUNK, BLOCK) + 1, max_waiting=10**6)
    run.submit(Job(-1, 8, 20))
    run.submit(Job(0, 60, 30))
    for id in range(1, 4000):
        run.submit(Job(id, 6, 20))
        run.round(CHUNK)
        run.now += 0.2
        if 0 in run.done:
            break
    assert 0 in run.done and run.now < 3 * PATIENCE_S
    assert len(run.done) > 5


def test_under_pressure_nothing_new_begins():
    run = model(2)
    run.submit(Job(0, 4, 20))
    run.round(pressure=WARNING)
    run.submit(Job(1, 20, 20))
    for _ in range(5):
        assert run.round(pressure=WARNING).pieces == ()
    assert run.round().pieces == (Piece(1, 0, 8),)
    assert run.round(pressure=CRITICAL).pieces == (Piece(1, 8, 16),)  # it has begun


def test_under_pressure_one_goes_on_where_nothing_else_does():
    run = model(2)
    for id in range(3):
        run.submit(Job(id, 20, 5))
    rounds = run.run(pressure=CRITICAL)
    assert run.done.keys() == {0, 1, 2} and rounds == 3 * (3 + 5)


def test_saved_kv_go_when_pressure_is_critical():
    run = decoding(PLENTY, 0, 0, text=2)
    run.pause(0)
    assert run.round(pressure=WARNING).save == (0,)
    assert run.round(pressure=WARNING).forget == ()
    assert run.round(pressure=CRITICAL).forget == (0,)


@pytest.mark.parametrize("stage", ["waiting", "staged", "ready", "live", "parked"])
@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_who_is_cancelled_or_late_leaves_from_any_stage(stage, reason):
    run = model(1)
    deadline = 1.0 if reason == "timeout" else None
    if stage in ("ready", "staged"):
        run.submit(Job(0, 4, 50))
        run.round()
        run.round()
    run.submit(Job(1, 20 if stage == "staged" else 4, 50, deadline=deadline))
    rounds = {"waiting": 0, "staged": 2, "ready": 2, "live": 3, "parked": 3}[stage]
    for _ in range(rounds):
        run.round(4)
    if stage == "parked":
        run.pause(1)
        run.round()
    assert run.requests[1].where == {"waiting": "nowhere", "ready": "saved", "live": "row", "parked": "saved"}.get(
        stage, stage
    )
    assert run.scheduler.next_deadline() == deadline
    run.now = 1.0
    if reason == "cancelled":
        run.scheduler.cancel(1)
    assert run.scheduler.busy or stage == "parked"
    assert run.round().ended == ((1, reason),)
    assert run.scheduler.next_deadline() is None
    for call in (run.scheduler.cancel, run.scheduler.paused, run.scheduler.resumed):
        call(1)  # it may be gone by the time that the caller knows


def test_a_paused_request_is_passed_over_and_its_row_is_saved():
    run = model(1)
    run.submit(Job(0, 4, 50))
    run.submit(Job(1, 4, 3))
    run.submit(Job(2, 4, 3))
    run.round()
    run.round()
    run.pause(0)
    run.pause(1)
    plan = run.round()
    assert plan.save == (0,) and 0 not in plan.places
    run.run()
    assert run.done.keys() == {2} and not run.scheduler.busy and set(run.requests) == {0, 1}
    run.resume(0)
    assert run.scheduler.busy and run.round().places == (0,)


def test_parked_kv_go_for_a_request_that_waits():
    """Memory holds one: a reader that does not read keeps nobody waiting."""
    run = model(2, memory_of().alone(8, 40, CHUNK, BLOCK))
    run.submit(Job(0, 8, 40))
    for _ in range(20):
        run.round()
    run.pause(0)
    assert run.round().save == (0,)
    run.submit(Job(1, 8, 40))
    assert run.round().forget == (0,)
    run.run()
    run.resume(0)
    run.run()
    assert list(run.done) == [1, 0]


def test_the_budget_is_kept_on_the_grid():
    run = model(2, grid=4)
    run.submit(Job(0, 9, 50))
    run.submit(Job(1, 23, 50))
    assert run.round(1).pieces == (Piece(0, 0, 4),)
    assert run.round(1).pieces == (Piece(0, 4, 9),)  # the last token is no forward of its own
    assert run.round(7).begins
    assert run.round(7).pieces == (Piece(1, 0, 4),)
    assert run.round(11).pieces == (Piece(1, 4, 12),)  # a chunk, however large the budget is
    assert run.round(7).pieces == (Piece(1, 12, 16),)
    assert run.round(3).pieces == (Piece(1, 16, 23),)


def test_a_last_piece_is_no_longer_than_a_chunk():
    run = model(2, grid=4)
    run.submit(Job(0, 9, 50))
    assert run.round(8).pieces == (Piece(0, 0, 8),)
    assert run.round(8).pieces == (Piece(0, 8, 9),)


def test_what_is_left_of_a_chunk_is_one_piece_wherever_it_begins():
    """A turn goes on from what was kept: as many tokens, in no more forwards than one that begins on the grid."""
    run = model(2, grid=4)
    run.submit(Job(0, 19, 5, keys=keys(19, 0, grid=4), cached=12))
    run.prefixes = {run.requests[0].job.keys[2]}
    assert run.round().pieces == (Piece(0, 12, 19),)


def test_without_rows_a_chunk_of_each_row_is_prefilled():
    run = model(3)
    for id in range(5):
        run.submit(Job(id, 20, 5))
    assert [piece.stop for piece in run.round().pieces] == [8, 8, 8]


def test_a_chunk_is_no_larger_than_memory_has_room_for():
    """Four prompts are staged, and there is room for the work of two chunks at once."""
    prompts, memory = 4, memory_of()
    held = memory.weights + prompts * (memory.staged(8) + memory.row(8 + 4 + BLOCK))
    run = model(prompts, held + memory.chunk(2 * CHUNK, 8))
    for id in range(prompts):
        run.submit(Job(id, 8, 9))
    rows = sum(memory.row(8 + 4 + BLOCK) for _ in range(prompts))
    run.scheduler.demand.memory = replace(memory, limit=held - rows + memory.chunk(2 * CHUNK, 8))
    run.scheduler.demand.memory = replace(run.scheduler.memory, row=lambda tokens: 0)
    run.memory = run.scheduler.memory
    assert len(run.round().pieces) == 2


def test_what_the_batch_holds_for_nobody_is_given_back_where_it_matters():
    memory = memory_of(300)
    scheduler = Scheduler(4, CHUNK, memory, block=BLOCK)
    scheduler.submit(Job(0, 8, 20), 0.0)
    assert not scheduler.plan(0.0, batch_bytes=50).trim
    assert scheduler.plan(0.0, batch_bytes=250).trim


def test_what_can_never_fit_is_refused_with_the_numbers():
    run = model(2, 180)
    with pytest.raises(UserError, match=r"a prompt of 9 tokens with max_tokens=90 needs \d+ bytes .*, the limit is"):
        run.submit(Job(0, 9, 90))
    run.submit(Job(1, 9, 20))
    assert run.run() > 0


def test_a_full_queue_refuses():
    run = model(1, max_waiting=3)
    for id in range(4):  # the first has the row, once a plan is made
        run.submit(Job(id, 4, 4))
    with pytest.raises(UserError, match=r"3 requests wait, expected at most max_waiting=3; send this one again later"):
        run.submit(Job(4, 4, 4))
    run.round()  # staged ones do not wait
    run.submit(Job(4, 4, 4))
    run.run()
    assert len(run.done) == 5


def test_whoever_has_a_free_row_does_not_wait():
    """A list, or a burst of calls, that comes between two plans: it is refused for what is beyond the rows alone."""
    run = model(4, max_waiting=1)
    for id in range(5):
        run.submit(Job(id, 4, 4))
    with pytest.raises(UserError, match="max_waiting=1;"):
        run.submit(Job(5, 4, 4))
    run.run()
    assert len(run.done) == 5


def test_one_that_outgrew_what_its_prefill_may_take_comes_back_alone():
    """Its K/V went, and to make them anew takes more than memory has: alone it does it all the same, and once."""
    memory = replace(memory_of(), staged=lambda tokens: 14 + 3 * tokens)
    memory = replace(memory, limit=memory.alone(8, 60, CHUNK, BLOCK))
    run = Model(Scheduler(2, CHUNK, memory, block=BLOCK), memory)
    run.submit(Job(0, 8, 60))
    for _ in range(40):
        run.round()
    run.pause(0)
    run.submit(Job(1, 4, 3))
    assert run.round(pressure=CRITICAL).forget == (0,)
    run.resume(0)
    fed = sum(len(run.round().pieces) for _ in range(12))
    assert run.rows == [0] and fed <= 1 + -(-46 // CHUNK)


def sharing(run: Model, count: int, prompt: int = 40, common: int = 32, **options) -> None:
    """Requests that begin with the same tokens."""
    for id in range(count):
        run.submit(Job(id, prompt, 5, keys=keys(prompt, id, common, grid=run.scheduler.grid), **options))


@pytest.mark.parametrize("grid", [8, 4])
def test_what_waiting_requests_share_is_prefilled_once(grid):
    """Eight come at once: the first one computes the common tokens, and keeps them; all others go on from there."""
    run = model(8, grid=grid)
    sharing(run, 8)
    run.run()
    assert run.computed == {0: 40} | dict.fromkeys(range(1, 8), 8)
    assert run.done.keys() == set(range(8)) and max(run.first.values()) - min(run.first.values()) <= 2


def test_equal_prompts_are_prefilled_once_but_for_their_ends():
    """The last token of each is computed, since its hidden state is drawn from."""
    run = model(4)
    sharing(run, 4, prompt=41, common=41)
    run.run()
    assert run.computed == {0: 41, 1: 1, 2: 1, 3: 1}


def test_nobody_waits_for_a_common_beginning_of_a_chunk():
    run = model(4)
    sharing(run, 4, prompt=20, common=8)
    assert {piece.id for piece in run.round().pieces} == {0, 1, 2, 3}


def test_a_common_beginning_that_is_worth_it_is_waited_for_though_a_chunk_is_longer():
    run = model(4, grid=2, worth=4)
    sharing(run, 4, prompt=20, common=8)
    assert {piece.id for piece in run.round().pieces} == {0}
    run.run()
    assert run.computed == {0: 20} | dict.fromkeys(range(1, 4), 12)


@pytest.mark.parametrize("fate", ["cancelled", "paused", "forgotten", "late"])
def test_another_goes_on_where_the_first_does_not(fate):
    """Whoever waited for it chooses another, which computes the common tokens for the rest."""
    run = model(4)
    sharing(run, 4, deadline=1.0 if fate == "late" else None)
    for id in range(1, 4):  # the deadline is the first one's alone
        entry = run.scheduler.entries.find(id)
        entry.job = replace(entry.job, deadline=None)
    run.round()
    run.round()
    assert run.computed == {0: 16, 1: 0, 2: 0, 3: 0}
    if fate == "cancelled":
        run.scheduler.cancel(0)
    elif fate == "paused":
        run.pause(0)
    elif fate == "late":
        run.now = 1.0
    else:
        run.scheduler._forget(run.scheduler.entries.find(0))
        run.requests[0].where, run.requests[0].fed = "nowhere", 0
    run.run()
    assert run.done.keys() >= {1, 2, 3} and sum(run.computed.values()) <= 16 + 40 + 3 * 8
    if fate == "paused":
        run.resume(0)
        run.run()
        assert run.done.keys() == {0, 1, 2, 3}


def test_whoever_waited_does_not_wait_again_where_nothing_is_kept():
    """There is no room for prefixes: the others begin together once the first one is past what they share."""
    run = model(4)
    run.keeps = False
    sharing(run, 4)
    for _ in range(4):
        assert [piece.id for piece in run.round().pieces] == [0]
    assert [piece.id for piece in run.round().pieces if piece.id] == [1, 2, 3]
    run.run()
    assert run.computed == dict.fromkeys(range(4), 40)


def test_nobody_waits_for_a_prompt_of_lower_priority():
    run = model(4)
    for id, priority in enumerate((-1, 1, 1, 0)):
        run.submit(Job(id, 40, 5, priority, keys=keys(40, id, 32)))
        run.round()
    assert run.computed[0] > 0 and run.computed[1] > 0 and run.computed[2] == 0
    run.run()
    assert run.computed[2] == 8


def test_a_piece_behind_an_exact_end_ends_on_the_grid():
    """What was kept of a reply ends anywhere."""
    run = model(2, grid=4)
    run.beyond = 1
    run.submit(Job(9, 5, 50))
    for _ in range(2):
        run.round()
    run.submit(Job(0, 40, 5, keys=keys(40, 0, grid=4)))
    run.prefixes = {run.requests[0].job.keys[1]}
    assert run.round(6).pieces == (Piece(0, 9, 12),)
    assert run.round(6).pieces == (Piece(0, 12, 16),)


def test_what_is_kept_counts_as_prefilled_for_the_order():
    """A long prompt of which all but a little is kept goes before a shorter one."""
    run = model(1)
    run.submit(Job(0, 4, 30))
    run.round()
    run.submit(Job(1, 30, 3))
    run.submit(Job(2, 40, 3, keys=keys(40, 2), cached=32))
    run.prefixes = {keys(40, 2)[3]}
    run.run(budget=CHUNK)
    assert run.first[2] < run.first[1] and run.computed[2] == 8


def test_what_is_left_is_told():
    """What prefixes may take: all that the plan needs nothing of, and nothing of what it needs."""
    memory = memory_of(300)
    scheduler = Scheduler(4, CHUNK, memory, block=BLOCK)
    scheduler.submit(Job(0, 8, 20), 0.0)
    scheduler.plan(0.0)
    alone = scheduler.spare
    assert alone == 300 - memory.weights - memory.staged(8) - memory.chunk(8, 8)
    scheduler.submit(Job(1, 8, 20), 0.0)
    scheduler.plan(0.0, batch_bytes=30)
    assert scheduler.spare == alone - 30 - memory.staged(8) - (memory.chunk(16, 8) - memory.chunk(8, 8))


def test_rounds_are_planned_ahead_while_nothing_happens():
    """All of a text's rounds but the one in which it joins, and the one in which it ends."""
    run = model()
    run.submit(Job(0, 4, 20))
    assert run.run() == 21 and run.ahead == 19


@pytest.mark.parametrize(
    "happens",
    [
        lambda scheduler: scheduler.submit(Job(7, 4, 4), 0.0),
        lambda scheduler: scheduler.cancel(0),
        lambda scheduler: scheduler.paused(0),
        lambda scheduler: scheduler.finished(1),
        lambda scheduler: scheduler.ahead(0.0),
    ],
)
def test_a_plan_that_was_made_ahead_is_dropped_where_anything_happens(happens):
    run = decoding(PLENTY, 0, 0)
    run.scheduler.foresee(0.0)
    happens(run.scheduler)
    assert run.scheduler.ahead(0.0) is None


def test_a_plan_that_was_made_ahead_ends_nobody_too_late():
    run = model()
    run.submit(Job(0, 4, 20, deadline=5.0))
    run.round()
    run.round()
    run.scheduler.foresee(0.0)
    assert run.scheduler.ahead(5.0) is None
    run.scheduler.foresee(0.0)
    assert run.scheduler.ahead(4.9) is not None
