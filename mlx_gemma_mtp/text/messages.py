"""Chat messages as clients send them: every part is taken or refused by name, and what is taken has one shape."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from numbers import Integral, Real
from typing import Any

from ..errors import UserError, in_a_line, shown
from ..sampling.params import check_unicode
from .control import CLOSE, OPEN

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning", "reasoning_content", "thinking")
COPIES = ("thinking_blocks", "reasoning_details")  # of litellm and OpenRouter: the reasoning once more, in parts
# Beside role, content and name.
TAKEN = {"assistant": ("tool_calls", *REASONING, *COPIES), "tool": ("tool_call_id", "tool_name")}
CONTINUES = ("prefix", "partial")  # of DeepSeek, Mistral and Qwen: the reply goes on with this message
# What clients send along or echo, and what says nothing to a model.
UNSAID = (
    *("id", "type", "index", "status", "annotations", "cache_control", "extra_content", "provider_specific_fields"),
    *("metadata", "response_metadata", "usage_metadata", "usage", "model", "timestamp", "created_at"),
)
TRUTHS = ("bool", "bool_")  # Python's and NumPy's, by name: whoever has none of NumPy's does not wait for it
DEEPEST = 64  # levels of arguments and schemas
THOUGHT = "thought"  # the channel's name, which a newline ends
CHANNEL = re.compile(f"{re.escape(OPEN)}(.*?){re.escape(CLOSE)}", re.DOTALL)
UNCLOSED = re.compile(f"{re.escape(OPEN)}{THOUGHT}(?:\n(.*))?$", re.DOTALL)


def are_messages(prompt: Any) -> bool:
    """Returns whether a prompt is chat messages: neither text nor token ids, of which there may be many of one type."""
    return not isinstance(prompt, str) and any(issubclass(kind, Mapping) for kind in set(map(type, prompt)))


def normalised(messages: Iterable[Any], thoughts: bool = True) -> list[dict[str, Any]]:
    """Returns new messages with role, content (text), and where they are given name, reasoning and tool_calls.

    Arguments of calls become objects, and a tool's message gets the name of the function that it answers for. The
    messages given are left as they are. thoughts: takes thoughts out of the assistant's text, where a client has sent
    a reply back as it came. Raises UserError for whatever a template would leave out or cannot render.
    """
    found: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []  # that tools may answer now
    answers = 0
    for given in messages:
        message = _message(given, thoughts)
        if message["role"] == "tool":
            message["name"] = _answers_for(message, calls, answers, found[-1]["role"] if found else None)
            answers += 1
        else:
            calls, answers = message.get("tool_calls", []), 0
        found.append(message)
    return _identified(found)


def _identified(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives ids to calls that have none of their own.

    Google's template names a response by its id alone: among calls without ids that is the name of the last one.
    """
    for at, message in enumerate(messages):
        calls = message.get("tool_calls", [])
        known = _by_id(calls)
        for place, call in enumerate(calls):
            if call.get("id") not in known:
                calls[place] = call | {"id": f"call_{at}_{place}"}
        if len(known) < len(calls):
            for answer in takewhile(lambda each: each["role"] == "tool", messages[at + 1 :]):
                if answer.get("tool_call_id") not in known:  # then its name says what it answers
                    answer.pop("tool_call_id", None)
    return messages


