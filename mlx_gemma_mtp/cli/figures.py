"""Figures of replies, in words: while one comes, and once it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from ..engine.stats import Stats


class Live:
    """Counts a reply while it comes.

    began: when it was asked for. `now` is the same clock's, in seconds.
    """

    def __init__(self, began: float):
        self._began = began
        self._first: float | None = None  # when the first tokens came
        self.tokens = self.after_first = self.drafted = self.accepted = 0

    def take(self, chunk: Chunk, now: float) -> None:
        """Adds a piece of the reply."""
        self.tokens += len(chunk.tokens)
        self.drafted += chunk.drafted
        self.accepted += chunk.accepted
        if self._first is not None:
            self.after_first += len(chunk.tokens)
        elif chunk.tokens:
            self._first = now

    def parts(self, now: float) -> list[str]:
        """Returns the parts of a line that says how the reply goes, the most telling first."""
        if self._first is None:
            return [f"{now - self._began:.0f} s"]
        seconds = now - self._first
        rate = [f"{self.after_first / seconds:.1f} tokens/s"] if seconds > 0 and self.after_first else []
        return [*rate, *kept(self.drafted, self.accepted), tokens(self.tokens)]


def kept(drafted: int, accepted: int) -> list[str]:
    """Returns what became of drafts as a part of a line; nothing where there were none."""
    return [f"{accepted / drafted:.0%} of drafts kept"] if drafted else []


def tokens(count: int) -> str:
    """Returns a number of tokens in words."""
    return f"{count:,} token{'' if count == 1 else 's'}"


def reading(done: int, total: int) -> list[str]:
    """Returns the parts of a line that says how far a prompt is read."""
    return [f"reading the prompt: {done:,} of {tokens(total)}"]


def summary(result: Result) -> list[str]:
    """Returns the parts of a line about a whole reply, the most telling first."""
    s = result.stats
    rate = [f"{s.generation_tps:.1f} tokens/s"] if s.generation_tokens > 1 else []
    return [*rate, *kept(s.drafted, s.accepted), tokens(s.generation_tokens)]


def lines(stats: Stats, finish_reason: str) -> list[str]:
    """Returns the figures of a reply."""
    s = stats
    positions = " ".join(f"{share:.2f}" for share in s.acceptance_by_position) or "none"
    mtp = "on" if s.mtp else f"off: {s.mtp_reason}"
    return [
        f"{s.prompt_tokens} tokens, {s.prompt_tps:.1f} tokens/s; first after {s.ttft_s:.3f} s",
        f"  generation: {s.generation_tokens} tokens, {s.generation_tps:.1f} tokens/s; end: {finish_reason}",
        f"  MTP {mtp}; {s.rounds} rounds, {s.tokens_per_round:.2f} tokens a round, {s.host_syncs} readbacks",
        f"  drafts: {s.accepted} of {s.drafted} accepted ({s.accept}); by position {positions}; seed {s.seed}",
        f"  drafts by source: {sources(s.sources)}; {s.refused} refused by a grammar before that",
        f"  rounds by draft length: {depths(s.depths)}",
    ]


def sources(counts: dict[str, dict[str, int]]) -> str:
    """Returns how many drafts of each source were kept, as in 'mtp 31 of 40, copy 200 of 210'."""
    return ", ".join(f"{name} {each['accepted']} of {each['drafted']}" for name, each in counts.items()) or "none"


def depths(counts: dict[int, dict[str, int]]) -> str:
    """Returns how often each draft length was taken, and why, as in '4: 31 best, 2 confidence; 0: 1 limit'."""
    each = {drafts: ", ".join(f"{n} {reason}" for reason, n in counts[drafts].items()) for drafts in sorted(counts)}
    return "; ".join(f"{drafts}: {text}" for drafts, text in each.items()) or "none"
