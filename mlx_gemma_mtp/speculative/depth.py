"""Who chooses how many drafts the rows of a running batch make: a number that was asked for, or cost and acceptance.

In exact arithmetic the emitted text never depends on any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from .auto import Auto, Part
from .choice import FIXED, JOINED, Choice
from .correction import Prices
from .costs import UNKNOWN, WIDEST, CostTable, Drafted, Verified
from .history import Acceptance, History

AUTO = "auto"  # what the user says for all of this
GREEDY, SAMPLED = "greedy", "sampled"  # kinds of text: their rounds differ in cost, and their drafts in acceptance
NEW = History()

# Gives the cost table of a kind of text. rows: of a batch that begins while none runs, so that what is not known of
# such a one may be measured now; 0 amid a batch, when None stands for a table that is not there.
Tables = Callable[[str, int], CostTable | None]


class DraftRow(NamedTuple):
    """What the draft length may depend on in one row.

    id: the request's, unique in the engine. drafts: the number that it asked for, or AUTO. useful: how many drafts its
    limit leaves room for. sampled: whether its tokens are drawn with noise.
    """

    id: int
    drafts: int | str
    useful: int
    sampled: bool


class Chosen(NamedTuple):
    """The drafts of a round, which wait to be verified.

    counts: by request. most: the largest of them when they were chosen. auto, choice: who chose for the automatic rows,
    and what; None where there was no such row.
    """

    counts: dict[int, int]
    most: int = 0
    auto: Auto | None = None
    choice: Choice | None = None


class Pass(NamedTuple):
    """A verify.

    chosen: the drafts it verifies. parts: by request, of the automatic rows. reasons: by request, of all rows. rows:
    all of them. partners: rows of a fixed length. context: committed tokens of a row, on average. width: drafts
    verified, the most in any row. own: the most in any automatic row, if these were alone. steady: no row has just
    joined.
    """

    chosen: Chosen
    parts: dict[int, Part]
    reasons: dict[int, str]
    rows: int = 0
    partners: int = 0
    context: int = 0
    width: int = 0
    own: int = 0
    steady: bool = False


class Depth:
    """Chooses the draft lengths of a running batch, whose rows join, leave and differ in what they ask for.

    A round calls `verify` once its rows are known, `draft` for the next round's drafts, and when it is over `timed`
    (unless its time was disturbed) and `observe`, both before the next `verify`. The first round of a batch, whose
    tokens follow the prefill, has no verify: it calls `draft` alone. Rows are those that the loop holds. They may join
    before any `verify`, and go at any time; what a row kept in its last round is learned if `observe` hears of it
    before `forget` does.
    """

    def __init__(
        self,
        tables: Tables | None,
        rejection: bool = False,
        frozen: bool = False,
        priors: Mapping[str, Acceptance] = MappingProxyType({}),
    ):
        """Starts with nothing known of its requests.

        tables: the source of cost tables; None where there is no drafter, and nothing is drafted. rejection: sampled
        drafts are accepted by rejection, so they are never cut, which would favour those that are not. frozen: no clock
        influences a choice, a batch that begins anew is chosen for as if it were the first, and nothing is left for the
        next start. priors: by kind of text, what drafts had kept in earlier starts.
        """
        self.tables, self.rejection, self.frozen, self.priors = tables, rejection, frozen, priors
        self.autos: dict[str, Auto] = {}  # by kind of text
        self._own: dict[int, History] = {}
        self._chosen, self._pass, self._seconds = Chosen({}), Pass(Chosen({}), {}, {}), None

    @property
    def confident(self) -> bool:
        """Whether the drafts that were chosen last are wanted with their confidences."""
        return self._chosen.auto is not None and self._chosen.auto.confident

    def draft(self, rows: Sequence[DraftRow], context: int) -> list[int]:
        """Returns how many drafts to make for each row.

        rows: in any order, `useful` as of the verify of these drafts. context: committed tokens of a row, on average. A
        batch begins anew where none of the rows was in the last verify or choice; then a table of costs may be
        measured, which takes about two seconds once.
        """
        if self.tables is None:
            counts = {row.id: 0 for row in rows}
            self._chosen = Chosen(counts)
            return [*counts.values()]
        automatic = [row for row in rows if row.drafts == AUTO]
        begins = not any(row.id in self._chosen.counts or row.id in self._pass.reasons for row in rows)
        if begins and rows:
            self._pass = Pass(Chosen({}), {}, {})
            if self.frozen:
                self.autos |= {kind: auto.anew() for kind, auto in self.autos.items()}  # equal calls, equal choices
        auto, choice = None, None
        if automatic:
            auto = self._auto(SAMPLED if any(row.sampled for row in rows) else GREEDY, len(rows) if begins else 0)
            histories = [self._own.get(row.id, NEW) for row in automatic]
            choice = auto.choose(len(rows), context, histories, [row.useful for row in automatic])
        counts = {row.id: max(0, min(choice.drafts if row.drafts == AUTO else row.drafts, row.useful)) for row in rows}
        self._chosen = Chosen(counts, max(counts.values(), default=0), auto, choice)
        return [*counts.values()]

    def verify(
        self,
        rows: Sequence[DraftRow],
        context: int,
        confidences: Sequence[Sequence[float]],
        waiting: Sequence[int],
        led: Collection[int] = (),
    ) -> int | None:
        """Returns how many drafts of each row to verify, at most; None for all that wait.

        rows: in any order, `useful` as of this verify. context: committed tokens of a row, on average. confidences: of
        each row, those of its drafts. waiting: of each row, how many of its drafts its grammar left; 0 where it has
        just joined. led: requests whose drafts a grammar forces: that the drafter's are refused says nothing of other
        texts.
        """
        chosen, counts, reasons, own = self._chosen, self._chosen.counts, {}, []
        partners, floor, steady = 0, 0, True
        for row, sure, left in zip(rows, confidences, waiting, strict=True):
            if row.id not in counts:
                reasons[row.id], steady = JOINED if row.drafts else FIXED, False
            elif chosen.auto is not None and row.drafts == AUTO:
                own.append((row, sure[:left], left))
            else:
                reasons[row.id], partners, floor = FIXED, partners + 1, max(floor, left)
        if chosen.auto is None:
            self._pass = Pass(chosen, {}, reasons)
            return None
        _, sure, allowed = zip(*own, strict=True) if own else ((), (), ())
        useful = [row.useful for row, _, _ in own]
        width = chosen.auto.width(chosen.choice, len(rows), context, sure, allowed, useful)
        most, parts = max(width, floor), {}
        for row, sure, left in own:
            parts[row.id] = part = Part(counts[row.id], left, min(left, most), sure, row.id not in led)
            reasons[row.id] = part.reason(chosen.choice)
        self._pass = Pass(chosen, parts, reasons, len(rows), partners, context, most, width, steady)
        self._seconds = None
        return most

    def give_way(self, requests: Iterable[int], made: bool = True) -> None:
        """Takes in that another source drafts for these requests: nothing is learned from the drafts that were chosen.

        made: whether they were made at all; False for all rows together, right after `draft`.
        """
        counts = self._chosen.counts
        counts |= {id_: 0 for id_ in requests if id_ in counts}
        if not made:
            choice = self._chosen.choice and replace(self._chosen.choice, drafts=0)
            self._chosen = self._chosen._replace(most=0, choice=choice)

    def prices(self, rows: int, context: int) -> tuple[Prices, int] | None:
        """Returns what rounds cost, and how many drafts are made in each; None where no automatic row has a choice."""
        auto, choice = self._chosen.auto, self._chosen.choice
        return None if auto is None else (auto.prices(rows, context), choice.drafts)

    def reason(self, request: int) -> str:
        """Returns the code of the reason for the last verified length of a request; "" where it had no verify."""
        return self._pass.reasons.get(request, "")

    def timed(self, seconds: float) -> None:
        """Takes in the time of the last verified round.

        seconds: of the verify and of the drafts that were made after it, and of nothing else. Rounds that rows joined,
        and those between two kinds of text, are not believed.
        """
        past, made = self._pass, self._chosen.most
        auto = past.chosen.auto
        if auto is None or auto is not self._chosen.auto or not past.steady or max(past.width, made) > WIDEST:
            return
        alone = auto.timed(past.rows, past.context, past.width, made, past.chosen.most > 0, seconds)
        self._seconds = alone if past.width == past.own else None  # a partner's drafts are no loss of ours

    def observe(self, accepted: Mapping[int, int]) -> None:
        """Takes in how many drafts each request kept in the last verified round.

        accepted: request id -> drafts kept. Who is not in it, has gone or has just joined teaches nothing.
        """
        past = self._pass
        kept = {id_: accepted[id_] for id_ in past.parts if id_ in accepted}
        auto, choice = past.chosen.auto, past.chosen.choice
        if not kept:
            return
        if choice.drafts and not any(past.parts[id_].made for id_ in kept):
            return  # another source's drafts were verified
        for id_, count in kept.items():
            if past.parts[id_].made:
                count = min(count, past.parts[id_].width)  # behind wider copies more were verified
                self._own[id_] = auto.observe(past.parts[id_], count, self._own.get(id_, NEW))
        auto.earned(choice, sum(kept.values()), len(kept) + past.partners, past.context, past.own, self._seconds)

    def leave(self, requests: Iterable[int]) -> None:
        """Takes in that these requests left the batch, whose drafts that wait are lost. They may come back."""
        for id_ in requests:
            for kept in (self._chosen.counts, self._pass.parts, self._pass.reasons):
                kept.pop(id_, None)

    def forget(self, requests: Sequence[int]) -> None:
        """Drops all that is kept of these requests alone. Call it when they have ended."""
        self.leave(requests)
        for id_ in requests:
            self._own.pop(id_, None)

    def adopt(self, tables: Mapping[str, CostTable]) -> None:
        """Goes on with these tables, by kind of text. A round that is under way ends by the old ones, and is not
        learned from.
        """
        self.autos |= {kind: self._new(kind, table) for kind, table in tables.items()}

    def learned(self) -> dict[str, tuple[Verified, Drafted]]:
        """Returns by kind of text costs.Verified and costs.Drafted of the cells that were timed often since the last
        call, in the scale of the kind's own table.
        """
        return {kind: auto.learned() for kind, auto in self.autos.items()}

    def accepted(self) -> dict[str, Acceptance]:
        """Returns by kind of text what was kept of the drafts, where enough were verified since the last call."""
        found = {kind: auto.accepted() for kind, auto in self.autos.items()}
        return {kind: each for kind, each in found.items() if each is not None}

    def _auto(self, kind: str, begin: int) -> Auto:
        """Returns what is known of a kind of text. begin: how many rows begin together while none runs, 0 amid a batch.

        A kind whose own table is not there yet goes by another's until a batch begins.
        """
        auto = self.autos.get(kind)
        if auto is None or (begin and (auto.borrowed or not (auto.frozen or auto.table.knows(begin)))):
            table = self.tables(kind, begin)
            if table is not None:
                auto = self._new(kind, table) if auto is None else auto.on(table)
            elif auto is None:
                others = (each.table for each in self.autos.values() if not each.borrowed)
                auto = self._new(kind, next(others, UNKNOWN), borrowed=True)
            self.autos[kind] = auto
        return auto

    def _new(self, kind: str, table: CostTable, borrowed: bool = False) -> Auto:
        return Auto(table, kind == GREEDY or not self.rejection, self.frozen, borrowed, self.priors.get(kind))
