"""Tools that a caller gives, and the calls that a model makes of them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _new_id() -> str:
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
    id: str = field(default_factory=_new_id, compare=False)

    def as_openai(self) -> dict[str, Any]:
        """Returns the call as OpenAI's API writes it, with the arguments as JSON text."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


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
        """Returns the tools of a list in OpenAI's form, the Responses API's flat one, or bare functions.

        Raises UserError, naming the tool and the part, for anything else.
        """
        functions = [each.get("function", each) for each in raw]
        names = tuple(each["name"] for each in functions)
        parameters = {each["name"]: each.get("parameters") or {"type": "object"} for each in functions}
        strict = frozenset(each["name"] for each in functions if each.get("strict"))
        return cls(names, [{"type": "function", "function": each} for each in functions], parameters, strict)

    def parameters(self, name: str) -> dict[str, Any]:
        """Returns the JSON schema of a tool's arguments, as the caller wrote it, with references written out."""
        return self._parameters[name]

    def strict(self, name: str) -> bool:
        """Returns whether the caller wants the arguments to follow the schema to the letter."""
        return name in self._strict
