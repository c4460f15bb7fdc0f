"""Which tools a reply may call, and which it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, clipped, shown
from ..sampling.params import SamplingParams

AUTO, NONE, REQUIRED = "auto", "none", "required"
ALLOWED = "allowed_tools"


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

        choice: None or 'auto', 'none', 'required', a tool's name, or OpenAI's object, of type function with a name or
        of type allowed_tools with a mode and tools. names: those of the tools. Raises UserError for other choices, and
        for those that need tools where there are none.
        """
        if isinstance(choice, str) and choice == NONE:
            return cls(barred=True)
        if choice is None or (isinstance(choice, str) and choice == AUTO):
            return cls(tuple(names), several=several)
        forced, chosen = _asked(choice, names)
        if not names:
            raise UserError(f"tool_choice is {shown(choice)} without tools; give tools, or leave it out")
        if unknown := [name for name in chosen if name not in names]:
            given = clipped(", ".join(map(repr, names)))
            raise UserError(f"tool_choice names {shown(unknown[0])}, expected 'auto', 'none', 'required', or {given}")
        return cls(tuple(dict.fromkeys(chosen)), forced, several)

    def check(self, params: SamplingParams) -> None:
        """Raises UserError for settings of a reply that exclude this choice."""
        if self.forced and params.grammars:
            raise UserError(
                f"{next(iter(params.grammars))} is given and tool_choice forces a call, expected one of the two: the "
                "reply is either a text or a call"
            )
        if params.ignore_eos and (self.forced or (self.names and not self.several)):
            reason = "tool_choice forces a call" if self.forced else "parallel_tool_calls is False"
            raise UserError(f"ignore_eos is set and {reason}, expected one of the two: such text has an end")


def _asked(choice: Any, names: Sequence[str]) -> tuple[bool, Sequence[str]]:
    """Whether a choice forces a call, and the tools that it names. Raises UserError."""
    if isinstance(choice, str) and choice == REQUIRED:
        return True, names
    if not isinstance(choice, Mapping) or choice.get("type") != ALLOWED:
        return True, [_named(choice)]
    allowed = choice.get(ALLOWED, choice)  # OpenAI's two forms
    mode, tools = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, Mapping) else (None, None)
    if mode not in (AUTO, REQUIRED) or not isinstance(tools, (list, tuple)) or not tools:
        raise UserError(
            f"tool_choice is {shown(choice)}, expected the mode 'auto' or 'required', and a list of tools, each "
            "{'type': 'function', 'function': {'name': NAME}}"
        )
    return mode == REQUIRED, [_named(tool) for tool in tools]


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
