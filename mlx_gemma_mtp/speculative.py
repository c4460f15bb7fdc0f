"""The loop: prefill, then rounds of draft, verify, accept, commit. Plain decoding is the same loop with no drafts.

Order of a round: VERIFY runs while ACCEPT, COMMIT and the next DRAFT are queued behind it and the next VERIFY is built;
one readback fetches what was emitted; then the next VERIFY is dispatched. So every read of the cache has finished when
a verify writes it, and the write is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from . import rejection
from .cache import Cache
from .drafter import Drafter, Drafts, draft
from .gemma4 import Gemma4
from .guide import Guide
from .kernels import metal_available
from .noise import keys_of_round
from .params import COUPLED, REJECTION
from .penalties import Said
from .sampling import Distribution, Rules, accept, logprobs, sample


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own log-probability of an emitted token, and the likeliest tokens at its place, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Round:
    """What one round gave: the tokens emitted by each row, and how many drafts a row were verified.

    The prefill's tokens come as a round that verified nothing: drafted is None. logprobs: one for each token, where the
    rules ask for them.
    """

    tokens: list[list[int]]
    drafted: int | None
    logprobs: list[list[TokenLogprob]] | None = None


@dataclass
class _Verify:
    """A verify pass that is built but not dispatched, and the cache's buffers as they were before it."""

    drafts: Drafts
    hidden: mx.array
    positions: mx.array
    before: list[tuple[mx.array, mx.array]]


