"""Cases, the order in which they are measured, and the record that each becomes.

A case is a system, a draft length, a number of rows, a temperature and a class of prompts. Every case is warmed; then
one call at a time goes round all cases of the same prompts, in an order that turns from repeat to repeat, so that
other load and heat fall on all alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, groupby, islice, product
from typing import Any

from benchmarks.machine import Sensors
from benchmarks.workers import OURS, Failed, Gone, Setup, Worker

Tokens = list[list[int]]
WARM_TOKENS = 8
TRACED = (8, 24)  # tokens of the two calls whose difference is counted


@dataclass
class Case:
    """timings: for each repeat what its calls answered (systems/call.py: Timing); failed: why it has none."""

    setup: Setup
    drafts: int | str
    batch: int
    temperature: float
    text: str
    timings: list[list[dict[str, Any]]] = field(default_factory=list)
    sensed: dict[str, float] = field(default_factory=dict)
    traced: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    @property
    def place(self) -> tuple[int, float, str]:
        """What cases have in common that get the same calls."""
        return self.batch, self.temperature, self.text

    def name(self) -> str:
        how = f"{self.drafts} drafts" if self.drafts else "plain"
        return f"{self.setup.system}, {how}, {self.batch} rows, T {self.temperature:g}, {self.text}"


@dataclass(frozen=True)
class Axes:
    """What is varied."""

    drafts: Sequence[int | str]
    batches: Sequence[int]
    temperatures: Sequence[float]
    texts: Sequence[str]

    def cases(self, setups: Sequence[Setup]) -> list[Case]:
        places = product(self.batches, self.temperatures, self.texts)
        return [
            Case(setup, drafts, *place)
            for place in places
            for setup in setups
            for drafts in self.drafts
            if supports(setup, drafts, place[0])
        ]


def supports(setup: Setup, drafts: int | str, batch: int) -> bool:
    """Whether a system has such cases: mlx-lm has no MTP, transformers' assisted generation takes one row, and none but
    ours chooses its draft length by itself.
    """
    if drafts and not setup.pair.drafter:
        return False
    able = {"mlx-lm": drafts == 0, "mlx-vlm": drafts != "auto", "transformers": drafts != "auto" and batch == 1}
    return able.get(setup.system, True)


@dataclass
class Job:
    """The calls of a run. prompts: the ids of each class; enough: asked after each repeat, ends the run early; tick:
    told the case of each call.
    """

    prompts: dict[str, Tokens]
    max_tokens: int
    repeats: int
    tick: Callable[[Case], None]
    note: Callable[[str], None]
    enough: Callable[[], bool] = lambda: False

    def calls(self, batch: int, text: str) -> list[Tokens]:
        """The prompts in batches; the first ones again where the last batch would not be full."""
        prompts = self.prompts[text]
        count = -(-len(prompts) // batch)
        rows = list(islice(cycle(prompts), count * batch))
        return [rows[start : start + batch] for start in range(0, len(rows), batch)]

    def length(self, cases: Sequence[Case]) -> int:
        """Ticks to come, if nothing fails."""
        return sum(2 + self.repeats * len(self.calls(case.batch, case.text)) for case in cases)

    def together(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """All systems loaded at the same time. Returns what each says of itself."""
        with crew(cases, self.note) as workers:
            self._prepare(cases, workers)
            for repeat in range(self.repeats):
                self._repeat(cases, workers, repeat)
                if self.enough():
                    break
            return {system: worker.about for system, worker in workers.items()}

    def one_at_a_time(self, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """Measures all cases with one system in memory at a time: each repeat loads them in turn."""
        systems, about = list(dict.fromkeys(case.setup.system for case in cases)), {}
        for repeat in range(self.repeats):
            for system in _turned(systems, repeat):
                own = [case for case in cases if case.setup.system == system and not case.failed]
                with crew(own, self.note) as workers:
                    about |= {system: worker.about for system, worker in workers.items()}
                    self._prepare(own, workers)
                    self._repeat(own, workers, repeat)
            if self.enough():
                break
        return about

    def _prepare(self, cases: Sequence[Case], workers: dict[str, Worker]) -> None:
        """Warms each case, and counts once for cases that differ in their prompts alone."""
        counted: dict[tuple, dict[str, float]] = {}
        for case in cases:
            first = self.calls(case.batch, case.text)[0]
            self._ask(case, workers, "call", prompts=first, max_tokens=WARM_TOKENS)
            kind = (case.setup.system, case.drafts, case.batch, case.temperature)
            if case.traced or case.setup.system == "transformers":
                continue
            if kind not in counted:
                counted[kind] = self._ask(case, workers, "trace", prompts=first, tokens=TRACED) or {}
            case.traced = counted[kind]

    def _repeat(self, cases: Sequence[Case], workers: dict[str, Worker], repeat: int) -> None:
        for place, group in groupby(cases, lambda case: case.place):
            alike = _turned(list(group), repeat)
            for case in alike:
                case.timings.append([])
            for prompts in self.calls(place[0], place[2]):
                for case in alike:
                    with Sensors() as sensors:
                        timing = self._ask(
                            case, workers, "call", prompts=prompts, max_tokens=self.max_tokens, seed=repeat
                        )
                    case.sensed = sensors.means() or case.sensed
                    if timing:
                        case.timings[-1].append(timing)

    def _ask(self, case: Case, workers: dict[str, Worker], method: str, **request: Any) -> dict[str, Any] | None:
        """The answer; where there is none the case has failed, and with a process that ended all of its cases."""
        self.tick(case)
        if case.failed:
            return None
        asked = workers[case.setup.system]
        try:
            return asked.ask(method, drafts=case.drafts, temperature=case.temperature, **request)
        except Failed as error:
            case.failed = str(error)
            self.note(f"{case.name()} failed: {error}")
            if isinstance(error, Gone):
                asked.close()
                workers[case.setup.system] = Ended(str(error), asked.about)
            return None


class Ended:
    """In the place of a worker whose process has ended."""

    def __init__(self, why: str, about: dict[str, Any] | None = None):
        self.why, self.about = why, about or {}

    def ask(self, method: str, **arguments: Any) -> Any:
        raise Failed(self.why)

    def close(self) -> None:
        """Nothing is left to close."""


@contextmanager
def crew(cases: Sequence[Case], note: Callable[[str], None]) -> Iterator[dict[str, Worker | Ended]]:
    """The workers of these cases by system; the cases of one that cannot be loaded have failed."""
    workers: dict[str, Worker | Ended] = {}
    try:
        for setup in dict.fromkeys(case.setup for case in cases):
            try:
                workers[setup.system] = setup.start()
            except Failed as error:
                note(f"{setup.system} failed to load: {error}")
                workers[setup.system] = Ended(str(error))
                for case in cases:
                    if case.setup == setup:
                        case.failed = f"not loaded: {error}"
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _turned(items: list, turns: int) -> list:
    start = turns % max(1, len(items))
    return items[start:] + items[:start]


def texts_of(case: Case, end: set[int]) -> list[Tokens]:
    """For each repeat the tokens of every prompt. Some systems return the token that ended a text and some do not: it
    is no text, so it counts for nobody.
    """
    return [
        [row[:-1] if row and row[-1] in end else row for call in repeat for row in call["tokens"]]
        for repeat in case.timings
    ]


def first_difference(reference: Tokens, made: Tokens) -> dict[str, int | None] | None:
    """Where texts part: the prompt, the position, both tokens (None after a text's end); None where they are equal."""
    for prompt, (expected, row) in enumerate(zip(reference, made, strict=False)):
        if expected == row:
            continue
        both = zip(expected, row, strict=False)
        here = next((i for i, (a, b) in enumerate(both) if a != b), min(len(expected), len(row)))
        token, other = ((text[here] if here < len(text) else None) for text in (row, expected))
        return {"prompt": prompt, "position": here, "token": token, "reference": other}
    return None


def reference_of(case: Case, cases: Sequence[Case]) -> Case | None:
    """What a greedy case's tokens are compared with: plain decoding of the same class in the fewest rows, mlx-lm's
    before ours.
    """
    order = ("mlx-lm", OURS)
    able = [
        other for other in cases
        if not (other.failed or other.drafts or other.temperature) and other.text == case.text
        and other.setup.system in order and other.timings
    ]  # fmt: skip
    best = min(able, key=lambda other: (other.batch, order.index(other.setup.system)), default=None)
    return None if case.temperature or best is case else best


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))
