"""What a request wants of the engine: prompts as token ids, settings and options. Made in a thread of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import shown
from ..sampling.params import OFF, SamplingParams
from ..text.tools import Tools
from .channels import Channels
from .errors import Refusal, about
from .schema import Common

if TYPE_CHECKING:
    from ..text.encode import Text
    from .service import Served

# Fields that SamplingParams has under the same name.
SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "regex", "grammar", "ignore_eos", "stop_repetition"),
)
EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None}  # tokens of thoughts


@dataclass(frozen=True)
class Ask:
    """Choices to be made, all in one call of the engine.

    prompts: ids; each gets n choices, which come in a row. options: of Engine.astream. tools: the caller's, if there
    are any.
    """

    prompts: list[list[int]]
    params: SamplingParams
    options: dict[str, Any]
    n: int = 1
    tools: Tools | None = None

    @property
    def choices(self) -> int:
        """How many choices there are."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each of which counts once."""
        return sum(map(len, self.prompts))

    def channels(self, text: Text, choice: int) -> Channels:
        """Returns the channels of a choice's tokens."""
        called = self.tools is not None and self.options.get("tool_choice") != "none"
        return Channels(text.template.control, called, text.opens_thought(self.prompts[choice // self.n]))

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return self.params.logprobs is not None


@dataclass(frozen=True)
class Thoughts:
    """Whether a reply may think, and for how many tokens; a budget of None is no limit."""

    wanted: bool = False
    budget: int | None = None


@dataclass(frozen=True)
class Tooling:
    """Tools as a request gives them, with the fields of Engine.astream that go with them."""

    tools: Tools | None = None
    choice: str | Mapping[str, Any] | None = None
    several: bool = True

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template, None where there are none."""
        return None if self.tools is None else self.tools.schemas

    @property
    def options(self) -> dict[str, Any]:
        """The options of Engine.astream."""
        if self.tools is None and self.choice is None:
            return {}
        return {"tools": self.tools, "tool_choice": self.choice, "parallel_tool_calls": self.several}


@dataclass(frozen=True)
class Settings:
    """Settings of a request, as far as they go to SamplingParams and to Engine.astream."""

    sampling: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    n: int = 1


def common_settings(served: Served, body: Common) -> Settings:
    """Returns the settings that all routes share."""
    sampling = body.model_dump(include=set(SAME) & type(body).model_fields.keys(), exclude_none=True)
    _check_repetition(served, body.stop_repetition)
    if sampling.get("top_k") == 0:
        sampling["top_k"] = OFF
    seconds = served.limits.seconds if body.timeout is None else min(body.timeout, served.limits.seconds)
    options = {"timeout": seconds, "num_draft_tokens": body.num_draft_tokens, "priority": body.priority or 0}
    return Settings(sampling, options | {"cache_salt": body.cache_salt})


def salted(ask: Ask, key: str) -> Ask:
    """Returns the request with a salt of its client's own: what is kept of its prompts is found by no other key.

    key: tells whose the request is, '' without keys.
    """
    salt = ask.options.get("cache_salt")
    whole = hashlib.sha256(f"{key}\n{salt or ''}".encode("utf-8", "surrogatepass")).hexdigest() if key else salt
    return replace(ask, options=ask.options | {"cache_salt": whole})


def _check_repetition(served: Served, length: int | None) -> None:
    """Raises Refusal for a stop_repetition beyond the limit: to look for a long block takes time from every reply."""
    most = served.limits.repetition
    if length is not None and length > most:
        message = f"stop_repetition is {length}, expected at most {most} tokens"
        raise Refusal(400, message, param="stop_repetition")


def check_choices(served: Served, count: int, param: str) -> None:
    """Raises Refusal for a number of choices that is not from 1 to the limit."""
    if not 1 <= count <= served.limits.choices:
        message = f"{param} asks for {count} choices, expected 1 to {served.limits.choices}"
        raise Refusal(400, message, param=param)


def stops_of(served: Served, name: str, stops: Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings. Raises Refusal for too many and too long ones."""
    limits = served.limits
    limits.check(name, stops, limits.stops, "strings")
    for each in stops or ():
        limits.check(name, each, limits.stop_length, "characters in a string")
    return tuple(stops or ())


def output_tokens(served: Served, asked: int | None) -> int:
    """Returns the most tokens of a reply: what is asked for, as far as the server and the context allow it."""
    most = min(served.context, served.limits.output_tokens or served.context)
    return most if asked is None else min(asked, most)


def tooling_of(served: Served, tools: Any, choice: Any, several: bool) -> Tooling:
    """Returns the tools of a request, checked. Raises Refusal and UserError."""
    served.limits.check("tools", tools, served.limits.tools, "tools")
    with about("tools"):
        return Tooling(Tools.of(tools) if tools else None, choice, several)


def schema_of(served: Served, name: str, schema: Any) -> dict[str, str]:
    """Returns a JSON schema as a setting of SamplingParams. Raises Refusal where it is none, or too large."""
    if not isinstance(schema, Mapping):
        raise Refusal(400, f"{name} is {shown(schema)}, expected a JSON schema, which is an object", param=name)
    text = json.dumps(schema)
    served.limits.check(name, text, served.limits.schema, "characters")
    return {"json_schema": text}


def encoded(
    served: Served, messages: Sequence[Mapping[str, Any]], tooling: Tooling, thoughts: Thoughts, continued: bool
) -> list[int]:
    """Returns the ids of a conversation. continued: whether the reply goes on with the last message. Raises
    Refusal.
    """
    if not messages:
        raise Refusal(400, "messages is empty, expected one message or more", param="messages")
    with about("messages"):
        return served.engine.text.encode(
            messages, thinking=thoughts.wanted, tools=tooling.schemas, continue_final_message=continued
        )


def made(
    served: Served, prompts: Sequence[list[int]], settings: Settings, tooling: Tooling, param: str = "messages"
) -> Ask:
    """Returns the request for n choices of each prompt. param: the field of the prompts. Raises Refusal for a prompt
    beyond the context or the limit, and UserError for settings out of range.
    """
    for ids in prompts:
        _check_length(served, len(ids), param)
    params, options = SamplingParams(**settings.sampling), settings.options | tooling.options
    return Ask(list(prompts), params, options | {"n": settings.n}, settings.n, tooling.tools)


def _check_length(served: Served, tokens: int, param: str) -> None:
    most = min(served.context - 1, served.limits.prompt_tokens or served.context)
    if tokens > most:
        raise Refusal(
            400,
            f"the prompt has {tokens} tokens, expected at most {most}: shorten it (the context is {served.context})",
            param=param,
            code="context_length_exceeded",
        )
