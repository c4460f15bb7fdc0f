"""What one request asks for, checked when it is made."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from ..errors import UserError, shown
from ..models.config import LEAST_TEMPERATURE, LEAST_TOP_P, MOST, GenerationDefaults

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
OFF = -1  # of top_k
LARGEST_TOP_K = 2**31 - 1
# Settings of the engine, here because the command line needs them before MLX is imported.
COUPLED, REJECTION = ACCEPT = ("coupled", "rejection")  # how drafts are accepted
MAX_ROWS = 8  # prompts in one batch, unless `load` is told otherwise; the others wait for the next


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request. None means: as the model folder's generation_config.json says.

    temperature: 0 is greedy, and so is anything below 1e-6. top_k: keep so many of the likeliest tokens, -1 switches
    it off; top_p: then those that make up this probability, 1 is off; min_p: then those with at least this share of the
    likeliest's probability, 0 is off (the order of transformers). repetition_penalty: divides positive and multiplies
    negative logits of tokens of the prompt and the text (transformers), 1 is off; presence_penalty, frequency_penalty:
    are taken from the logits of the text's tokens, once, or as often as they occur (OpenAI), 0 is off; logit_bias:
    token id -> what is added to its logit, -inf forbids it. logprobs: report so many of the likeliest tokens at each
    place, with the model's own log-probabilities (before any of these settings); None reports nothing. seed: one seed,
    one text; None draws a fresh one. stop: strings that end the text, left out of it. ignore_eos: generate max_tokens
    whatever comes.

    json_schema (JSON text or its object), regex, grammar (Lark): at most one; the reply follows it. thinking: the chat
    template's switch; thinking_budget: tokens after which a thought is closed, None is no limit.

    Numbers may be numpy's; they are kept as Python's. Raises UserError for whatever is out of range or of another type.
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
        checked = self._numbers() | {"logit_bias": _biases(self.logit_bias), "stop": _stops(self.stop)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen from here on
        flag("ignore_eos", self.ignore_eos)
        flag("thinking", self.thinking)
        for name, source in self.grammars.items():
            _check_source(name, source)
        given = list(self.grammars)
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given, expected one of them")
        if given and self.ignore_eos:
            raise UserError(f"ignore_eos is set with {given[0]}, expected one of the two: such text has an end")
        if self.thinking_budget is not None and not self.thinking:
            raise UserError(f"thinking_budget is {self.thinking_budget} without thinking, expected thinking=True")

    def _numbers(self) -> dict[str, int | float]:
        """Every number that is given, checked, as Python's, and within what float32 and int32 can tell."""
        share = (number, lambda r: 1 / MOST <= r <= MOST, f"{1 / MOST:g} to {MOST:g}; 1 is off")
        signed = (number, lambda x: -MOST <= x <= MOST, f"a number from {-MOST:g} to {MOST:g}; 0 is off")
        checks = {
            "max_tokens": (whole, lambda n: n >= 1, "at least 1, a whole number"),
            "temperature": (number, lambda t: 0 <= t <= MOST, f"0 (greedy) to {MOST:g}"),
            "top_p": (number, lambda p: 0 < p <= 1, "above 0, at most 1 (off)"),
            "top_k": (whole, lambda k: k == OFF or k >= 1, f"1 or more, or {OFF} (off), a whole number"),
            "min_p": (number, lambda p: 0 <= p <= 1, "0 (off) to 1"),
            "repetition_penalty": share,
            "presence_penalty": signed,
            "frequency_penalty": signed,
            "logprobs": (whole, lambda n: 0 <= n <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, a whole number"),
            "seed": (whole, lambda n: 0 <= n <= MAX_SEED, f"0 to {MAX_SEED}, a whole number"),
            "thinking_budget": (whole, lambda n: n >= 0, "0 or more, a whole number"),
        }
        may_be_none = {"temperature", "top_p", "top_k", "logprobs", "seed", "thinking_budget"}
        given = {k: v for k, v in vars(self).items() if k in checks and (v is not None or k not in may_be_none)}
        numbers = {name: check(name, given[name], *rest) for name, (check, *rest) in checks.items() if name in given}
        if numbers.get("temperature", 1) < LEAST_TEMPERATURE:
            numbers["temperature"] = 0.0
        for name, limit in (("top_p", lambda p: max(p, LEAST_TOP_P)), ("top_k", lambda k: min(k, LARGEST_TOP_K))):
            numbers |= {name: limit(numbers[name])} if name in numbers else {}
        return numbers

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


def whole(name: str, value: Any, good: Callable[[int], bool], expected: str) -> int:
    """The value as Python's int. Raises UserError for other types (bool is no number) and where it is not good."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not good(int(value)):
        raise UserError(f"{name} is {shown(value)}, expected {expected}")
    return int(value)


def number(name: str, value: Any, good: Callable[[float], bool], expected: str) -> float:
    """The value as Python's float, finite. Raises UserError as `whole`."""
    try:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not good(float(value)):
            raise UserError(f"{name} is {shown(value)}, expected {expected}")
    except OverflowError:
        raise UserError(f"{name} is beyond all floating-point numbers, expected {expected}") from None
    return float(value)


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least so much."""
    return whole(name, value, lambda n: n >= least, f"at least {least}, a whole number")


def flag(name: str, value: Any) -> bool:
    """The value, if it is True or False; raises UserError."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}, expected True or False")
    return value


def check_unicode(what: str, text: str) -> str:
    """The text, if it is valid Unicode (bytes of an argument that are not UTF-8 arrive as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} has {text[error.start]!r} at {error.start}, which is no character; expected UTF-8"
        ) from None
    return text


def _biases(biases: Any) -> dict[int, float]:
    if biases is None:
        return {}
    if not isinstance(biases, Mapping):
        raise UserError(f"logit_bias is {shown(biases)}, expected a mapping of token ids to numbers")
    checked = {}
    for token, bias in biases.items():
        key = whole("a key of logit_bias", token, lambda t: t >= 0, "a token id, 0 or more")
        if isinstance(bias, Real) and not isinstance(bias, bool) and bias == -math.inf:
            checked[key] = -math.inf
        else:
            expected = f"a number from {-MOST:g} to {MOST:g}, or -inf, which forbids the token"
            checked[key] = number(f"logit_bias of token {key}", bias, lambda b: -MOST <= b <= MOST, expected)
    return checked


def _stops(stops: Any) -> tuple[str, ...]:
    if stops is None:
        return ()
    if isinstance(stops, (str, bytes, Mapping)) or not isinstance(stops, Iterable):
        raise UserError(f"stop is {shown(stops)}, expected a list of non-empty strings")
    checked = tuple(stops)
    for each in checked:
        if not isinstance(each, str) or not each:
            raise UserError(f"stop has {shown(each)}, expected non-empty strings")
    return tuple(map(str, checked))


def _check_source(name: str, source: Any) -> None:
    """Of a grammar: text, or for a JSON schema an object that can be written as JSON."""
    if isinstance(source, str):
        check_unicode(f"the {name}", source)
    elif name != "json_schema" or not isinstance(source, Mapping):
        expected = "JSON text or an object" if name == "json_schema" else "text"
        raise UserError(f"{name} is {shown(source)}, expected {expected}")
    else:
        try:
            json.dumps(dict(source), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"json_schema is {shown(source)}, expected what JSON can say: {reason}") from None
