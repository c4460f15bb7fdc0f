"""What the host reads of a round, and what it makes of it: tokens, reports, and why a row cannot go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..models.gemma4 import Gemma4
from ..sampling.distribution import logprobs
from ..sampling.drawing import UNDECIDED, settled
from .rounds import Accepted, Prefilled, Verify

NOT_FINITE = "the model's scores are not finite (NaN or infinity): its weights are damaged, or the dtype is too narrow"
NOTHING_ALLOWED = "no token is allowed here: the constraint, logit_bias and suppressed tokens leave none in common"


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own log-probability of an emitted token, and (token, log-probability) of the likeliest ones at its
    place, best first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Round:
    """What one round gave: the tokens that each row emitted.

    drafted: how many drafts of each row were verified; None for a row whose first token this is, drawn from the
    prefill. errors: for each row why it cannot go on, or None. A row with an error has only the tokens that are good,
    and must leave. logprobs: one for each token, where the rules ask for them. firsts: the first tokens of staged
    prompts, where the round had any. sources: for each row the names of its drafts' sources. refused: how many drafts
    of each row a grammar refused before the verify.
    """

    tokens: list[list[int]]
    drafted: list[int | None]
    errors: list[str | None]
    logprobs: list[list[TokenLogprob]] | None = None
    firsts: Round | None = None
    sources: Sequence[Sequence[str]] = ()
    refused: Sequence[int] = ()


class Read(NamedTuple):
    """What the host read of Accepted: of each row the kept + 1 tokens that count, and the rest as it is there."""

    verify: Verify | Prefilled
    out: Accepted
    tokens: list[list[int]]
    kept: list[int]
    sums: list[list[float]]
    peaks: list[list[float]]
    report: list[list]

    @classmethod
    def of(cls, verify: Verify | Prefilled, out: Accepted, values: Sequence[list]) -> Read:
        """Returns what was read. values: of `out.told`."""
        tokens, kept, sums, *more = values
        peaks = [[]] * len(kept) if out.peaks is None else more.pop(0)
        counted = [row[: count + 1] for row, count in zip(tokens, kept, strict=True)]
        return cls(verify, out, counted, kept, sums, peaks, more)

    @property
    def undecided(self) -> list[int]:
        """The rows whose last token is to be settled."""
        return [row for row, tokens in enumerate(self.tokens) if tokens[-1] == UNDECIDED]

    def settlement(self, target: Gemma4) -> tuple[mx.array, mx.array]:
        """Returns the last tokens of the rows that are undecided, drawn from all that they may be, and their
        log-probabilities, where the rules ask for these: [n, 1] each.
        """
        now, cap, rows = self.verify.inputs, target.config.softcap, self.undecided
        index, place = mx.array(rows), mx.array([self.kept[row] for row in rows])
        one = lambda array: array[index, place][:, None]  # noqa: E731
        counts = self.out.undecided.token_counts and self.out.undecided.token_counts.at_place(index, place)
        mask, logits = None if now.mask is None else one(now.mask), one(self.out.undecided.logits)
        drawn = settled(logits, now.rules.of_rows(index), one(self.verify.positions), cap, counts, mask)
        return drawn, logprobs(logits, drawn, cap, 0)[0] if self.report else drawn

    def settle(self, tokens: list[list[int]], own: list[list[float]]) -> None:
        """Puts what was read of the settlement into the tokens and the report."""
        for i, row in enumerate(self.undecided):
            self.tokens[row][-1] = tokens[i][0]
            if self.report:
                self.report[0][row][self.kept[row]] = own[i][0]

    def round(self) -> Round:
        """Returns what each row emitted, and moves the guide on by it."""
        inputs = self.verify.inputs
        emitted, errors = map(list, zip(*map(sound, self.tokens, self.sums, self.peaks), strict=True))
        for row, reason in inputs.failures.items():
            emitted[row], errors[row] = [], reason
        if inputs.guide is not None:
            for row, (good, reason) in inputs.guide.advance(emitted).items():
                emitted[row], errors[row] = emitted[row][:good], reason
        report = named(emitted, *self.report) if self.report else None
        refused = inputs.drafts.refused or (0,) * inputs.rows
        return Round(emitted, inputs.drafted, errors, report, sources=inputs.drafts.named, refused=refused)


def sound(tokens: Sequence[int], sums: Sequence[float], peaks: Sequence[float]) -> tuple[list[int], str | None]:
    """Returns a row's tokens up to the first that is not good, and why it is not, or None where all are good.

    A token is not good where the logits that it was drawn from are not finite, or where the row's settings left none to
    draw. sums, peaks: the row's part of those in Accepted. A refused draft can make the logits of good tokens NaN: its
    K/V stay in the row's slots, and attention multiplies what it does not see by 0, which leaves NaN as it is. Then the
    row ends, though plain decoding would have gone on.
    """
    count = len(tokens)
    if math.isfinite(sum(sums[:count])) and -math.inf not in peaks[:count]:
        return list(tokens), None
    for i in range(count):
        if not math.isfinite(sums[i]):
            return list(tokens[:i]), NOT_FINITE
        if peaks and peaks[i] == -math.inf:
            return list(tokens[:i]), NOTHING_ALLOWED
    return list(tokens), None


def named(emitted: list[list[int]], own: list, best: list, values: list) -> list[list[TokenLogprob]]:
    """Returns the report of the tokens that were emitted, by row; what it says of refused drafts is dropped.

    own, best, values: [B][K + 1], see sampling.logprobs.
    """
    return [
        [
            TokenLogprob(token, own[row][i], list(zip(best[row][i], values[row][i], strict=True)))
            for i, token in enumerate(tokens)
        ]
        for row, tokens in enumerate(emitted)
    ]
