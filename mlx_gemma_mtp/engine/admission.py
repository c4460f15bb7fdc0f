"""Admission by bytes: what requests take, and whether one can ever fit. Numbers of the host alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..cache.spec import KVSpec, row_bytes, saved_bytes, staged_bytes
from ..errors import UserError, size
from ..machine.device import Traits
from ..models.config import TargetConfig
from ..models.transients import Transients

ADVANCE = 256  # tokens of text


@dataclass(frozen=True)
class Memory:
    """Where the bytes of a run go.

    limit: all that the run may hold. weights: what both models hold. row(tokens): of a row of the batch whose K/V have
    room for so many tokens, its slots rounded up as the cache does. staged(tokens): of the cache of a prompt of so many
    tokens while it is prefilled. saved(tokens, slack=0): of the K/V of so many tokens, kept by themselves, with so much
    slack (`Cache.save`). chunk(tokens, context): the most that a forward of so many prompt tokens holds beside these,
    where the longest prompt has `context` tokens. verify(rows, context): the same of a round's verify of so many rows.
    advance: tokens of text that a request is given room for when it is admitted.
    """

    limit: int
    weights: int
    row: Callable[[int], int]
    staged: Callable[[int], int]
    saved: Callable[..., int]
    chunk: Callable[[int, int], int]
    verify: Callable[[int, int], int]
    advance: int = ADVANCE

    def alone(self, prompt: int, limit: int, chunk: int, block: int) -> int:
        """Returns the most bytes that a request takes when nothing else runs, weights included: while its prompt is
        prefilled, while it joins the batch, or when its text has reached its limit.

        prompt, limit: tokens. chunk: prompt tokens a forward. block: tokens of the longest verify.
        """
        longest = prompt + limit
        prefilling = self.staged(prompt) + self.chunk(min(chunk, prompt), prompt)
        joining = self.saved(prompt) + self.row(min(prompt + self.advance, longest) + block) + self.verify(1, prompt)
        decoding = self.row(longest + block) + self.verify(1, longest)
        return self.weights + max(prefilling, joining, decoding)

    def check(self, prompt: int, limit: int, chunk: int, block: int) -> None:
        """Raises UserError for a request that would not fit even alone."""
        needed = self.alone(prompt, limit, chunk, block)
        if needed > self.limit:
            raise UserError(
                f"a prompt of {prompt} tokens with max_tokens={limit} needs {size(needed)} with the model, the "
                f"limit is {size(self.limit)}; lower max_tokens, shorten the prompt, or take a smaller model"
            )


def memory_of(
    config: TargetConfig,
    specs: Sequence[KVSpec],
    limit: int,
    weights: int,
    *,
    chunk: int,
    block: int,
    item_size: int,
    lookback: int = 0,
    traits: Traits,
) -> Memory:
    """Returns where the bytes of a target's run go.

    specs: of its K/V, in their bits. limit: all that it may hold. weights: bytes of both models. chunk: prompt tokens a
    forward. block: tokens of the longest verify. item_size: bytes of a number of the model's type. lookback: the
    cache's. traits: of the device.
    """
    transients = Transients(config, specs, item_size, chunk, traits)
    return Memory(
        limit,
        weights,
        row=lru_cache(4096)(lambda tokens: row_bytes(specs, tokens, block, item_size, lookback)),
        staged=lru_cache(4096)(lambda tokens: staged_bytes(specs, tokens, chunk, item_size, lookback)),
        saved=lru_cache(4096)(lambda tokens, slack=0: saved_bytes(specs, tokens, item_size, lookback + slack)),
        chunk=lru_cache(4096)(transients.chunk),
        verify=lru_cache(4096)(lambda rows, context: transients.verify(rows, block, context)),
    )
