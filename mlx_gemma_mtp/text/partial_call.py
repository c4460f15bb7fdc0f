"""A call while its tokens come: as much of its arguments as nothing that may follow can change, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .fitting import Bare, Fitting, Notes, constant, keeps_text, member
from .tool_calls import MARK, QUOTE, SPELLED, Body, Reader, Unreadable, unspelled, value_of
from .tools import NAME, ToolCall, Tools, new_id

LONG = 32  # characters of a string from which on a call is given away as it comes
_HEAD = re.compile(rf"call:({NAME}(?<!:))\{{")


class PartialCall:
    """Follows a call, and tells its arguments as JSON text in pieces.

    It tells nothing before a string among the arguments is long: what is short is soon whole, and then it can be
    mended. It follows calls in the trained form alone, and tells no more from the first thing that is none on. The last
    characters of a string that is open wait while they may be the brackets and blanks behind a string without end.

    tools: the caller's. quote: what is around strings, MARK where the vocabulary has a token for it. id, name: of the
    call. begun: whether any of it was told. at: characters of its body that were looked at.
    """

    def __init__(self, tools: Tools, quote: str):
        self.id, self.name, self.begun, self.at = new_id(), "", False, 0
        self._tools, self._quote = tools, quote
        self._schema: dict[str, Any] = {}
        self._sure: list[str] = []  # what may be told
        self._told: list[str] = []
        self._keys: set[str] = set()
        self._edges = 0  # marks of the body that were looked at
        self._open: str | None = None  # the argument whose string is open
        self._live = False  # whether its string is told as it comes
        self._length = 0  # of what is sure of it
        self._held: list[str] = []  # its last characters
        self._lost = False  # whether the call is not followed any more

    def push(self, body: Body) -> str:
        """Returns what the newest characters of the call's body make sure."""
        for start, end in body.edges[self._edges :]:
            if self._lost:
                break
            self._edges += 1
            if self._open is None:
                self._begin(body.text[self.at : end])
            else:
                self._end(body.text[self.at : start])
            self.at = end
        if self._live and not body.later:
            self._grow(body.fresh[self.at - body.size + len(body.fresh) :])
            self.at = body.size
        self.begun = self.begun or self._length >= LONG
        return self._tell() if self.begun and self._sure else ""

    def rest(self, call: ToolCall) -> str | None:
        """Returns what is still to be told of the call that this one has become; None where that is another one."""
        whole, told = call.json, "".join(self._told)
        return whole[len(told) :] if call.name == self.name and whole.startswith(told) else None

    def ended(self) -> tuple[ToolCall, str]:
        """Returns the call with what was told of its arguments, and the end of its JSON."""
        end = '"}' if self._live else "}"
        fault = "what follows cannot be read, and was left out"
        arguments = json.loads("".join(self._told) + end)
        return ToolCall(self.name, arguments, faults=(fault,), id=self.id), end

    def _tell(self) -> str:
        self._told += self._sure
        text = "".join(self._sure)
        self._sure.clear()
        return text

    def _begin(self, text: str) -> None:
        """A string begins after the members that the text has."""
        found = self._members(text)
        if found is None:
            self._lost = True
            return
        self._open, _ = found.popitem()
        self._add(found)
        self._live = keeps_text(member(self._schema, self._open))
        if self._live:
            self._sure.append(f'{self._before(self._open)}: "')

    def _end(self, text: str) -> None:
        """The string that is open ends with the text."""
        if self._live:
            self._sure.append(_escaped("".join(self._held) + text) + '"')
        else:
            self._add({self._open: text})
        self._held.clear()
        self._open, self._live, self._length = None, False, 0

    def _grow(self, text: str) -> None:
        """The string that is open goes on."""
        kept = text
        while (shorter := kept.rstrip().rstrip("]}")) != kept:
            kept = shorter
        if kept:
            sure = "".join(self._held) + kept
            self._sure.append(_escaped(sure))
            self._length += len(sure)
            self._held.clear()
        self._held.append(text[len(kept) :])

    def _add(self, members: Mapping[str, Any]) -> None:
        """Members of the arguments are whole."""
        for key, value in Fitting(Notes(), value_of).fit(members, self._schema, "").items():
            self._sure.append(f"{self._before(key)}: {json.dumps(value, ensure_ascii=False)}")

    def _before(self, key: str) -> str:
        """The JSON before a key, and the key."""
        first = not self._keys
        self._keys.add(key)
        return ("{" if first else ", ") + json.dumps(key, ensure_ascii=False)

    def _members(self, text: str) -> dict[str, Any] | None:
        """The members that a text has, the last one an empty string, whose opening quote ends the text. None where they
        are not written as the model was trained to.
        """
        begun = "," if self.name else self._head(text)
        if not begun or not text.startswith(begun) or not text.endswith(self._quote):
            return None
        text = text[len(begun) :]
        if self._quote == MARK:
            text = text.replace(QUOTE, SPELLED).replace(MARK, QUOTE)
        reader = Reader(f"{{{text}{QUOTE}}}", closed=False)
        try:
            found = reader.value()
        except Unreadable:
            return None
        if reader.notes or reader.at < len(reader.text) or _has_words(found):
            return None
        found = unspelled(found)
        return None if self._keys & found.keys() else found

    def _head(self, text: str) -> str:
        """The beginning of a call, whose tool is now known; empty where it is another, or needs to be whole."""
        found = _HEAD.match(text)
        if not found:
            return ""
        known = found[1] in self._tools.names
        self._schema = self._tools.parameters(found[1]) if known else {}
        if self._schema.keys() & {"allOf", "anyOf", "oneOf"}:
            return ""
        self.name = found[1]
        return found[0]


def _has_words(value: Any) -> bool:
    """Whether a value has words without quotes, which may end elsewhere than it seems."""
    if isinstance(value, Bare):
        return isinstance(constant(value.word), str)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_words, inner))


def _escaped(text: str) -> str:
    """A string's characters as JSON has them."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
