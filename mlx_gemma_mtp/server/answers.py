"""Answers as schemas, for the OpenAPI document: what clients may rely on. No answer is checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

Count = Annotated[int, Field(ge=0)]
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


class Error(BaseModel):
    """OpenAI's error. param: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """OpenAI's body of an error."""

    error: Error


class MessageError(BaseModel):
    """Anthropic's error."""

    type: str
    message: str


class MessageFailure(BaseModel):
    """Anthropic's body of an error."""

    type: Literal["error"]
    error: MessageError


class Timings(BaseModel):
    """Figures of a choice under llama.cpp's names, and what drafts did."""

    prompt_n: Count
    prompt_ms: float
    prompt_per_second: float
    predicted_n: Count
    predicted_per_second: float
    draft_n: Count
    draft_n_accepted: Count
    rounds: Count
    mtp: bool
    mtp_reason: str | None
    seed: int | None


class PromptDetails(BaseModel):
    cached_tokens: Count
    cache_write_tokens: Count


class CompletionDetails(BaseModel):
    reasoning_tokens: Count
    accepted_prediction_tokens: Count
    rejected_prediction_tokens: Count


class Usage(BaseModel):
    """Tokens of all choices; the prompt counts once."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class CalledFunction(BaseModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Reply(BaseModel):
    """A chat's message. Thoughts are in reasoning_content, reasoning or both, as the server was started."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[Call] = []


class Choice(BaseModel):
    """What every choice has. repaired: what was mended to read its calls."""

    index: Count
    finish_reason: Literal["stop", "length", "tool_calls"]
    timings: Timings
    logprobs: dict[str, Any] | None
    stop_reason: Literal["repetition"] = "repetition"
    repaired: list[str] = []


class ChatChoice(Choice):
    message: Reply


class TextChoice(Choice):
    text: str
    reasoning_content: str = ""
    reasoning: str = ""


class Answer(BaseModel):
    """What OpenAI's answers share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Answer):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    """A model. root: whose alias it is."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    context_window: int
    root: str = ""


class Models(BaseModel):
    """The model and its aliases."""

    object: Literal["list"]
    data: list[Model]


class ListedModel(BaseModel):
    """A model as Anthropic writes it."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class ModelPage(BaseModel):
    """A page of models as Anthropic lists them."""

    data: list[ListedModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class TextBlock(BaseModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    input_tokens: Count
    output_tokens: Count
    cache_read_input_tokens: Count
    cache_creation_input_tokens: Count


class MessageAnswer(BaseModel):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    timings: Timings


class Counted(BaseModel):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: Count


class Health(BaseModel):
    """How the server is; whoever has a key is told more."""

    status: str
    seconds: float


class Ready(BaseModel):
    """Whether requests are taken."""

    ready: bool


def told(
    answer: type[BaseModel] | UnionType, failure: type[BaseModel] = Failure, events: bool = False
) -> dict[int | str, Any]:
    """Returns what a route answers, as FastAPI writes it into its document. events: whether it can stream."""
    good: dict[str, Any] = {"model": answer, "description": "The answer"}
    if events:
        good["content"] = EVENTS
    bad = {"4XX": "What is wrong with the request", "5XX": "The server cannot answer now, or has made a mistake"}
    return {200: good} | {status: {"model": failure, "description": what} for status, what in bad.items()}


def name_keys(app: FastAPI, free: Sequence[str]) -> None:
    """Has the document say how a key is sent. free: paths that need none."""
    written = app.openapi

    def document() -> dict[str, Any]:
        found = written()
        found.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"x-api-key": []}]
        for path in found["paths"].keys() & set(free):
            found["paths"][path]["get"]["security"] = []
        return found

    app.openapi = document
