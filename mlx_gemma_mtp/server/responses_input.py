"""OpenAI's Responses: a request's items as chat messages, its tools and settings as the engine takes them."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import shown
from .ask import (
    EFFORTS,
    Ask,
    Thoughts,
    common_settings,
    encoded,
    made,
    output_tokens,
    schema_of,
    tooling_of,
)
from .errors import Refusal
from .fields import ANY_OBJECT
from .responses_schema import ResponsesRequest, TextOptions

if TYPE_CHECKING:
    from .service import Served

log = logging.getLogger(__name__)
Item = Mapping[str, Any]
THOUGHTS, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"  # what `include` may ask for
SYSTEM, TEXTS = ("system", "developer"), ("input_text", "output_text", "text", "refusal")
# Of OpenAI's own service. Codex offers a search of the web with each request; nothing forces it, so that a reply
# without it is a good reply.
LEFT_OUT = ("web_search", "web_search_preview")
SEALED = "mtp1."  # what our own encrypted_content begins with; nothing is encrypted, and nobody else reads it


@dataclass(frozen=True)
class Functions:
    """The functions of a request as one list.

    offered: for the engine, those of a namespace as NAMESPACE.NAME. namespaces: the namespace and the name of those,
    by the names that are offered. told: as the request has them, without those that are left out.
    """

    offered: list[dict[str, Any]]
    namespaces: dict[str, tuple[str, str]]
    told: list[dict[str, Any]]

    @classmethod
    def of(cls, tools: Sequence[Item] | None) -> Functions:
        """Returns the functions of a request's tools. Raises Refusal for tools that are none."""
        offered: list[dict[str, Any]] = []
        namespaces: dict[str, tuple[str, str]] = {}
        told: list[dict[str, Any]] = []
        for place, tool in enumerate(tools or ()):
            kind = tool.get("type")
            if kind in LEFT_OUT:
                log.info("tools.%d: %s is left out: this package runs no tools", place, kind)
                continue
            told.append(dict(tool))
            if kind == "namespace":
                for inner, name in _inside(f"tools.{place}", tool):
                    offered.append(inner)
                    namespaces[inner["name"]] = (tool["name"], name)
            elif kind == "function":
                offered.append(dict(tool))
            else:
                raise odd(f"tools.{place}.type", kind, "'function' or 'namespace': this package runs no tools")
        return cls(offered, namespaces, told)

    def named(self, name: str) -> dict[str, str]:
        """Returns the name of a call as its item tells it."""
        if name not in self.namespaces:
            return {"name": name}
        namespace, inner = self.namespaces[name]
        return {"name": inner, "namespace": namespace}


def _inside(where: str, tool: Item) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the functions of a namespace under the names that they are offered by, and their own."""
    name, inner = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name:
        raise odd(f"{where}.name", name, "a name")
    if not isinstance(inner, list):
        raise odd(f"{where}.tools", inner, "a list of functions")
    for place, each in enumerate(inner):
        here = f"{where}.tools.{place}"
        if not isinstance(each, dict) or each.get("type") != "function":
            raise odd(here, each, "a tool of type 'function'")
        if not isinstance(each.get("name"), str):
            raise odd(f"{here}.name", each.get("name"), "a name")
        yield each | {"name": _joined(name, each["name"])}, each["name"]


def _joined(namespace: Any, name: Any) -> Any:
    return f"{namespace}.{name}" if namespace else name


def of_responses(served: Served, body: ResponsesRequest, before: Sequence[Item] = ()) -> Ask:
    """Returns what a request wants. before: the items of the conversation that it goes on with. Raises Refusal and
    UserError.
    """
    body.check_supported()
    settings = common_settings(served, body)
    sampling = settings.sampling
    sampling["max_tokens"] = output_tokens(served, body.max_output_tokens)
    thoughts = _thoughts(served, body)
    sampling |= {"thinking": thoughts.wanted, "thinking_budget": thoughts.budget}
    sampling |= _format(served, body.text)
    if (asked := _logprobs(body)) is not None:
        sampling["logprobs"] = asked
    several = True if body.parallel_tool_calls is None else body.parallel_tool_calls
    tooling = tooling_of(served, Functions.of(body.tools).offered, body.tool_choice, several)
    items = items_of(body.input)
    served.limits.check("input", items, served.limits.messages - len(before), "items")
    with _called("input"):
        messages = messages_of([*before, *items], body.instructions, -len(before))
        ids = encoded(served, messages, tooling, thoughts, False)
    return made(served, [ids], settings, tooling, "input")


def items_of(given: str | Sequence[Item] | None) -> list[Item]:
    """Returns a request's input as items. Raises Refusal where there is none."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not given:
        raise odd("input", given, "text, or a list of one item or more")
    return list(given)


@contextmanager
def _called(param: str) -> Iterator[None]:
    """Has a Refusal within the block name the field that this route has."""
    try:
        yield
    except Refusal as refusal:
        refusal.param = param if refusal.param == "messages" else refusal.param
        raise


