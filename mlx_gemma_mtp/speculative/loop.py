"""The loop: rounds of draft, verify, accept, commit. Plain decoding is the same loop with no drafts.

Order of a round: VERIFY runs while ACCEPT, COMMIT and the next DRAFT are queued behind it and the next VERIFY is built;
one readback fetches what was emitted; then the next VERIFY is dispatched. So every read of the cache has finished when
a verify writes it, and the write is in place. Rows leave and join between the readback and that dispatch; where the
caller knows that none does, the verify begins as soon as the round is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import mlx.core as mx

from ..cache.cache import Cache
from ..cache.saved import Saved
from ..models.drafter import Drafter
from ..models.gemma4 import Gemma4
from ..sampling.penalties import TokenCounts
from ..sampling.rules import Rules
from .copies import RowText
from .drafting import DEFAULT_DRAFTING, SOURCES, Drafting, Drafts, DraftState
from .guide import Guide
from .mixture import Chain, Mixture, Pool, mixed
from .readback import Read, Round
from .rounds import Inputs, Prefilled, Verify, accepted


@dataclass(frozen=True)
class Joiner:
    """A sequence that comes into the batch.

    saved: its K/V. newest: its newest token, which these do not hold yet. None: its first token is not drawn yet; then
    hidden, [H], is the target's hidden state at its last token. text: all its tokens, the newest among them, for
    copies.
    """

    saved: Saved
    newest: int | None = None
    hidden: mx.array | None = None
    text: RowText = field(default_factory=RowText)


@dataclass(frozen=True)
class Firsts:
    """Staged prompts whose last chunk is queued: their first tokens come with a round of the batch.

    hidden: [J, H], the target's hidden states at their last tokens, which need not be evaluated. positions: of the
    tokens that these predict, the lengths of the prompts. rules, token_counts, guide: theirs, see Inputs.
    """

    hidden: mx.array
    positions: Sequence[int]
    rules: Rules
    token_counts: TokenCounts | None = None
    guide: Guide | None = None

    def prefilled(self) -> Prefilled:
        """Returns what their first tokens are drawn from."""
        inputs = Inputs.of_prefill(len(self.positions), self.rules, self.token_counts, self.guide)
        return Prefilled(inputs, self.hidden, mx.array(list(self.positions), mx.int32))


def compact(live: Sequence[bool]) -> list[int]:
    """Returns which row goes into which place when rows leave: the last live rows fill the holes, the others stay."""
    count = sum(live)
    movers = [row for row in range(count, len(live)) if live[row]]
    return [place if live[place] else movers.pop() for place in range(count)]


class Speculation:
    """The loop over the rows of a cache: rows come and leave by `arrange`, and `step` after `step` runs a round.

    It begins without rows, over a cache that has none. drafter: None decodes plainly. drafting: where drafts come from,
    and how they are accepted. confident: read the drafts' confidences with every round, into `confidences`: for each
    row those of the drafts that wait. It may be set anew between two rounds.

    With a guide the drafts are read before the verify is built, and those that it refuses are cut (but see
    rejection.py). What there is between two rounds: `inputs`, and perhaps a verify that is built of the drafter's
    drafts alone: it is dispatched if no others are to be verified, and else dropped.
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        cache: Cache,
        drafting: Drafting = DEFAULT_DRAFTING,
        confident: bool = False,
        pool: Pool | None = None,
    ):
        self.target, self.cache, self.confident, self.drafting = target, cache, confident, drafting
        alone = drafter is None or drafting.source is None
        self.proposer = None if alone else SOURCES[drafting.source](drafter, target.embed, drafting)
        self.inputs, self.mixture = Inputs.none(), Mixture(drafting, pool)
        self.chains: list[Chain] = []
        self._made: list[list[int]] = []  # the drafter's drafts, of which a verify is built
        self.host_syncs = 0
        self._listed = 0  # tokens of which token counts may have a list, at most, of any row
        self._verify: Verify | Prefilled | None = None

    @property
    def waiting(self) -> list[int]:
        """How many drafts of each row wait to be verified: those of all sources, without what the guide cut."""
        return self.inputs.drafts.of_each

    @property
    def certain(self) -> bool:
        """Whether all drafts that wait are verified, whatever is known: they are the drafter's alone, and nobody doubts
        more than the first of them.
        """
        if self.confident and max(self.waiting) > 1:
            return False
        return not any(chain.beside for chain in self.chains)

    @property
    def running(self) -> bool:
        """Whether the next verify has begun: then the rows stay as they are."""
        return isinstance(self._verify, Verify) and self._verify.begun

    def needs_no_drafter(self, num_draft: Sequence[int]) -> bool:
        """Returns whether the rows that would have drafts need none of the drafter's: there is none, or copies of their
        texts are kept again and again.
        """
        asked = [row for row, count in enumerate(num_draft) if count]
        return bool(asked) and (self.proposer is None or self.mixture.hot(asked))

    @property
    def confidences(self) -> list[list[float]]:
        """For each row the chances of those of its drafts which the drafter made."""
        return [chain.rates[: chain.own] if self.confident else [] for chain in self.chains]

    def begin(
        self,
        hidden: mx.array,
        rules: Rules,
        token_counts: TokenCounts | None = None,
        guide: Guide | None = None,
        texts: Sequence[RowText] | None = None,
    ) -> None:
        """Begins with all rows of the cache, of which no token is drawn yet. The next round draws their first tokens,
        and makes drafts.

        hidden: [B, H], the target's hidden state at each row's last token. token_counts: the prompts, where the rules
        have penalties. guide: the rows' constraints, None where every row is free. texts: their tokens, for copies;
        None where these are to be of what is said from now on.
        """
        inputs = Inputs.of_prefill(hidden.shape[0], rules, token_counts, guide)
        self._go_on_with(inputs)
        self._verify = Prefilled(inputs, hidden, self.cache.lengths)
        self.mixture.begin(texts or [RowText() for _ in range(inputs.rows)])
        self.chains = [Chain.none()] * inputs.rows
        self._listed = 0 if token_counts is None else token_counts.places

    def arrange(
        self,
        places: Sequence[int | Joiner],
        rules: Rules | None = None,
        token_counts: TokenCounts | None = None,
        guide: Guide | None = None,
    ) -> None:
        """Goes on with these rows in this order: between a round and the next `launch`.

        places: an int is a row as it was; without any the batch is empty. A joiner has no drafts in its first round. If
        every row is a joiner without its first token, the batch begins with them (see `begin`); beside other rows a
        joiner has it. rules, token_counts, guide: of these rows, after all that was emitted, as for `begin`. A verify
        that was built is dropped.
        """
        joiners = [place for place in places if isinstance(place, Joiner)]
        begins = bool(places) and all(isinstance(place, Joiner) and place.newest is None for place in places)
        self._go_on_with(self.inputs)
        self.cache.arrange([place.saved if isinstance(place, Joiner) else place for place in places])
        if begins:
            texts = [joiner.text for joiner in joiners]
            self.begin(mx.stack([joiner.hidden for joiner in joiners]), rules, token_counts, guide, texts)
            return
        assert all(joiner.newest is not None for joiner in joiners), "beside other rows a joiner has its first token"
        new = iter(range(self.inputs.rows, self.inputs.rows + len(joiners)))
        order = [next(new) if isinstance(place, Joiner) else place for place in places]
        newest = [joiner.newest for joiner in joiners]
        self.inputs = self.inputs.arranged(order, newest, rules, token_counts, guide) if places else Inputs.none()
        self.mixture.arrange([place.text if isinstance(place, Joiner) else place for place in places])
        self.chains = [Chain.none() if isinstance(place, Joiner) else self.chains[place] for place in places]
        self._listed = 0 if token_counts is None else token_counts.places

    def save(self, row: int, slack: int = 0, tokens: int | None = None) -> Saved:
        """Returns copies of a row's K/V, which with its newest token make a Joiner (see Cache.save): between a round
        and the next `launch`. A verify that was built is dropped.
        """
        if isinstance(self._verify, Verify):
            self._go_on_with(self.inputs)
        return self.cache.save(row, slack, tokens)

    def launch(self, width: int | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Dispatches the next verify, or the rest of it, so that it runs while the caller uses the last round. `step`
        does it if nobody did.

        width: how many of a row's drafts to verify at most, the first ones; None for all. meanwhile: is called once,
        when the device has something to do.
        """
        if self._verify is not None and self._verify.dispatched:
            return meanwhile()
        if not self.running:
            self._build(width)
        self._verify.dispatch(meanwhile)

    def _build(self, width: int | None = None) -> None:
        """Builds the next verify, of `width` drafts of a row at most, where it is not the one that is built."""
        counts = [each if width is None else min(each, width) for each in self.waiting]
        if (
            self._verify is None
            or [chain.tokens[:n] for chain, n in zip(self.chains, counts, strict=True)] != self._made
        ):
            self._go_on_with(self.inputs.cut(counts))
        else:  # what other sources added is cut again
            self.inputs = self._verify.inputs
        self._verify = self._verify or Verify(self.target, self.cache, self.inputs)

    def step(
        self,
        num_draft: Sequence[int],
        firsts: Firsts | None = None,
        extra: Sequence[mx.array] = (),
        reach: Sequence[int] | None = None,
        goes_on: Callable[[Round], bool] = lambda done: False,
    ) -> Round:
        """Runs one round: it verifies the drafts that wait, and makes others for the next round.

        num_draft: how many the drafter makes for each row. firsts: staged prompts whose first tokens come with this
        round. extra: arrays that are dispatched behind the drafts, and not read: the chunks of prompts. reach: how many
        drafts of all sources a row may have; None for as many as the drafter makes. goes_on: is called with the round
        once it is read. It says whether no row leaves or joins: then the next verify begins before this returns, unless
        its width is to be chosen.
        """
        # VERIFY: runs from here on, if not since `launch`; all that follows is queued behind it.
        self.launch()
        verify, self._verify = self._verify, None
        now = verify.inputs
        # ACCEPT
        out = accepted(self.target, verify)
        emitted = counted = out.kept + 1
        if out.undecided is not None:  # a guess is not counted: it may be another token
            counted = emitted - out.undecided.last
        token_counts = now.token_counts and now.token_counts.first(self._listed).after(out.tokens, counted)
        # COMMIT: each row's tokens that stay
        if now.newest is not None:
            self.cache.commit(emitted, [count + 1 for count in now.drafts.of_each])
        # DRAFT
        drafts = Drafts.none(now.rows)
        if self.proposer is not None and max(num_draft) > 0:
            hidden = mx.take_along_axis(verify.hidden, out.kept[:, None, None], axis=1)[:, 0]
            state = DraftState(self.cache, out.newest, hidden, now.rules, token_counts, self.confident)
            drafts = self.proposer.propose(state, max(num_draft)).counted(num_draft)
            assert drafts.q is None or self.drafting.rejection, "a source brings q for acceptance by rejection alone"
        told = (*out.told, drafts.tokens, drafts.confidence)
        mx.async_eval(*told, self.cache.lengths, out.newest)
        # First tokens of staged prompts, and chunks of others: behind the drafts, which do not wait for them.
        staged = None if firsts is None else firsts.prefilled()
        drawn = None if staged is None else accepted(self.target, staged)
        late = () if drawn is None else drawn.told
        mx.async_eval(*late, *extra)
        # VERIFY of the next round: built while the device works, unless guide or copies must see the tokens first.
        self._go_on_with(Inputs(out.newest, drafts, now.rules, token_counts, now.guide))
        if now.guide is None and not self.mixture.hot(range(now.rows)):
            self._verify = Verify(self.target, self.cache, self.inputs)
        # One readback
        values = self._readback(*told, *late)
        *own, drafted_next, confidences = values[: len(told)]
        read = Read.of(verify, out, own)
        first = None if drawn is None else Read.of(staged, drawn, values[len(told) :])
        self.cache.tighten_length_bound([(each or 0) - kept for each, kept in zip(now.drafted, read.kept, strict=True)])
        if self.cache.outgrown:
            self._go_on_with(self.inputs)
        self._listed += max(read.kept) + 1
        self._settle(read, first)
        done = read.round() if first is None else replace(read.round(), firsts=first.round())
        sure = _confidences(confidences, drafts.of_each) if self.confident else [[]] * now.rows
        self._mix(done, drafted_next, sure, num_draft if reach is None else reach)
        if goes_on(done) and self.certain:
            self._build()
            self._verify.begin()
        return done

    def _go_on_with(self, inputs: Inputs) -> None:
        """Makes these the next round's inputs. A verify that was built of others is dropped."""
        if self._verify is not None:
            self._verify.drop()
        self.inputs, self._verify = inputs, None

    def _settle(self, read: Read, first: Read | None) -> None:
        """Settles what a round left undecided, with a second host sync; the next drafts were made after guesses."""
        late = [each for each in (read, first) if each is not None and each.undecided]
        if not late:
            return
        settlements = [each.settlement(self.target) for each in late]
        if late[0] is read:
            self._go_on_with(self.inputs.settled(mx.array(read.undecided), settlements[0][0][:, 0]))
        values = iter(self._readback(*chain.from_iterable(settlements)))
        for each in late:
            each.settle(next(values), next(values))

    def _mix(
        self, done: Round, drafted: list[list[int]], confidences: Sequence[Sequence[float]], reach: Sequence[int]
    ) -> None:
        """Puts the next round's drafts together: the drafter's, copies, and what the guide forces and leaves."""
        own, inputs = self.inputs.drafts, self.inputs
        if own.counts is not None:
            drafted = [row[:count] for row, count in zip(drafted, own.counts, strict=True)]
        self._made = drafted
        self.mixture.take(done.tokens)
        self.chains = self.mixture.chains(drafted, confidences, reach, own.q is not None)
        if inputs.guide is not None and own.q is None:
            self.chains, look = self.mixture.led(inputs.guide, self.chains, reach)
        elif inputs.guide is not None:  # what was drawn is not cut
            look = inputs.guide.look([chain.tokens for chain in self.chains], cut=False)
        drafts = mixed(own, drafted, self.chains)
        if inputs.guide is not None:
            for row, reason in look.failures.items():
                done.errors[row] = reason
            self._go_on_with(replace(inputs, drafts=drafts, mask=look.mask))
        elif drafts is not own:
            self.inputs = replace(inputs, drafts=drafts)

    def _readback(self, *arrays: mx.array) -> list[list]:
        """Returns the values of these arrays: the round's one host sync, if all of its tokens are decided."""
        self.host_syncs += 1
        mx.eval(*arrays)
        return [array.tolist() for array in arrays]


def _confidences(confidences: list[list[float]], waiting: Sequence[int]) -> list[list[float]]:
    """Returns a number from 0 to 1 for each of the drafts that wait: 0 for NaN, and 1 from a source that gives none,
    which is then judged by the drafts that were kept.
    """
    return [
        [0.0 if math.isnan(each) else each for each in row[:count]] or [1.0] * count
        for row, count in zip(confidences, waiting, strict=True)
    ]
