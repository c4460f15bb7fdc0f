"""OpenAI's requests: their fields as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import shown
from ..sampling.params import MAX_LOGPROBS
from .ask import (
    EFFORTS,
    Ask,
    Settings,
    Thoughts,
    Tooling,
    check_choices,
    common_settings,
    encoded,
    made,
    output_tokens,
    schema_of,
    stops_of,
    tooling_of,
)
from .errors import Refusal, about
from .schema import ChatRequest, CompletionRequest, Sampling

if TYPE_CHECKING:
    from .service import Served

ANY_OBJECT = {"type": "object"}
TEMPLATE = ("enable_thinking", "thinking", "thinking_budget")  # of chat_template_kwargs what is taken


def of_chat(served: Served, body: ChatRequest) -> Ask:
    """Returns what a chat request wants. Raises Refusal and UserError."""
    body.check_supported()
    served.limits.check("messages", body.messages, served.limits.messages, "messages")
    settings = _settings(served, body, body.max_completion_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        message = f"top_logprobs is {body.top_logprobs} without logprobs, expected logprobs: true with it"
        raise Refusal(400, message, param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        message = f"top_logprobs is {body.top_logprobs}, expected 0 to {MAX_LOGPROBS}"
        raise Refusal(400, message, param="top_logprobs")
    if body.continue_final_message and (body.model_extra or {}).get("add_generation_prompt"):
        message = "add_generation_prompt is true beside continue_final_message, expected one of them"
        raise Refusal(400, message, param="add_generation_prompt")
    if body.draft_positions and not body.stream:
        raise Refusal(400, "draft_positions is given without stream, expected stream: true", param="draft_positions")
    if body.logprobs:
        settings.sampling["logprobs"] = body.top_logprobs or 0
    thoughts = _thoughts(served, body)
    settings.sampling.update(thinking=thoughts.wanted, thinking_budget=thoughts.budget)
    several = True if body.parallel_tool_calls is None else body.parallel_tool_calls
    tooling = tooling_of(served, body.tools, body.tool_choice, several)
    if body.prediction is not None:
        settings.options["prediction"] = _prediction(body.prediction)
    ids = encoded(served, body.messages, tooling, thoughts, bool(body.continue_final_message))
    return made(served, [ids], settings, tooling)


def of_completion(served: Served, body: CompletionRequest) -> Ask:
    """Returns what a text completion wants. Raises Refusal and UserError."""
    body.check_supported()
    settings = _settings(served, body)
    if body.logprobs is not None:
        settings.sampling["logprobs"] = body.logprobs
    whole = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
    prompts = [body.prompt] if whole else list(body.prompt)
    check_choices(served, len(prompts) * settings.n, "prompt" if not prompts else "n")
    with about("prompt"):
        ids = [served.engine.text.encode(each, chat_template=False) for each in prompts]
    return made(served, ids, settings, Tooling(), "prompt")


def _settings(served: Served, body: Sampling, max_tokens: int | None = None) -> Settings:
    """Returns the settings that chat and text completions share. max_tokens: wins over the body's."""
    limits, common = served.limits, common_settings(served, body)
    sampling = common.sampling
    sampling["stop"] = stops_of(served, "stop", [body.stop] if isinstance(body.stop, str) else body.stop)
    sampling["logit_bias"] = _biases(served, body.logit_bias)
    sampling["max_tokens"] = output_tokens(served, body.max_tokens if max_tokens is None else max_tokens)
    for name in ("regex", "grammar"):
        limits.check(name, sampling.get(name), limits.schema, "characters")
    if body.response_format is not None:
        sampling |= _format(served, body.response_format)
    if body.stream_options is not None and body.stream_options.model_fields_set and not body.stream:
        raise Refusal(400, "stream_options is given without stream, expected stream: true", param="stream_options")
    n = 1 if body.n is None else body.n
    check_choices(served, n, "n")
    return replace(common, n=n)


def _prediction(given: Mapping[str, Any]) -> str:
    """Returns the text that the reply is expected to be like: OpenAI's object, of the type content."""
    content = given.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if given.get("type") != "content" or not all(isinstance(text, str) for text in texts):
        message = f"prediction is {shown(given)}, expected the type content, with content as text or parts of text"
        raise Refusal(400, message, param="prediction")
    return "".join(texts)


def _biases(served: Served, given: Mapping[str, float] | None) -> dict[int, float]:
    served.limits.check("logit_bias", given, served.limits.biases, "entries")
    try:
        return {int(token): bias for token, bias in (given or {}).items()}
    except ValueError:
        message = f"logit_bias has keys such as {shown(next(iter(given)))}, expected token ids"
        raise Refusal(400, message, param="logit_bias") from None


def _format(served: Served, given: Mapping[str, Any]) -> dict[str, str]:
    """Returns the setting that response_format asks for."""
    kind = given.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return schema_of(served, "response_format", ANY_OBJECT)
    if kind == "json_schema" and isinstance(given.get("json_schema"), Mapping):
        return schema_of(served, "response_format.json_schema.schema", given["json_schema"].get("schema"))
    raise Refusal(
        400,
        f"response_format is {shown(given)}, expected the type text, json_object, or json_schema with a json_schema",
        param="response_format",
    )


def _thoughts(served: Served, body: ChatRequest) -> Thoughts:
    """Returns what a chat request says of thoughts: chat_template_kwargs wins over reasoning_effort, and what is not
    said is as the server was started.
    """
    given = {key: value for key, value in (body.chat_template_kwargs or {}).items() if value is not None}
    if unknown := [key for key in given if key not in TEMPLATE]:
        message = f"chat_template_kwargs has {shown(unknown[0])}, expected {', '.join(TEMPLATE)} alone"
        raise Refusal(400, message, param="chat_template_kwargs", code="unsupported_parameter")
    budget = given.get("thinking_budget") if body.thinking_budget is None else body.thinking_budget
    wanted = given.get("enable_thinking", given.get("thinking"))
    if wanted is not None and not isinstance(wanted, bool):
        message = f"enable_thinking is {shown(wanted)}, expected true or false"
        raise Refusal(400, message, param="chat_template_kwargs")
    if wanted is None and body.reasoning_effort is not None:
        wanted = body.reasoning_effort != "none"
        budget = EFFORTS[body.reasoning_effort] if budget is None else budget
    if wanted is None:
        wanted = served.thinking or budget is not None
    return Thoughts(wanted, budget if wanted else None)
