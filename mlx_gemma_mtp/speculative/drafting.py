"""Sources of drafts: what is proposed for every row, and by whom.

A source that computes on the device is a class in this file and a name for it in SOURCES. Beside it the host drafts:
copies of the row's own text (copies.py) and what a grammar forces (guide.py); mixture.py puts them together. No source
changes what the text may be: drafts that the target would not have said are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..cache.cache import Cache, Span
from ..errors import UserError
from ..models.drafter import DenseHead, Drafter
from ..ops.kernels import head_argmax
from ..sampling.distribution import Distribution, Rules
from ..sampling.drawing import draw
from ..sampling.noise import keys_of_round
from ..sampling.params import ACCEPT, COUPLED, MTP, REJECTION, number, shown, whole
from ..sampling.penalties import TokenCounts

COPY, FORCED = BESIDE = "copy", "forced"  # what the host drafts
Embed = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Drafting:
    """How drafts are made and kept.

    position: the drafter's query position, relative to the newest token's index: 0 as in transformers, -1 as in vLLM.
    temperature: the drafter's, as a multiple of the target's. accept: which drafts stay, 'coupled' (those that plain
    decoding says) or 'rejection' (see rejection.py; drafts are never cut then, which would favour those that are not).
    sources: who makes the drafts, as a tuple of names or a text with commas: one of SOURCES at most, and those of
    BESIDE. Raises UserError for whatever is out of range.
    """

    position: int = 0
    temperature: float = 1.0
    accept: str = COUPLED
    sources: tuple[str, ...] | str = (MTP,)

    def __post_init__(self) -> None:
        place, factor = (
            "0 (as in transformers) or -1 (as in vLLM)",
            "a number from 0.001 to 1000; 1 is the request's own",
        )
        numbers = {
            "position": whole("draft_position", self.position, lambda n: n in (0, -1), place),
            "temperature": number("draft_temperature", self.temperature, lambda t: 1e-3 <= t <= 1e3, factor),
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)  # as Python's, frozen from here on
        if self.accept not in ACCEPT:
            raise UserError(f"accept is {shown(self.accept)}, expected one of {', '.join(ACCEPT)}")
        object.__setattr__(self, "sources", _sources(self.sources))

    @property
    def source(self) -> str | None:
        """The name in SOURCES of what drafts on the device, None where nothing does."""
        return next((name for name in self.sources if name not in BESIDE), None)

    @property
    def copies(self) -> bool:
        """Whether drafts are copied from a row's own text."""
        return COPY in self.sources

    @property
    def alone(self) -> Drafting:
        """The same settings without what the host drafts."""
        return replace(self, sources=(self.source or MTP,))

    @property
    def rejection(self) -> bool:
        return self.accept == REJECTION

    @property
    def lookback(self) -> int:
        """How far before the newest token's index the drafter's query sits, for which the cache keeps more."""
        return -self.position


class Drafts(NamedTuple):
    """K drafts of each row, of which a row may have fewer real ones. A draft beyond these is a pad: it is never kept,
    whatever it is.

    tokens: int32 [B, K], ids of the vocabulary. confidence: float32 [B, K], how sure the source is of each, from 0 to 1
    (the drafter: the probability of its likeliest token, before temperature and filters). [B, 0] where nobody asked, or
    from a source that cannot say: then each counts as 1 until the drafts that were kept show what they are worth. q:
    the distribution that the tokens were drawn from, K positions, with noise under `noise.keys_of_round`, for
    acceptance by rejection alone; None where they were not drawn. counts: how many drafts of each row are real; None
    for all, which is all that a source says. sources: for each row the name of each draft's source, None where one made
    them all; then they count as the drafter's. refused: how many more drafts of each row a grammar refused, None for
    none.
    """

    tokens: mx.array
    confidence: mx.array
    q: Distribution | None = None
    counts: tuple[int, ...] | None = None
    sources: tuple[tuple[str, ...], ...] | None = None
    refused: tuple[int, ...] | None = None

    @property
    def real(self) -> mx.array | None:
        """int32 [B], how many drafts of each row are real; None: all."""
        return None if self.counts is None else mx.array(self.counts, mx.int32)

    @property
    def of_each(self) -> list[int]:
        """How many drafts of each row are real."""
        rows, width = self.tokens.shape
        return [width] * rows if self.counts is None else list(self.counts)

    @property
    def named(self) -> list[tuple[str, ...]]:
        """For each row the names of the sources of its real drafts."""
        if self.sources is None:
            return [(MTP,) * count for count in self.of_each]
        return [names[:count] for names, count in zip(self.sources, self.of_each, strict=True)]

    @classmethod
    def none(cls, rows: int) -> Drafts:
        """Returns no drafts, K = 0, of so many rows."""
        return cls(*_nothing(rows))

    def counted(self, counts: Sequence[int]) -> Drafts:
        """Returns the drafts with so many real ones in each row. A place where no row has one is left out."""
        width = max(counts)
        of_rows = None if min(counts) == width else tuple(counts)
        if width == self.tokens.shape[1]:
            return self._replace(counts=of_rows)
        tokens, confidence = self.tokens[:, :width], self.confidence[:, :width]
        return self._replace(tokens=tokens, confidence=confidence, q=self.q and self.q.first(width), counts=of_rows)

    def arranged(self, places: Sequence[int], pads: mx.array) -> Drafts:
        """Returns the drafts of other rows, in this order.

        places: a number below B is a row as it was, B + j the j-th of J new ones, which has none. pads: [J], a token
        of each of these for places where others have drafts.
        """
        rows, width = self.tokens.shape
        if not rows:
            return Drafts.none(len(places))
        counts = self.of_each + [0] * pads.shape[0]
        index = mx.array(list(places))
        old = mx.minimum(index, rows - 1)  # of a new row it is anything
        tokens = mx.concatenate([self.tokens, mx.repeat(pads[:, None], width, axis=1)], axis=0)[index]
        new = pads.shape[0]
        sources, refused = (
            None if each is None else tuple([*each, *[none] * new][place] for place in places)
            for each, none in ((self.sources, ()), (self.refused, 0))
        )
        drafts = Drafts(tokens, self.confidence[old], self.q and self.q.of_rows(old), None, sources, refused)
        return drafts.counted([counts[place] for place in places])


