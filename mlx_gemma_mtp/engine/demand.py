"""What the requests of a plan take in bytes."""

from __future__ import annotations

from .admission import Memory
from .entries import Entries, Entry, Stage


class Demand:
    """The bytes that requests take where they are. chunk: prompt tokens a forward. block: tokens of the longest
    verify.
    """

    def __init__(self, memory: Memory, entries: Entries, chunk: int, block: int):
        self.memory, self.entries, self.chunk, self.block = memory, entries, chunk, block

    def row(self, entry: Entry, advance: int = 0) -> int:
        """Returns the bytes of a row of a request with room for a verify after `advance` more tokens."""
        most = entry.job.prompt + entry.job.limit
        return self.memory.row(min(entry.tokens + advance, most) + self.block)

    def outside(self, entry: Entry) -> int:
        """Returns the bytes of a request's K/V outside the batch."""
        staged = self.entries.stage_of(entry.job.id) is Stage.STAGED
        return self.memory.staged(entry.tokens) if staged else self.memory.saved(entry.tokens)

    def total(self, advance: int = 0, candidate: Entry | None = None) -> int:
        """Returns the bytes of everything, with room for `advance` more tokens of each row.

        A request that joins in this plan has its K/V twice. candidate: is counted in its next stage. One that is to be
        staged reserves its row as well, and so do those outside the batch which will want theirs before it.
        """
        rows, outside = self.entries.at(Stage.LIVE), self.entries.at(Stage.STAGED, Stage.READY)
        total = self.memory.weights + sum(map(self.outside, outside))
        total += sum(self.memory.saved(entry.tokens) for entry in rows if entry.place is None)
        if candidate is not None and self.entries.stage_of(candidate.job.id) is Stage.WAITING:
            outside = [*outside, candidate]
            total += self.memory.staged(candidate.tokens)
            total += sum(self.row(entry, advance) for entry in outside if not entry.paused)
        elif candidate is not None:
            rows = [*rows, candidate]
        total += sum(self.row(entry, advance) for entry in rows)
        prompts = [entry.tokens for entry in outside if entry.remaining]
        if prompts:
            total += self.memory.chunk(min(self.chunk, max(prompts)), max(prompts))
        if rows:
            total += self.memory.verify(len(rows), max(entry.tokens for entry in rows) + advance)
        return total