def _by_id(calls: Sequence[Message]) -> dict[str, str]:
    """The names of calls by their ids. What several have is no id of any."""
    ids = Counter(call["id"] for call in calls if "id" in call)
    return {call["id"]: call["function"]["name"] for call in calls if "id" in call and ids[call["id"]] == 1}


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Returns a copy of tools, objects of type function with a name. Raises UserError for anything else."""
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise UserError(f"tools are {shown(tools)}, expected a list of objects of type 'function'")
    made = []
    for each in tools:
        function = each.get("function") if isinstance(each, Mapping) else None
        if not isinstance(function, Mapping):
            raise UserError(f"a tool is {shown(each)}, expected an object of type 'function' with a function")
        name = _word("the name of a tool", function.get("name"))
        made.append(plain(f"the tool {shown(name)}", each))
    return made


def is_empty(messages: Sequence[Message]) -> bool:
    """Returns whether normalised messages say nothing at all."""
    return not any(each["content"] or each.get("tool_calls") or each.get("reasoning") for each in messages)


def plain(what: str, value: Any, depth: int = 0) -> Any:
    """Returns a copy of a JSON value of Python's own types. Raises UserError, beginning with `what`, for anything else
    and for lone surrogates.
    """
    if depth > DEEPEST:
        raise UserError(f"{what} is nested deeper than {DEEPEST} levels; make it flatter")
    if isinstance(value, str):
        return check_unicode(what, str(value))
    if value is None or type(value).__name__ in TRUTHS:
        return None if value is None else bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{what} has the key {shown(strange[0])}, expected text")
        return {plain(what, key): plain(what, each, depth + 1) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [plain(what, each, depth + 1) for each in value]
    raise UserError(f"{what} has {shown(value)}, expected what JSON can say")


def _message(given: Any, thoughts: bool) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"a message is {shown(given)}, expected an object with role and content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"a message has the role {shown(role)}, expected one of {', '.join(ROLES)}")
    role = "assistant" if role == "model" else role
    what = f"{'an' if role == 'assistant' else 'a'} {role} message"
    _check_keys(what, given, ("role", "content", "name", *TAKEN.get(role, ())))
    if asked := next((key for key in CONTINUES if given.get(key)), None):
        raise UserError(f"{what} has {asked!r}, expected none: give continue_final_message, which does the same")
    message: dict[str, Any] = {"role": role, "content": _content(what, role, given.get("content"))}
    for key in ("name", *(("tool_call_id",) if role == "tool" else ())):
        if given.get(key) not in (None, ""):
            message[key] = _word(f"the {key} of {what}", given[key])
    if role == "tool" and "name" not in message and given.get("tool_name") not in (None, ""):  # as Ollama calls it
        message["name"] = _word(f"the tool_name of {what}", given["tool_name"])
    if role == "assistant":
        message |= _said(what, message["content"], given, thoughts)
    return message


def _check_keys(what: str, given: Mapping[Any, Any], taken: Sequence[str]) -> None:
    """Raises UserError for a key that is not taken, unless it says nothing: null, empty, a number, or in UNSAID."""
    for key, value in given.items():
        empty = value is None or (isinstance(value, (str, Mapping, Sequence)) and not len(value))
        number = isinstance(value, Real) or type(value).__name__ in TRUTHS
        if key not in taken and key not in UNSAID and not empty and not number:
            raise UserError(
                f"{what} has the key {shown(key)} with {shown(value)}, expected {', '.join(taken)}: put what it says "
                "into the content, or leave it out"
            )


def _word(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{what} is {shown(value)}, expected some text")
    return check_unicode(what, str(value))


def _content(what: str, role: str, content: Any) -> str:
    """Returns the text of a message; that of several parts is joined as it stands."""
    if isinstance(content, str):
        return check_unicode(f"the content of {what}", str(content))
    if content is None:
        if role in ("assistant", "tool"):
            return ""
        raise UserError(f"{what} has no content, expected text or a list of text parts")
    if isinstance(content, (Mapping, bytes, bytearray, memoryview)) or not isinstance(content, Sequence):
        raise UserError(f"{what} has the content {shown(content)}, expected text or a list of text parts")
    return "".join(_part(what, part) for part in content)


def _part(what: str, part: Any) -> str:
    if not isinstance(part, Mapping):
        raise UserError(f"{what} has the part {shown(part)}, expected an object of type 'text'")
    kind = part.get("type")
    if kind not in TEXT_PARTS and not (kind is None and "text" in part):
        kind = kind if kind is not None else "/".join(map(str, part))
        raise UserError(f"{what} has a part of type {shown(kind)}, expected text, which alone this package takes")
    if not isinstance(part.get("text"), str):
        raise UserError(f"a text part of {what} has the text {shown(part.get('text'))}, expected a string")
    _check_keys(f"a text part of {what}", part, ("type", "text"))
    return check_unicode(f"the content of {what}", str(part["text"]))


def _said(what: str, content: str, given: Message, thoughts: bool) -> dict[str, Any]:
    """Returns content, reasoning and tool_calls of the assistant's message, as far as there are any."""
    said: dict[str, Any] = {}
    reasons = _reasons(what, given)
    if thoughts and OPEN in content:
        found, said["content"] = without_thoughts(content)
        reasons += [thought for thought in found if thought not in reasons]
    if reasons:
        # Templates of different dates read different names.
        said["reasoning"] = said["reasoning_content"] = "\n".join(reasons)
    calls = given.get("tool_calls")
    if calls is not None and (isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence)):
        raise UserError(f"the tool_calls of {what} are {shown(calls)}, expected a list of calls")
    if calls:
        said["tool_calls"] = [_call(call) for call in calls]
    return said


