"""What the router chose during a run: every verify pass of it, logged from beside the model.

The loop and the model do not know that they are watched: `watched` puts a wrapper in each router's place and takes it
out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..engine.engine import Engine
from ..errors import UserError
from ..models.gemma4 import Gemma4
from ..models.moe import Router
from ..sampling.distribution import Rules
from ..sampling.params import SamplingParams
from ..speculative.loop import Round, Speculation, compact
from ..speculative.prefill import batch


class Watched(nn.Module):
    """A router whose choices also go to a list. They are not evaluated there, but with the pass that they belong to."""

    def __init__(self, router: Router, log: list[mx.array]):
        super().__init__()
        self.router, self._append = router, log.append  # a list would become a parameter

    def __call__(self, normed: mx.array) -> tuple[mx.array, mx.array]:
        experts, weights = self.router(normed)
        self._append(experts)
        return experts, weights


@contextmanager
def watched(model: Gemma4) -> Iterator[list[mx.array]]:
    """Yields a list to which each pass of `model` appends what every layer chose: [N, k] a layer, in order."""
    log: list[mx.array] = []
    before = [(layer.router, layer._post_attention) for layer in model.layers]
    try:
        for layer, (router, _) in zip(model.layers, before, strict=True):
            layer.router = Watched(router, log)
            layer._post_attention = layer.post_attention  # the compiled half does not look at the router again
        yield log
    finally:
        for layer, (router, leave) in zip(model.layers, before, strict=True):
            layer.router, layer._post_attention = router, leave


@dataclass(frozen=True)
class Verify:
    """One verify pass over the newest token of each row and its drafts.

    rows: [B], the number of each row's prompt; experts: [layers, B, T, k]; kept: [B] how many of the T tokens are the
    row's text: the newest one, and the drafts that were accepted, up to the end of the text.
    """

    rows: tuple[int, ...]
    experts: np.ndarray
    kept: tuple[int, ...]


@dataclass
class Text:
    """The tokens of one row's text. limit: how many it may have. The token that ends it is not kept."""

    limit: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, emitted: Sequence[int], end_tokens: frozenset[int]) -> int:
        """Adds a round's tokens up to the text's end, and returns how many these are, an end token included."""
        for used, token in enumerate(emitted, 1):
            if token in end_tokens:
                self.ended = True
            else:
                self.tokens.append(token)
                self.ended = len(self.tokens) == self.limit
            if self.ended:
                return used
        return len(emitted)


def trace(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, num_draft: int
) -> tuple[list[list[int]], list[Verify]]:
    """Generates the texts of a batch of encoded prompts; returns (their tokens, every verify pass).

    The prefill is not logged. Other requests of the engine wait meanwhile: their passes are not logged, either.

    Raises UserError for a prompt that fills the context, and for a text that cannot go on.
    """
    return engine.call(partial(_traced, engine, prompts, params, num_draft), lambda: None)


def _traced(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_draft: int,
    pause: Callable[[], None],
) -> tuple[list[list[int]], list[Verify]]:
    """Does what `trace` describes, in the engine's own thread. pause: ends it where nobody waits any more."""
    context, longest = engine.target.config.context, max(map(len, prompts))
    if longest >= context:
        raise UserError(f"a prompt has {longest} tokens, expected fewer than the context of {context}; shorten it")
    params = params.resolved(engine.defaults)
    texts = [Text(min(params.max_tokens, context - len(prompt))) for prompt in prompts]
    live, verifies = list(range(len(prompts))), []

    def take(done: Round) -> tuple[int, ...]:
        for reason in filter(None, done.errors):
            raise UserError(f"a text cannot be traced: {reason}")
        return tuple(texts[row].take(tokens, engine.end_tokens) for row, tokens in zip(live, done.tokens, strict=True))

    loop = _begin(engine, prompts, params, num_draft)
    with watched(engine.target) as log:
        take(loop.step([num_draft] * len(live)))
        while stay := compact([not texts[row].ended for row in live]):
            pause()
            if len(stay) < len(live):
                live = [live[place] for place in stay]
                log.clear()  # of the pass that was built for all of them: `arrange` drops it
                loop.arrange(stay, _rules(engine, params, len(live)))
            loop.launch()
            launched, log[:] = log[:], []  # `step` builds the next pass
            done = loop.step([num_draft] * len(live))
            verifies.append(Verify(tuple(live), _gathered(launched, len(live)), take(done)))
    return [text.tokens for text in texts], verifies


def _begin(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, num_draft: int) -> Speculation:
    """Prefills the prompts together; with no drafts the drafter stays out."""
    chunk = min(engine.prefill_chunk, max(map(len, prompts)))
    cache, hidden = batch(engine.target, prompts, chunk, num_draft + 1, engine.drafting.lookback)
    loop = Speculation(engine.target, engine.drafter if num_draft else None, cache, engine.drafting.alone)
    loop.begin(hidden, _rules(engine, params, len(prompts)))
    return loop


def _rules(engine: Engine, params: SamplingParams, rows: int) -> Rules:
    return Rules.of([params] * rows, engine.target.config.vocab_size, engine.defaults.suppress_token_ids)


def _gathered(layers: Sequence[mx.array], rows: int) -> np.ndarray:
    """[B * T, k] a layer -> [layers, B, T, k]."""
    experts = np.stack([np.array(layer) for layer in layers])
    return experts.reshape(len(layers), rows, -1, experts.shape[-1])
