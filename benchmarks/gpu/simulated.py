"""Drafts that are right at a stated rate: what MTP is worth with weights that nobody trained, or at another acceptance.

The drafter's drafts are computed, and then overwritten: by what the text goes on with, or by another token. So a round
costs what it costs, and the text stays that of plain decoding. A hook of the benchmarks, entered into the sources of
drafts by `Script.enter`; whose row is whose is read from the engine's runner.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.speculative.drafting import SOURCES, Drafting, Drafts, DraftState, Embed, Mtp

NAME = "simulated"


@dataclass
class Script:
    """What each prompt's text is, and which of its tokens a draft is right about.

    rate: the share of drafts that are right, each by itself. texts: prompt -> tokens of its plain text. seed: of which
    they are.
    """

    rate: float = 1.0
    texts: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    seed: int = 0
    engine: Any = None
    _rows: tuple[int, ...] = ()
    _held: tuple[mx.array, mx.array, mx.array] | None = None

    def enter(self) -> None:
        """Makes `load(draft_sources=NAME)` take drafts from here. Set `engine` to what was loaded."""
        SOURCES[NAME] = lambda *made: Simulated(self, *made)

    def tell(self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], rate: float) -> None:
        """Says what the next texts are, and how many drafts are right."""
        self.rate, self._rows, self._held = rate, (), None
        self.texts = {tuple(prompt): list(text) for prompt, text in zip(prompts, texts, strict=True)}

    def held(self) -> tuple[mx.array, mx.array, mx.array] | None:
        """Returns of the batch's rows the lengths of their prompts, [B, 1], their texts, [B, L], and which tokens of
        these are drafted right, [B, L]; None where a row is of no text that was told.
        """
        runner = self.engine._worker._runner
        rows = tuple(runner.rows)
        if rows != self._rows:
            prompts = [tuple(runner.held[row].request.prompt) for row in rows]
            known = all(prompt in self.texts for prompt in prompts)
            self._rows, self._held = rows, self._of(prompts) if known else None
        return self._held

    def _of(self, prompts: Sequence[tuple[int, ...]]) -> tuple[mx.array, mx.array, mx.array]:
        longest = max(len(self.texts[prompt]) for prompt in prompts)
        texts, right = (np.zeros((len(prompts), longest), kind) for kind in (np.int32, np.bool_))
        for row, prompt in enumerate(prompts):
            text = self.texts[prompt]
            rng = random.Random(f"{self.seed} {self.rate} {prompt[-8:]} {len(prompt)}")
            texts[row, : len(text)] = text
            right[row, : len(text)] = [rng.random() < self.rate for _ in text]
        lengths = mx.array([[len(prompt)] for prompt in prompts], mx.int32)
        return lengths, mx.array(texts), mx.array(right)


class Simulated:
    """A source of drafts: Google's drafter, overwritten as a script says."""

    def __init__(self, script: Script, drafter: Drafter, embed: Embed, drafting: Drafting):
        self.script, self.mtp = script, Mtp(drafter, embed, drafting)

    def propose(self, state: DraftState, count: int) -> Drafts:
        """Returns `count` drafts for every row, see Proposer. Behind the end of a text they are the drafter's."""
        drafts, held = self.mtp.propose(state, count), self.script.held()
        if held is None:
            return drafts
        prompts, texts, right = held
        place = state.cache.lengths[:, None] - prompts + 1 + mx.arange(count)  # of each draft in its text
        known = place < texts.shape[1]
        place = mx.minimum(place, texts.shape[1] - 1)
        text = mx.take_along_axis(texts, place, axis=1)
        other = mx.where(text > 0, text - 1, text + 1)
        tokens = mx.where(mx.take_along_axis(right, place, axis=1), text, other)
        return drafts._replace(tokens=mx.where(known, tokens, drafts.tokens))


@dataclass
class Kept:
    """Drafts that were looked at, since all before them in their round were kept; and those of them that were kept."""

    looked: int = 0
    kept: int = 0

    def count(self, drafted: int, accepted: int) -> None:
        """Adds a round of a row."""
        self.looked += accepted + (accepted < drafted)
        self.kept += accepted

    @property
    def rate(self) -> float | None:
        return self.kept / self.looked if self.looked else None
