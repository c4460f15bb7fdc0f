"""Which tools a reply may call, and which it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, clipped, shown

AUTO, NONE, REQUIRED = "auto", "none", "required"


@dataclass(frozen=True)
class ToolChoice:
    """What was asked for as `tool_choice`.

    names: the tools that may be called. forced: whether the reply must call one of them. several: whether it may make
    more than one call. barred: whether calls are forbidden, rather than unknown for want of tools.
    """

    names: tuple[str, ...] = ()
    forced: bool = False
    several: bool = True
    barred: bool = False

    @classmethod
    def of(cls, choice: Any, names: Sequence[str], several: bool = True) -> ToolChoice:
        """Returns what a choice means.

        choice: None or 'auto', 'none', 'required', a tool's name, or OpenAI's object of type function with a name.
        names: those of the tools. Raises UserError for other choices, and for those that need tools where there are
        none.
        """
        if isinstance(choice, str) and choice == NONE:
            return cls(barred=True)
        if choice is None or (isinstance(choice, str) and choice == AUTO):
            return cls(tuple(names), several=several)
        required = isinstance(choice, str) and choice == REQUIRED
        chosen = tuple(names) if required else (_named(choice),)
        if not names:
            raise UserError(f"tool_choice is {shown(choice)} without tools; give tools, or leave it out")
        if unknown := set(chosen) - set(names):
            given = clipped(", ".join(map(repr, names)))
            raise UserError(
                f"tool_choice names {shown(unknown.pop())}, expected 'auto', 'none', 'required', or {given}"
            )
        return cls(chosen, forced=True, several=several)


def _named(choice: Any) -> str:
    """The tool that a choice names. Raises UserError."""
    if isinstance(choice, str):
        return str(choice)
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return str(name)
    raise UserError(
        f"tool_choice is {shown(choice)}, expected 'auto', 'none', 'required', a tool's name, or "
        "{'type': 'function', 'function': {'name': NAME}}"
    )
