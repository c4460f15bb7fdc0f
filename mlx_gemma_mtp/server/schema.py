"""Requests as JSON: the fields of each route and their types. Ranges are checked by SamplingParams.

null is the same as a field that is left out. Fields that are not known are ignored, but for those of UNSUPPORTED and of
other routes, which would change what the client gets. Of a list the first wrong part alone is told: a body of megabytes
may have millions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast

from ..errors import shown
from ..sampling.params import check_unicode
from .errors import Refusal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class First(FailFast):
    """Has the first wrong part of a list told alone. Unlike its base it can stand in a union."""

    __hash__ = object.__hash__


Text = Annotated[str, AfterValidator(lambda text: check_unicode("the text", text))]
Texts = Annotated[list[Text], First()]
Objects = Annotated[list[dict[str, Any]], First()]
Ids = Annotated[list[int], First()]
INSTEAD = "give response_format, regex or grammar"
# Fields that are not supported -> (values that ask for nothing, what to do instead).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this package speaks text alone"),
    "modalities": ((["text"],), "this package speaks text alone"),
    "functions": ((), "give tools"),
    "function_call": ((), "give tool_choice"),
    "web_search_options": ((), "this package runs no tools"),
    "reasoning": ((), "give reasoning_effort or thinking_budget"),
    "echo": ((False,), "put the prompt before the text yourself"),
    "suffix": ((), "Gemma has no tokens for a text in the middle"),
    "best_of": ((1,), "give n"),
    "use_beam_search": ((False,), "leave it out"),
    "length_penalty": ((1,), "leave it out"),
    "min_tokens": ((0,), "leave it out"),
    "stop_token_ids": ((), "give stop"),
    "include_stop_str_in_output": ((False,), "leave it out"),
    "bad_words": ((), "give logit_bias"),
    "logits_processors": ((), "leave it out"),
    "prompt_logprobs": ((False,), "leave it out"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "add_generation_prompt": ((True,), "give continue_final_message"),
    "chat_template": ((), "the template is the model's"),
    "documents": ((), "put them into a message"),
    "structured_outputs": ((), INSTEAD),
    "guided_json": ((), INSTEAD),
    "guided_regex": ((), INSTEAD),
    "guided_choice": ((), INSTEAD),
    "guided_grammar": ((), INSTEAD),
    "json_schema": ((), INSTEAD),
    "output_format": ((), "give output_config.format, or response_format on OpenAI's routes"),
    "enable_thinking": ((), "give chat_template_kwargs"),
    "typical_p": ((1,), "leave it out"),
    "mirostat": ((0,), "leave it out"),
    "draft_model": ((), "it is chosen when the server starts"),
    "adapters": ((), "fuse it into the model"),
    "previous_response_id": ((), "send the whole conversation"),
    "mcp_servers": ((), "this package runs no tools"),
    "container": ((), "this package runs no tools"),
}
# Fields of other routes: the values that ask for nothing, where they are not false or 0; those that never do.
ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "repetition_penalty": (1,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "reasoning_effort": ("none",),
}
HARMLESS = {"prediction", "stream_options"}
NOTHING: tuple[Any, ...] = (None, [], {}, "")


class Body(BaseModel):
    """A body with fields of JSON's own types, none of which is converted."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def check_supported(self) -> None:
        """Raises Refusal for a field that asks for what this server, or this route, does not do."""
        others = self.others()
        for name, value in (self.model_extra or {}).items():
            neutral, instead = UNSUPPORTED.get(name) or others.get(name) or ((value,), "")
            if not any(_same(value, each) for each in (*NOTHING, *neutral)):
                message = f"{name} is {shown(value)}, expected none: it is not supported here; {instead}"
                raise Refusal(400, message, param=name, code="unsupported_parameter")

    @classmethod
    def others(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Returns the fields of other routes, as UNSUPPORTED has fields; none where they would change nothing."""
        return {}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class StreamOptions(Body):
    """include_usage: whether a last chunk tells the usage."""

    include_usage: bool | None = None


class Generating(Body):
    """What every route has that generates."""

    @classmethod
    def others(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Returns the fields of other routes."""
        names = {name for each in (ChatRequest, CompletionRequest, MessagesRequest) for name in each.model_fields}
        return {name: (ELSEWHERE.get(name, (False, 0)), "another route has it") for name in names - HARMLESS}


class Common(Generating):
    """What all routes share. num_draft_tokens, timeout, priority, cache_salt: as Engine.stream has them."""

    model: Text | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_repetition: int | None = None
    num_draft_tokens: int | str | None = None
    timeout: float | None = None
    priority: int | None = None
    cache_salt: Text | None = None


class Sampling(Common):
    """What chat and text completions share. max_tokens: None is all that the context leaves. regex, grammar: what the
    text must follow.
    """

    max_tokens: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None  # the biases' types are checked with their ranges
    stop: Text | Texts | None = None
    n: int | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions. draft_positions: whether a stream tells which draft each piece of its text was."""

    messages: Objects
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    prediction: dict[str, Any] | None = None
    draft_positions: bool | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: text or token ids, or a list of these."""

    prompt: str | Annotated[list[str], First()] | Ids | Annotated[list[Ids], First()]
    logprobs: int | None = None


class MessagesRequest(Common):
    """POST /v1/messages."""

    max_tokens: int
    messages: Objects
    system: str | Objects | None = None
    stop_sequences: Texts | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: Text | None = None
    messages: Objects
    system: str | Objects | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
