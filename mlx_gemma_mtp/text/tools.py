"""Tools that a caller gives, and the calls that a model makes of them."""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, shown
from .messages import plain
from .schemas import resolved, top

NAME = r"""[^\s{}()\[\]<>"'`,;=|]+"""  # of a tool: what a call can be read back with
PARAMETERS = ("parameters", "input_schema", "inputSchema")  # of OpenAI, Anthropic and MCP


def new_id() -> str:
    """Returns the id of a new call."""
    # Not of `random`: a library leaves its host's seeds alone.
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class ToolCall:
    """A call that a reply makes.

    arguments: JSON values by name. repaired: what was mended to read it, in words. faults: what does not fit the tool's
    schema and was left as it is, in words. id: unique; two calls that differ in nothing else are equal.
    """

    name: str
    arguments: dict[str, Any]
    repaired: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    id: str = field(default_factory=new_id, compare=False)

    @property
    def json(self) -> str:
        """The arguments as JSON text."""
        return json.dumps(self.arguments, ensure_ascii=False)

    def as_openai(self) -> dict[str, Any]:
        """Returns the call as OpenAI's API writes it, with the arguments as JSON text."""
        return _as_openai(self.id, self.name, self.json)


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call that is being made. Joined, the pieces of a whole call are its arguments as JSON text.

    id, name: of the call. json: what follows the pieces before it.
    """

    id: str
    name: str
    json: str

    def as_openai(self) -> dict[str, Any]:
        """Returns the call, as far as this piece has it, as OpenAI's API writes it."""
        return _as_openai(self.id, self.name, self.json)


def _as_openai(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True)
class Tools:
    """The tools of a request, checked. Make them with `Tools.of`.

    names: in the caller's order. schemas: for the chat template, one object a tool, written so that Gemma's template
    drops nothing.
    """

    names: tuple[str, ...]
    schemas: list[dict[str, Any]]
    _parameters: Mapping[str, dict[str, Any]]
    _strict: frozenset[str]

    @classmethod
    def of(cls, raw: Any) -> Tools:
        """Returns the tools of a list of objects: of OpenAI's two forms, {"type": "function", "function": {...}} and
        the flat one, or functions alone.

        Raises UserError, naming the tool and the part, for anything else.
        """
        if isinstance(raw, (str, bytes, Mapping)) or not isinstance(raw, Sequence):
            raise UserError(f"tools is {shown(raw)}, expected a list of tools, objects with a name and parameters")
        functions = [_function(plain("a tool", each)) for each in raw]
        names = tuple(function["name"] for function in functions)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"two tools are named {twice[0]!r}; expected names that differ: rename or drop one")
        parameters = {function["name"]: _parameters(function) for function in functions}
        strict = frozenset(function["name"] for function in functions if _flag(function))
        return cls(names, [_schema(function, parameters) for function in functions], parameters, strict)

    def parameters(self, name: str) -> dict[str, Any]:
        """Returns the JSON schema of a tool's arguments, as the caller wrote it, with references written out."""
        return self._parameters[name]

    def strict(self, name: str) -> bool:
        """Returns whether the caller wants the arguments to follow the schema to the letter."""
        return name in self._strict


def _function(tool: Any) -> dict[str, Any]:
    """The function that a tool is, by name. Raises UserError for tools of other kinds, and for odd names."""
    if not isinstance(tool, dict):
        raise UserError(f"a tool is {shown(tool)}, expected an object with a name and parameters")
    if tool.get("type", "function") != "function":
        raise UserError(f"a tool is of type {shown(tool['type'])}, expected 'function': this package runs no tools")
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise UserError(
            f"the tool {shown(tool)} has the name {shown(name)}, expected one of letters, digits and . _ - : /"
        )
    if not isinstance(function.get("description"), str | None):
        raise UserError(f"the tool {name!r} has the description {shown(function['description'])}, expected text")
    return function


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments. Raises UserError for what is no schema of an object."""
    where = f"{function['name']}.parameters"
    given = next((function[key] for key in PARAMETERS if function.get(key) is not None), {})
    schema = resolved(where, given)
    if not isinstance(schema, dict) or top(schema)["type"] != "object":
        raise UserError(f"{where} is {shown(given)}, expected a JSON schema of type object")
    return schema if "type" in schema else {"type": "object"} | schema


def _flag(function: dict[str, Any]) -> bool:
    strict = function.get("strict")
    if strict not in (None, True, False):
        raise UserError(f"{function['name']}.strict is {shown(strict)}, expected true or false")
    return bool(strict)


def _schema(function: dict[str, Any], parameters: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What the chat template is given: name, description and parameters, where there are any."""
    found, notes = {"name": function["name"]}, ""
    if any(function.get(key) for key in PARAMETERS):
        shape = top(parameters[function["name"]])
        notes = shape.pop("description", "")
        found["parameters"] = shape
    description = function.get("description") or ""
    if notes not in description:
        description = f"{description} {notes}".lstrip()
    return {"type": "function", "function": ({"description": description} if description else {}) | found}