def prefill(
    target: Gemma4,
    cache: Cache,
    rows: slice,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> mx.array:
    """Feeds ragged prompts in chunks of the cache's block; each row commits its own tokens alone.

    progress is told after each chunk how many columns are done. Returns each row's hidden state at its last token, [B,
    1, H].
    """
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    padded = mx.array([list(p) + [0] * (width - len(p)) for p in prompts])
    hidden = None
    for start in range(0, width, cache.block):
        tokens = padded[:, start : start + cache.block]
        step = tokens.shape[1]
        counts = [max(0, min(length - start, step)) for length in lengths]  # each row's own tokens in this chunk
        last = mx.array([length - 1 - start for length in lengths])  # the last token's column, if it is in this chunk
        here = target(tokens, cache.span(rows, step, counts), mx.clip(last, 0, step - 1))[:, 0]
        cache.commit(rows, mx.array(counts), counts)
        inside = ((last >= 0) & (last < step))[:, None]
        hidden = here if hidden is None else mx.where(inside, here, hidden)
        mx.eval(hidden, cache.lengths)
        progress(start + step)
    return hidden


def compact(live: Sequence[bool]) -> list[int]:
    """Which row goes into which place when the dead ones leave: the last live rows fill the holes, the others stay."""
    count = sum(live)
    movers = [row for row in range(count, len(live)) if live[row]]
    return [place if live[place] else movers.pop() for place in range(count)]


class Speculation:
    """The loop's state between rounds, for rows 0 to B - 1 of a cache.

    hidden: [B, H] of each row's last token, from `prefill`. drafter: None decodes plainly.
    draft_position: the drafter's query position, relative to the newest token's index (0: transformers; -1: vLLM).
    draft_temperature: the drafter's, as a multiple of the target's. said: the prompts, where the rules have penalties.
    guide: the rows' constraints; then the drafts are read before the verify is built, and those that are refused cut.
    confident: read the drafter's confidences with every round, into `confidences`, [B][K] for the drafts that were made
    last, also those that the guide cut. accept: which drafts stay, 'coupled' (those that plain decoding says) or
    'rejection' (see rejection.py; drafts are never cut then, which would favour those that are not).
    """

    def __init__(
        self,
        target: Gemma4,
        drafter: Drafter | None,
        cache: Cache,
        rules: Rules,
        hidden: mx.array,
        draft_position: int = 0,
        draft_temperature: float = 1.0,
        said: Said | None = None,
        guide: Guide | None = None,
        confident: bool = False,
        accept: str = COUPLED,
    ):
        self.target, self.drafter, self.cache, self.rules = target, drafter, cache, rules
        self.draft_position, self.draft_temperature = draft_position, draft_temperature
        self.hidden, self.said, self.guide, self.confident = hidden, said, guide, confident
        self.rejection = accept == REJECTION
        self.confidences: list[list[float]] = [[]] * hidden.shape[0]
        self._mask = guide and guide.look([[]] * hidden.shape[0])[1]  # [B, 1, V] for the first token
        self.rows = slice(0, hidden.shape[0])
        self.host_syncs = 0
        self._verify: _Verify | None = None
        self._launched = False

    def start(self, num_draft: int) -> Round:
        """Draws every row's first token and drafts `num_draft` more."""
        positions = self.cache.lengths[self.rows][:, None]
        tokens = self._sample(self.hidden[:, None], positions, self.said)
        self._next = tokens[:, 0]
        self.said = self.said and self.said.followed_by(self._next)
        self._draft(num_draft)
        return self._read(tokens, None, None)

    @property
    def waiting(self) -> int:
        """How many drafts wait to be verified: those that were made, without what the guide cut."""
        return self._drafts.tokens.shape[1]

    def launch(self, width: int | None = None) -> None:
        """Dispatches the next verify, of the first `width` drafts (None: of all), so that it runs while the caller uses
        the last round. `step` does it if nobody did.
        """
        if self._launched:
            return
        if width is not None and width < self._drafts.tokens.shape[1]:
            self._forget()
            self._drafts = self._drafts.first(width)
            self._mask = self._mask[:, : width + 1] if self._mask is not None else None
        self._verify = self._verify or self._build()
        self._verify.before.clear()  # the last handles of the old buffers: from here on the write can be in place
        if not metal_available():  # layer by layer: MLX walks a whole graph before its first operation begins
            for buffers in self.cache.buffers:
                mx.async_eval(*buffers)
        mx.async_eval(self._verify.hidden)
        self._launched = True

    def step(self, num_draft: int) -> Round:
        """One round: verifies the drafts there are; num_draft: how many to draft for the next."""
        self.launch()
        verify, self._launched = self._verify, False
        said = self.said and self.said.at_each(verify.drafts.tokens)
        tokens, n, self._next = self._accept(verify, said)
        self.said = self.said and self.said.after(tokens, n + 1)
        width = verify.drafts.tokens.shape[1]
        self.cache.commit(self.rows, n + 1, [width + 1] * self.rows.stop)
        self.hidden = mx.take_along_axis(verify.hidden, n[:, None, None], axis=1)[:, 0]
        self._draft(num_draft)
        return self._read(tokens, n, width)

    def retain(self, rows: Sequence[int], rules: Rules) -> None:
        """Goes on with these rows alone, row rows[i] in place i (see `compact`); rules: theirs, in this order."""
        assert not self._launched, "rows leave between rounds, before the next verify is launched"
        self._forget()  # it was built for the old rows
        for place, row in enumerate(rows):
            if place != row:
                self.cache.move(row, place)
        index = mx.array(list(rows))
        self.hidden, self._next, self._drafts = self.hidden[index], self._next[index], self._drafts.of_rows(index)
        self.said = self.said and self.said.of_rows(index) if rules.penalties else None
        self._mask = self._mask[index] if self._mask is not None else None
        self.guide = self.guide and self.guide.of_rows(rows)
        self.confidences = [self.confidences[row] for row in rows]
        self.rows, self.rules = slice(0, len(rows)), rules

    def _sample(self, hidden: mx.array, positions: mx.array, said: Said | None) -> mx.array:
        """The target's own tokens at these positions, [B, T], from the hidden states that predict them."""
        logits = self.target.logits(hidden)
        tokens = sample(logits, self.rules, positions, self.target.config.softcap, said=said, mask=self._mask)
        self._note(logits, tokens)
        return tokens

    def _accept(self, verify: _Verify, said: Said | None) -> tuple[mx.array, mx.array, mx.array]:
        """Tokens [B, K + 1], of which n + 1 count, n [B], the drafts kept, and the token after them [B]. said: the
        tokens before each position.
        """
        drafts, positions = verify.drafts, verify.positions + 1
        if drafts.q is None or self.rules.all_greedy:
            targets = self._sample(verify.hidden, positions, said)
            return targets, *accept(drafts.tokens, targets)
        logits = self.target.logits(verify.hidden)
        p = Distribution.of(logits, self.rules, self.target.config.softcap, said=said, mask=self._mask)
        tokens, n, following = rejection.accept(drafts.tokens, drafts.q, p, self.rules, positions)
        self._note(logits, tokens)
        return tokens, n, following

    def _note(self, logits: mx.array, tokens: mx.array) -> None:
        """What is to be reported of these tokens, where the rules ask for it."""
        cap, top = self.target.config.softcap, self.rules.logprobs
        self._report = () if top is None else logprobs(logits, tokens, cap, top)

    def _draft(self, count: int) -> None:
        if self.drafter is None or count < 1:
            self._drafts = Drafts.none(self.rows.stop)
            return
        rules = self.rules.drafting(self.draft_temperature)
        if self.rejection:
            rules = replace(rules, keys=keys_of_round(rules.keys, self.cache.lengths[self.rows]))
        self._drafts = draft(
            self.drafter,
            self.target.embed,
            self.cache,
            self.rows,
            self._next,
            self.hidden,
            rules,
            count,
            self.draft_position,
            self.said,
            self.confident,
            self.rejection,
        )

    def _forget(self) -> None:
        """Drops a verify that was built and not dispatched."""
        if self._verify is not None:
            self.cache.buffers = self._verify.before
            self._verify = None

    def _build(self) -> _Verify:
        tokens = mx.concatenate([self._next[:, None], self._drafts.tokens], axis=1)
        span = self.cache.span(self.rows, tokens.shape[1])
        before = self.cache.buffers
        return _Verify(self._drafts, self.target(tokens, span), span.positions, before)

    def _read(self, tokens: mx.array, n: mx.array | None, drafted: int | None) -> Round:
        """Queues everything, builds the next verify meanwhile, and reads back once."""
        waiting = (self._drafts.tokens, self._drafts.sure)
        mx.async_eval(tokens, self.cache.lengths, self.hidden, self._next, *waiting, *self._report)
        if self.guide is None:
            self._verify = self._build()
        rows, kept, drafts, report = self._readback(tokens, n)
        self.cache.tighten(self.rows, [(drafted or 0) - count for count in kept])
        emitted = [row[: k + 1] for row, k in zip(rows, kept, strict=True)]
        if self.guide is not None:
            self.guide.advance(emitted)
            width, self._mask = self.guide.look(drafts, cut=self._drafts.q is None)
            self._drafts = self._drafts if self._drafts.q else self._drafts.first(width)
            self._verify = self._build()
        return Round(emitted, drafted, _named(emitted, *report) if report else None)

    def _readback(self, tokens: mx.array, n: mx.array | None) -> tuple[list[list[int]], list[int], list, list]:
        """The round's one host synchronisation: targets, drafts kept, the next drafts (where a guide needs them), and
        the report.
        """
        self.host_syncs += 1
        waiting = self._drafts
        mx.eval(tokens, waiting.tokens, waiting.sure, self.hidden, *self._report)
        self.confidences = waiting.sure.tolist()
        kept = [0] * tokens.shape[0] if n is None else n.tolist()
        drafts = [] if self.guide is None else waiting.tokens.tolist()
        return tokens.tolist(), kept, drafts, [part.tolist() for part in self._report]


def _named(emitted: list[list[int]], own: list, best: list, values: list) -> list[list[TokenLogprob]]:
    """The report of the tokens that were emitted; those of refused drafts are dropped."""
    return [
        [
            TokenLogprob(token, own[row][i], list(zip(best[row][i], values[row][i], strict=True)))
            for i, token in enumerate(tokens)
        ]
        for row, tokens in enumerate(emitted)
    ]
