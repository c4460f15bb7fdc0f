"""The controllers of an engine's draft lengths, and where their costs come from and go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..speculative.costs import UNKNOWN, CostTable
from ..speculative.depth import Auto
from .calibration import Costs


class Autos:
    """One controller for each kind of text (a key of calibration.KINDS), for all requests of an engine.

    Costs are measured by running the loop, so only where nothing else runs: whoever computes the rounds calls `begin`
    before the first request and `rest` after the last. Everything is called in the worker's thread.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter,
        costs: Mapping[str, Costs],
        prompt: Sequence[int],
        rejection: bool = False,
        frozen: bool = False,
    ):
        """prompt: token ids that rounds are timed after. rejection: whether drafts are accepted by rejection. frozen:
        nothing is kept of earlier requests, and no clock influences a choice.
        """
        self.target, self.drafter, self.costs, self.prompt = target, drafter, costs, prompt
        self.rejection, self.frozen = rejection, frozen
        self.known: dict[str, Auto] = {}
        self._unknown: set[str] = set()  # kinds whose costs are still to be measured

    def __call__(self, kind: str) -> Auto:
        """Returns the controller of a kind of text. It knows no costs where none are kept and none were measured."""
        if kind not in self.known:
            table = self.costs[kind].kept()
            if table is None:
                self._unknown.add(kind)
            self.known[kind] = self._auto(kind, UNKNOWN if table is None else table)
        return self.known[kind]

    def begin(self, kind: str) -> None:
        """Has the costs of a kind ready: reads them or, once, measures them. Call it where no request is a row."""
        if kind in self._unknown or kind not in self.known:
            self.known[kind] = self._auto(kind, self.costs[kind].table(self.target, self.drafter, self.prompt))
            self._unknown.discard(kind)

    def rest(self) -> None:
        """Writes what rounds took for the next start. Call it where no request is a row any more."""
        for kind, auto in self.known.items():
            self.costs[kind].learn(*auto.learned())
        if self.frozen:
            self.known = {kind: self._auto(kind, auto.table) for kind, auto in self.known.items()}

    def measured(self, repeats: int, progress: Callable[[int, int], None]) -> dict[str, CostTable]:
        """Measures the costs of every kind anew, writes them, uses them from now on, and returns them."""
        tables = {}
        for kind, costs in self.costs.items():
            tables[kind] = costs.measured(self.target, self.drafter, self.prompt, repeats, progress)
            self.known[kind] = self._auto(kind, tables[kind])
            self._unknown.discard(kind)
        return tables

    def _auto(self, kind: str, table: CostTable) -> Auto:
        """Drafts accepted by rejection are never cut, since that would favour those that are not."""
        return Auto(table, kind == "greedy" or not self.rejection, self.frozen)
