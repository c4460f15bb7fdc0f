"""The plan of a round: who is prefilled, who joins, who leaves. Numbers of the host alone; the arrays are the runner's.

The life of a request. Every arrow is one method of Scheduler, and nothing else moves a request:

    submit          _stage         prefilled, drawn         _join         finished
    -----> WAITING --------> STAGED --------------> READY --------> LIVE --------> gone
              ^                 |                   |   ^            | ^
              |                 |                   |   +-- _save ---+ |
              +---- _forget ----+-------------------+----------------+ |
                                +-- _join, where the batch begins -----+

WAITING: nothing of it is in memory. STAGED: its prompt is being prefilled in a cache of its own, or is prefilled and
its first token is not drawn. READY: it waits for a row, with K/V and a newest token. LIVE: it has a row of the batch. A
request whose reader does not read is parked: it loses its row, else keeps its stage, and is passed over. One that lost
its row is requeued: READY while its K/V are kept, else WAITING, and then its prompt and its text are prefilled anew. Of
a request that is staged the first tokens may have K/V already, from others (prefix.py); while a staged prompt is about
to have K/V that one which waits could use, that one goes on waiting. A request that is cancelled or late leaves with
the next plan, from any stage.

One order decides who goes first and who gives way: the time at which a request is due (`Entry.due`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..errors import UserError
from ..machine.pressure import CRITICAL, NORMAL
from .admission import Memory
from .demand import Demand
from .entries import Entries, Entry, Stage, order, shared, shortest, yields
from .plan import Job, Known, Piece, Plan

PRIORITIES = range(-100, 101)
PATIENCE_S = 10.0  # how long after it was due a request for which memory is missing lets others go before it
AHEAD = 4  # requests with K/V outside the batch, beyond its free rows; the last place is for prompts of one chunk
TURN = 4  # every so many rounds prompts are prefilled in the order, else the shortest first


def _nothing(id: int) -> Known:
    """Returns that nothing is kept for a request."""
    return Known()


class Scheduler:
    """Says for each round who is prefilled, joins and leaves. It computes nothing: the runner does what a plan says,
    then tells what came of it (`prefilled`, `drawn`, `emitted`, `finished`), then asks for the next plan.

    max_rows: rows of the batch. chunk: prompt tokens a forward of one prompt. block: tokens of the longest verify.
    grid: a divisor of chunk; pieces end at its multiples, or with the prompt. worth: tokens beyond which it is worth
    waiting for a prompt that begins with the same ones; None for a chunk. max_waiting: requests beyond the free rows
    that may wait before `submit` refuses another.
    """

    def __init__(
        self,
        max_rows: int,
        chunk: int,
        memory: Memory,
        *,
        block: int,
        grid: int | None = None,
        worth: int | None = None,
        max_waiting: int = 1024,
    ):
        grid = grid or chunk
        assert chunk % grid == 0, "pieces would not lie on the grid of chunks"
        self.max_rows, self.chunk, self.grid, self.block = max_rows, chunk, grid, block
        self.worth, self.max_waiting, self.entries = worth or chunk, max_waiting, Entries()
        self.demand = Demand(memory, self.entries, chunk, block)
        self.spare = 0  # bytes beside all that the last plan needs: what is kept for others may take them
        self._known: Callable[[int], Known] = _nothing
        self._rounds = 0  # that prefilled
        self._ahead: Plan | None = None  # of the next round, unless anything happens but that rows emit tokens
        self._deadline: float | None = None  # the first one then

    def submit(self, job: Job, now: float) -> None:
        """Takes a request, which waits from now on. Raises UserError for one that could never fit, and where the queue
        is full.
        """
        assert self.entries.find(job.id) is None and job.prompt > 0 and job.limit > 0 and job.priority in PRIORITIES
        self.memory.check(job.prompt, job.limit, self.chunk, self.block)
        if self.waiting >= self.max_waiting:
            raise UserError(
                f"{self.waiting} requests wait, expected at most max_waiting={self.max_waiting}; "
                "send this one again later, or load with a larger max_waiting"
            )
        self.entries.add(Entry(job, now, kept=job.cached))
        self._ahead = None

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Lets a request leave with the next plan. Nothing happens to one that is gone."""
        self._ahead = None
        if entry := self.entries.find(id):
            entry.leaving = reason

    def paused(self, id: int) -> None:
        """Passes a request over from the next plan on: its reader does not read. A row of it is saved. Nothing happens
        to one that is gone.
        """
        self._ahead = None
        if entry := self.entries.find(id):
            entry.paused = True

    def resumed(self, id: int) -> None:
        """Ends what `paused` began. Nothing happens to one that is gone."""
        if entry := self.entries.find(id):
            entry.paused = False

    def plan(
        self,
        now: float,
        budget: int | None = None,
        pressure: int = NORMAL,
        batch_bytes: int = 0,
        known: Callable[[int], Known] = _nothing,
    ) -> Plan:
        """Returns what the next round does. The requests are in their new stages from then on.

        now: seconds of the clock of arrivals and deadlines. budget: prompt tokens that the round may prefill, rounded
        down to the grid, at least one step of it; None for a chunk of each row, or one chunk in all where rows decode.
        pressure: the system's level. batch_bytes: what the batch's buffers hold, unused rows included; where the rows
        of this plan need less and that matters, `trim` is set. How much a row grows is not asked: its bytes are a
        function of its length. known: says what is kept for a request; it is asked for each that is staged, of which
        nothing else is held then.
        """
        self._known, self._ahead = known, None
        if (alone := self._go_on(now, batch_bytes)) is not None:
            return alone
        ended = self._end(now)
        rows = self.entries.at(Stage.LIVE)
        held = [entry for entry in self.entries.at(Stage.STAGED, Stage.READY, Stage.LIVE) if entry.fed]
        for entry in rows:
            if entry.paused:
                self._save(entry)
        self._grow()
        stay = self.entries.at(Stage.LIVE)
        self._admit(now, pressure)
        if pressure >= CRITICAL:
            self._give_back()
        live = self._arrange()
        begins = bool(live) and not stay and not any(entry.text for entry in live)
        pieces = () if begins else self._pack(budget)  # first tokens that can be drawn wait for no forward
        left, unused = self._left(live, batch_bytes)
        self.spare = max(0, (left - unused if unused <= left else left) - self._wide(pieces))
        return Plan(
            ended,
            forget=tuple(entry.job.id for entry in held if not entry.fed),
            save=tuple(entry.job.id for entry in rows if self.entries.stage_of(entry.job.id) is Stage.READY),
            trim=unused > left,
            places=tuple(entry.job.id for entry in live),
            begins=begins,
            pieces=pieces,
            firsts=self._firsts(pieces) if live and not begins else (),
        )

    def foresee(self, now: float, batch_bytes: int = 0) -> None:
        """Plans the next round ahead, as far as the rows go on as they are. now, batch_bytes: see `plan`."""
        self._ahead, self._deadline = self._go_on(now, batch_bytes, self.block), self.next_deadline()

    def ahead(self, now: float) -> Plan | None:
        """Returns the plan that `foresee` made, which takes the place of the next `plan`. It is None where that is to
        be asked: where anything has happened since but that rows emitted a round's tokens, or somebody is late.
        """
        plan, self._ahead = self._ahead, None
        late = self._deadline is not None and self._deadline <= now
        return None if late else plan

    def prefilled(self, id: int, tokens: int) -> None:
        """Says that the first `tokens` tokens of a staged request have K/V: its piece's `stop`. A requeued one, which
        has its first token, is ready with the last of them.
        """
        entry = self.entries.one(id, Stage.STAGED)
        assert entry.fed <= tokens <= entry.tokens
        entry.fed = tokens
        if entry.text and not entry.remaining:
            self.entries.move(entry, Stage.STAGED, Stage.READY)

    def drawn(self, id: int) -> None:
        """Says that the first token of one of the plan's `firsts` is there: the request is ready."""
        entry = self.entries.one(id, Stage.STAGED)
        assert not entry.text and not entry.remaining
        entry.text = 1
        self.entries.move(entry, Stage.STAGED, Stage.READY)

    def emitted(self, id: int, tokens: int) -> None:
        """Says that a row's text grew by so many tokens, its first one included where the batch began."""
        entry = self.entries.one(id, Stage.LIVE)
        before = entry.tokens
        entry.text += tokens
        entry.fed += entry.tokens - before

    def finished(self, id: int) -> None:
        """Says that a request is done, in whatever stage. A row of it is a hole until the next plan. Nothing happens
        to one that is gone.
        """
        self._ahead = None
        self.entries.remove(id)

    def has(self, id: int) -> bool:
        """Returns whether a request is there, in whatever stage."""
        return self.entries.stage_of(id) is not None

    def is_row(self, id: int) -> bool:
        """Returns whether a request has a row of the batch, or has been given one by a plan that was not finished."""
        return self.entries.stage_of(id) is Stage.LIVE

    @property
    def memory(self) -> Memory:
        """Where the bytes of the run go."""
        return self.demand.memory

    @property
    def busy(self) -> bool:
        """Whether a plan would do anything now: someone leaves, or someone is there who is not paused."""
        return self.entries.count(Stage.LIVE) > 0 or any(not entry.paused or entry.leaving for entry in self.entries)

    @property
    def prompts(self) -> bool:
        """Whether a plan may have pieces."""
        return self.entries.count(Stage.WAITING) + self.entries.count(Stage.STAGED) > 0

    @property
    def waiting(self) -> int:
        """How many requests wait for which there is no free row."""
        taken = self.entries.count(Stage.LIVE)
        taken += sum(not entry.paused for entry in self.entries.at(Stage.STAGED, Stage.READY))
        return max(0, self.entries.count(Stage.WAITING) - max(0, self.max_rows - taken))

    def next_deadline(self) -> float | None:
        """Returns the first deadline of all requests; None without any."""
        deadlines = [entry.job.deadline for entry in self.entries]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _go_on(self, now: float, batch_bytes: int, advance: int = 0) -> Plan | None:
        """Returns the plan of a round in which the rows go on as they are, which is nearly every round; None where
        anything else is to be looked at. advance: tokens that each row may have emitted by then.
        """
        rows = self.entries.at(Stage.LIVE)
        if len(rows) != len(self.entries) or any(row.paused or row.leaving or row.late(now) for row in rows):
            return None
        left, unused = self._left(rows, batch_bytes, advance)
        if unused > left or sorted(row.place for row in rows) != list(range(len(rows))):
            return None
        self.spare = left - unused
        return Plan(places=tuple(row.job.id for row in sorted(rows, key=lambda row: row.place)))

    def _left(self, rows: Sequence[Entry], batch_bytes: int, advance: int = 0) -> tuple[int, int]:
        """Returns the bytes that the limit leaves beside all requests, with room for `advance` more tokens of each row,
        and those that the batch holds for nobody.
        """
        left = self.memory.limit - self.demand.total(advance)
        return left, max(0, batch_bytes - sum(map(self.demand.row, rows)))

    # The moves of a request that a plan makes.

    def _end(self, now: float) -> tuple[tuple[int, str], ...]:
        """Takes out who is cancelled or late. Returns their ids and why."""
        reasons = {entry.job.id: entry.leaving or entry.late(now) for entry in self.entries}
        ended = tuple((id, reason) for id, reason in reasons.items() if reason)
        for id, _ in ended:
            self.finished(id)
        return ended

    def _stage(self, entry: Entry) -> None:
        entry.fed, entry.keep = self._known(entry.job.id)
        entry.kept = entry.fed
        assert entry.remaining, "the last token is computed, whatever is kept"
        self.entries.move(entry, Stage.WAITING, Stage.STAGED)

    def _join(self, entry: Entry) -> None:
        self.entries.move(entry, self.entries.stage_of(entry.job.id), Stage.LIVE)

    def _save(self, entry: Entry) -> None:
        assert entry.text, "the hidden state that its first token is drawn from is not kept"
        entry.place = None
        self.entries.move(entry, Stage.LIVE, Stage.READY)

    def _forget(self, entry: Entry) -> None:
        entry.fed = 0
        self.entries.move(entry, self.entries.stage_of(entry.job.id), Stage.WAITING)

    # What a plan is made of.

    def _grow(self) -> None:
        """Makes room for what the rows write in this round. First K/V outside the batch go, then rows, those that are
        due last first: a row is saved where that is enough. The last request that holds anything stays as it is.
        """
        while self.demand.total() > self.memory.limit:
            outside, rows = self.entries.at(Stage.STAGED, Stage.READY), self.entries.at(Stage.LIVE)
            if outside and len(outside) + len(rows) > 1:
                self._forget(max(outside, key=yields))
            elif len(rows) > 1:
                self._save(max(rows, key=yields))
            else:
                return

    def _admit(self, now: float, pressure: int) -> None:
        """Gives free rows to requests that are ready, and stages waiting ones, in the order of what is due.

        While memory is missing for one, what is small goes ahead; but nothing new does once it was due PATIENCE_S ago,
        so that it is not overtaken for ever. The last place outside the batch is for prompts of one chunk: these never
        wait for long ones.
        """
        if pressure > NORMAL:  # what has not begun is new, too
            for entry in self.entries.at(Stage.STAGED):
                if not entry.begun:
                    self._forget(entry)
        free = self.max_rows - self.entries.count(Stage.LIVE)
        outside, last = self._outside(free, pressure)
        candidates = (self._joinable() if free else []) + (self._waiting() if outside > 0 else [])
        missing, smallest = None, float("inf")
        for entry in sorted(candidates, key=order):
            waits = self.entries.stage_of(entry.job.id) is Stage.WAITING
            places = outside - (last if entry.remaining > self.chunk else 0) if waits else free
            held_back = missing is not None and now > missing.due + PATIENCE_S
            if places <= 0 or (waits and (held_back or entry.tokens >= smallest)):
                continue
            if waits and self._awaits(entry):
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
        taken = sum(not entry.paused for entry in self.entries.at(Stage.STAGED, Stage.READY))
        if pressure == NORMAL:
            return free + AHEAD - taken, 1
        return int(not taken and free == self.max_rows), 0  # one, where nothing else goes on

    def _waiting(self) -> list[Entry]:
        return [entry for entry in self.entries.at(Stage.WAITING) if not entry.paused]

    def _joinable(self) -> list[Entry]:
        """Returns who may join: requests with a newest token. Where there is no row, and a prefilled prompt without one
        is due first, all such prompts instead: they begin the batch.
        """
        ready = [entry for entry in self.entries.at(Stage.READY) if not entry.paused]
        prefilled = [entry for entry in self.entries.at(Stage.STAGED) if not entry.remaining and not entry.paused]
        if prefilled and not self.entries.count(Stage.LIVE) and min(ready + prefilled, key=order) in prefilled:
            return prefilled
        return ready

    def _awaits(self, entry: Entry) -> bool:
        """Returns whether a request that waits goes on doing so: a staged prompt of no lower priority begins as its own
        does, by more than `worth` beyond what is kept, and is not so far yet. Whoever has waited until then does not
        wait again, be it kept or not.
        """
        leader = None if entry.leader is None else self.entries.find(entry.leader)
        if leader is not None and leader.fed >= shared(leader.job, entry.job, self.grid):
            entry.patient = False
        for other in self.entries.at(Stage.STAGED) if entry.patient else []:
            begins = self._worth(other, entry)
            if other.fed < begins and not other.paused and other.job.priority >= entry.job.priority:
                entry.leader = other.job.id
                return True
        return False

    def _worth(self, staged: Entry, entry: Entry) -> int:
        """Returns how many first tokens of a staged prompt are worth keeping for a request that waits, or 0."""
        least = (entry.kept + self.worth) // self.grid  # the key of the first border beyond
        keys = staged.job.keys, entry.job.keys
        if min(map(len, keys)) <= least or keys[0][least] != keys[1][least]:
            return 0
        return shared(staged.job, entry.job, self.grid)

    def _fits(self, entry: Entry) -> bool:
        """Returns whether memory holds one more request in its next stage, with room to advance.

        Requests outside the batch that are paused, or due after one that joins, give their K/V up for it where that is
        enough. Where nobody else has any it fits: `submit` has looked.
        """
        missing = self.demand.total(self.memory.advance, entry) - self.memory.limit
        waits = self.entries.stage_of(entry.job.id) is Stage.WAITING
        outside = [other for other in self.entries.at(Stage.STAGED, Stage.READY) if other is not entry]
        spare = [other for other in outside if other.paused or (not waits and order(other) > order(entry))]
        given = []
        for other in sorted(spare, key=yields, reverse=True):
            if missing <= 0:
                break
            given.append(other)
            missing -= self.demand.outside(other)
        if missing > 0 and len(spare) < len(outside) + self.entries.count(Stage.LIVE):
            return False
        for other in given:
            self._forget(other)
        return True

    def _give_back(self) -> None:
        """Forgets the K/V of requests that wait for a row."""
        for entry in self.entries.at(Stage.READY):
            self._forget(entry)

    def _arrange(self) -> list[Entry]:
        """Gives every row its place and returns the rows in order. Holes go to joiners first, then to the last rows."""
        live = self.entries.at(Stage.LIVE)
        joiners = sorted((entry for entry in live if entry.place is None), key=order, reverse=True)
        rows = {entry.place: entry for entry in live if entry.place is not None}
        for place in range(len(live)):
            if place not in rows:
                rows[place] = joiners.pop() if joiners else rows.pop(max(rows))
                rows[place].place = place
        return [rows[place] for place in range(len(live))]

    def _pack(self, budget: int | None) -> tuple[Piece, ...]:
        """Returns the prompt tokens of a round, at most a chunk of each prompt. A prompt's last tokens that would be
        left, less than a step of the grid, come with it where a chunk has room: they would cost a forward of their own.

        Of every TURN rounds one goes to what is due first, so that a long prompt comes to its end; the others to the
        highest priority, and there to the shortest remaining prompt. Once half of a chunk is taken nobody else joins
        it: a forward of so many tokens costs hardly more a token, and the first ones would wait for the others'.
        """
        staged = [entry for entry in self.entries.at(Stage.STAGED) if entry.remaining and not entry.paused]
        if not staged:
            return ()
        self._rounds += 1
        left = whole = self._budget(budget, staged)
        pieces: list[Piece] = []
        for entry in sorted(staged, key=shortest if self._rounds % TURN else order):
            start, stop, most = entry.fed, entry.tokens, min(left, self.chunk)
            if stop - start > max(most, min(left + self.grid - 1, self.chunk - (whole - left))):
                stop = (start + most) // self.grid * self.grid  # what was kept may end anywhere
            if stop > start:
                pieces.append(Piece(entry.job.id, start, stop, self._kept(entry, start, stop)))
                left -= stop - start
            if left <= 0 or (left < self.chunk and whole - left >= self.chunk // 2):
                break
        return tuple(pieces)

    def _kept(self, entry: Entry, start: int, stop: int) -> tuple[int, ...]:
        """Returns what is to be kept of a prompt within its next piece: what `known` said, and what requests that wait
        have in common with it.
        """
        waiting = self.entries.at(Stage.WAITING) if entry.job.keys else []
        wanted = {*entry.keep, *(self._worth(entry, other) for other in waiting)}
        return tuple(sorted(each for each in wanted if start < each <= stop))

    def _budget(self, budget: int | None, staged: Sequence[Entry]) -> int:
        """Returns how many prompt tokens a round prefills: as asked, at least one step of the grid, and no more than
        what memory has room for.
        """
        if budget is None:
            budget = self.chunk if self.entries.count(Stage.LIVE) else self.chunk * self.max_rows
        longest = max(entry.tokens for entry in staged)
        free = self.memory.limit - self.demand.total() + self.memory.chunk(min(self.chunk, longest), longest)
        while budget > self.chunk and self.memory.chunk(budget, longest) > free:
            budget -= self.chunk
        return max(budget, self.grid)

    def _wide(self, pieces: Sequence[Piece]) -> int:
        """Returns the bytes that these pieces take beyond those of one chunk."""
        if not pieces:
            return 0
        longest = max(entry.tokens for entry in self.entries.at(Stage.STAGED) if entry.remaining)
        one = self.memory.chunk(min(self.chunk, longest), longest)
        return max(0, self.memory.chunk(sum(piece.stop - piece.start for piece in pieces), longest) - one)

    def _firsts(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """Returns the staged requests whose first tokens are drawn with these pieces' round."""
        fed = {piece.id: piece.stop for piece in pieces}
        staged = [entry for entry in self.entries.at(Stage.STAGED) if not entry.text and not entry.paused]
        return tuple(entry.job.id for entry in staged if fed.get(entry.job.id, entry.fed) == entry.tokens)
