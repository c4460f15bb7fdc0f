"""Which source's drafts a row has verified: the drafter's, copies of its own text, or the one behind the other.

Every source is judged in every round by what it would have had kept, whether its drafts were verified or not: to look
at a copy costs nothing. So no source has to be tried again to learn whether it pays again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from operator import mul
from typing import NamedTuple

import mlx.core as mx

from ..sampling.distribution import Distribution
from .copies import Copy, RowText, agreeing
from .drafting import BESIDE, COPY, FORCED, MTP, Drafting, Drafts
from .guide import Draft, Guide, Look, More

OWN, POOLED = 0.95, 0.99  # what a token leaves of the counts before it: of one row, of all
WEIGHT = 3.0  # of what is assumed, in tokens
LENGTHS = (0, 2, 3, 4, 6, 9, 16)  # of matches, by which copies are told apart; 0 is a copy that was left
ASSUMED = (0.3, 0.2, 0.3, 0.45, 0.65, 0.8, 0.9)  # the chance that a copied token is kept, by these
AGREED = (0.6, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # and where the drafter said all tokens before it
PLACES, DRAFTED = 8, 0.75  # drafts of the drafter that are told apart by their place, and what is assumed of each
BINS = 10  # by which they are told apart where it says how sure it is
BETTER = 1.1  # a copy takes the drafter's place where this many times as many of its drafts are expected to stay
LIKELY, REACHED = 0.4, 0.1  # the chance of a copy's first token, and that all up to one are kept, for it to be drafted
HOT = 2  # rounds that kept a copy whole, after which the drafter is not asked
SURE = 0.85  # and the chance of its next token from which that is so


class Chain(NamedTuple):
    """The drafts of a row, one behind the other.

    tokens: of the vocabulary. sources: the name of each token's source. rates: the chance of each to be kept, if all
    before it are. refused: how many more a grammar refused.
    """

    tokens: list[int]
    sources: list[str]
    rates: list[float]
    refused: int = 0

    @classmethod
    def none(cls) -> Chain:
        """Returns no drafts."""
        return cls([], [], [])

    @classmethod
    def of(cls, drafts: Sequence[Draft], refused: int = 0) -> Chain:
        """Returns the chain of these drafts."""
        tokens, sources, rates = map(list, zip(*drafts, strict=True)) if drafts else ([], [], [])
        return cls(tokens, sources, rates, refused)

    @property
    def replaced(self) -> bool:
        """Whether another source took the drafter's place from the first draft on, by its own hit rate."""
        return self.sources[:1] == [COPY]

    @property
    def drafts(self) -> list[Draft]:
        """The drafts one by one."""
        return list(zip(self.tokens, self.sources, self.rates, strict=True))

    @property
    def beside(self) -> bool:
        """Whether any draft is another source's than the drafter's."""
        return any(source in BESIDE for source in self.sources)

    @property
    def own(self) -> int:
        """How many of the first drafts are the drafter's."""
        return leading(self.sources)


class Rates:
    """How often tokens of a kind were kept, given that all before them were. Older tokens count less."""

    def __init__(self, assumed: Sequence[float], keep: float, pool: Rates | None = None):
        """assumed: by kind. keep: what a token leaves of the counts before it. pool: those of all rows, which are
        assumed in their place.
        """
        self.assumed, self.keep, self.pool = tuple(assumed), keep, pool
        self.tried, self.kept = [0.0] * len(assumed), [0.0] * len(assumed)

    def rate(self, kind: int) -> float:
        """Returns the chance that a token of a kind is kept."""
        assumed = self.assumed[kind] if self.pool is None else self.pool.rate(kind)
        return (self.kept[kind] + WEIGHT * assumed) / (self.tried[kind] + WEIGHT)

    def add(self, kind: int, kept: bool) -> None:
        """Takes in one more token of a kind."""
        self.tried[kind] = self.tried[kind] * self.keep + 1
        self.kept[kind] = self.kept[kind] * self.keep + kept
        if self.pool is not None:
            self.pool.add(kind, kept)


COPIED = (*ASSUMED, *AGREED)
MADE = (*[DRAFTED] * PLACES, *((i + 0.5) / BINS for i in range(BINS)))


