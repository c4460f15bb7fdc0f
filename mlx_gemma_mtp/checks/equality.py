"""Texts with drafts against texts without: token by token, and as distributions.

The reference is plain decoding, one row at a time, with the same weights, dtype and kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..cache.cache import Cache
from ..engine.engine import Engine, Result
from ..sampling.distribution import logprobs, soft_cap
from ..sampling.params import SamplingParams

PARTITIONS = 9999  # of a permutation test: the least p value is 1e-4


@dataclass(frozen=True)
class Divergence:
    """The first token of a text that differs from the reference's.

    position: of the token in the text; plain_logit, mtp_logit: the reference's logits of both tokens at that place.
    """

    prompt: int
    position: int
    plain_token: int
    mtp_token: int
    plain_logit: float
    mtp_logit: float

    @property
    def gap(self) -> float:
        return self.plain_logit - self.mtp_logit

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt + 1}, token {self.position + 1}: plain {self.plain_token} (logit "
            f"{self.plain_logit:.5f}), MTP {self.mtp_token} ({self.mtp_logit:.5f}), gap {self.gap:.2g}"
        )


@dataclass(frozen=True)
class Cell:
    """The texts of one temperature, batch size (rows) and draft length against the reference.

    equal: the number of texts that are equal; divergences: of the others.
    """

    temperature: float
    rows: int
    drafts: int
    equal: int
    divergences: list[Divergence]
    tokens_per_round: float
    errors: list[str]  # of texts that could not go on, with or without drafts

    def __str__(self) -> str:
        what = "greedy" if not self.temperature else f"temperature {self.temperature:g}"
        count = self.equal + len(self.divergences) + len(self.errors)
        lines = [
            f"  {what}, {self.rows} rows, {self.drafts} drafts: {self.equal} of {count} texts equal, "
            f"{self.tokens_per_round:.2f} tokens a round"
        ]
        return "\n".join([*lines, *(f"    {each}" for each in (*self.divergences, *self.errors))])


def compare(
    engine: Engine, prompts: Sequence[str], params: SamplingParams, rows: Sequence[int], drafts: Sequence[int]
) -> Iterator[Cell]:
    """Yields the comparison with plain decoding for every batch size and draft length.

    params: with a seed, so that sampled texts are comparable token by token.
    """
    plain = [engine.generate(prompt, params, num_draft_tokens=0) for prompt in prompts]
    for size in rows:
        for count in drafts:
            results = []
            for start in range(0, len(prompts), size):
                results += engine.generate(list(prompts[start : start + size]), params, num_draft_tokens=count)
            errors = [_failed(i, one, other) for i, (one, other) in enumerate(zip(plain, results, strict=True))]
            found = [
                divergence(engine, i, prompts[i], plain[i].tokens, r.tokens)
                for i, r in enumerate(results)
                if errors[i] is None
            ]
            differing, errors = ([each for each in some if each is not None] for some in (found, errors))
            rounds = sum(r.stats.rounds for r in results)
            emitted = sum(r.stats.accepted + r.stats.rounds for r in results)
            equal = len(prompts) - len(differing) - len(errors)
            yield Cell(params.temperature, size, count, equal, differing, emitted / rounds if rounds else 0.0, errors)


def _failed(index: int, plain: Result, drafted: Result) -> str | None:
    """Which of a prompt's two texts could not go on, and why; None where both could."""
    for name, result in (("plain", plain), ("MTP", drafted)):
        if result.error is not None:
            return f"prompt {index + 1}, {name}, after {len(result.tokens)} tokens: {result.error}"
    return None


def divergence(engine: Engine, index: int, prompt: str, plain: list[int], tokens: list[int]) -> Divergence | None:
    """Returns where `tokens` leave `plain`, the reference's text after `prompt`; None where they do not."""
    if plain == tokens:
        return None
    at = next((i for i, (a, b) in enumerate(zip(plain, tokens, strict=False)) if a != b), min(len(plain), len(tokens)))
    end = min(engine.end_tokens, default=0)  # a text that ended before the other
    first, second = (text[at] if at < len(text) else end for text in (plain, tokens))
    ids = [*engine.text.encode(prompt), *plain[:at]]
    logits = engine.call(lambda: _logits(engine, ids)[0, -1, mx.array([first, second])].tolist())
    return Divergence(index, at, first, second, *logits)


def same_distribution(engine: Engine, prompt: str, params: SamplingParams, drafts: int, samples: int) -> float:
    """Returns the p value of the claim that texts sampled with and without drafts have the same distribution.

    The test compares the log-probabilities that the target gives to whole texts of 12 tokens, with other seeds on
    either side: a wrong rule makes texts that are too likely or too unlikely. samples: texts on each side. The result
    is NaN, which no comparison accepts, where a text could not go on.
    """

    def likelihoods(num_draft: int, first_seed: int) -> list[float]:
        every = [replace(params, max_tokens=12, seed=first_seed + i, ignore_eos=True) for i in range(samples)]
        results = engine.generate([prompt] * samples, every, num_draft_tokens=num_draft)
        if any(result.error is not None for result in results):
            return [math.nan]
        return [_log_probability(engine, tokens, result.tokens) for result in results]

    tokens = engine.text.encode(prompt)
    return permutation_test(likelihoods(0, 0), likelihoods(drafts, samples))


def permutation_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the p value of the claim that two samples have the same distribution; NaN where a value is NaN.

    It is the share of random partitions of all values whose two means differ at least as much as those of the samples,
    the given partition among them (Phipson and Smyth, 2010). This is exact for any number and any distribution of
    values. The partitions are the same at every call.
    """
    values = np.array([*first, *second], dtype=np.float64)
    if np.isnan(values).any():
        return math.nan
    random, least = np.random.default_rng(0), abs(np.mean(first) - np.mean(second))
    least -= 1e-12 * max(1.0, np.abs(values).max())  # an equal difference may round to less
    found = 0
    for _ in range(PARTITIONS):
        random.shuffle(values)
        found += bool(abs(values[: len(first)].mean() - values[len(first) :].mean()) >= least)
    return (1 + found) / (1 + PARTITIONS)


def _log_probability(engine: Engine, prompt: list[int], text: list[int]) -> float:
    """Of the text after the prompt, in one pass of the target."""

    def computed() -> float:
        logits = _logits(engine, [*prompt, *text])[:, len(prompt) - 1 : -1]
        return logprobs(logits, mx.array([text]), None, 0)[0].sum().item()

    return engine.call(computed)


def _logits(engine: Engine, tokens: list[int]) -> mx.array:
    """The target's soft-capped logits after each token, float32 [1, T, V], in one pass with a cache of its own. For the
    engine's own thread."""
    config = engine.target.config
    cache = Cache(engine.specs, len(tokens), engine.target.dtype).open(len(tokens))
    hidden = engine.target(mx.array([tokens]), cache.span(len(tokens)))
    return soft_cap(engine.target.logits(hidden), config.softcap)
