"""The requests of a scheduler: where each is, and who goes before whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from .plan import Job

LEVEL_S = 10.0  # seconds of waiting that a level of priority is worth
TOKEN_S = 1e-3  # seconds that a prompt token is worth: about what its prefill takes


class Stage(Enum):
    """Where a request is."""

    WAITING = auto()
    STAGED = auto()
    READY = auto()
    LIVE = auto()

    __hash__ = object.__hash__  # Enum's own is a function of Python, and every look at a stage asks for it


@dataclass(eq=False)
class Entry:
    """A request in the plan.

    arrived: when it was submitted. fed: how many of `tokens` have K/V. kept: how many of them were kept from others,
    when that was last looked up. keep: what is to be kept of it (see Known). text: tokens generated so far. place: its
    row while LIVE; None in all other stages, and until `plan` has arranged the rows. paused: whether its reader does
    not read. leader: the request whose prompt it waits for last. patient: whether it waits for one. leaving: why it
    leaves with the next plan, '' where it does not.
    """

    job: Job
    arrived: float
    fed: int = 0
    kept: int = 0
    keep: tuple[int, ...] = ()
    text: int = 0
    place: int | None = None
    paused: bool = False
    leader: int | None = None
    patient: bool = True
    leaving: str = ""

    @property
    def tokens(self) -> int:
        """The tokens that a row of it has K/V of: the prompt, and the text but for its newest token."""
        return self.job.prompt + max(self.text - 1, 0)

    @property
    def remaining(self) -> int:
        """The tokens that are still to be prefilled; while it waits, by what was kept when that was looked up."""
        return self.tokens - max(self.fed, self.kept)

    @property
    def begun(self) -> bool:
        """Whether any of its tokens were computed for it."""
        return self.fed > self.kept

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


class Entries:
    """Requests by their stages. Each is in one of them."""

    def __init__(self) -> None:
        self._stages: dict[Stage, dict[int, Entry]] = {stage: {} for stage in Stage}

    def __iter__(self) -> Iterator[Entry]:
        """Yields all requests, those that are the least far first."""
        return iter(self.at(*Stage))

    def __len__(self) -> int:
        return sum(map(len, self._stages.values()))

    def at(self, *stages: Stage) -> list[Entry]:
        """Returns the requests of some stages. Any thread may ask: a tuple is made in one step of the interpreter."""
        return [entry for stage in stages for entry in tuple(self._stages[stage].values())]

    def count(self, stage: Stage) -> int:
        """Returns how many requests are in a stage."""
        return len(self._stages[stage])

    def stage_of(self, id: int) -> Stage | None:
        """Returns the stage of a request; None where it is gone."""
        return next((stage for stage in Stage if id in self._stages[stage]), None)

    def find(self, id: int) -> Entry | None:
        """Returns a request; None where it is gone."""
        stage = self.stage_of(id)
        return None if stage is None else self._stages[stage][id]

    def one(self, id: int, stage: Stage) -> Entry:
        """Returns the request of a stage. Raises KeyError where it is not there."""
        return self._stages[stage][id]

    def add(self, entry: Entry) -> None:
        """Takes in a request that waits."""
        self._stages[Stage.WAITING][entry.job.id] = entry

    def move(self, entry: Entry, old: Stage, new: Stage) -> None:
        """Moves a request from one stage to another."""
        self._stages[new][entry.job.id] = self._stages[old].pop(entry.job.id)

    def remove(self, id: int) -> None:
        """Lets a request go, from whatever stage. Nothing happens to one that is gone."""
        if (stage := self.stage_of(id)) is not None:
            del self._stages[stage][id]


def shared(one: Job, other: Job, grid: int) -> int:
    """Returns how many first tokens of two prompts are the same, rounded down to the grid."""
    low, high = 0, min(len(one.keys), len(other.keys))
    while low < high:  # a key stands for all before it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.keys[middle - 1] == other.keys[middle - 1] else (low, middle - 1)
    return low * grid


def order(entry: Entry) -> tuple[float, int]:
    """Sorts by what is due first."""
    return entry.due, entry.job.id


def shortest(entry: Entry) -> tuple[int, int, float]:
    """Sorts by priority, then by the shortest remaining prompt."""
    return -entry.job.priority, entry.remaining, entry.due


def yields(entry: Entry) -> tuple[bool, float, int]:
    """Sorts by who gives its memory up last: of those that are read the one that is due first."""
    return entry.paused, *order(entry)
