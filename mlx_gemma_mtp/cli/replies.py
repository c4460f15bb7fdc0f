"""Replies on standard output: text, thoughts and calls of tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import shown
from .command import note
from .terminal import dimmed, printable

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from ..text.tools import ToolCall


class Printer:
    """Prints a reply as it comes.

    Thoughts are shown on a terminal alone, dimmed (not where NO_COLOR is set): what a pipe or a file gets is the reply.
    A terminal gets no control characters of a reply, they are spelled out. Each call has a line of its own.
    """

    def __init__(self, hide_thinking: bool = False, write: Callable[[str], None] | None = None):
        """write: takes text in the place of standard output."""
        self._terminal = sys.stdout.isatty()
        self._thoughts = self._terminal and not hide_thinking
        self._to = _print if write is None else write
        self._thinking = False  # whether a thought was printed last
        self._said = False  # whether text was printed
        self._called = False  # whether a call was printed last, which ends its line

    def __call__(self, piece: Chunk | Result) -> None:
        """Prints a piece of a reply, or a whole one."""
        if piece.reasoning and self._thoughts:
            self._thinking = True
            self._to(dimmed(printable(piece.reasoning)))
        if piece.text:
            self._end_thought()
            self._write(piece.text)
            self._called, self._said = False, True
        for call in piece.tool_calls:
            self._end_thought()
            self._write(("\n" if self._said and not self._called else "") + line_of(call) + "\n")
            self._called = True
            for what in (*call.repaired, *call.faults):
                note(f"the call of {call.name}: {what}")
        if (cut := piece.cut_call) is not None:
            note(f"the call of {cut.name} is cut off, its arguments so far: {shown(cut.json)}")

    def end(self) -> None:
        """Ends the last line. A reply that says nothing is an empty one."""
        self._end_thought()
        if not self._called:
            self._write("\n")

    def _end_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write("\n\n")

    def _write(self, text: str) -> None:
        self._to(printable(text) if self._terminal else text)


def _print(text: str) -> None:
    print(text, end="", flush=True)


def line_of(call: ToolCall) -> str:
    """Returns a call in one line, as in `call get_weather {"city": "Paris"}`."""
    return f"call {call.name} {json.dumps(call.arguments, ensure_ascii=False)}"
