"""How many drafts to make, and how many of them to verify: pure functions of prices and of what was kept so far.

Expected tokens of a round over its cost, for K = 0..MAX_DRAFTS; the best ratio wins, among the lengths whose failure
can be afforded. Prior art: Cascade (arXiv 2506.20675), EVICT (arXiv 2605.00342), conservative bandits (arXiv
1602.04282).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .correction import Prices
from .costs import MAX_DRAFTS, CostTable
from .history import History, Trust, expected

FIXED, BEST, PROBE, CHECK, OFF, LIMIT = "fixed", "best", "probe", "check", "off", "limit"
CONFIDENCE, GRAMMAR, JOINED = "confidence", "grammar", "joined"
COPIED, LED = "copy", "forced"  # the names of these sources
REASONS = {
    FIXED: "the length that was asked for",
    BEST: "the most tokens a second by measured cost and acceptance",
    PROBE: "a look whether drafts, or more of them, would pay",
    CHECK: "a look at what a plain round takes now",
    OFF: "drafts do not pay at present",
    LIMIT: "the text has no room for more drafts before its end",
    JOINED: "the text had just joined the batch, without drafts",
    GRAMMAR: "drafts that the grammar refuses were cut before the verify",
    COPIED: "drafts were copied from an earlier place of the text",
    LED: "drafts were what the grammar leaves no choice of",
    CONFIDENCE: "drafts that the drafter itself doubts were cut before the verify",
}
PROBE_FROM, PROBE_TO = 8, 24  # rounds without drafts before a probe; doubled after each failure
PROBE_SOON = 2  # likewise where little is known, and drafts may pay
PROBE_SHARE = 0.015  # of the time may go into probes and checks
CHECK_FROM = 16  # rounds with drafts before plain decoding is timed again
CHECK_SURE = 8  # checks, before which they come faster
CHECK_MOST = 4  # plain rounds at the start, where their times do not come
TRY_AFTER = 4  # rounds with drafts, after which more of them are tried where that may pay; doubled each time
SHORT = 12  # tokens: a text that has fewer left tries nothing new
PURSE_FIRST, PURSE_MOST, PURSE_LEAST = 1.0, 12.0, -0.3  # see Purse
PURSE_KNOWN = 2.5  # at first, where rounds were timed before
PURSE_OPEN = -0.1  # below which it stays shut, however well drafts are kept
PURSE_ROUND = 0.015  # that each round adds
MARGIN = 0.03  # drafts that gain less than this are not worth the doubt


@dataclass(frozen=True)
class Choice:
    """A draft length. reason: the code of the reason. rate: expected tokens a second of all rows."""

    drafts: int
    reason: str
    rate: float


@dataclass(frozen=True)
class Pause:
    """Counts of rounds since something else was done.

    rounds: rounds without drafts since the last with them. every: rounds without drafts before the next probe, at
    least. drafting: rounds with drafts since the last plain one. checks: plain rounds that were made to be timed, since
    the start. checking: one more is due, because a plain round that also makes drafts gives the time of both.
    """

    rounds: int = 0
    every: int = PROBE_FROM
    drafting: int = 0
    checks: int = 0
    checking: bool = False

    @property
    def tries(self) -> bool:
        """Whether more drafts are to be tried, where that may pay."""
        count = self.drafting + 1
        return count >= TRY_AFTER and count & (count - 1) == 0

    def chosen(self, reason: str) -> Pause:
        """Returns the counts after a choice. reason: its code."""
        if reason == PROBE:
            return replace(self, rounds=0, drafting=self.drafting + (self.drafting > 0))
        if reason == OFF:
            return replace(self, rounds=self.rounds + 1, drafting=0)
        if reason == CHECK:
            return replace(self, drafting=0, checks=self.checks + 1, checking=self.drafting > 0)
        return Pause(drafting=self.drafting + 1, checks=self.checks)

    def probed(self, accepted: int) -> Pause:
        """Returns the counts after a probe. accepted: drafts that it kept.

        After a success the next probe may follow at once. After each failure the wait doubles.
        """
        return replace(self, every=0 if accepted else min(max(2 * self.every, PROBE_FROM), PROBE_TO))


@dataclass(frozen=True)
class Purse:
    """What drafts may still lose, in plain rounds: their gains so far and a small allowance for each round.

    A draft length is affordable if its worst case loses no more than the purse holds. In the worst case a round keeps
    only as many drafts as the counts guarantee. So drafts never lose much against plain decoding, however wrong prices
    and expectations are.
    """

    left: float = PURSE_FIRST

    def after(self, earned: float) -> Purse:
        """Returns the purse after one more round. earned: the round's gain over plain decoding, in plain rounds."""
        return Purse(max(PURSE_LEAST, min(PURSE_MOST, self.left + earned + PURSE_ROUND)))


def affordable(prices: Prices, pool: History, room: int, purse: Purse, share: float = 1.0) -> list[int]:
    """Returns the draft lengths from 1 to `room` whose worst case the purse covers.

    A length beyond the longest timed one, n, is at most 2 n + 1. It counts only the tokens that the timed lengths are
    sure to gain, and it is never tried by a text with fewer than SHORT tokens left. pool: the counts of all requests.
    room: drafts that the row with most room can take. share: of the batch's rows, those that would draft.
    """
    longest = prices.tried if room < SHORT else 2 * prices.tried + 1
    sure = _sure(pool)
    if share < 1:
        sure = [1 + share * (tokens - 1) for tokens in sure]
    return [
        drafts
        for drafts in range(1, min(MAX_DRAFTS, room, longest) + 1)
        if max(prices.risk(drafts, sure[min(drafts, prices.tried)]), PURSE_OPEN) <= purse.left
    ]


