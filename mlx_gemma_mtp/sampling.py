"""From logits to tokens: pure functions of arrays, all rows at once.

Sampling is Gumbel-coupled (Daliri, Musco, Suresh, arXiv 2408.07978): token = argmax(log p + g), where the noise g
depends on (seed, absolute position, token id) and on nothing else. Target and drafter use the same noise, so that they
agree often; the emitted token never depends on a draft, so that one seed gives one text for every draft length.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .config import GenerationDefaults
from .errors import UserError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. None means: as the model folder's generation_config.json says.

    temperature 0 is greedy; top_k 0 and top_p 1 switch the filter off; a seed of None draws a fresh one.
    stop: strings that end the text, left out of it. ignore_eos: generate max_tokens whatever comes.
    """

    max_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        if self.temperature is not None:
            _check("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more")
        if self.top_p is not None:
            _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)")
        if self.top_k is not None:
            _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        if self.seed is not None:
            _check("seed", self.seed, 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}")
        if isinstance(self.stop, str) or any(not s for s in self.stop):
            raise UserError(f"stop is {self.stop!r}, expected a list of non-empty strings")

    def resolved(self, defaults: GenerationDefaults) -> SamplingParams:
        """Every None replaced."""
        return replace(
            self,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}, expected {expected}")


@dataclass(frozen=True)
class Rules:
    """The resolved settings of all rows of a batch, as arrays.

    temperature, top_k, top_p: [B, 1, 1]; keys: uint32 [B, 2]; greedy: bool [B, 1]; bias: [V] with -inf at suppressed
    tokens, or None. candidates: how many of the best tokens any row may need (0: none is filtered, -1: all, sorted).
    """

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    keys: mx.array
    greedy: mx.array
    bias: mx.array | None
    all_greedy: bool
    candidates: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab: int, suppress: Sequence[int] = ()) -> Rules:
        """params: resolved, one a row."""
        sampled = [p for p in params if p.temperature]
        filtered = [p for p in sampled if p.top_k or p.top_p < 1]
        unbounded = any(not p.top_k or p.top_k >= vocab for p in sampled)
        widest = max((p.top_k for p in sampled), default=0)
        bias = None
        if suppress:
            bias = mx.zeros((vocab,))
            bias[mx.array(list(suppress))] = -mx.inf
        column = lambda values, dtype: mx.array(values, dtype)[:, None, None]  # noqa: E731
        return cls(
            temperature=column([p.temperature or 1.0 for p in params], mx.float32),
            top_k=column([p.top_k or vocab for p in params], mx.int32),
            top_p=column([p.top_p for p in params], mx.float32),
            keys=mx.array([_key(p.seed) for p in params], mx.uint32),
            greedy=mx.array([not p.temperature for p in params])[:, None],
            bias=bias,
            all_greedy=not sampled,
            candidates=0 if not filtered else -1 if unbounded else widest,
        )


def soft_cap(logits: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(logits / cap), or the logits as they are."""
    return logits if cap is None else mx.tanh(logits / cap) * cap


def sample(
    logits: mx.array, rules: Rules, positions: mx.array, cap: float | None = None, ids: mx.array | None = None
) -> mx.array:
    """Greedy or coupled sampling after soft-cap, temperature, top-k and top-p (in transformers' order).

    logits: float32 [B, T, C], not capped (greedy needs no cap: it keeps the order); positions: [B, T], absolute, of the
    tokens to be drawn; ids: [B, T, C] token ids of the columns, None where column i is token i. Returns int32 [B, T].
    """
    bias = 0.0 if rules.bias is None else rules.bias if ids is None else rules.bias[ids]
    best = mx.argmax(logits if rules.bias is None else logits + bias, axis=-1)
    if rules.all_greedy:
        return _named(best, ids)
    scaled, tokens = (soft_cap(logits, cap) + bias) / rules.temperature, ids
    if rules.candidates:
        scaled, columns = _filtered(scaled, rules)
        tokens = columns if ids is None else mx.take_along_axis(ids, columns, axis=-1)
    if tokens is None:
        tokens = mx.arange(logits.shape[-1])[None, None]
    drawn = mx.argmax(scaled + gumbel(rules.keys, positions, tokens), axis=-1, keepdims=True)
    drawn = mx.take_along_axis(mx.broadcast_to(tokens, scaled.shape), drawn, axis=-1)[..., 0]
    return mx.where(rules.greedy, _named(best, ids), drawn.astype(mx.int32))


def _named(columns: mx.array, ids: mx.array | None) -> mx.array:
    if ids is not None:
        columns = mx.take_along_axis(ids, columns[..., None], axis=-1)[..., 0]
    return columns.astype(mx.int32)


def _filtered(scaled: mx.array, rules: Rules) -> tuple[mx.array, mx.array]:
    """The best candidates, best first, -inf where top-k or top-p leaves them out, and their columns: [B, T, k] each."""
    count = scaled.shape[-1]
    if 0 < rules.candidates < count:
        columns = mx.argpartition(scaled, kth=-rules.candidates, axis=-1)[..., -rules.candidates :]
        columns = mx.sort(columns, axis=-1)  # ties go to the lower id
        scaled = mx.take_along_axis(scaled, columns, axis=-1)
        order = mx.argsort(-scaled, axis=-1)
        columns = mx.take_along_axis(columns, order, axis=-1)
    else:
        columns = order = mx.argsort(-scaled, axis=-1)
    scaled = mx.take_along_axis(scaled, order, axis=-1)
    scaled = mx.where(mx.arange(scaled.shape[-1]) < rules.top_k, scaled, -mx.inf)
    p = mx.softmax(scaled, axis=-1, precise=True)
    before = mx.cumsum(p, axis=-1, inclusive=False)
    return mx.where(before < rules.top_p, scaled, -mx.inf), columns


def gumbel(keys: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    """Standard Gumbel noise, a pure function of (key, position, token). keys: uint32 [B, 2]; positions: [B, T];
    tokens: [B, T, C] (or broadcastable). Returns float32 [B, T, C].

    A counter-based hash, so that it is computed only where it is needed. -log(E) with E = -log1p(-u): the many small u
    keep their precision, which the large values of the noise need.
    """
    position = positions.astype(mx.uint32)
    first = _mix(_mix(position * 0x9E3779B9 + keys[:, :1]) ^ keys[:, 1:])[..., None]
    second = _mix(first + 0x85EBCA6B)
    bits = _mix(_mix(tokens.astype(mx.uint32) * 0xC2B2AE35 ^ first) + second)
    u = (bits.astype(mx.float32) + 0.5) * 2.0**-32
    return -mx.log(-mx.log1p(-u))


def _mix(x: mx.array) -> mx.array:
    """A bijection of 32-bit integers whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def _key(seed: int) -> tuple[int, int]:
    return seed & 0xFFFFFFFF, seed >> 32


def accept(drafts: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """How far the drafts agree: a draft is kept while it and all before it equal the target's token.

    drafts: [B, K]; targets: [B, K + 1], the target's own tokens, which is why the text never depends on the drafts.
    Returns n [B], the drafts kept, and next [B], the token after them.
    """
    same = (drafts == targets[:, :-1]).astype(mx.int32)
    n = mx.cumprod(same, axis=1).sum(axis=1).astype(mx.int32)
    return n, mx.take_along_axis(targets, n[:, None], axis=1)[:, 0]
