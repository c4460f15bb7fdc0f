"""The plan of a round: who is prefilled, who joins, who leaves. Numbers of the host alone; the arrays are the runner's.

The life of a request. Every arrow is one method of Scheduler, and nothing else moves a request:

    submit          _stage         prefilled, drawn         _join         finished
    -----> WAITING --------> STAGED --------------> READY --------> LIVE --------> gone
              ^                 |                   |   ^            | ^
              |                 |                   |   +-- _save ---+ |
              +---- _forget ----+-------------------+----------------+ |
                                +-- _join, where the batch begins -----+

WAITING: nothing of it is in memory. STAGED: its prompt is being prefilled in a cache of its own, or is prefilled and its
first token is not drawn. READY: it waits for a row with K/V and a newest token. LIVE: it has a row of the batch. A
request that is not LIVE and whose reader does not read is parked: it keeps its stage and is passed over. One that lost
its row is requeued: READY while its K/V are kept, else WAITING, and then its prompt and its text are prefilled anew. A
request that is cancelled or late leaves with the next plan, from any stage.

One order decides who goes first and who gives way: the time at which a request is due (`Entry.due`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ..errors import UserError
from .admission import ADVANCE, Memory

PRIORITIES = range(-100, 101)
LEVEL_S = 10.0  # seconds of waiting that a level of priority is worth
TOKEN_S = 1e-3  # seconds that a prompt token is worth: about what its prefill takes
PATIENCE_S = 10.0  # how much later a request may be due that goes before one for which memory is missing
AHEAD = 4  # requests with K/V outside the batch, beyond its free rows; the last place is for prompts of one chunk
TURN = 4  # every so many rounds prompts are prefilled in the order, else the shortest first

NORMAL, WARNING, CRITICAL = 1, 2, 4  # the system's levels of memory pressure


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
    trim: whether the batch gives back the rows and slots that it holds for nobody (after `save`, before the joins).
    places: the requests of the batch's rows in order. Those that had a row and stay keep it or move; all others join. A
    hole goes to a joiner first, then to the last row.
    begins: whether no row was there and no request of `places` has its first token yet: the round draws it from the
    hidden state of its prompt's last token. Otherwise every joiner has a newest token.
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
    WAITING = auto()
    STAGED = auto()
    READY = auto()
    LIVE = auto()


@dataclass
class Entry:
    """A request in the plan.

    arrived: when it was submitted. fed: while STAGED, how many of `tokens` have K/V; else 0. text: tokens generated so
    far. place: its row while LIVE; None before its first plan there and in all other stages. paused: whether its reader
    does not read. leaving: why it leaves with the next plan, '' where it does not.
    """

    job: Job
    arrived: float
    stage: Stage = Stage.WAITING
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
        return self.tokens - self.fed if self.stage in (Stage.WAITING, Stage.STAGED) else 0

    @property
    def prefilled(self) -> bool:
        """Whether it is staged, and nothing but its first token is missing."""
        return self.stage is Stage.STAGED and not self.remaining

    @property
    def outside(self) -> bool:
        """Whether it has K/V, or the memory for them, outside the batch."""
        return self.stage in (Stage.STAGED, Stage.READY)

    @property
    def holds(self) -> bool:
        """Whether the runner keeps anything of it."""
        return self.fed > 0 or self.stage in (Stage.READY, Stage.LIVE)

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

    max_rows: rows of the batch. chunk: prompt tokens a forward of one prompt; pieces never cross a multiple of it. grid:
    a divisor of chunk; pieces end at its multiples, or with the prompt. block: tokens of the longest verify.
    max_waiting: requests that may wait before `submit` refuses another.
    """

    def __init__(
        self, max_rows: int, chunk: int, memory: Memory, *, block: int, grid: int | None = None, max_waiting: int = 1024
    ):
        grid = grid or chunk
        assert chunk % grid == 0, "pieces would not lie on the grid of chunks"
        self.max_rows, self.chunk, self.grid, self.block = max_rows, chunk, grid, block
        self.memory, self.max_waiting = memory, max_waiting
        self._entries: dict[int, Entry] = {}
        self._rounds = 0  # that prefilled

    def submit(self, job: Job, now: float) -> None:
        """Takes a request, which waits from now on. Raises UserError for one that could never fit, and where the queue
        is full.
        """
        raise NotImplementedError

    def cancel(self, id: int, reason: str = "cancelled") -> None:
        """Lets a request leave with the next plan. Nothing happens to one that is gone."""
        raise NotImplementedError

    def paused(self, id: int) -> None:
        """Passes a request over from the next plan on: its reader does not read. A row of it is saved. Nothing happens
        to one that is gone.
        """
        raise NotImplementedError

    def resumed(self, id: int) -> None:
        """Ends what `paused` began. Nothing happens to one that is gone."""
        raise NotImplementedError

    def plan(self, now: float, budget: int | None = None, pressure: int = NORMAL, batch_bytes: int = 0) -> Plan:
        """Returns what the next round does. The requests are in their new stages from then on.

        now: seconds of the clock of arrivals and deadlines. budget: prompt tokens that the round may prefill, rounded
        down to the grid, at least one step of it; None for a chunk of each row, or one chunk in all where rows decode.
        pressure: the system's level. batch_bytes: what the batch's buffers hold, unused rows included; where the rows
        of this plan need less and that matters, `trim` is set. How much a row grows is not asked: its bytes are a
        function of its length.
        """
        raise NotImplementedError

    def prefilled(self, id: int, tokens: int) -> None:
        """Says that the first `tokens` tokens of a staged request have K/V: its piece's `stop`. A requeued one, which
        has its first token, is ready with the last of them.
        """
        raise NotImplementedError

    def drawn(self, id: int) -> None:
        """Says that the first token of one of the plan's `firsts` is there: it is ready. (Where none could be drawn,
        nothing is said, and the next plan asks again.)
        """
        raise NotImplementedError

    def emitted(self, id: int, tokens: int) -> None:
        """Says that a row's text grew by so many tokens, its first one included where the batch began."""
        raise NotImplementedError

    def finished(self, id: int) -> None:
        """Says that a request is done, in whatever stage. A row of it is a hole until the next plan."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether a plan would do anything now: someone leaves, or someone is there who is not paused."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """Returns the first deadline of all requests; None without any."""
        raise NotImplementedError