@lru_cache(maxsize=64)
def _tokens(histories: tuple[History, ...], pool: History, rooms: tuple[int, ...]) -> list[float]:
    """Returns the tokens that a round of all rows is expected to emit, for each draft length. Rounds without drafts ask
    the same again and again.
    """
    common, tokens = pool.rates(), [0.0] * (MAX_DRAFTS + 1)
    for history, room in zip(histories, rooms, strict=True):
        tokens = [a + b for a, b in zip(tokens, expected(history.rates(common), room), strict=True)]
    return tokens


@lru_cache(maxsize=64)
def _sure(pool: History) -> list[float]:
    """Returns the tokens that a row's round emits at least, for each draft length."""
    return expected(pool.floor(), MAX_DRAFTS)


@lru_cache(maxsize=64)
def _lucky(pool: History) -> list[float]:
    """Returns the tokens that a row's round emits where what was little tried turns out well, for each draft length."""
    return expected(pool.hopes(), MAX_DRAFTS)


def _at_best(prices: Prices, histories: Sequence[History], pool: History, partners: int) -> list[float]:
    """Returns tokens a second of each draft length, if rounds cost and keep what they may at best."""
    tokens = [len(histories) * emitted + partners for emitted in _lucky(pool)]
    return [emitted / cost for emitted, cost in zip(tokens, prices.hope[: MAX_DRAFTS + 1], strict=True)]


def choose(
    prices: Prices,
    histories: Sequence[History],
    pool: History,
    useful: Sequence[int],
    pause: Pause,
    purse: Purse,
    partners: int = 0,
) -> Choice:
    """Returns one draft length for all rows.

    prices: the seconds of rounds. histories: the counts of each row. pool: the counts of all requests. useful: for each
    row, how many drafts its limit leaves room for. pause: counts of rounds since the last probe and check. purse: what
    drafts may still lose. partners: further rows in the batch, which pay for the round and emit one token, whatever is
    chosen here.
    """
    most, seconds = min(MAX_DRAFTS, max(useful)), prices.rounds[: MAX_DRAFTS + 1]
    tokens = _tokens(tuple(histories), pool, tuple(min(room, MAX_DRAFTS) for room in useful))
    if partners:
        tokens = [emitted + partners for emitted in tokens]
    rates = [emitted / cost for emitted, cost in zip(tokens, seconds, strict=True)]
    if most < 1:
        return Choice(0, LIMIT, rates[0])
    if prices.live and (pause.checking or (not prices.anchored and pause.checks < CHECK_MOST)):
        return Choice(0, CHECK, rates[0])
    lengths = affordable(prices, pool, max(useful), purse, len(histories) / (len(histories) + partners))
    best = max(lengths, key=rates.__getitem__, default=0)
    hopes = _at_best(prices, histories, pool, partners)
    hope = max(lengths, key=hopes.__getitem__, default=0)
    if best and rates[best] > (1 + MARGIN) * rates[0]:
        every = max(CHECK_FROM, 2 * (rates[best] / rates[0] - 1) / PROBE_SHARE)
        if prices.live and pause.drafting >= every * min((prices.plain + 1) / CHECK_SURE, 1.0):
            return Choice(0, CHECK, rates[0])
        if hope > best and pause.tries and hopes[hope] > rates[best]:
            return Choice(hope, PROBE, rates[0])
        return Choice(best, BEST, rates[best])
    if hope and max(useful) >= SHORT:
        loss = seconds[hope] / seconds[0] - tokens[hope] / tokens[0]  # expected, in plain rounds
        every = min(pause.every, PROBE_FROM) if purse.left > PURSE_MOST / 2 else pause.every
        wait = max(every, loss / PROBE_SHARE)
        if prices.live and hopes[hope] > (1 + MARGIN) * rates[0]:
            wait = PROBE_SOON if prices.timed else PROBE_FROM if prices.tried else 0
        if pause.rounds >= wait:
            return Choice(hope, PROBE, rates[0])
    return Choice(0, OFF, rates[0])


def worthwhile(
    prices: Prices, trust: Trust, confidences: Sequence[Sequence[float]], useful: Sequence[int], rate: float
) -> int:
    """Returns how many of the drafts that were made to verify, at least the first.

    confidences: of each row, those of its drafts. useful: for each row, how many drafts its limit leaves room for.
    rate: tokens a second that the time would yield in another round.
    """
    made = max(map(len, confidences))
    if made < 2:
        return made
    rates = [[trust.rate(each) for each in row] + [0.0] * (made - len(row)) for row in confidences]
    rows = [expected(row, room) for row, room in zip(rates, useful, strict=True)]
    return max(range(1, made + 1), key=lambda width: sum(row[width] for row in rows) - rate * prices.verify(width))


def break_even(table: CostTable, rows: int, context: int) -> list[float | None]:
    """Returns for K = 1..MAX_DRAFTS the acceptance rate from which a round of K drafts beats plain decoding.

    The rate is equal at all positions. None stands where even a rate of 1 would not do.
    """
    seconds = table.rounds_at(rows, context)
    found: list[float | None] = []
    for drafts in range(1, MAX_DRAFTS + 1):
        needed = seconds[drafts] / seconds[0]
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if expected([middle] * drafts, drafts)[-1] >= needed else (middle, high)
        found.append(high if drafts + 1 >= needed else None)
    return found
