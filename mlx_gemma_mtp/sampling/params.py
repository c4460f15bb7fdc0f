"""What one request asks for, checked when it is made."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from ..errors import UserError, shown
from ..models.config import LARGEST_TOP_K, LEAST_TEMPERATURE, LEAST_TOP_P, MOST, GenerationDefaults

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
FROM_THE_FOLDER = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what None leaves to its defaults
OFF = -1  # of top_k
LARGEST_ID = 2**31 - 1  # of a token: what an int32 can say
LEAST_REPETITION = 4  # tokens: a block of two, twice
LARGEST_COUNT = 2**31 - 1  # of rows, tokens or drafts: more than fits any memory
# Settings of the engine, here because the command line needs them before MLX is imported.
COUPLED, REJECTION = ACCEPT = ("coupled", "rejection")  # how drafts are accepted
MTP = "mtp"  # the name of Google's drafters among the sources of drafts, and who drafts where nobody says it
MAX_ROWS = 8  # requests that are decoded at once, unless `load` is told otherwise; the others wait


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request.

    None for temperature, top_p, top_k, min_p or repetition_penalty is what the model folder's generation_config.json
    says.

    temperature: 0 is greedy, and so is anything below 1e-6. top_k: keeps this many of the likeliest tokens; -1 is off.
    top_p: then keeps the likeliest that make up this probability; 1 is off. min_p: then keeps those with at least this
    share of the likeliest's probability; 0 is off. The order is transformers'. repetition_penalty: divides positive and
    multiplies negative logits of tokens in the prompt and the text; 1 is off. presence_penalty: is subtracted from the
    logits of tokens in the text, once; 0 is off. frequency_penalty: is subtracted as often as the token occurs; 0 is
    off. logit_bias: token id -> a number added to its logit; -inf forbids the token. logprobs: reports this many of the
    likeliest tokens at each place with the model's own log-probabilities, before any of these settings; None reports
    nothing. seed: equal seeds give equal texts; None draws a fresh one. max_tokens: the most tokens to generate. stop:
    strings that end the text and are left out of it. ignore_eos: generates max_tokens whatever comes. stop_repetition:
    ends a reply once its last so many tokens, thoughts and calls included, are one block that repeats (of at most half
    as many tokens, the last time cut off anywhere); None is off.

    json_schema (JSON text, or its object, which is kept as text), regex, grammar (Lark): the reply follows it, behind
    its thoughts; at most one of them. thinking: the chat template's switch. thinking_budget: the most tokens of all
    thoughts of the reply together; once they are spent, an open thought is closed and no other is opened; None is no
    limit.

    Numbers may be numpy's; they are kept as Python's. Raises UserError for whatever is out of range or of another type.
    """

    max_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_repetition: int | None = None
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
            object.__setattr__(self, name, _source(name, source))
        given = list(self.grammars)
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given, expected one of them")
        if given and self.ignore_eos:
            raise UserError(f"ignore_eos is set with {given[0]}, expected one of the two: such text has an end")
        if self.thinking_budget is not None and not self.thinking:
            raise UserError(
                f"thinking_budget is {shown(self.thinking_budget)} without thinking, expected thinking=True "
                "(--thinking)"
            )

    def _numbers(self) -> dict[str, int | float]:
        """Returns every number that is given, checked, as Python's, and within the limits of float32 and int32."""
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
            "stop_repetition": (whole, lambda n: n >= LEAST_REPETITION, f"{LEAST_REPETITION} or more tokens, or None"),
            "thinking_budget": (whole, lambda n: n >= 0, "0 or more, a whole number"),
        }
        may_be_none = {*FROM_THE_FOLDER, "logprobs", "seed", "stop_repetition", "thinking_budget"}
        given = {k: v for k, v in vars(self).items() if k in checks and (v is not None or k not in may_be_none)}
        numbers = {name: check(name, given[name], *rest) for name, (check, *rest) in checks.items() if name in given}
        if numbers.get("temperature", 1) < LEAST_TEMPERATURE:
            numbers["temperature"] = 0.0
        if "top_p" in numbers:
            numbers["top_p"] = max(numbers["top_p"], LEAST_TOP_P)
        counts = ("max_tokens", "stop_repetition", "thinking_budget")
        most = {"top_k": LARGEST_TOP_K} | dict.fromkeys(counts, LARGEST_COUNT)
        return numbers | {name: min(numbers[name], limit) for name, limit in most.items() if name in numbers}

    @property
    def penalised(self) -> bool:
        """Whether a penalty makes the logits depend on the tokens before."""
        return (self.repetition_penalty or 1.0, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def grammars(self) -> dict[str, str]:
        """The constraint of the reply as {setting's name: source}, with one entry at most."""
        settings = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return {name: source for name, source in settings.items() if source is not None}

    def samples(self, n: int) -> list[SamplingParams]:
        """Returns the settings of n samples: with the seeds from this one on, beyond the largest from 0 on; without a
        seed they are these settings, n times.
        """
        if self.seed is None:
            return [self] * n
        return [replace(self, seed=(self.seed + i) % (MAX_SEED + 1)) for i in range(n)]

    def resolved(self, defaults: GenerationDefaults) -> SamplingParams:
        """Returns the settings with the folder's values where they are None, and with a seed."""
        return replace(
            self,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=(defaults.top_k or OFF) if self.top_k is None else self.top_k,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            repetition_penalty=(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


def whole(name: str, value: Any, good: Callable[[int], bool], expected: str) -> int:
    """Returns the value as Python's int. Raises UserError for other types, bool included, and for values that are not
    `good`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not good(int(value)):
        raise UserError(f"{name} is {shown(value)}, expected {expected}")
    return int(value)


def number(name: str, value: Any, good: Callable[[float], bool], expected: str) -> float:
    """Returns the value as Python's float. Raises UserError for other types, bool included, and for values that are not
    finite or not `good`.
    """
    try:
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not good(float(value)):
            raise UserError(f"{name} is {shown(value)}, expected {expected}")
    except OverflowError:
        raise UserError(f"{name} is beyond all floating-point numbers, expected {expected}") from None
    return float(value)


def count(name: str, value: Any, most: int = LARGEST_COUNT) -> int:
    """Returns the value as Python's int, if it is from 1 to `most`. Raises UserError."""
    return whole(name, value, lambda n: 1 <= n <= most, f"a whole number from 1 to {most}")


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """Returns the values as a list. Raises UserError for text, mappings, and what cannot be iterated, such as a 0-d
    array.
    """
    try:
        if not isinstance(values, (str, bytes, Mapping)):
            return list(values)
    except TypeError:
        pass
    raise UserError(f"{name} is {shown(values)}, expected {expected}")


def flag(name: str, value: Any) -> bool:
    """Returns the value, if it is True or False. Raises UserError."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}, expected True or False")
    return value


def check_unicode(what: str, text: str) -> str:
    """Returns the text. Raises UserError for lone surrogates, as which argument bytes that are not UTF-8 arrive."""
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
        expected = f"a token id, 0 to {LARGEST_ID}"
        key = whole("a key of logit_bias", token, lambda t: 0 <= t <= LARGEST_ID, expected)
        if isinstance(bias, Real) and not isinstance(bias, bool) and bias == -math.inf:
            checked[key] = -math.inf
        else:
            expected = f"a number from {-MOST:g} to {MOST:g}, or -inf, which forbids the token"
            checked[key] = number(f"logit_bias of token {key}", bias, lambda b: -MOST <= b <= MOST, expected)
    return checked


def _stops(stops: Any) -> tuple[str, ...]:
    checked = [] if stops is None else listed("stop", stops, "a list of non-empty strings")
    for each in checked:
        if not isinstance(each, str) or not each:
            raise UserError(f"stop has {shown(each)}, expected non-empty strings")
    return tuple(map(str, checked))


def _source(name: str, source: Any) -> str:
    """The text of a grammar. A JSON schema is checked and written out as text, which nobody can change afterwards."""
    if name == "json_schema" and isinstance(source, (str, Mapping)):
        return _schema(source)
    if not isinstance(source, str):
        expected = "JSON text or an object" if name == "json_schema" else "text"
        raise UserError(f"{name} is {shown(source)}, expected {expected}")
    return check_unicode(f"the {name}", source)


def _schema(source: str | Mapping[str, Any]) -> str:
    """A JSON schema as JSON text in ASCII. Raises UserError for what is no JSON object, NaN and lone surrogates
    included.
    """
    try:
        text = source if isinstance(source, str) else json.dumps(dict(source), allow_nan=False)
        schema = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        text = json.dumps(schema, allow_nan=False)
        json.dumps(schema, ensure_ascii=False).encode()  # text of the schema's strings
    except RecursionError:
        raise UserError(f"json_schema is {shown(source)}, expected JSON that is nested less deeply") from None
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"json_schema is {shown(source)}, expected JSON text or its object ({reason})") from None
    if not isinstance(schema, dict):
        raise UserError(f'json_schema is {shown(source)}, expected an object such as {{"type": "object"}}')
    return text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is beyond all floating-point numbers")
    return value
