"""What one request asks for, checked when it is made."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from .config import GenerationDefaults
from .errors import UserError

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
OFF = -1  # of top_k
# Settings of the engine, here because the command line needs them before MLX is imported.
COUPLED, REJECTION = ACCEPT = ("coupled", "rejection")  # how drafts are accepted
MAX_ROWS = 8  # prompts in one batch, unless `load` is told otherwise; the others wait for the next


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request. None means: as the model folder's generation_config.json says.

    temperature: 0 is greedy. top_k: keep so many of the likeliest tokens, -1 switches it off; top_p: then those that
    make up this probability, 1 is off; min_p: then those with at least this share of the likeliest's probability, 0 is
    off (the order of transformers). repetition_penalty: divides positive and multiplies negative logits of tokens of
    the prompt and the text (transformers), 1 is off; presence_penalty, frequency_penalty: are taken from the logits of
    the text's tokens, once, or as often as they occur (OpenAI), 0 is off; logit_bias: token id -> what is added to its
    logit, -inf forbids it. logprobs: report so many of the likeliest tokens at each place, with the model's own
    log-probabilities (before any of these settings); None reports nothing. seed: one seed, one text; None draws a fresh
    one. stop: strings that end the text, left out of it. ignore_eos: generate max_tokens whatever comes.

    json_schema (JSON text or its object), regex, grammar (Lark): at most one; the reply follows it. thinking: the chat
    template's switch; thinking_budget: tokens after which a thought is closed, None is no limit.

    Raises UserError for whatever is out of range.
    """

    max_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    thinking: bool = False
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, lambda n: n >= 1, "at least 1")
        if self.temperature is not None:
            _number("temperature", self.temperature, lambda t: t >= 0, "0 (greedy) or more")
        if self.top_p is not None:
            _number("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0, at most 1 (off)")
        if self.top_k is not None:
            _whole("top_k", self.top_k, lambda k: k == OFF or k >= 1, f"1 or more, or {OFF} (off)")
        _number("min_p", self.min_p, lambda p: 0 <= p <= 1, "0 (off) to 1")
        _number("repetition_penalty", self.repetition_penalty, lambda r: r > 0, "above 0; 1 is off")
        _number("presence_penalty", self.presence_penalty, lambda _: True, "a finite number; 0 is off")
        _number("frequency_penalty", self.frequency_penalty, lambda _: True, "a finite number; 0 is off")
        for token, bias in self.logit_bias.items():
            _whole("logit_bias", token, lambda t: t >= 0, "token ids as keys")
            if math.isnan(bias) or bias == math.inf:
                raise UserError(f"logit_bias of token {token} is {bias}, expected a number or -inf")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, lambda n: 0 <= n <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        if self.seed is not None:
            _whole("seed", self.seed, lambda n: 0 <= n <= MAX_SEED, f"0 to {MAX_SEED}")
        if isinstance(self.stop, str) or any(not s for s in self.stop):
            raise UserError(f"stop is {self.stop!r}, expected a list of non-empty strings")
        given = list(self.grammars)
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given, expected one of them")
        if given and self.ignore_eos:
            raise UserError(f"ignore_eos is set with {given[0]}, expected one of the two: such text has an end")
        if self.thinking_budget is not None:
            _whole(
                "thinking_budget", self.thinking_budget, lambda n: n >= 0 and self.thinking, "0 or more, and thinking"
            )

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def grammars(self) -> dict[str, str | Mapping[str, Any]]:
        """What the reply must follow, by the setting's name: one entry at most."""
        settings = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return {name: source for name, source in settings.items() if source is not None}

    def resolved(self, defaults: GenerationDefaults) -> SamplingParams:
        """Every None replaced, but that of logprobs."""
        return replace(
            self,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=(defaults.top_k or OFF) if self.top_k is None else self.top_k,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


def _whole(name: str, value: Any, good: Callable[[int], bool], expected: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not good(value):
        raise UserError(f"{name} is {value!r}, expected {expected}")


def _number(name: str, value: Any, good: Callable[[float], bool], expected: str) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not good(value):
        raise UserError(f"{name} is {value!r}, expected {expected}")
