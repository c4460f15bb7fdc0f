"""Which channel a token of a reply belongs to: its text, a thought, or a call of a tool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..text.control import CLOSE, OPEN
from ..text.tool_calls import CALL_CLOSE, CALL_OPEN

TEXT, THOUGHT, CALL, MARK = "text", "thought", "call", "mark"


class Channels:
    """Follows the tokens of one reply.

    control: control tokens by name. called: whether the request has tools; without them calls are text. in_thought:
    whether the prompt opened a thought.
    """

    def __init__(self, control: Mapping[str, int], called: bool, in_thought: bool):
        self._now = THOUGHT if in_thought else TEXT
        marks = {control.get(OPEN): THOUGHT, control.get(CLOSE): TEXT}
        if called:
            marks |= {control.get(CALL_OPEN): CALL, control.get(CALL_CLOSE): TEXT}
        self._marks = {token: channel for token, channel in marks.items() if token is not None}

    def of(self, token: int) -> str:
        """Returns the channel of the next token; a token between two channels is a mark."""
        if token in self._marks:
            self._now = self._marks[token]
            return MARK
        return self._now

    def thoughts(self, tokens: Iterable[int]) -> int:
        """Returns how many of the next tokens are of thoughts."""
        return sum(self.of(token) == THOUGHT for token in tokens)
