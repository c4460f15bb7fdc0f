"""The loop: prefill, then rounds of draft, verify, accept, commit. Plain decoding is the same loop with no drafts.

Order of a round: VERIFY runs while ACCEPT, COMMIT and the next DRAFT are queued behind it and the next VERIFY is built;
one readback fetches what was emitted; then the next VERIFY is dispatched. So every read of the cache has finished when
a verify writes it, and the write is in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from ..cache.cache import Cache
from ..machine.device import metal_available
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..ops.topk import total
from ..sampling import rejection
from ..sampling.distribution import Distribution, Rules, accept, logprobs
from ..sampling.drawing import UNDECIDED, draw, settled
from ..sampling.penalties import TokenCounts
from .drafting import DEFAULT_DRAFTING, SOURCES, Drafting, Drafts, DraftState
from .guide import Guide

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

    drafted: how many drafts of each row were verified; None for the first round, which follows the prefill. errors: for
    each row why it cannot go on, or None. A row with an error has only the tokens that are good, and must leave.
    logprobs: one for each token, where the rules ask for them.
    """

    tokens: list[list[int]]
    drafted: int | None
    errors: list[str | None]
    logprobs: list[list[TokenLogprob]] | None = None


@dataclass(frozen=True)
class Inputs:
    """All that one round begins with, for rows 0 to B - 1 of the cache. A round makes the inputs of the next; nothing
    else of it stays.

    newest: int32 [B], each row's newest token, which the cache does not hold yet; None after the prefill, where it
    does. drafts: the K drafts to be verified behind it. token_counts: the tokens up to the newest, where the rules have
    penalties. guide: the rows' constraints, None where every row is free. mask: uint32 [B, K + 1, words], bit t % 32 of
    word t // 32 set where the guide allows token t; None without a guide.
    """

    newest: mx.array | None
    drafts: Drafts
    rules: Rules
    token_counts: TokenCounts | None
    guide: Guide | None
    mask: mx.array | None

    @property
    def rows(self) -> slice:
        return slice(0, self.drafts.tokens.shape[0])

    @property
    def width(self) -> int:
        """K, how many drafts are to be verified."""
        return self.drafts.tokens.shape[1]

    def first(self, width: int) -> Inputs:
        """Returns the inputs with the first `width` drafts alone."""
        mask = None if self.mask is None else self.mask[:, : width + 1]
        return replace(self, drafts=self.drafts.first(width), mask=mask)

    def of_rows(self, rows: Sequence[int], rules: Rules) -> Inputs:
        """Returns the inputs of these rows alone, row rows[i] in place i. rules: of these rows, in this order."""
        index, guide = mx.array(list(rows)), self.guide and self.guide.of_rows(rows)
        return Inputs(
            self.newest[index],
            self.drafts.of_rows(index),
            rules,
            self.token_counts.of_rows(index) if rules.penalties else None,
            guide,
            None if guide is None else self.mask[index],
        )


class Verify:
    """The target's forward over a round's newest tokens and drafts. It is built first, and then dispatched or dropped.

    inputs: the round's. hidden: [B, K + 1, H]. positions: [B, K + 1], of the tokens that the hidden states predict.
    """

    def __init__(self, target: Gemma4, cache: Cache, inputs: Inputs):
        tokens = mx.concatenate([inputs.newest[:, None], inputs.drafts.tokens], axis=1)
        span = cache.span(inputs.rows, tokens.shape[1])
        self._cache, self._before = cache, cache.buffers  # while these handles are kept, a write is a copy
        self.inputs, self.positions = inputs, span.positions + 1
        self.hidden = target(tokens, span)
        self.dispatched = False

    def dispatch(self) -> None:
        """Lets the forward run. Its writes are in place, since the last handles of the old buffers go."""
        self._before.clear()
        if not metal_available():  # layer by layer: MLX walks a whole graph before its first operation begins
            for buffers in self._cache.buffers:
                mx.async_eval(*buffers)
        mx.async_eval(self.hidden)
        self.dispatched = True

    def drop(self) -> None:
        """Gives the cache back as it was before this forward was built."""
        assert not self.dispatched, "a forward that was dispatched has written"
        self._cache.buffers = self._before


