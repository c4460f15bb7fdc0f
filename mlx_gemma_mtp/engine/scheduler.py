"""The plan of a round: who is prefilled, who joins, who leaves. Numbers of the host alone; the arrays are the runner's.

The life of a request. Every arrow is one method of Scheduler, and nothing else moves a request:

    submit          _stage         prefilled, drawn         _join         finished
    -----> WAITING --------> STAGED --------------> READY --------> LIVE --------> gone
              ^                 |                   |   ^            | ^
              |                 |                   |   +-- _save ---+ |
              +---- _forget ----+-------------------+----------------+ |
                                +-- _join, where the batch begins -----+

WAITING: nothing of it is in memory. STAGED: its prompt is being prefilled in a cache of its own, or is prefilled and
its first token is not drawn. READY: it waits for a row, with K/V and a newest token. LIVE: it has a row of the batch.
A request whose reader does not read is parked: it loses its row, else keeps its stage, and is passed over. One that
lost its row is requeued: READY while its K/V are kept, else WAITING, and then its prompt and its text are prefilled
anew. A request that is cancelled or late leaves with the next plan, from any stage.

One order decides who goes first and who gives way: the time at which a request is due (`Entry.due`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ..errors import UserError
from ..machine.pressure import CRITICAL, NORMAL
from .admission import Memory

PRIORITIES = range(-100, 101)
LEVEL_S = 10.0  # seconds of waiting that a level of priority is worth
TOKEN_S = 1e-3  # seconds that a prompt token is worth: about what its prefill takes
PATIENCE_S = 10.0  # how long after it was due a request for which memory is missing lets others go before it
AHEAD = 4  # requests with K/V outside the batch, beyond its free rows; the last place is for prompts of one chunk
TURN = 4  # every so many rounds prompts are prefilled in the order, else the shortest first


@dataclass(frozen=True)
class Job:
    """What the plan knows of a request.

    id: unique. prompt: its tokens. limit: the most tokens to generate. priority: -100 to 100, higher goes first.
    deadline: when it ends unfinished, by the clock of `plan`; None for never.
    """

    id: int
    prompt: int
    limit: int
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens start to stop of a request's prompt, to be prefilled in this round.

    They begin where the last piece ended. Of a requeued request the text so far belongs to the prompt, but for its
    newest token, which its first verify feeds.
    """

    id: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What a round does, in the order of the fields. Ids are those of jobs.

    ended: who leaves unfinished, and why ('cancelled', 'timeout' or what `cancel` was told); all K/V of it go.
    forget: whose K/V go, be they a row, saved or staged; it will be prefilled anew from its first token.
    save: rows whose K/V are saved before their places are given away.
    trim: whether the batch gives back the rows and slots that it holds for nobody, once those that leave are out.
    places: the requests of the batch's rows in order. Those that had a row and stay keep it or move; all others join. A
    hole goes to a joiner first, then to the last row.
    begins: whether no row stays and no request of `places` has its first token yet: the round draws it from the hidden
    state of its prompt's last token. Otherwise every joiner has a newest token.
    pieces: what is prefilled in this round, in one forward.
    firsts: staged requests whose prompt is prefilled with this round's pieces, or was before: their first tokens are
    drawn in this round. Empty where `places` is, and where the batch begins: then a later plan draws them or lets them
    begin the batch, so the hidden state of a prompt's last token is kept until then.
    """

    ended: tuple[tuple[int, str], ...] = ()
    forget: tuple[int, ...] = ()
    save: tuple[int, ...] = ()
    trim: bool = False
    places: tuple[int, ...] = ()
    begins: bool = False
    pieces: tuple[Piece, ...] = ()
    firsts: tuple[int, ...] = ()


class Stage(Enum):
    """Where a request is."""

    WAITING = auto()
    STAGED = auto()
    READY = auto()
    LIVE = auto()


@dataclass(eq=False)
class Entry:
    """A request in the plan.

    arrived: when it was submitted. fed: how many of `tokens` have K/V. text: tokens generated so far. place: its row
    while LIVE; None in all other stages, and until `plan` has arranged the rows. paused: whether its reader does not
    read. leaving: why it leaves with the next plan, '' where it does not.
    """

    job: Job
    arrived: float
    fed: int = 0
    text: int = 0
    place: int | None = None
    paused: bool = False
    leaving: str = ""

    @property
    def tokens(self) -> int:
        """The tokens that a row of it has K/V of: the prompt, and the text but for its newest token."""
        return self.job.prompt + max(self.text - 1, 0)

    @property
    def remaining(self) -> int:
        """The tokens that are still to be prefilled."""
        return self.tokens - self.fed

    def late(self, now: float) -> str:
        """Returns 'timeout' once its deadline is over, else ''."""
        return "timeout" if self.job.deadline is not None and self.job.deadline <= now else ""

    @property
    def due(self) -> float:
        """When its turn comes, in seconds: its arrival and the time of its prefill, less what its priority is worth.

        It does not depend on the present, and whoever arrives long enough after a request is due after it. So the order
        ages by itself, and nobody waits for ever.
        """
        return self.arrived + self.remaining * TOKEN_S - self.job.priority * LEVEL_S


class Scheduler:
    """Says for each round who is prefilled, joins and leaves. It computes nothing: the runner does what a plan says,
    then tells what came of it (`prefilled`, `drawn`, `emitted`, `finished`), then asks for the next plan.

    max_rows: rows of the batch. chunk: prompt tokens a forward of one prompt; pieces never cross a multiple of it.
    block: tokens of the longest verify. grid: a divisor of chunk; pieces end at its multiples, or with the prompt.
    max_waiting: requests beyond the free rows that may wait before `submit` refuses another.
    """

    def __init__(
        self, max_rows: int, chunk: int, memory: Memory, *, block: int, grid: int | None = None, max_waiting: int = 1024
    ):
        grid = grid or chunk
        assert chunk % grid == 0, "pieces would not lie on the grid of chunks"
        self.max_rows, self.chunk, self.grid, self.block = max_rows, chunk, grid, block
        self.memory, self.max_waiting = memory, max_waiting
        self._stages: dict[Stage, dict[int, Entry]] = {stage: {} for stage in Stage}  # each request is in one of them
        self._rounds = 0  # that prefilled

    def submit(self, job: Job, now: float) -> None:
        """Takes a request, which waits from now on. Raises UserError for one that could never fit, and where the queue
        is full.
        """
        assert self._find(job.id) is None and job.prompt > 0 and job.limit > 0 and job.priority in PRIORITIES
        self.memory.check(job.prompt, job.limit, self.chunk, self.block)
        if self.waiting >= self.max_waiting:
            raise UserError(
                f"{self.waiting} requests wait, expected at most max_waiting={self.max_waiting}; "
                "send this one again later, or load with a larger max_waiting"
            )
        self._stages[Stage.WAITING][job.id] = Entry(job, now)

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Lets a request leave with the next plan. Nothing happens to one that is gone."""
        if entry := self._find(id):
            entry.leaving = reason

    def paused(self, id: int) -> None:
        """Passes a request over from the next plan on: its reader does not read. A row of it is saved. Nothing happens
        to one that is gone.
        """
        if entry := self._find(id):
            entry.paused = True

    def resumed(self, id: int) -> None:
        """Ends what `paused` began. Nothing happens to one that is gone."""
        if entry := self._find(id):
            entry.paused = False

    def plan(self, now: float, budget: int | None = None, pressure: int = NORMAL, batch_bytes: int = 0) -> Plan:
        """Returns what the next round does. The requests are in their new stages from then on.

        now: seconds of the clock of arrivals and deadlines. budget: prompt tokens that the round may prefill, rounded
        down to the grid, at least one step of it; None for a chunk of each row, or one chunk in all where rows decode.
        pressure: the system's level. batch_bytes: what the batch's buffers hold, unused rows included; where the rows
        of this plan need less and that matters, `trim` is set. How much a row grows is not asked: its bytes are a
        function of its length.
        """
        ended = self._end(now)
        rows = self._at(Stage.LIVE)
        held = [entry for entry in self._at(Stage.STAGED, Stage.READY, Stage.LIVE) if entry.fed]
        for entry in rows:
            if entry.paused:
                self._save(entry)
        self._grow()
        stay = self._at(Stage.LIVE)
        self._admit(now, pressure)
        if pressure >= CRITICAL:
            self._give_back()
        live = self._arrange()
        begins = bool(live) and not stay and not any(entry.text for entry in live)
        pieces = self._pack(budget)
        return Plan(
            ended,
            forget=tuple(entry.job.id for entry in held if not entry.fed),
            save=tuple(entry.job.id for entry in rows if entry.job.id in self._stages[Stage.READY]),
            trim=self._bytes() + max(0, batch_bytes - sum(map(self._row, live))) > self.memory.limit,
            places=tuple(entry.job.id for entry in live),
            begins=begins,
            pieces=pieces,
            firsts=self._firsts(pieces) if live and not begins else (),
        )

    def prefilled(self, id: int, tokens: int) -> None:
        """Says that the first `tokens` tokens of a staged request have K/V: its piece's `stop`. A requeued one, which
        has its first token, is ready with the last of them.
        """
        entry = self._stages[Stage.STAGED][id]
        assert entry.fed <= tokens <= entry.tokens
        entry.fed = tokens
        if entry.text and not entry.remaining:
            self._move(entry, Stage.STAGED, Stage.READY)

    def drawn(self, id: int) -> None:
        """Says that the first token of one of the plan's `firsts` is there: the request is ready."""
        entry = self._stages[Stage.STAGED][id]
        assert not entry.text and not entry.remaining
        entry.text = 1
        self._move(entry, Stage.STAGED, Stage.READY)

    def emitted(self, id: int, tokens: int) -> None:
        """Says that a row's text grew by so many tokens, its first one included where the batch began."""
        entry = self._stages[Stage.LIVE][id]
        before = entry.tokens
        entry.text += tokens
        entry.fed += entry.tokens - before

    def finished(self, id: int) -> None:
        """Says that a request is done, in whatever stage. A row of it is a hole until the next plan. Nothing happens
        to one that is gone.
        """
        if (stage := self._stage_of(id)) is not None:
            del self._stages[stage][id]

    def has(self, id: int) -> bool:
        """Returns whether a request is there, in whatever stage."""
        return self._stage_of(id) is not None

    def is_row(self, id: int) -> bool:
        """Returns whether a request has a row of the batch, or has been given one by a plan that was not finished."""
        return self._stage_of(id) is Stage.LIVE

    @property
    def busy(self) -> bool:
        """Whether a plan would do anything now: someone leaves, or someone is there who is not paused."""
        return bool(self._stages[Stage.LIVE]) or any(not entry.paused or entry.leaving for entry in self._at(*Stage))

    @property
    def prompts(self) -> bool:
        """Whether a plan may have pieces."""
        return bool(self._stages[Stage.WAITING] or self._stages[Stage.STAGED])

    @property
    def waiting(self) -> int:
        """How many requests wait for which there is no free row."""
        taken = len(self._stages[Stage.LIVE])
        taken += sum(not entry.paused for entry in self._at(Stage.STAGED, Stage.READY))
        return max(0, len(self._stages[Stage.WAITING]) - max(0, self.max_rows - taken))

    def next_deadline(self) -> float | None:
        """Returns the first deadline of all requests; None without any."""
        deadlines = [entry.job.deadline for entry in self._at(*Stage)]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    # The moves of a request that a plan makes.

    def _end(self, now: float) -> tuple[tuple[int, str], ...]:
        """Takes out who is cancelled or late. Returns their ids and why."""
        reasons = {entry.job.id: entry.leaving or entry.late(now) for entry in self._at(*Stage)}
        ended = tuple((id, reason) for id, reason in reasons.items() if reason)
        for id, _ in ended:
            self.finished(id)
        return ended

    def _stage(self, entry: Entry) -> None:
        self._move(entry, Stage.WAITING, Stage.STAGED)

    def _join(self, entry: Entry) -> None:
        self._move(entry, self._stage_of(entry.job.id), Stage.LIVE)

    def _save(self, entry: Entry) -> None:
        assert entry.text, "the hidden state that its first token is drawn from is not kept"
        entry.place = None
        self._move(entry, Stage.LIVE, Stage.READY)

    def _forget(self, entry: Entry) -> None:
        entry.fed = 0
        self._move(entry, self._stage_of(entry.job.id), Stage.WAITING)

    def _move(self, entry: Entry, old: Stage, new: Stage) -> None:
        self._stages[new][entry.job.id] = self._stages[old].pop(entry.job.id)

    # What a plan is made of.

    def _at(self, *stages: Stage) -> list[Entry]:
        """Returns the requests of some stages."""
        return [entry for stage in stages for entry in self._stages[stage].values()]

    def _stage_of(self, id: int) -> Stage | None:
        """Returns the stage of a request; None where it is gone."""
        return next((stage for stage in Stage if id in self._stages[stage]), None)

    def _find(self, id: int) -> Entry | None:
        stage = self._stage_of(id)
        return None if stage is None else self._stages[stage][id]

    def _grow(self) -> None:
        """Makes room for what the rows write in this round. First K/V outside the batch go, then rows, those that are
        due last first: a row is saved where that is enough. The last request that holds anything stays as it is.
        """
        while self._bytes() > self.memory.limit:
            outside, rows = self._at(Stage.STAGED, Stage.READY), self._at(Stage.LIVE)
            if outside and len(outside) + len(rows) > 1:
                self._forget(max(outside, key=_yields))
            elif len(rows) > 1:
                self._save(max(rows, key=_yields))
            else:
                return

    def _admit(self, now: float, pressure: int) -> None:
        """Gives free rows to requests that are ready, and stages waiting ones, in the order of what is due.

        While memory is missing for one, what is small goes ahead; but nothing new does once it was due PATIENCE_S ago,
        so that it is not overtaken for ever. The last place outside the batch is for prompts of one chunk: these never
        wait for long ones.
        """
        if pressure > NORMAL:  # what has not begun is new, too
            for entry in self._at(Stage.STAGED):
                if not entry.fed:
                    self._forget(entry)
        free = self.max_rows - len(self._stages[Stage.LIVE])
        outside, last = self._outside(free, pressure)
        candidates = (self._joinable() if free else []) + (self._waiting() if outside > 0 else [])
        missing, smallest = None, float("inf")
        for entry in sorted(candidates, key=_order):
            waits = entry.job.id in self._stages[Stage.WAITING]
            places = outside - (last if entry.remaining > self.chunk else 0) if waits else free
            held_back = missing is not None and now > missing.due + PATIENCE_S
            if places <= 0 or (waits and (held_back or entry.tokens >= smallest)):
                continue
            if not self._fits(entry):
                missing, smallest = missing or entry, min(smallest, entry.tokens)
            elif waits:
                self._stage(entry)
                outside -= 1
            else:
                self._join(entry)
                free -= 1

    def _outside(self, free: int, pressure: int) -> tuple[int, int]:
        """Returns how many more requests may have K/V outside the batch, and how many of these places are for short
        prompts. free: rows that nobody has.
        """
        taken = sum(not entry.paused for entry in self._at(Stage.STAGED, Stage.READY))
        if pressure == NORMAL:
            return free + AHEAD - taken, 1
        return int(not taken and free == self.max_rows), 0  # one, where nothing else goes on

    def _waiting(self) -> list[Entry]:
        return [entry for entry in self._at(Stage.WAITING) if not entry.paused]

    def _joinable(self) -> list[Entry]:
        """Returns who may join: requests with a newest token. Where there is no row, and a prefilled prompt without one
        is due first, all such prompts instead: they begin the batch.
        """
        ready = [entry for entry in self._at(Stage.READY) if not entry.paused]
        prefilled = [entry for entry in self._at(Stage.STAGED) if not entry.remaining and not entry.paused]
        if prefilled and not self._stages[Stage.LIVE] and min(ready + prefilled, key=_order) in prefilled:
            return prefilled
        return ready

    def _fits(self, entry: Entry) -> bool:
        """Returns whether memory holds one more request in its next stage, with room to advance.

        Requests outside the batch that are paused, or due after one that joins, give their K/V up for it where that is
        enough. Where nobody else has any it fits: `submit` has looked.
        """
        missing = self._bytes(self.memory.advance, entry) - self.memory.limit
        waits = entry.job.id in self._stages[Stage.WAITING]
        outside = [other for other in self._at(Stage.STAGED, Stage.READY) if other is not entry]
        spare = [other for other in outside if other.paused or (not waits and _order(other) > _order(entry))]
        given = []
        for other in sorted(spare, key=_yields, reverse=True):
            if missing <= 0:
                break
            given.append(other)
            missing -= self._outside_bytes(other)
        if missing > 0 and len(spare) < len(outside) + len(self._stages[Stage.LIVE]):
            return False
        for other in given:
            self._forget(other)
        return True

    def _give_back(self) -> None:
        """Forgets the K/V of requests that wait for a row."""
        for entry in self._at(Stage.READY):
            self._forget(entry)

    def _arrange(self) -> list[Entry]:
        """Gives every row its place and returns the rows in order. Holes go to joiners first, then to the last rows."""
        live = self._at(Stage.LIVE)
        joiners = sorted((entry for entry in live if entry.place is None), key=_order, reverse=True)
        rows = {entry.place: entry for entry in live if entry.place is not None}
        for place in range(len(live)):
            if place not in rows:
                rows[place] = joiners.pop() if joiners else rows.pop(max(rows))
                rows[place].place = place
        return [rows[place] for place in range(len(live))]

    def _pack(self, budget: int | None) -> tuple[Piece, ...]:
        """Returns the prompt tokens of a round, at most a chunk of each prompt.

        Of every TURN rounds one goes to what is due first, so that a long prompt comes to its end; the others to the
        highest priority, and there to the shortest remaining prompt.
        """
        staged = [entry for entry in self._at(Stage.STAGED) if entry.remaining and not entry.paused]
        if not staged:
            return ()
        self._rounds += 1
        left, pieces = self._budget(budget, staged), []
        for entry in sorted(staged, key=_shortest if self._rounds % TURN else _order):
            start = entry.fed
            stop = min(entry.tokens, start + self.chunk - start % self.chunk)
            if stop - start > left:
                stop = start + left // self.grid * self.grid
            if stop > start:
                pieces.append(Piece(entry.job.id, start, stop))
                left -= stop - start
        return tuple(pieces)

    def _budget(self, budget: int | None, staged: Sequence[Entry]) -> int:
        """Returns how many prompt tokens a round prefills: as asked, at least one step of the grid, and no more than
        what memory has room for.
        """
        if budget is None:
            budget = self.chunk if self._stages[Stage.LIVE] else self.chunk * self.max_rows
        longest = max(entry.tokens for entry in staged)
        free = self.memory.limit - self._bytes() + self.memory.chunk(min(self.chunk, longest), longest)
        while budget > self.chunk and self.memory.chunk(budget, longest) > free:
            budget -= self.chunk
        return max(budget, self.grid)

    def _firsts(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """Returns the staged requests whose first tokens are drawn with these pieces' round."""
        fed = {piece.id: piece.stop for piece in pieces}
        staged = [entry for entry in self._at(Stage.STAGED) if not entry.text and not entry.paused]
        return tuple(entry.job.id for entry in staged if fed.get(entry.job.id, entry.fed) == entry.tokens)

    # Bytes.

    def _row(self, entry: Entry, advance: int = 0) -> int:
        """Returns the bytes of a row of a request with room for a verify after `advance` more tokens."""
        most = entry.job.prompt + entry.job.limit
        return self.memory.row(min(entry.tokens + advance, most) + self.block)

    def _outside_bytes(self, entry: Entry) -> int:
        """Returns the bytes of a request's K/V outside the batch."""
        staged = entry.job.id in self._stages[Stage.STAGED]
        return self.memory.staged(entry.tokens) if staged else self.memory.saved(entry.tokens)

    def _bytes(self, advance: int = 0, candidate: Entry | None = None) -> int:
        """Returns the bytes of everything, with room for `advance` more tokens of each row.

        A request that joins in this plan has its K/V twice. candidate: is counted in its next stage. One that is to be
        staged reserves its row as well, and so do those outside the batch which will want theirs before it.
        """
        rows, outside = self._at(Stage.LIVE), self._at(Stage.STAGED, Stage.READY)
        total = self.memory.weights + sum(map(self._outside_bytes, outside))
        total += sum(self.memory.saved(entry.tokens) for entry in rows if entry.place is None)
        if candidate is not None and candidate.job.id in self._stages[Stage.WAITING]:
            outside = [*outside, candidate]
            total += self.memory.staged(candidate.tokens)
            total += sum(self._row(entry, advance) for entry in outside if not entry.paused)
        elif candidate is not None:
            rows = [*rows, candidate]
        total += sum(self._row(entry, advance) for entry in rows)
        prompts = [entry.tokens for entry in outside if entry.remaining]
        if prompts:
            total += self.memory.chunk(min(self.chunk, max(prompts)), max(prompts))
        if rows:
            total += self.memory.verify(len(rows), max(entry.tokens for entry in rows))
        return total


def _order(entry: Entry) -> tuple[float, int]:
    """Sorts by what is due first."""
    return entry.due, entry.job.id


def _shortest(entry: Entry) -> tuple[int, int, float]:
    """Sorts by priority, then by the shortest remaining prompt."""
    return -entry.job.priority, entry.remaining, entry.due


def _yields(entry: Entry) -> tuple[bool, float, int]:
    """Sorts by who gives its memory up last: of those that are read the one that is due first."""
    return entry.paused, *_order(entry)