class Pool:
    """What is known of the sources over all rows. It outlasts a batch."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.copies, self.drafter = Rates(COPIED, POOLED), Rates(MADE, POOLED)


@dataclass
class _Row:
    """What is known of one row.

    text: its tokens. copies, drafter: how often theirs were kept. copy, drafts, kinds: what was proposed for the next
    tokens, whether it is verified or not, and the kinds of these drafts. forced: the places where a guide leaves one
    token, which says nothing of a source that has it, too. streak: rounds in which a copy was kept whole.
    """

    text: RowText
    copies: Rates
    drafter: Rates
    copy: Copy | None = None
    drafts: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    forced: frozenset[int] = frozenset()
    streak: int = 0

    def learn(self, emitted: Sequence[int]) -> None:
        """Takes in what the row emitted after what was proposed."""
        if self.drafts:
            same = agreeing(self.drafts, emitted)
            for i in self._judged(same, self.drafts, emitted):
                self.drafter.add(self.kinds[i], i < same)
        copy, whole = self.copy, False
        if copy is not None and emitted:
            kept, after = agreeing(copy.tokens, emitted), self.agreed
            for i in self._judged(kept, copy.tokens, emitted):
                self.copies.add(kind(copy.length + i, i >= after > 0), i < kept)
            whole = kept == min(len(copy.tokens), len(emitted)) > 1
        self.streak = self.streak + 1 if whole else 0
        self.text.add(emitted, copy)
        self.copy, self.drafts, self.forced = None, [], frozenset()

    def _judged(self, kept: int, drafts: Sequence[int], emitted: Sequence[int]) -> list[int]:
        """The places of a source's drafts by which it is judged. kept: how many of the first ones were emitted."""
        return [i for i in range(min(kept + 1, len(drafts), len(emitted))) if i not in self.forced]

    @property
    def agreed(self) -> int:
        """How many drafts the drafter made, if the copy has them all, else 0."""
        whole = self.copy is not None and agreeing(self.copy.tokens, self.drafts) == len(self.drafts)
        return len(self.drafts) if whole else 0

    def chances(self, copy: Copy, start: int = 0) -> Iterator[float]:
        """The chance of each token of a copy. start: how many the drafter said as well, which are left out."""
        before, rate = -1, 0.0
        for i in range(start, len(copy.tokens)):
            each = kind(copy.length + i, start > 0)
            if each != before:  # tokens of a kind follow each other
                before, rate = each, self.copies.rate(each)
            yield rate

    def likely(self, copy: Copy, start: int = 0) -> Chain:
        """The first tokens of a copy, as far as it may be worth to build a verify of them. start: see `chances`."""
        rates, reached = [], 1.0
        for rate in self.chances(copy, start):
            reached *= rate
            if reached < (REACHED if rates else LIKELY):
                break
            rates.append(rate)
        return Chain(copy.tokens[start : start + len(rates)], [COPY] * len(rates), rates)

    @property
    def hot(self) -> bool:
        """Whether copies are kept so well that the drafter need not be asked."""
        return self.streak >= HOT and self.copies.rate(kind(LENGTHS[-1], False)) > SURE


class Mixture:
    """Puts the drafts of a batch's rows together, of those sources that may draft."""

    def __init__(self, drafting: Drafting, pool: Pool | None = None):
        self.copying, self.forcing, self.pool = drafting.copies, FORCED in drafting.sources, pool or Pool()
        self.rows: list[_Row] = []

    def begin(self, texts: Sequence[RowText]) -> None:
        """Begins with these rows."""
        self.rows = [self._row(text) for text in texts]

    def arrange(self, places: Sequence[int | RowText]) -> None:
        """Goes on with these rows in this order: an int is a row as it was, a text is a new one."""
        self.rows = [self._row(place) if isinstance(place, RowText) else self.rows[place] for place in places]

    def take(self, emitted: Sequence[Sequence[int]]) -> None:
        """Takes in what each row emitted."""
        if self.copying:
            for row, tokens in zip(self.rows, emitted, strict=True):
                row.learn(tokens)

    def hot(self, rows: Sequence[int]) -> bool:
        """Returns whether none of these rows needs the drafter's drafts."""
        return self.copying and bool(rows) and all(self.rows[row].hot for row in rows)

    def chains(
        self,
        drafts: Sequence[Sequence[int]],
        confidences: Sequence[Sequence[float]],
        reach: Sequence[int],
        drawn: bool = False,
    ) -> list[Chain]:
        """Returns the drafts of each row.

        drafts: the drafter's. confidences: of these, empty where it was not asked. reach: how many drafts a row may
        have. drawn: the drafter's drafts are accepted by rejection: then nothing is chosen by what was drawn.
        """
        chains = []
        for i, (tokens, most) in enumerate(zip(drafts, reach, strict=True)):
            sure = confidences[i] if len(confidences[i]) >= len(tokens) else None
            chains.append(self._chain(i, list(tokens), sure, most, drawn))
        return chains

    def led(self, guide: Guide, chains: Sequence[Chain], reach: Sequence[int]) -> tuple[list[Chain], Look]:
        """Returns the drafts of each row as a guide has them, and what it says of them: with what it forces, if that
        may draft, and without what it refuses.

        chains: the rows' drafts. reach: how many a row may have.
        """
        walks, look = guide.lead([chain.drafts for chain in chains], reach if self.forcing else None, self._more(reach))
        for row, walk in zip(self.rows, walks, strict=True):
            row.forced = walk.forced
        return [Chain.of(walk.drafts, walk.refused) for walk in walks], look

    def _more(self, reach: Sequence[int]) -> Callable[[int], More]:
        """What the text of a row has behind drafts, as far as the row reaches."""

        def of_row(row: int) -> More:
            def behind(drafts: list[Draft]) -> list[Draft]:
                most = reach[row] - len(drafts)
                copy = self.rows[row].text.find(most, [token for token, _, _ in drafts]) if self.copying else None
                if copy is None:
                    return []
                chances = self.rows[row].chances(copy)
                return [(token, COPY, chance) for token, chance in zip(copy.tokens, chances, strict=True)]

            return behind

        return of_row

    def _row(self, text: RowText) -> _Row:
        return _Row(text, Rates(COPIED, OWN, self.pool.copies), Rates(MADE, OWN, self.pool.drafter))

    def _chain(self, index: int, drafts: list[int], sure: Sequence[float] | None, most: int, drawn: bool) -> Chain:
        if not self.copying:
            return Chain(drafts, [MTP] * len(drafts), list(sure or [DRAFTED] * len(drafts)))
        row = self.rows[index]
        copy = row.copy = row.text.find(most)
        row.drafts = drafts
        if not drafts:
            return Chain.none() if copy is None else row.likely(copy)
        told = None if drawn else sure
        row.kinds = [
            min(i, PLACES - 1) if told is None else PLACES + min(int(told[i] * BINS), BINS - 1)
            for i in range(len(drafts))
        ]
        judged = [row.drafter.rate(each) for each in row.kinds]
        own = Chain(drafts, [MTP] * len(drafts), judged if sure is None else list(sure[: len(drafts)]))
        if copy is None:
            return own
        if expected(islice(row.chances(copy), len(drafts))) > BETTER * expected(judged):
            return row.likely(copy)
        if not (agreed := row.agreed):
            return own
        behind = row.likely(copy, agreed)
        return Chain(drafts + behind.tokens, own.sources + behind.sources, own.rates + behind.rates)