class Prefilled:
    """The prefill, in the place of the first round's verify. It has no drafts, and its tokens are committed.

    hidden: [B, 1, H], of each row's last token. positions: [B, 1], of the tokens that the hidden states predict.
    """

    dispatched = True

    def __init__(self, cache: Cache, inputs: Inputs, hidden: mx.array):
        self.inputs, self.hidden, self.positions = inputs, hidden[:, None], cache.lengths[inputs.rows][:, None]


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


def compact(live: Sequence[bool]) -> list[int]:
    """Returns which row goes into which place when rows leave: the last live rows fill the holes, the others stay."""
    count = sum(live)
    movers = [row for row in range(count, len(live)) if live[row]]
    return [place if live[place] else movers.pop() for place in range(count)]


def accepted(target: Gemma4, verify: Verify | Prefilled) -> Accepted:
    """Returns which drafts of a verify stay, and the token after them. It reads no cache and waits for nothing."""
    inputs, cap = verify.inputs, target.config.softcap
    drafts, rules = inputs.drafts, inputs.rules
    token_counts = inputs.token_counts and inputs.token_counts.at_each(drafts.tokens)
    logits, undecided = target.logits(verify.hidden), None
    if drafts.q is None or rules.all_greedy:
        drawn = draw(logits, rules, verify.positions, cap, token_counts=token_counts, mask=inputs.mask)
        tokens, peak = drawn.tokens, drawn.peak
        kept, newest = accept(drafts.tokens, tokens)  # no draft is UNDECIDED
        if not drawn.certain:
            undecided = Undecided(newest == UNDECIDED, logits, token_counts)
            newest = mx.take_along_axis(drawn.guess, kept[:, None], axis=1)[:, 0]
    else:
        p = Distribution.of(logits, rules, cap, token_counts=token_counts, mask=inputs.mask)
        tokens, kept, newest = rejection.accept(drafts.tokens, drafts.q, p, rules, verify.positions)
        peak = p.peak
    report = () if rules.logprobs is None else logprobs(logits, tokens, cap, rules.logprobs)
    return Accepted(tokens, kept, newest, total(logits), peak, report, undecided)


def sound(tokens: Sequence[int], sums: Sequence[float], peaks: Sequence[float]) -> tuple[list[int], str | None]:
    """Returns a row's tokens up to the first that is not good, and why it is not, or None where all are good.

    A token is not good where the logits that it was drawn from are not finite, or where the row's settings left none to
    draw. sums, peaks: the row's part of those in Accepted. A refused draft can make the logits of good tokens NaN: its
    K/V stay in the row's slots, and attention multiplies what it does not see by 0, which leaves NaN as it is. Then the
    row ends, though plain decoding would have gone on.
    """
    for i in range(len(tokens)):
        if not math.isfinite(sums[i]):
            return list(tokens[:i]), NOT_FINITE
        if peaks and peaks[i] == -math.inf:
            return list(tokens[:i]), NOTHING_ALLOWED
    return list(tokens), None


