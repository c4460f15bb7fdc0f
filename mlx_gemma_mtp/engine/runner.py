"""The runner: it does what the plan of a round says, with the arrays of the batch and of the prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import count

import mlx.core as mx

from ..cache.cache import Cache
from ..errors import in_a_line
from ..machine import device, memory, pressure
from ..machine.power import Awake
from ..machine.pressure import NORMAL
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..models.loading import model_bytes
from ..sampling.penalties import TokenCounts
from ..sampling.rules import Rules
from ..speculative.budget import Budget
from ..speculative.copies import RowText
from ..speculative.costs import WIDEST
from ..speculative.depth import AUTO, Depth
from ..speculative.guide import Guide, guide
from ..speculative.loop import Firsts, Joiner, Speculation
from ..speculative.mixture import Pool, reason_of
from ..speculative.prefill import chunk
from ..speculative.readback import Round
from .admission import Memory, memory_of
from .held import Held
from .keeping import Keeping, share
from .lengths import Lengths
from .outbox import Item
from .plan import Job, Known, Piece, Plan
from .prefix_disk import PrefixDisk
from .request import Advance, Delivery, Request
from .scheduler import Scheduler
from .settings import Settings
from .stats import Totals
from .tables import Tables

# Rounds from one time to the next that MLX gives its unused buffers back on a GPU: prompts come in ever new sizes, so
# that else they pile up to its limit.
CLEAR_EVERY = 256
WORTH = 256  # first tokens of a prompt: fewer are computed as soon as others' are kept or waited for
SLOW_CALLER = 0.05  # of a round: a caller that takes longer to deliver spoils the round's time


class Runner:
    """Rounds of all requests of an engine: the rows of the batch, and the prompts that are prefilled beside it.

    A call of `round` reads back what runs, hands its tokens to the requests, asks for the next plan, arranges the rows
    by it, and dispatches their verify; while that runs, it makes text of the tokens and has it delivered. In most
    rounds the rows go on as they are, by a plan that was made ahead: then the verify begins right behind the readback.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        tables: Tables | None,
        depth: Depth,
        settings: Settings,
        *,
        scheduler: Scheduler | None = None,
        budget: Budget | None = None,
        pressure: Callable[[], int] = pressure.level,
        clock: Callable[[], float] = time.monotonic,
        disk: PrefixDisk | None = None,
    ):
        """Starts without requests.

        tables: where the costs come from that `depth` chooses by. scheduler, budget: None for those of the settings.
        pressure: the system's level of memory pressure. clock: of arrivals and deadlines, in seconds. disk: where
        prefixes outlast the runner.
        """
        self.target, self.drafter, self.tables, self.depth, self.settings = target, drafter, tables, depth, settings
        self.drafting = settings.drafting
        self.specs = settings.specs(target.config)
        drafts = settings.num_draft_tokens
        block = max(WIDEST, 0 if drafts == AUTO else drafts) + 1
        chunk = settings.prefill_chunk
        self.scheduler = scheduler or Scheduler(
            settings.max_rows,
            chunk,
            self._memory(block),
            block=block,
            grid=_grid(chunk),
            worth=min(chunk, WORTH),
            max_waiting=settings.max_waiting,
        )
        self.budget = budget or Budget(chunk, _grid(chunk))
        self.lengths = Lengths(depth, block, drafter is not None)
        self.keeping = self._new_keeping()
        if disk is not None:
            disk.join(self.keeping.prefixes)
        self.pressure, self.clock = pressure, clock
        memory.limit_cache(self._transient())
        self._awake, self._working = Awake("mlx_gemma_mtp generates text"), ExitStack()  # while there are requests
        self.held: dict[int, Held] = {}  # by request
        self.rows: list[int] = []  # the requests of the batch's rows
        self.totals, self._pool = Totals(), Pool()
        self._loop = self._new_loop()
        self._plan = Plan()
        self._ahead: Plan | None = None  # of the next verify, where that may begin before anything is taken in
        self._given: list[Item] = []  # what the round gave so far
        self._changed: dict[int, Request] = {}  # requests whose tokens of this round are not in `_given` yet
        # When the last verify began, when `round` returned after that, and the last readback.
        self._launched = self._returned = self._last = self._read_at = 0.0
        self._rounds = count(1)

    # What the worker asks.

    @property
    def busy(self) -> bool:
        """Whether a round would advance anything."""
        return bool(self.rows or self._plan.pieces) or self.scheduler.busy

    def submit(self, request: Request) -> None:
        """Takes a request in. Raises UserError for one that can never fit, and where too many wait."""
        now = self.clock()
        keys, cached = self.keeping.keys(request), self.keeping.cached(request)
        job = Job(request.id, len(request.prompt), request.limit, request.priority, request.deadline, keys, cached)
        self.scheduler.submit(job, now)
        if not self.held:
            self._begin()
        self.held[request.id] = Held(request, now)

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Has the next round end a request; one that is done is passed over. reason: its finish_reason."""
        self.scheduler.cancel(id, reason)

    def pause(self, id: int) -> None:
        """Lets a request rest until `resume`; one that is done is passed over."""
        self.scheduler.paused(id)

    def resume(self, id: int) -> None:
        """Lets a request go on."""
        self.scheduler.resumed(id)

    def next_deadline(self) -> float | None:
        """Returns when the next request is to be ended, by the clock; None where none is."""
        return self.scheduler.next_deadline()

    def round(self, deliver: Callable[[list[Item]], None]) -> None:
        """Computes one round. The last Delivery of a request carries its Result.

        deliver: is called with what the round gives, amid the dispatch of the next verify: readers whom it wakes have
        the interpreter then, while MLX works without it.
        """
        self._ahead = None
        self._read()
        level, plan = self.pressure(), self._ahead
        if plan is None:
            budget = self.budget.tokens(len(self.rows)) if self.scheduler.prompts else None
            plan = self.scheduler.plan(self.clock(), budget, level, self._loop.cache.bytes, self._known)
        self._plan = plan
        for id, reason in plan.ended:
            self._end(id, reason)
        self._arrange(plan, level)
        self._launch(deliver)
        if device.traits().gives_back and next(self._rounds) % CLEAR_EVERY == 0:
            mx.clear_cache()
        if not self.held:
            self._rest()
        self._returned = self.clock()

    def fail(self, error: BaseException) -> list[Item]:
        """Ends, with finish_reason 'error', the requests of a round that raised, and is ready for others.

        These are the rows, and the prompts that it prefilled or that were to join; where there are none, all requests.
        A plan that was not finished may have let others go, or have made rows of them: these end, too.
        """
        plan, rows = self._plan, self.rows
        failed = {*rows, *plan.places, *(piece.id for piece in plan.pieces), *plan.firsts}
        failed |= {id for id in self.held if self.scheduler.is_row(id) or not self.scheduler.has(id)}
        self._start_anew()
        for id in [id for id in self.held if id in failed] or list(self.held):
            self._end(id, "error", f"a round failed: {in_a_line(error)}", done=True)
        if not self.held:
            self._rest()
        return self._all_given()

    def close(self) -> list[Item]:
        """Ends every request with finish_reason 'cancelled', and gives back what it holds."""
        for id in list(self.held):
            self._end(id, "cancelled", done=True)
        self._start_anew()
        self.keeping.prefixes.clear()
        self._rest()
        return self._all_given()

    def _all_given(self) -> list[Item]:
        """Returns what there is to deliver, once. A round that raises has given what it gave before."""
        changed, self._changed = self._changed, {}
        items, self._given = self._given, []
        for id, request in changed.items():
            items.append(Delivery(id, request.chunk()))
            if request.finish_reason is None and request.error is not None:
                self.cancel(id)  # its text failed: the next plan lets it go
        return items

    # A round.

    def _read(self) -> None:
        """Queues what the last plan asked for besides its verify, reads the round back, and hands its tokens on."""
        plan, staged, began = self._plan, [], self.clock()
        hidden = self._prefill(plan.pieces)
        for piece in plan.pieces:
            held = self.held[piece.id]
            staged += [held.staged.lengths, *(array for pair in held.staged.buffers for array in pair)]
        if self.rows:
            away = began - self._returned
            self._step(plan, hidden, staged, away)
        elif plan.pieces:
            mx.eval(hidden, staged)
            self._last = self.clock()
            self.budget.took(0, self._last - began, _tokens(plan.pieces), True)
            self._prefilled(plan.pieces)

    def _prefill(self, pieces: Sequence[Piece]) -> mx.array | None:
        """Builds the forward of the next pieces of prompts. Returns the hidden states of their last tokens, [P, H]."""
        if not pieces:
            return None
        caches, tokens, now = [], [], self.clock()
        for piece in pieces:
            held = self.held[piece.id]
            held.began = held.began or now
            caches.append(held.staged)
            tokens.append(held.tokens[piece.start : piece.stop])
        hidden = chunk(self.target, caches, tokens, at_once=not self.rows)  # else drafts come first
        for i, piece in enumerate(pieces):
            held = self.held[piece.id]
            if piece.stop == len(held.tokens):
                held.hidden = hidden[i]
        return hidden

    def _known(self, id: int) -> Known:
        """Returns what is kept for a request that is staged now. What it had is gone."""
        held = self.held[id]
        held.saved = held.staged = held.hidden = None
        return self.keeping.find(held)

    def _open(self, held: Held) -> None:
        """Makes the cache in which a prompt is prefilled, from what was found of it."""
        specs, block = self.specs, self.scheduler.chunk
        held.staged = Cache(specs, block, self.target.dtype, self.drafting.lookback).open(len(held.tokens), held.found)
        held.found = None

    def _prefilled(self, pieces: Sequence[Piece]) -> None:
        """Takes in that pieces of prompts were prefilled, and tells how far these are."""
        for piece in pieces:
            held = self.held[piece.id]
            self.keeping.prompt(held, piece)
            self.scheduler.prefilled(piece.id, piece.stop)
            if held.request.tokens:  # it comes back to a place where it was before
                if piece.stop == len(held.tokens):
                    self._save_staged(held)
                continue
            if piece.stop == len(held.tokens):
                held.prefilled = self.clock()
                held.request.stats.prompt_tps = held.computed / max(held.prefilled - held.began, 1e-9)
            self._given.append(Advance(piece.id, piece.stop, len(held.tokens)))

    def _save_staged(self, held: Held) -> None:
        """Keeps of a prompt's cache what a row needs."""
        held.saved, held.staged, held.hidden = held.staged.save(0), None, None

    def _step(self, plan: Plan, hidden: mx.array | None, staged: list[mx.array], away: float) -> None:
        """Runs the round of the rows, and what is prefilled beside them.

        away: seconds that the caller took since the verify was dispatched.
        """
        firsts = self._firsts(plan.firsts)
        counts, reach = self.lengths.draft(self._loop, self._held_rows())
        syncs = self._loop.host_syncs
        extra = staged if hidden is None else [hidden, *staged]
        done = self._loop.step(counts, firsts, extra, reach, self._goes_on)
        now, before = self._read_at, self.totals
        emitted = sum(map(len, done.tokens)) + (0 if done.firsts is None else len(done.firsts.tokens))
        self.totals += Totals(now - self._last, emitted, 1, len(self.rows), self._loop.host_syncs - syncs)
        seconds, self._last, self._launched = now - self._launched, now, now
        timed = 0.0 if plan.begins else seconds  # the first tokens have no verify: that is no round of so many rows
        clean = self.budget.took(len(self.rows), timed, _tokens(plan.pieces), firsts is not None)
        clean = clean and away < SLOW_CALLER * seconds  # else the round is hidden behind the caller's own work
        self._prefilled(plan.pieces)
        drawn = () if done.firsts is None else plan.firsts
        for id in drawn:  # rows of this round alone: they may have to wait for a place
            self.held[id].becomes_row(before)
            self.held[id].leaves_row(self.totals)
        self.lengths.read(self.rows, done, seconds if clean else None)
        self._take(self.rows, done, self.scheduler.emitted)
        if drawn:
            self._take(drawn, done.firsts, lambda id, tokens: self._drawn(id))

    def _goes_on(self, done: Round) -> bool:
        """Returns whether all rows go on as they are behind what a round gave them; by which plan, is kept."""
        self._read_at = self.clock()
        plan = self.scheduler.ahead(self._read_at)
        if plan is None or done.firsts is not None or any(done.errors):
            return False
        rows = zip(self.rows, done.tokens, strict=True)
        if not all(self.held[id].request.goes_on(tokens) for id, tokens in rows):
            return False
        self._ahead = plan
        return True

    def _firsts(self, ids: Sequence[int]) -> Firsts | None:
        """Returns what the first tokens of these staged prompts are drawn from."""
        if not ids:
            return None
        hidden = mx.stack([self.held[id].hidden for id in ids])
        return Firsts(hidden, [len(self.held[id].tokens) for id in ids], *self._inputs(ids))

    def _drawn(self, id: int) -> None:
        """Takes in that a staged prompt's first token is there: it waits for a row."""
        self.scheduler.drawn(id)
        self._save_staged(self.held[id])

    def _take(self, ids: Sequence[int], done: Round, told: Callable[[int, int], None]) -> None:
        """Hands a round's tokens to their requests. told: is called with each that goes on, and with its tokens."""
        now = self.clock()
        reports = done.logprobs or [None] * len(ids)
        rows = zip(list(ids), done.tokens, done.drafted, reports, done.errors, done.sources, done.refused, strict=True)
        for id, tokens, drafted, report, error, sources, refused in rows:
            held = self.held[id]
            request, stats = held.request, held.request.stats
            if not request.tokens:
                stats.ttft_s = now - held.submitted
            reason = "" if drafted is None else reason_of(sources) or self.depth.reason(id)
            request.take(tokens, drafted, reason, report, error, sources, refused)
            self._changed[id] = request
            stats.generation_tokens = len(request.tokens)
            stats.generation_tps = len(request.tokens) / max(held.seconds(self.totals), 1e-9)
            if request.finish_reason is None:
                told(id, len(tokens))
            else:
                self.scheduler.finished(id)
                self._let_go(id)
                self._keep_reply(held)

    def _keep_reply(self, held: Held) -> None:
        """Keeps what a request computed that has ended, and is let go, in a row."""
        if (id := held.request.id) in self.rows:
            self.keeping.reply(held, self._loop, self.rows.index(id))

    def _arrange(self, plan: Plan, pressure: int = NORMAL) -> None:
        """Brings the rows into the places that the plan gives them. pressure: the system's level."""
        for id in plan.forget:
            held = self.held[id]
            held.found = held.saved = held.staged = held.hidden = None
        self.keeping.give_back(self.scheduler.spare, pressure)
        for piece in plan.pieces:
            if (held := self.held[piece.id]).staged is None:
                self._open(held)
        for id in plan.save:
            self.held[id].saved = self._loop.save(self.rows.index(id))
        gone = [id for id in self.rows if id not in plan.places]
        if gone:
            self.lengths.leave(gone)
        for id in gone:
            if held := self.held.get(id):
                held.leaves_row(self.totals)
                held.request.stats.preemptions += 1
        if plan.trim:
            self._go_on_with([id for id in self.rows if id in plan.places])
            self._loop.cache.trim()
        if list(plan.places) != self.rows:
            self._go_on_with(plan.places)

    def _go_on_with(self, ids: Sequence[int]) -> None:
        """Goes on with the rows of these requests in this order. Those that had none join."""
        if not self.rows:
            self._last = self.clock()  # of the time before no row knows
            if self.depth.frozen:
                self._pool.clear()  # equal calls, equal choices
        old = {id: row for row, id in enumerate(self.rows)}
        places: list[int | Joiner] = []
        for id in ids:
            places.append(old[id] if id in old else self._joiner(self.held[id]))
        self._loop.arrange(places, *self._inputs(ids))
        self.rows = list(ids)

    def _joiner(self, held: Held) -> Joiner:
        """Returns a request's K/V for a row of the batch. The runner has none of it any more."""
        hidden, saved = held.hidden, held.saved or held.staged.leave()
        held.saved = held.staged = held.hidden = None
        held.becomes_row(self.totals)
        request = held.request
        newest = request.tokens[-1] if request.tokens else None
        text = RowText()  # which only copies look at
        if self.drafting.copies:
            text = RowText([*request.prompt, *request.tokens], request.prediction)
        return Joiner(saved, newest, None if newest is not None else hidden, text)

    def _inputs(self, ids: Sequence[int]) -> tuple[Rules | None, TokenCounts | None, Guide | None]:
        """Returns the settings, the token counts and the constraints of these requests, after all of their text."""
        if not ids:
            return None, None, None
        requests, vocab = [self.held[id].request for id in ids], self.target.config.vocab_size
        rules, counts = Rules.of([request.params for request in requests], vocab, self.settings.suppress), None
        if rules.penalties:
            prompts, texts = [request.prompt for request in requests], [request.tokens for request in requests]
            counts = TokenCounts.of(prompts, vocab, texts)
        return rules, counts, guide([request.constraint for request in requests], vocab)

    def _launch(self, deliver: Callable[[list[Item]], None]) -> None:
        """Dispatches the next verify, has what the round gave delivered, and counts it: before the dispatch where that
        decides how wide the verify is, else while the device computes.
        """
        if not self.rows:
            deliver(self._all_given())
            return self.lengths.count()
        if not self._loop.running:
            self._launched = self.clock()
        chosen = self._loop.running or self._loop.certain
        width = None if chosen else self._width()

        def meanwhile() -> None:
            deliver(self._all_given())
            if chosen:
                self._width()
            self.scheduler.foresee(self.clock(), self._loop.cache.bytes)

        self._loop.launch(width, meanwhile)

    def _width(self) -> int | None:
        """Counts the last round, and returns how many drafts of each row the next verify has at most, None for all."""
        self.lengths.count()
        return None if self._plan.begins else self.lengths.verify(self._loop, self._held_rows())

    def _held_rows(self) -> list[Held]:
        """Returns what is held of the batch's rows, in their order."""
        return [self.held[id] for id in self.rows]

    # Requests that end.

    def _end(self, id: int, reason: str, error: str | None = None, done: bool = False) -> None:
        """Ends a request with what it has. done: the scheduler does not know of it yet."""
        if done:
            self.scheduler.finished(id)
        held = self.held[id]
        held.request.cancel(reason, error)
        self._changed[id] = held.request
        self._let_go(id)
        if not done:
            self._keep_reply(held)

    def _let_go(self, id: int) -> None:
        """Drops all that is held of a request, and completes its figures."""
        held = self.held.pop(id)
        held.leaves_row(self.totals)
        held.request.stats.say_why_off()
        held.request.stats.peak_memory_gb = mx.get_peak_memory() / 1e9
        self.lengths.end(id)

    def _begin(self) -> None:
        """Readies the machine for requests: the first one has come."""
        mx.reset_peak_memory()
        self._awake.on()
        self._working.callback(self._awake.off)
        self._working.enter_context(memory.wired_limit(self.settings.wired_limit))

    def _rest(self) -> None:
        """Lets the machine rest, and keeps what rounds took for the next start: no request is left."""
        self._working.close()
        if self.tables is not None:
            self.tables.learn(self.depth)

    def _memory(self, block: int) -> Memory:
        """Returns where the bytes of a run go. block: tokens of the longest verify."""
        settings, models = self.settings, (self.target, self.drafter)
        return memory_of(
            self.target.config,
            self.specs,
            settings.memory_limit or memory.total_bytes(),
            sum(model_bytes(model) for model in models if model is not None),
            chunk=settings.prefill_chunk,
            block=block,
            item_size=self.target.dtype.size,
            lookback=self.drafting.lookback,
            traits=device.traits(),
        )

    def _new_keeping(self) -> Keeping:
        """Returns what keeps prefixes, as the settings have it."""
        scheduler, config = self.scheduler, self.target.config
        limit = self.settings.prefix_memory
        if limit is None:
            limit = share(scheduler.memory, config, scheduler.chunk, scheduler.block)
        lookback = self.drafting.lookback
        return Keeping(limit, self.specs, lookback, scheduler.memory, scheduler.worth, scheduler.grid)

    def _transient(self) -> int:
        """The bytes that a round frees again: those of a chunk and a verify of short texts."""
        room, settings = self.scheduler.memory, self.settings
        return room.chunk(settings.prefill_chunk, settings.prefill_chunk) + room.verify(settings.max_rows, 0)

    def _start_anew(self) -> None:
        """Goes on with an empty batch, whatever state the last one is in."""
        self._loop, self.rows, self._plan = self._new_loop(), [], Plan()
        self.lengths.drop()

    def _new_loop(self) -> Speculation:
        """Returns a batch without rows."""
        block = self.scheduler.block
        cache = Cache(self.specs, block, self.target.dtype, self.drafting.lookback)
        return Speculation(self.target, self.drafter, cache, self.drafting, pool=self._pool)


def _tokens(pieces: Iterable[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _grid(chunk: int) -> int:
    """The steps in which a budget is spent and prefixes are cut: a quarter of what is worth it, where that divides a
    chunk.
    """
    step = min(chunk, WORTH) // 4
    return step if step and chunk % step == 0 else chunk
