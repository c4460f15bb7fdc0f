"""What a round is made of: its inputs, the verify of these, and what that decides, all on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import mlx.core as mx

from ..cache.cache import Cache
from ..cache.kv import Arrays
from ..machine import device
from ..models.gemma4 import Gemma4
from ..ops.topk import total
from ..sampling import rejection
from ..sampling.distribution import Distribution, accept, logprobs
from ..sampling.drawing import UNDECIDED, draw
from ..sampling.penalties import TokenCounts
from ..sampling.rules import Rules
from .drafting import BESIDE, Drafts
from .guide import ALL, Guide


@dataclass(frozen=True)
class Inputs:
    """All that one round begins with, for the B rows of the cache. A round makes the inputs of the next; nothing else
    of it stays.

    newest: int32 [B], each row's newest token, which the cache does not hold yet; None after the prefill, where it
    does. drafts: the K drafts to be verified behind it. token_counts: the tokens up to the newest, where the rules have
    penalties. guide: the rows' constraints, None where every row is free. mask: uint32 [B, K + 1, words], bit t % 32 of
    word t // 32 set where the guide allows token t; None without a guide. failures: the reasons of rows whose
    constraint raised when the mask was made; these may say nothing.
    """

    newest: mx.array | None
    drafts: Drafts
    rules: Rules | None
    token_counts: TokenCounts | None = None
    guide: Guide | None = None
    mask: mx.array | None = None
    failures: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Inputs:
        """Returns the inputs of no rows."""
        return cls(mx.zeros((0,), mx.int32), Drafts.none(0), None)

    @classmethod
    def of_prefill(
        cls, rows: int, rules: Rules, token_counts: TokenCounts | None = None, guide: Guide | None = None
    ) -> Inputs:
        """Returns the inputs of prefilled rows whose first tokens are to be drawn."""
        inputs = cls(None, Drafts.none(rows), rules, token_counts, guide)
        if guide is None:
            return inputs
        look = guide.look([[]] * rows)
        return replace(inputs, mask=look.mask, failures=look.failures)

    @property
    def rows(self) -> int:
        return self.drafts.tokens.shape[0]

    @property
    def width(self) -> int:
        """K, how many drafts are to be verified, of the row that has the most."""
        return self.drafts.tokens.shape[1]

    @property
    def drafted(self) -> list[int | None]:
        """How many drafts of each row are to be verified; None where nothing is verified."""
        return [None] * self.rows if self.newest is None else self.drafts.of_each

    def cut(self, counts: Sequence[int]) -> Inputs:
        """Returns the inputs with the first counts[i] drafts of row i alone."""
        if list(counts) == self.drafts.of_each:
            return self
        if self.drafts.q is not None:
            drawn = [sum(name not in BESIDE for name in names) for names in self.drafts.named]
            whole = all(count >= own for count, own in zip(counts, drawn, strict=True))
            assert whole, "drafts that were drawn are not cut: it would change the distribution of the text"
        mask = None if self.mask is None else self.mask[:, : max(counts) + 1]
        return replace(self, drafts=self.drafts.counted(counts), mask=mask)

    def arranged(
        self,
        places: Sequence[int],
        newest: Sequence[int],
        rules: Rules,
        token_counts: TokenCounts | None,
        guide: Guide | None,
    ) -> Inputs:
        """Returns the inputs of other rows, in this order. New rows have no drafts.

        places: a number below B is a row as it was, B + j the j-th new one. newest: of the new ones. rules,
        token_counts, guide: of the rows in their order.
        """
        assert self.newest is not None, "rows whose first tokens are not drawn yet go through a round first"
        joined = mx.array(list(newest), mx.int32)
        drafts = self.drafts.arranged(places, joined)
        tokens = mx.concatenate([self.newest, joined])[mx.array(list(places))]
        inputs = Inputs(tokens, drafts, rules, token_counts, guide)
        return inputs if guide is None else replace(inputs, **self._constraints(places, guide, inputs.width))

    def _constraints(self, places: Sequence[int], guide: Guide, width: int) -> dict[str, object]:
        """Returns the mask and the failures of these rows (see `arranged`). Old rows keep theirs."""
        new = [row for row, place in enumerate(places) if place >= self.rows]
        look = Guide([guide.constraints[row] for row in new], guide.vocab).look([[]] * len(new))
        words = look.mask.shape[-1]
        every = lambda rows, positions: mx.full((rows, positions, words), ALL, mx.uint32)  # noqa: E731
        old = every(self.rows, self.width + 1) if self.mask is None else self.mask
        joined = mx.concatenate([look.mask, every(len(new), self.width)], axis=1)
        mask = mx.concatenate([old, joined], axis=0)[mx.array(list(places))][:, : width + 1]
        kept = {row: self.failures[place] for row, place in enumerate(places) if place in self.failures}
        return {"mask": mask, "failures": kept | {new[i]: reason for i, reason in look.failures.items()}}

    def settled(self, index: mx.array, newest: mx.array) -> Inputs:
        """Returns the inputs after other newest tokens [n] in the rows index [n], which are not counted yet."""
        tokens = self.newest.at[index].add(newest - self.newest[index])
        if self.token_counts is None:
            return replace(self, newest=tokens)
        counted = mx.zeros(tokens.shape, mx.int32).at[index].add(1)
        return replace(self, newest=tokens, token_counts=self.token_counts.followed_by(tokens, counted))


class Verify:
    """The target's forward over a round's newest tokens and drafts. It is built first, and then dispatched or dropped.

    inputs: the round's. hidden: [B, K + 1, H]. positions: [B, K + 1], of the tokens that the hidden states predict.
    begun, dispatched: whether any of it, and all of it, is on its way.
    """

    def __init__(self, target: Gemma4, cache: Cache, inputs: Inputs):
        tokens = inputs.newest[:, None]
        if inputs.width:
            tokens = mx.concatenate([tokens, inputs.drafts.tokens], axis=1)
        span = cache.span(tokens.shape[1])
        self._cache, self._before = cache, cache.buffers  # while these handles are kept, a write is a copy
        self.inputs, self.positions = inputs, span.positions + 1
        self.hidden = target(tokens, span)
        self.begun = self.dispatched = False

    def begin(self) -> None:
        """Gives the device something to do: the forward, or half of it where MLX walks a whole graph before its first
        operation begins. Its writes are in place, since the last handles of the old buffers go.
        """
        self._before.clear()
        self.begun = True
        if device.traits().walks_first:
            layers = self._cache.buffers
            self._layer_by_layer(layers[: len(layers) // 2])
        else:
            mx.async_eval(self.hidden)

    def dispatch(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Lets the forward run: what of it does not yet.

        meanwhile: is called once, when the device has something to do.
        """
        if not self.begun:
            self.begin()
        meanwhile()  # MLX lets so much work wait that half of it covers this, and the other half what comes next
        if device.traits().walks_first:
            layers = self._cache.buffers
            self._layer_by_layer(layers[len(layers) // 2 :])
            mx.async_eval(self.hidden)
        self.dispatched = True

    @staticmethod
    def _layer_by_layer(layers: Sequence[Arrays]) -> None:
        for buffers in layers:
            mx.async_eval(*buffers)

    def drop(self) -> None:
        """Gives the cache back as it was before this forward was built."""
        assert not self.begun, "a forward that was dispatched has written"
        self._cache.buffers = self._before


class Prefilled:
    """A prefill, in the place of a verify. It has no drafts, and its tokens are committed.

    hidden: [B, 1, H], of each row's last token. positions: [B, 1], of the tokens that the hidden states predict.
    """

    dispatched = True

    def __init__(self, inputs: Inputs, hidden: mx.array, positions: mx.array):
        self.inputs, self.hidden, self.positions = inputs, hidden[:, None], positions[:, None]

    def drop(self) -> None:
        """Does nothing: no cache is written."""


class Undecided(NamedTuple):
    """What a verify may have left to be settled.

    last: bool [B], whether it is the row's last token. logits, token_counts: of each position.
    """

    last: mx.array
    logits: mx.array
    token_counts: TokenCounts | None


class Accepted(NamedTuple):
    """What a verify decided, as arrays on the device.

    tokens: int32 [B, K + 1], of which kept + 1 count. kept: int32 [B], how many drafts stay. newest: [B], the token
    after them, or a guess where it is UNDECIDED. sums: float32 [B, K + 1], of the logits of each position, finite
    where all of these are. peaks: [B, K + 1], the target's Distribution.peak, or None. report: what sampling.logprobs
    says of the tokens, where the rules ask for it, or nothing. undecided: None where no token can be.
    """

    tokens: mx.array
    kept: mx.array
    newest: mx.array
    sums: mx.array
    peaks: mx.array | None
    report: tuple[mx.array, ...]
    undecided: Undecided | None

    @property
    def told(self) -> tuple[mx.array, ...]:
        """What the host reads."""
        return (self.tokens, self.kept, self.sums, *(() if self.peaks is None else (self.peaks,)), *self.report)


def accepted(target: Gemma4, verify: Verify | Prefilled) -> Accepted:
    """Returns which drafts of a verify stay, and the token after them. It reads no cache and waits for nothing."""
    inputs, cap = verify.inputs, target.config.softcap
    drafts, rules = inputs.drafts, inputs.rules
    token_counts = inputs.token_counts and inputs.token_counts.at_each(drafts.tokens)
    logits, undecided = target.logits(verify.hidden), None
    if drafts.q is None or rules.all_greedy:
        drawn = draw(logits, rules, verify.positions, cap, token_counts=token_counts, mask=inputs.mask)
        tokens, peak = drawn.tokens, drawn.peak
        kept, newest = accept(drafts.tokens, tokens, drafts.real)  # no draft is UNDECIDED
        if not drawn.certain:
            undecided = Undecided(newest == UNDECIDED, logits, token_counts)
            newest = mx.take_along_axis(drawn.guess, kept[:, None], axis=1)[:, 0]
    else:
        p = Distribution.of(logits, rules, cap, token_counts=token_counts, mask=inputs.mask)
        tokens, kept, newest = rejection.accept(drafts.tokens, drafts.q, p, rules, verify.positions, drafts.real)
        peak = p.peak
    report = () if rules.logprobs is None else logprobs(logits, tokens, cap, rules.logprobs)
    return Accepted(tokens, kept, newest, total(logits), peak, report, undecided)