def kind(length: int, agreed: bool) -> int:
    """Returns the kind of a copied token. length: of the match before it. agreed: whether the drafter said all drafts
    before it.
    """
    return bisect_right(LENGTHS, length) - 1 + len(LENGTHS) * agreed


def expected(rates: Iterable[float]) -> float:
    """Returns how many drafts are kept on average."""
    return sum(accumulate(rates, mul))


def reason_of(sources: Sequence[str]) -> str:
    """Returns the name of the last source that is not the drafter, which is the reason for the width of a verify; ""
    where the drafter made all drafts.
    """
    return next((source for source in reversed(sources) if source in BESIDE), "")


def leading(sources: Sequence[str]) -> int:
    """Returns how many of the first drafts come from the drafter."""
    return next((i for i, source in enumerate(sources) if source in BESIDE), len(sources))


def mixed(own: Drafts, drafted: Sequence[list[int]], chains: Sequence[Chain]) -> Drafts:
    """Returns the drafts of these chains; `own` where they are the drafter's, and nothing was refused.

    own, drafted: the drafter's drafts, and their tokens as the host read them.
    """
    rows = zip(drafted, chains, strict=True)
    if all(chain.tokens == row and not chain.beside and not chain.refused for row, chain in rows):
        return own
    refused = tuple(chain.refused for chain in chains)
    counts = [len(chain.tokens) for chain in chains]
    sources = tuple(tuple(chain.sources) for chain in chains)
    if not max(counts):
        return Drafts.none(len(chains))._replace(refused=refused)
    if all(row[: len(chain.tokens)] == chain.tokens for row, chain in zip(drafted, chains, strict=True)):
        return own._replace(sources=sources, refused=refused).counted(counts)
    width = max(counts)
    tokens = mx.array([chain.tokens + [0] * (width - len(chain.tokens)) for chain in chains], mx.int32)
    q = None if own.q is None else _with_certain(own.q, tokens, chains)
    return Drafts(tokens, mx.zeros((len(chains), 0)), q, None, sources, refused).counted(counts)


def _with_certain(q: Distribution, tokens: mx.array, chains: Sequence[Chain]) -> Distribution:
    """Returns what the drafts were drawn from where those that are not the drafter's were certain.

    q: of the drafter's drafts, [B, K, C]. tokens: int32 [B, W].
    """
    width, drawn = tokens.shape[1], q.best.shape[1]
    certain = mx.array([[place >= chain.own for place in range(width)] for chain in chains])[..., None]
    wide = lambda array: mx.pad(array[:, :width], [(0, 0), (0, max(width - drawn, 0))] + [(0, 0)] * (array.ndim - 2))  # noqa: E731
    names = mx.arange(q.scores.shape[-1]) if q.tokens is None else wide(q.tokens)
    if q.tokens is None:
        here = names == tokens[..., None]
    else:  # one column is the token; the others keep their names, and nothing of the chance
        here = mx.broadcast_to(mx.arange(names.shape[-1]) == 0, names.shape)
        names = mx.where(certain & here, tokens[..., None].astype(names.dtype), names)
    scores = mx.where(certain, mx.where(here, 0.0, -mx.inf), wide(q.scores))
    best = mx.where(certain[..., 0], tokens, wide(q.best))
    return Distribution(best, scores, None if q.tokens is None else names)
