"""How many drafts the rows of the batch make and verify: what `Depth` is asked, and what it is told, in every round."""

from __future__ import annotations

from collections.abc import Sequence

from ..speculative.depth import AUTO, Depth, DraftRow
from ..speculative.loop import Speculation
from ..speculative.mixture import leading
from ..speculative.readback import Round
from ..speculative.widening import verified
from .held import Held


class Lengths:
    """The draft lengths of a runner's rounds.

    A round calls `draft` before its readback and `read` after it; `count` once the next round's rows are known, and
    then `verify`. What a round gave is counted late, so that a verify can be dispatched first.
    """

    def __init__(self, depth: Depth, block: int, drafting: bool):
        """depth: who chooses. block: tokens of the longest verify. drafting: whether there is a drafter."""
        self.depth, self.block, self.drafting = depth, block, drafting
        self._timed = True  # whether the verify that runs has a width that the drafter's drafts have
        self._due: tuple[dict[int, int], float | None] | None = None  # of the last round, which is to be counted
        self._gone: list[int] = []  # requests that ended, which are to be forgotten once that is counted

    def draft(self, loop: Speculation, held: Sequence[Held]) -> tuple[list[int], list[int]]:
        """Returns how many drafts each row makes, and how many of all sources it may have. held: of the rows."""
        rows = self._rows(held, 2)
        counts = self.depth.draft(rows, _context(held))
        if loop.needs_no_drafter(counts):
            self.depth.give_way((row.id for row in rows), made=False)
            counts = [0] * len(rows)
        loop.confident = self.depth.confident
        return counts, [self._reach(row) for row in rows]

    def read(self, ids: Sequence[int], done: Round, seconds: float | None) -> None:
        """Takes in what a round gave its rows, to be counted. seconds: its time; None where that says nothing of the
        drafter's drafts.
        """
        rows = zip(ids, done.tokens, done.drafted, done.sources, strict=True)
        kept = {
            id: min(len(tokens) - 1, leading(sources))
            for id, tokens, drafted, sources in rows
            if drafted is not None and tokens
        }
        self._due, self._timed = (kept, seconds if self._timed else None), True

    def count(self) -> None:
        """Tells what came of the last round, and who has ended."""
        if self._due is not None:
            kept, seconds = self._due
            if seconds is not None:
                self.depth.timed(seconds)
            self.depth.observe(kept)
        self.depth.forget(self._gone)
        self._due, self._gone = None, []

    def leave(self, ids: Sequence[int]) -> None:
        """Takes in that these requests lost their rows; what they kept in their last round is counted."""
        self.count()
        self.depth.leave(ids)

    def end(self, id: int) -> None:
        """Takes in that a request has ended; it is forgotten with the next count."""
        self._gone.append(id)

    def drop(self) -> None:
        """Counts nothing of the last round, which failed."""
        self._due, self._timed = None, True

    def verify(self, loop: Speculation, held: Sequence[Held]) -> int | None:
        """Returns how many drafts of each row the next verify has at most, None for all. held: of the rows."""
        rows, context = self._rows(held, 1), _context(held)
        most, self._timed = verified(self.depth, rows, context, loop.chains, loop.confidences, loop.waiting)
        return most

    def _rows(self, held: Sequence[Held], due: int) -> list[DraftRow]:
        """Returns what the draft length may depend on in each row.

        due: tokens that each row emits before these drafts, and with their verify, whatever is accepted.
        """
        requests = [each.request for each in held]
        return [
            DraftRow(each.id, self._most(each.drafts), max(0, each.remaining - due), bool(each.params.temperature))
            for each in requests
        ]

    def _most(self, drafts: int | str) -> int | str:
        """Returns how many drafts a request that asked for so many gets, as far as the cache has room for them."""
        return AUTO if drafts == AUTO else min(drafts, self.block - 1)

    def _reach(self, row: DraftRow) -> int:
        """Returns how many drafts of all sources a row may have."""
        if not self.drafting:
            return 0
        return min(self.block - 1 if row.drafts == AUTO else row.drafts, row.useful)


def _context(held: Sequence[Held]) -> int:
    """Returns the committed tokens of a row, on average: attention takes as long as it has keys in all rows."""
    return -(-sum(each.context for each in held) // len(held))
