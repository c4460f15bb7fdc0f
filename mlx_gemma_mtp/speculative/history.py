"""What was kept of the drafts so far: decayed counts, by position and by the drafter's confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .costs import MAX_DRAFTS

FIRST = 0.8  # acceptance that is assumed before anything is known
WEIGHT = 3.0  # of what is assumed, in rounds
ALIKE = 6.0  # likewise of what everybody's last position says of the next one
LUCK = 4.0  # rounds that go well, which is what a hopeful rate adds to those that were tried
SHARED = 12.0  # of the rounds at one position, those that tell a hopeful rate of the next one, at most
RECENT, LASTING = 0.9, 0.98  # what a round keeps of the past: of a request's own, of everybody's
BINS = 10
KNOWN = 20.0  # rounds that what is known from other starts counts at most


@dataclass(frozen=True)
class History:
    """Counts of draft acceptance by position. Older rounds count less.

    tried[i]: rounds in which the draft at position i was verified and all drafts before it were kept. kept[i]: those of
    them that also kept draft i.
    """

    tried: tuple[float, ...] = (0.0,) * MAX_DRAFTS
    kept: tuple[float, ...] = (0.0,) * MAX_DRAFTS

    def after(self, verified: int, accepted: int, keep: float, cut: Sequence[float] = ()) -> History:
        """Returns the history with one more round of one row.

        verified: drafts that were verified. accepted: drafts that were kept. keep: the weight that earlier rounds
        retain, below 1. cut: for each draft that was made but not verified, the chance that it would have been kept.
        Without these chances only confident drafts would be counted.
        """
        tried, kept = [t * keep for t in self.tried], [k * keep for k in self.kept]
        for i in range(accepted):
            tried[i], kept[i] = tried[i] + 1, kept[i] + 1
        if accepted < verified:  # whatever came after it was not reached
            tried[accepted] += 1
            return History(tuple(tried), tuple(kept))
        reach = 1.0
        for i, rate in enumerate(cut, verified):
            tried[i], kept[i], reach = tried[i] + reach, kept[i] + reach * rate, reach * rate
        return History(tuple(tried), tuple(kept))

    def rates(self, assumed: Sequence[float] | None = None) -> list[float]:
        """Returns the acceptance rate of each position, given that all drafts before it are kept.

        assumed: prior rates, which weigh as much as WEIGHT rounds. None assumes at each position the rate of the one
        before, which weighs as much as ALIKE rounds, and FIRST at the first.
        """
        rates: list[float] = []
        for i, (tried, kept) in enumerate(zip(self.tried, self.kept, strict=True)):
            weight = WEIGHT
            if assumed is None:
                prior, weight = (rates[-1], ALIKE) if rates else (FIRST, WEIGHT)
            else:  # as everybody's, as far as this row is like everybody
                prior = min(assumed[i] * (rates[-1] / max(assumed[i - 1], 1e-3) if rates else 1.0), 0.98)
            rates.append((kept + weight * prior) / (tried + weight))
        return rates

    def hopes(self) -> list[float]:
        """Returns hopeful acceptance rates: the higher above the likely ones, the less was tried."""
        found, known = [], 0.0
        for rate, tried in zip(self.rates(), self.tried, strict=True):
            known = tried + min(known, SHARED)
            found.append(rate + (1 - rate) * LUCK / (known + LUCK))
        return found

    def plus(self, other: History) -> History:
        """Returns the sum of both counts."""
        return History(_sum(self.tried, other.tried), _sum(self.kept, other.kept))

    def scaled(self, factor: float) -> History:
        """Returns the counts times a factor: the same rates with another weight."""
        return History(_times(self.tried, factor), _times(self.kept, factor))

    def floor(self) -> list[float]:
        """Returns cautious acceptance rates, with a prior of 0: 0 where nothing was tried."""
        return [kept / (tried + WEIGHT) for tried, kept in zip(self.tried, self.kept, strict=True)]


@dataclass(frozen=True)
class Trust:
    """The acceptance rate of drafts by the drafter's confidence, in bins of a tenth. Older drafts count less.

    tried: drafts by bin. kept: those of them that were kept.
    """

    tried: tuple[float, ...] = (0.0,) * BINS
    kept: tuple[float, ...] = (0.0,) * BINS

    def after(self, confidences: Sequence[float], accepted: int) -> Trust:
        """Returns the trust after one more round of one row. confidences: of the verified drafts. accepted: drafts that
        were kept.
        """
        tried, kept = list(self.tried), list(self.kept)
        for i, confidence in enumerate(confidences[: accepted + 1]):
            bin_ = _bin(confidence)
            tried[bin_], kept[bin_] = tried[bin_] * LASTING + 1, kept[bin_] * LASTING + (i < accepted)
        return Trust(tuple(tried), tuple(kept))

    def rate(self, confidence: float) -> float:
        """Returns the chance that a draft of this confidence is kept, given that all drafts before it are.

        The prior is the confidence itself.
        """
        bin_ = _bin(confidence)
        return (self.kept[bin_] + WEIGHT * confidence) / (self.tried[bin_] + WEIGHT)

    def plus(self, other: Trust) -> Trust:
        """Returns the sum of both counts."""
        return Trust(_sum(self.tried, other.tried), _sum(self.kept, other.kept))

    def scaled(self, factor: float) -> Trust:
        """Returns the counts times a factor."""
        return Trust(_times(self.tried, factor), _times(self.kept, factor))


@dataclass(frozen=True)
class Acceptance:
    """What was kept of the drafts of one kind of text: by position, and by the drafter's confidence."""

    history: History = History()
    trust: Trust = Trust()

    @property
    def rounds(self) -> float:
        """How many rounds it counts, older ones less."""
        return max(self.history.tried)

    def after(self, confidences: Sequence[float], accepted: int, keep: float) -> Acceptance:
        """Returns the acceptance after one more round of one row, in which no draft was cut.

        confidences: of the verified drafts. accepted: drafts that were kept. keep: what the round keeps of the past, of
        positions.
        """
        history = self.history.after(len(confidences), accepted, keep)
        return Acceptance(history, self.trust.after(confidences, accepted))

    def plus(self, other: Acceptance) -> Acceptance:
        """Returns the sum of both counts."""
        return Acceptance(self.history.plus(other.history), self.trust.plus(other.trust))

    def at_most(self, rounds: float) -> Acceptance:
        """Returns the same rates with the weight of so many rounds at most."""
        factor = min(1.0, rounds / max(self.rounds, 1.0))
        return Acceptance(self.history.scaled(factor), self.trust.scaled(factor))


def _sum(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _times(counts: Sequence[float], factor: float) -> tuple[float, ...]:
    return tuple(count * factor for count in counts)


def _bin(confidence: float) -> int:
    return min(int(confidence * BINS), BINS - 1)


def expected(rates: Sequence[float], most: int) -> list[float]:
    """Returns the expected tokens of a row's round with K = 0..len(rates) drafts.

    rates: the acceptance rate of each position. most: drafts beyond it gain nothing.
    """
    tokens, reach = [1.0], 1.0
    for i, rate in enumerate(rates):
        reach *= rate
        tokens.append(tokens[-1] + (reach if i < most else 0.0))
    return tokens
