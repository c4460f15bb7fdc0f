"""OpenAI's Responses as JSON: the fields of a request, and of the answer in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .answers import CompletionDetails, Count, PromptDetails
from .schema import Body, Common, Effort, Objects, Text

# Fields of OpenAI's service -> (values that ask for nothing, what to do instead).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": ((False,), "leave it out; several requests may run at once"),
    "conversation": ((), "give previous_response_id, or the whole conversation as input"),
    "prompt": ((), "give instructions and input"),
    "context_management": ((), "shorten the input yourself"),
    "truncation": (("disabled",), "shorten the input yourself"),
    "moderation": ((), "leave it out"),
}


class Reasoning(Body):
    """What a request says of thoughts. summary: taken, and no summary is made: the thoughts themselves come."""

    effort: Effort | Literal["max"] | None = None
    summary: str | None = None


class TextOptions(Body):
    """What a request says of the text. verbosity: taken, and changes nothing."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(Common):
    """POST /v1/responses. store: whether the response may be gone on with by its id; left out, it may."""

    input: Text | Objects | None = None
    instructions: Text | None = None
    previous_response_id: Text | None = None
    max_output_tokens: int | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None
    user: Text | None = None

    @classmethod
    def others(cls) -> dict[str, tuple[tuple[Any, ...], str]]:
        """Returns the fields that ask for what is not done here."""
        return super().others() | UNSUPPORTED


class ResponsesUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: Count
    input_tokens_details: PromptDetails
    output_tokens: Count
    output_tokens_details: CompletionDetails
    total_tokens: Count


class ResponsesAnswer(BaseModel):
    """The answer of /v1/responses. output: items of the types reasoning, message and function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponsesUsage | None
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    previous_response_id: str | None
    store: bool


class InputItems(BaseModel):
    """The answer of /v1/responses/ID/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["response"]
    deleted: bool
