"""Requests as JSON: the fields of each route and their types. Ranges are checked by SamplingParams.

null is the same as a field that is left out. Fields that are not known are ignored, but for those of UNSUPPORTED, which
would change what the client gets.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..errors import shown
from .errors import Refusal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
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
    "typical_p": ((1,), "leave it out"),
    "mirostat": ((0,), "leave it out"),
    "draft_model": ((), "it is chosen when the server starts"),
    "adapters": ((), "fuse it into the model"),
    "previous_response_id": ((), "send the whole conversation"),
    "mcp_servers": ((), "this package runs no tools"),
    "container": ((), "this package runs no tools"),
}
NOTHING: tuple[Any, ...] = (None, [], {}, "")


class Body(BaseModel):
    """A body with fields of JSON's own types, none of which is converted."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def check_supported(self) -> None:
        """Raises Refusal for a field that asks for what this server does not do."""
        for name, value in (self.model_extra or {}).items():
            neutral, instead = UNSUPPORTED.get(name, ((value,), ""))
            if not any(_same(value, each) for each in (*NOTHING, *neutral)):
                message = f"{name} is {shown(value)}, expected none: it is not supported here; {instead}"
                raise Refusal(400, message, param=name, code="unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


class StreamOptions(Body):
    """include_usage: whether a last chunk tells the usage."""

    include_usage: bool | None = None


class Sampling(Body):
    """What chat and text completions share. max_tokens: None is all that the context leaves. num_draft_tokens, timeout,
    priority, cache_salt: as Engine.stream has them. regex, grammar: what the text must follow.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    ignore_eos: bool | None = None
    num_draft_tokens: int | str | None = None
    timeout: float | None = None
    priority: int | None = None
    cache_salt: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    prediction: dict[str, Any] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: text or token ids, or a list of these."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None


class MessagesRequest(Body):
    """POST /v1/messages."""

    model: str | None = None
    max_tokens: int
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    seed: int | None = None
    num_draft_tokens: int | str | None = None


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
