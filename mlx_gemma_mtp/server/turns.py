"""Anthropic's requests: their turns as chat messages, their tools and settings as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import shown
from .ask import (
    EFFORTS,
    Ask,
    Thoughts,
    Tooling,
    common_settings,
    encoded,
    made,
    output_tokens,
    schema_of,
    stops_of,
    tooling_of,
)
from .errors import Refusal
from .schema import CountRequest, MessagesRequest

if TYPE_CHECKING:
    from .service import Served

BUDGETS = {name: EFFORTS[name] for name in ("low", "medium", "high", "xhigh")} | {"max": None}  # tokens of thoughts
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Block = Mapping[str, Any]


def of_messages(served: Served, body: MessagesRequest) -> Ask:
    """Returns what a request wants. Raises Refusal and UserError."""
    body.check_supported()
    settings = common_settings(served, body)
    sampling = settings.sampling
    sampling["stop"] = stops_of(served, "stop_sequences", body.stop_sequences)
    sampling["max_tokens"] = output_tokens(served, body.max_tokens)
    thoughts = _with_effort(_thoughts(served, body.thinking), body.output_config)
    sampling |= {"thinking": thoughts.wanted, "thinking_budget": thoughts.budget}
    form = (body.output_config or {}).get("format")
    if form is not None:
        sampling |= _format(served, form)
    tooling = _tooling(served, body)
    return made(served, [_ids(served, body, tooling, thoughts)], settings, tooling)


def tokens_of(served: Served, body: CountRequest) -> int:
    """Returns how many tokens the prompt of a request has. Raises Refusal and UserError."""
    body.check_supported()
    return len(_ids(served, body, _tooling(served, body), _thoughts(served, body.thinking)))


def _ids(served: Served, body: MessagesRequest | CountRequest, tooling: Tooling, thoughts: Thoughts) -> list[int]:
    served.limits.check("messages", body.messages, served.limits.messages, "messages")
    messages = [] if not body.system else [{"role": "system", "content": body.system}]
    for place, turn in enumerate(body.messages):
        messages += _turn(f"messages.{place}", turn)
    continued = bool(body.messages) and body.messages[-1].get("role") == "assistant"
    return encoded(served, messages if body.messages else [], tooling, thoughts, continued)


def _turn(where: str, turn: Block) -> Iterator[dict[str, Any]]:
    """Yields a turn as chat messages: results of tools become messages of their own."""
    role, content = turn.get("role"), turn.get("content")
    if role not in ("user", "assistant", "system"):
        raise _odd(f"{where}.role", role, "'user', 'assistant' or 'system'")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise _odd(f"{where}.content", content, "text or a list of blocks")
    if role == "assistant":
        yield _reply(where, content)
        return
    if role == "system":  # Claude Code's, amid a conversation
        yield {"role": role, "content": [_text(f"{where}.content.{at}", block) for at, block in enumerate(content)]}
        return
    texts: list[Block] = []
    for place, block in enumerate(content):
        if block.get("type") == "tool_result":
            if texts:
                yield {"role": "user", "content": texts}
            texts = []
            yield _result(f"{where}.content.{place}", block)
        else:
            texts.append(_text(f"{where}.content.{place}", block))
    if texts or not content:
        yield {"role": "user", "content": texts}


def _text(where: str, block: Block) -> Block:
    if block.get("type") != "text":
        raise _odd(f"{where}.type", block.get("type"), "'text': this package takes text alone")
    text = block.get("text")
    if not isinstance(text, str):
        raise _odd(f"{where}.text", text, "text")
    return {"type": "text", "text": text}


def _result(where: str, block: Block) -> dict[str, Any]:
    """A tool's result as a message. A failure is told in its text, since Gemma knows no other way."""
    content = block.get("content")
    if isinstance(content, list):
        parts = [_text(f"{where}.content.{place}", part) for place, part in enumerate(content)]
        content = "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise _odd(f"{where}.content", content, "text or a list of text blocks")
    text = f"Error: {content or ''}" if block.get("is_error") else content or ""
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _reply(where: str, content: Sequence[Block]) -> dict[str, Any]:
    """An assistant's turn: its text, thoughts and calls. What Anthropic's own service has hidden is left out."""
    message: dict[str, Any] = {"role": "assistant", "content": []}
    for place, block in enumerate(content):
        kind = block.get("type")
        if kind == "thinking":
            message["reasoning"] = message.get("reasoning", "") + str(block.get("thinking") or "")
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            message.setdefault("tool_calls", []).append({"id": block.get("id"), "function": function})
        elif kind != "redacted_thinking":
            message["content"].append(_text(f"{where}.content.{place}", block))
    return message


def _tooling(served: Served, body: MessagesRequest | CountRequest) -> Tooling:
    tools = [_tool(f"tools.{place}", tool) for place, tool in enumerate(body.tools or ())]
    given = body.tool_choice
    if given is None:
        return tooling_of(served, tools, None, True)
    kind = given.get("type")
    if kind == "tool":
        choice: Any = {"type": "function", "function": {"name": given.get("name")}}
    elif kind in CHOICES:
        choice = CHOICES[kind]
    else:
        raise _odd("tool_choice.type", kind, "'auto', 'any', 'tool' or 'none'")
    single = given.get("disable_parallel_tool_use")
    if single not in (None, True, False):
        raise _odd("tool_choice.disable_parallel_tool_use", single, "true or false")
    return tooling_of(served, tools, choice, not single)


def _tool(where: str, tool: Block) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise _odd(f"{where}.type", tool.get("type"), "'custom': this package runs no tools")
    function = {"name": tool.get("name"), "description": tool.get("description"), "strict": tool.get("strict")}
    return function | {"parameters": tool.get("input_schema")}


def _thoughts(served: Served, given: Block | None) -> Thoughts:
    if given is None:
        return Thoughts(served.thinking)
    kind = given.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise _odd("thinking.type", kind, "'enabled', 'adaptive' or 'disabled'")
    budget = given.get("budget_tokens")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
        raise _odd("thinking.budget_tokens", budget, "a whole number, 0 or more")
    return Thoughts() if kind == "disabled" else Thoughts(True, budget)


def _with_effort(thoughts: Thoughts, given: Block | None) -> Thoughts:
    """Returns thoughts with the budget that output_config's effort means, where they have none of their own."""
    effort = (given or {}).get("effort")
    if effort is not None and (not isinstance(effort, str) or effort not in BUDGETS):
        raise _odd("output_config.effort", effort, f"one of {', '.join(BUDGETS)}")
    return (
        replace(thoughts, budget=BUDGETS[effort])
        if effort and thoughts.wanted and thoughts.budget is None
        else thoughts
    )


def _format(served: Served, given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping) or given.get("type") != "json_schema":
        raise _odd("output_config.format", given, "the type json_schema with a schema")
    return schema_of(served, "output_config.format.schema", given.get("schema"))


def _odd(param: str, value: Any, expected: str) -> Refusal:
    return Refusal(400, f"{param} is {shown(value)}, expected {expected}", param=param)