def _reasons(what: str, given: Message) -> list[str]:
    """Returns the thoughts that an assistant's message names as such. Clients send one thought under several names."""
    reasons: list[str] = []
    for key in REASONING:
        reason = given.get(key)
        if reason is not None and not isinstance(reason, str):
            raise UserError(f"the {key} of {what} is {shown(reason)}, expected text")
        if reason and reason not in reasons:
            reasons.append(check_unicode(f"the {key} of {what}", str(reason)))
    for key in () if reasons else COPIES:
        parts = given.get(key)
        if parts is not None and (isinstance(parts, (str, Mapping)) or not isinstance(parts, Sequence)):
            raise UserError(f"the {key} of {what} are {shown(parts)}, expected a list of parts")
        found = [_reason(f"the {key} of {what}", part) for part in parts or ()]
        reasons += [reason for reason in ("".join(found),) if reason and reason not in reasons]
    return reasons


def _reason(what: str, part: Any) -> str:
    keys = ("thinking", "text", "summary") if isinstance(part, Mapping) else ()
    text = next((part[key] for key in keys if key in part), None)
    if not isinstance(text, str):
        raise UserError(f"{what} have {shown(part)}, expected an object with the thinking or the text")
    return check_unicode(what, str(text))


def without_thoughts(text: str) -> tuple[list[str], str]:
    """Returns the thoughts in the text of a reply, and the rest of it.

    What stands between channel marks without the channel's name is in neither, as in Google's template. Marks without
    a partner are text, except of a thought that the end of the text cuts off.
    """
    bodies = CHANNEL.findall(text)
    rest = CHANNEL.sub("", text)
    if cut := UNCLOSED.search(rest):
        rest = rest[: cut.start()]
        bodies.append(f"{THOUGHT}\n{cut[1] or ''}")
    thoughts = [body.removeprefix(f"{THOUGHT}\n").strip("\n") for body in bodies if body.startswith(f"{THOUGHT}\n")]
    return [thought for thought in thoughts if thought], rest


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise UserError(f"a tool call is {shown(call)}, expected an object with a function")
    kind = call.get("type")
    function = call.get("function", call if "name" in call else None)
    if kind not in (None, "function") or not isinstance(function, Mapping):
        raise UserError(f"a tool call is {shown(dict(call))}, expected the type 'function' with a name and arguments")
    if function is not call:
        _check_keys("a tool call", call, ("id", "type", "function"))
    _check_keys("the function of a tool call", function, ("name", "arguments"))
    name = _word("the name of a tool call", function.get("name"))
    made = {"type": "function", "function": {"name": name, "arguments": _arguments(name, function.get("arguments"))}}
    return made if call.get("id") in (None, "") else {"id": _word("the id of a tool call", call["id"])} | made


def _arguments(name: str, given: Any) -> dict[str, Any]:
    """Returns the arguments of a call, which come as an object or, in OpenAI's form, as its JSON text."""
    what, value = f"the arguments of the call of {shown(name)}", given
    if isinstance(given, str):
        check_unicode(what, given)
        try:
            value = json.loads(given, object_pairs_hook=_distinct) if given.strip() else None
        except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
            raise UserError(f"{what} are {shown(given)}, expected a JSON object ({in_a_line(error)})") from None
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{what} are {shown(given)}, expected a JSON object")
    return plain(what, value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object. Raises ValueError for a key that occurs twice, whose first value would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _answers_for(message: Message, calls: Sequence[Message], before: int, after: str | None) -> str:
    """Returns the name of the function that a tool's message answers for: the call's of its tool_call_id, or the name
    that it gives, or that of the call in its place.

    before: messages of tools since the calls. after: the role of the message before.
    """
    name, id = message.get("name"), message.get("tool_call_id")
    if not calls:
        where = f"after {'an' if after == 'assistant' else 'a'} {after} message" if after else "first"
        raise UserError(f"a tool message comes {where}, expected an assistant message with tool_calls before it")
    known = _by_id(calls)
    if id in known or (id is not None and len(known) == len(calls)):
        if id not in known:
            raise UserError(
                f"a tool message answers the call {shown(id)}, expected one of those before it: {', '.join(known)}"
            )
        if name is not None and name != known[id]:
            raise UserError(
                f"a tool message of the name {shown(name)} answers the call {shown(id)} of {shown(known[id])}; "
                "expected one of them: leave out the name"
            )
        return known[id]
    if name is None and before >= len(calls):
        raise UserError(f"{before + 1} tool messages answer {len(calls)} calls; expected a tool_call_id or a name")
    return name or calls[before]["function"]["name"]