class Speculation:
    """The loop over rows 0 to B - 1 of a cache: `start`, then `step` after `step`. Rows leave in between (`retain`).

    hidden: [B, H] of each row's last token, from `prefill`. drafter: None decodes plainly. drafting: where drafts come
    from, and how they are accepted. token_counts: the prompts, where the rules have penalties. guide: the rows'
    constraints; then the drafts are read before the verify is built, and those that are refused cut (but see
    rejection.py). confident: read the drafts' confidences with every round, into `confidences`, [B][K] for the drafts
    that were made last, also for those that the guide cut.

    What there is between two rounds: `inputs`, and the verify of exactly these once it is built.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        cache: Cache,
        rules: Rules,
        hidden: mx.array,
        drafting: Drafting = DEFAULT_DRAFTING,
        token_counts: TokenCounts | None = None,
        guide: Guide | None = None,
        confident: bool = False,
    ):
        self.target, self.cache, self.confident = target, cache, confident
        self.drafting, make = drafting, SOURCES[drafting.source]
        self.proposer = None if drafter is None else make(drafter, target.embed, drafting, confident)
        rows = hidden.shape[0]
        mask = guide and guide.look([[]] * rows).mask  # of the first token
        self.inputs = Inputs(None, Drafts.none(rows), rules, token_counts, guide, mask)
        self.confidences: list[list[float]] = [[]] * rows
        self.host_syncs = 0
        self._listed = 0 if token_counts is None else token_counts.places  # at most, of any row
        self._verify: Verify | Prefilled | None = Prefilled(cache, self.inputs, hidden)

    def start(self, num_draft: int) -> Round:
        """Runs the first round: it draws every row's first token from the prefill, and makes `num_draft` drafts."""
        assert self.inputs.newest is None, "a text starts once"
        return self.step(num_draft)

    @property
    def waiting(self) -> int:
        """How many drafts of a row wait to be verified: those that were made, without what the guide cut."""
        return self.inputs.width

    def launch(self, width: int | None = None) -> None:
        """Dispatches the next verify, so that it runs while the caller uses the last round. `step` does it if nobody
        did.

        width: how many of the drafts to verify, the first ones; None for all.
        """
        if self._verify is not None and self._verify.dispatched:
            return
        if width is not None and width < self.inputs.width:
            self._go_on_with(self.inputs.first(width))
        self._verify = self._verify or Verify(self.target, self.cache, self.inputs)
        self._verify.dispatch()

    def step(self, num_draft: int) -> Round:
        """Runs one round: it verifies the drafts that wait, and makes `num_draft` for the next round."""
        # VERIFY: runs from here on, if not since `launch`; all that follows is queued behind it.
        self.launch()
        verify, self._verify = self._verify, None
        now, rows = verify.inputs, verify.inputs.rows
        # ACCEPT
        out = accepted(self.target, verify)
        newest, counted = out.newest, out.kept + 1
        if out.undecided is not None:  # a guess is not counted: it may be another token
            counted -= out.undecided.last
        token_counts = now.token_counts and now.token_counts.first(self._listed).after(out.tokens, counted)
        # COMMIT: each row's tokens that stay
        drafted = None if now.newest is None else now.width
        if drafted is not None:
            self.cache.commit(rows, out.kept + 1, [drafted + 1] * rows.stop)
        # DRAFT
        drafts = Drafts.none(rows.stop)
        if self.proposer is not None and num_draft > 0:
            hidden = mx.take_along_axis(verify.hidden, out.kept[:, None, None], axis=1)[:, 0]
            state = DraftState(self.cache, rows, newest, hidden, now.rules, token_counts)
            drafts = self.proposer.propose(state, num_draft)
            assert drafts.q is None or self.drafting.rejection, "a source brings q for acceptance by rejection alone"
        checks = (out.sums,) if out.peaks is None else (out.sums, out.peaks)
        told = (out.tokens, out.kept, drafts.tokens, drafts.confidence, *out.report, *checks)
        mx.async_eval(*told, self.cache.lengths, newest)
        # VERIFY of the next round: built while the device works, unless constraints must see the tokens first.
        self._go_on_with(Inputs(newest, drafts, now.rules, token_counts, now.guide, None))
        if now.guide is None:
            self._verify = Verify(self.target, self.cache, self.inputs)
        # One readback
        tokens, kept, drafted_next, confidences, *more = self._readback(*told)
        report, (sums, *peaks) = more[: len(out.report)], more[len(out.report) :]
        self.confidences = _confidences(confidences, len(drafted_next[0])) if self.confident else confidences
        self.cache.tighten_length_bound(rows, [(drafted or 0) - count for count in kept])
        self._listed += max(kept) + 1
        counted = [row[: count + 1] for row, count in zip(tokens, kept, strict=True)]
        if undecided := [row for row, each in enumerate(counted) if each[-1] == UNDECIDED]:
            report = self._settle(verify, out.undecided, undecided, counted, report)
        emitted, errors = map(list, zip(*map(sound, counted, sums, *(peaks or [[[]] * rows.stop])), strict=True))
        if now.guide is not None:
            self._constrain(emitted, errors, drafted_next)
            self._verify = Verify(self.target, self.cache, self.inputs)
        return Round(emitted, drafted, errors, _named(emitted, *report) if report else None)

    def retain(self, rows: Sequence[int], rules: Rules) -> None:
        """Goes on with these rows alone, row rows[i] in place i. rows: from `compact`; rules: of these rows, in this
        order.
        """
        self._go_on_with(self.inputs.of_rows(rows, rules))
        self.cache.move({place: row for place, row in enumerate(rows) if place != row})
        self.confidences = [self.confidences[row] for row in rows]

    def _go_on_with(self, inputs: Inputs) -> None:
        """Makes these the next round's inputs. A verify that was built of others is dropped."""
        if self._verify is not None:
            self._verify.drop()
        self.inputs, self._verify = inputs, None

    def _settle(
        self,
        verify: Verify | Prefilled,
        undecided: Undecided,
        rows: list[int],
        tokens: list[list[int]],
        report: list[list],
    ) -> list[list]:
        """Draws the last token of these rows from all that it may be, and puts it into `tokens`, into the report, which
        it returns, and into the next round's inputs, whose drafts were made after a guess. It is a second host sync.
        """
        now, cap = verify.inputs, self.target.config.softcap
        index, place = mx.array(rows), mx.array([len(tokens[row]) - 1 for row in rows])
        logits, token_counts = undecided.logits, undecided.token_counts
        one = lambda array: array[index, place][:, None]  # noqa: E731
        counts = token_counts and token_counts.at_place(index, place)
        mask = None if now.mask is None else one(now.mask)
        drawn = settled(one(logits), now.rules.of_rows(index), one(verify.positions), cap, counts, mask)
        own = logprobs(one(logits), drawn, cap, 0)[0] if report else drawn
        newest = self.inputs.newest.at[index].add(drawn[:, 0] - self.inputs.newest[index])
        later = self.inputs.token_counts
        if later is not None:
            counted = mx.zeros(newest.shape, mx.int32).at[index].add(1)
            later = later.followed_by(newest, counted)
        self._go_on_with(replace(self.inputs, newest=newest, token_counts=later))
        told, values = self._readback(drawn, own)
        for i, row in enumerate(rows):
            tokens[row][-1] = told[i][0]
            if report:
                report[0][row][len(tokens[row]) - 1] = values[i][0]
        return report

    def _constrain(self, emitted: list[list[int]], errors: list[str | None], drafts: list[list[int]]) -> None:
        """Moves the guide by what was emitted, and cuts and masks the next round's drafts by it. A row whose constraint
        fails gets its error, and keeps of its tokens those before it.
        """
        inputs, uncut = self.inputs, self.inputs.drafts.q is not None
        for row, (good, reason) in inputs.guide.advance(emitted).items():
            emitted[row], errors[row] = emitted[row][:good], reason
        width, mask, failures = inputs.guide.look(drafts, cut=not uncut)
        for row, reason in failures.items():
            errors[row] = reason
        self.inputs = replace(inputs if uncut else inputs.first(width), mask=mask)

    def _readback(self, *arrays: mx.array) -> list[list]:
        """Returns the values of these arrays: the round's one host sync, if all of its tokens are decided."""
        self.host_syncs += 1
        mx.eval(*arrays)
        return [array.tolist() for array in arrays]


def _confidences(confidences: list[list[float]], made: int) -> list[list[float]]:
    """Returns a number from 0 to 1 for each of the drafts that were made: 0 for NaN, and 1 from a source that gives
    none, which is then judged by the drafts that were kept.
    """
    return [[0.0 if math.isnan(each) else each for each in row] or [1.0] * made for row in confidences]


def _named(emitted: list[list[int]], own: list, best: list, values: list) -> list[list[TokenLogprob]]:
    """Returns the report of the tokens that were emitted, by row; what it says of refused drafts is dropped."""
    return [
        [
            TokenLogprob(token, own[row][i], list(zip(best[row][i], values[row][i], strict=True)))
            for i, token in enumerate(tokens)
        ]
        for row, tokens in enumerate(emitted)
    ]