@lru_cache(maxsize=64)
def _nothing(rows: int) -> tuple[mx.array, mx.array]:
    """Returns the tokens and the confidences of no drafts. They are made once: no part of any graph."""
    return mx.array(np.zeros((rows, 0), np.int32)), mx.array(np.zeros((rows, 0), np.float32))


class DraftState(NamedTuple):
    """What a source may look at: a round's rows, after its tokens were committed.

    cache: the K/V of the B rows; a source reads it and writes nothing. newest: int32 [B], each row's newest token,
    which the cache does not hold yet. hidden: [B, H], the target's hidden state that predicted it. rules: the target's.
    token_counts: the tokens up to the newest, where the rules have penalties. confident: whether confidences are
    wanted.
    """

    cache: Cache
    newest: mx.array
    hidden: mx.array
    rules: Rules
    token_counts: TokenCounts | None
    confident: bool = False


class Proposer(Protocol):
    """A source of drafts, made once for a batch."""

    def propose(self, state: DraftState, count: int) -> Drafts:
        """Returns `count` drafts for every row, count at least 1. The host must not wait for the device in here.

        Drafts that bring no `q` are kept where they equal what plain decoding says. Rejection could keep no more of
        them: a draft that was not drawn stays with the target's probability of it.
        """


class Mtp:
    """Google's drafter: one batched call for each draft of all rows, all at one query position."""

    def __init__(self, drafter: Drafter, embed: Embed, drafting: Drafting):
        self.drafter, self.embed, self.drafting = drafter, embed, drafting

    def propose(self, state: DraftState, count: int) -> Drafts:
        """Returns `count` drafts for every row, see Proposer. For acceptance by rejection they bring `q`, and their
        noise is nobody else's.
        """
        token, hidden, token_counts = state.newest, state.hidden, state.token_counts
        span = Span(state.cache, 0, self.drafting.position)
        rules = state.rules.drafting(self.drafting.temperature)
        if self.drafting.rejection:
            rules = replace(rules, keys=keys_of_round(rules.keys, span.lengths))
        tables = self.drafter.ropes.tables(span.positions)
        newest, drafts, confidences, each = span.lengths[:, None], [], [], []
        for i in range(count):
            y, hidden = self.drafter(self.embed(token), hidden, span, tables)
            token, confidence, q = pick(
                self.drafter, y, rules, newest + (i + 1), token_counts, state.confident, self.drafting.rejection
            )
            token_counts = token_counts and token_counts.followed_by(token)
            confidences += [confidence] if state.confident else []
            each += [] if q is None else [q]
            mx.async_eval(token, hidden, *confidences[-1:])  # this step runs while Python builds the next
            drafts.append(token)
        confidence = mx.stack(confidences, axis=1) if state.confident else mx.zeros((token.shape[0], 0))
        return Drafts(mx.stack(drafts, axis=1), confidence, Distribution.joined(each) if each else None)


# The one list of what drafts on the device. Each is called with the drafter, the target's scaled embedding, and the
# settings.
SOURCES: dict[str, Callable[[Drafter, Embed, Drafting], Proposer]] = {MTP: Mtp}


def _sources(value: object) -> tuple[str, ...]:
    """Returns the names of sources, each once. Raises UserError for what is none, and for two that want the device."""
    known = [*SOURCES, *BESIDE]
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or not names or any(name not in known for name in names):
        raise UserError(f"draft_sources is {shown(value)}, expected some of {', '.join(known)}, with commas")
    names = tuple(dict.fromkeys(names))
    if sum(name not in BESIDE for name in names) > 1:
        raise UserError(f"draft_sources is {shown(value)}, expected one of {', '.join(SOURCES)} at most")
    return names


DEFAULT_DRAFTING = Drafting()


def pick(
    drafter: Drafter,
    y: mx.array,
    rules: Rules,
    positions: mx.array,
    token_counts: TokenCounts | None,
    confident: bool,
    rejection: bool = False,
) -> tuple[mx.array, mx.array | None, Distribution | None]:
    """Returns the token drafted for each row, int32 [B], its confidence [B] if `confident`, and what it was drawn from,
    if some row is sampled and drafts are accepted by `rejection`. A greedy token comes from a dense head without a row
    of logits.

    y: [B, size], from the drafter's step; positions: [B, 1], of the tokens to be drawn.
    """
    head = drafter.masked_embedding
    if rules.all_greedy and rules.reordered is None and isinstance(head, DenseHead):
        table = drafter.embed_tokens.weights
        if head_argmax.usable(table, y.dtype):
            return *head_argmax.best_token_metal(y, table, rules.suppressed), None
    logits, ids = drafter.scores(y)
    confidence = head_argmax.certainty(logits) if confident else None
    shortlist = None if ids is None else ids[:, None]
    if rejection and not rules.all_greedy:
        q = Distribution.of(logits[:, None], rules, ids=shortlist, token_counts=token_counts)
        return q.drawn(rules, positions)[:, 0], confidence, q
    token = draw(logits[:, None], rules, positions, ids=shortlist, token_counts=token_counts).guess
    return token[:, 0], confidence, None