def messages_of(items: Sequence[Item], instructions: str | None = None, first: int = 0) -> list[dict[str, Any]]:
    """Returns items as chat messages. first: the place of the first item.

    What the assistant thinks, says and calls in a row is one message. What stands at the beginning for the system is
    one message, the instructions first: Gemma's template knows one place for it. Raises Refusal for other items, by
    their place.
    """
    system = [instructions] if instructions else []
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items, first):
        message = _message(f"input.{place}", item)
        last = messages[-1] if messages else {"role": None}
        if message["role"] == "system" and not messages:
            system.append(message["content"])
        elif message["role"] == last["role"] == "assistant" and not _ends(last, message):
            _add(last, message)
        else:
            messages.append(message)
    return [*([{"role": "system", "content": "\n\n".join(system)}] if system else []), *messages]


def _ends(last: Item, message: Item) -> bool:
    """Whether a further piece of the assistant's is another message: text after text, where nothing was called."""
    return bool(last["content"] and message["content"]) and "tool_calls" not in last


def _add(last: dict[str, Any], message: Item) -> None:
    last["content"] += message["content"]
    if thought := message.get("reasoning"):
        last["reasoning"] = "\n".join(filter(None, (last.get("reasoning"), thought)))
    if calls := message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", ()), *calls]


def _message(where: str, item: Item) -> dict[str, Any]:
    """An item as a message, or as a piece of one."""
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", *SYSTEM):
            raise odd(f"{where}.role", role, "'user', 'assistant', 'system' or 'developer'")
        content = _text(f"{where}.content", item.get("content"))
        return {"role": "system" if role in SYSTEM else role, "content": content}
    if kind == "reasoning":
        return {"role": "assistant", "content": "", "reasoning": thought_of(item)}
    if kind == "function_call":
        name, namespace = item.get("name"), item.get("namespace")
        function = {"name": _joined(namespace, name), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        said = _text(f"{where}.output", item.get("output"))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": said}
    expected = "'message', 'reasoning', 'function_call' or 'function_call_output'"
    raise odd(f"{where}.type", kind, expected)


def _text(where: str, content: Any) -> str:
    """The text of an item, whose parts are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise odd(where, content, "text or a list of parts")
    found = []
    for place, part in enumerate(content):
        if part.get("type") not in TEXTS:
            kind = f"{where}.{place}.type"
            raise odd(kind, part.get("type"), "'input_text' or 'output_text': this package takes text alone")
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(text, str):
            raise odd(f"{where}.{place}.text", text, "text")
        found.append(text)
    return "".join(found)


def sealed(thought: str) -> str:
    """Returns a thought as encrypted_content: clients such as Codex send no other part of it back."""
    return SEALED + base64.urlsafe_b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def thought_of(item: Item) -> str:
    """Returns the thought of a reasoning item: its content, or what is sealed in it, or its summary. What others have
    encrypted says nothing.
    """
    content, hidden = item.get("content"), item.get("encrypted_content")
    if isinstance(content, list) and content:
        return _parts(content)
    if isinstance(hidden, str) and hidden.startswith(SEALED):
        try:
            return base64.urlsafe_b64decode(hidden.removeprefix(SEALED)).decode()
        except (binascii.Error, ValueError):
            return ""
    summary = item.get("summary")
    return _parts(summary) if isinstance(summary, list) else ""


def _parts(parts: Sequence[Any]) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _thoughts(served: Served, body: ResponsesRequest) -> Thoughts:
    """Returns what a request says of thoughts; what it does not say is as the server was started."""
    effort = None if body.reasoning is None else body.reasoning.effort
    if effort is None:
        return Thoughts(served.thinking)
    return Thoughts() if effort == "none" else Thoughts(True, EFFORTS.get(effort))


def _format(served: Served, text: TextOptions | None) -> dict[str, str]:
    """Returns the setting that text.format asks for."""
    given = None if text is None else text.format
    kind = "text" if given is None else given.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return schema_of(served, "text.format", ANY_OBJECT)
    if kind == "json_schema":
        return schema_of(served, "text.format.schema", given.get("schema"))
    raise odd("text.format.type", kind, "'text', 'json_object' or 'json_schema'")


def _logprobs(body: ResponsesRequest) -> int | None:
    """Returns how many log-probabilities a request asks for, None where it wants none. Raises Refusal."""
    for name in body.include or ():
        if name not in (THOUGHTS, LOGPROBS):
            raise odd("include", name, f"{THOUGHTS!r} or {LOGPROBS!r} alone")
    if LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    if body.top_logprobs:
        message = f"top_logprobs is {body.top_logprobs} without {LOGPROBS!r}, expected that in include"
        raise Refusal(400, message, param="top_logprobs")
    return None


def odd(param: str, value: Any, expected: str) -> Refusal:
    """The refusal of a value. param: its place."""
    return Refusal(400, f"{param} is {shown(value)}, expected {expected}", param=param)
