"""The cost tables of an engine's pair: read, or measured where nothing else runs; what is left for the next start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..speculative.costs import CostTable
from ..speculative.depth import Depth
from .calibration import Costs
from .priors import Priors


class Tables:
    """A source of cost tables for speculative.depth.Depth. Everything is called in the worker's thread.

    costs: of each kind of text. priors: what drafts had kept. prompt: token ids that rounds are timed after.
    """

    def __init__(
        self, target: Gemma4, drafter: Drafter, costs: Mapping[str, Costs], priors: Priors, prompt: Sequence[int]
    ):
        self.target, self.drafter, self.costs, self.priors, self.prompt = target, drafter, costs, priors, prompt

    def __call__(self, kind: str, rows: int) -> CostTable | None:
        """Returns the table of a kind of text. What is not known of so many rows is measured; with 0 nothing is, and
        None stands for a table that is not there.
        """
        costs = self.costs[kind]
        return costs.table(self.target, self.drafter, self.prompt, rows) if rows else costs.kept()

    def measured(self, repeats: int, progress: Callable[[int, int], None], full: bool = False) -> dict[str, CostTable]:
        """Measures the table of every kind anew, writes and returns it (see Costs.measured)."""
        parts = self.target, self.drafter, self.prompt, repeats, progress, full
        return {kind: costs.measured(*parts) for kind, costs in self.costs.items()}

    def learn(self, depth: Depth) -> None:
        """Writes what rounds took in use, and what was kept of the drafts, for the next start."""
        for kind, timed in depth.learned().items():
            self.costs[kind].learn(*timed)
        self.priors.learn(depth.accepted())
