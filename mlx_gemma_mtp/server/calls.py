"""Calls of tools on their way to clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.request import Result
    from ..text.tools import CallDelta, ToolCall


def calls_of(result: Result) -> list[ToolCall | CallDelta]:
    """Returns the calls that a reply makes, and the one that it ended in the middle of."""
    return [*result.tool_calls, *([result.cut_call] if result.cut_call is not None else [])]


def parted(deltas: Sequence[CallDelta], open: str | None) -> tuple[Sequence[CallDelta], Sequence[CallDelta]]:
    """Returns the pieces that go on with the call that is open, and those of others. A client gets the first ones
    before the text of their chunk, which follows the call. open: id of the newest call.
    """
    count = next((place for place, delta in enumerate(deltas) if delta.id != open), len(deltas))
    return deltas[:count], deltas[count:]
