"""A call while its tokens come: as much of its arguments as nothing that may follow can change, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .fitting import Bare, Fitting, Notes, constant, item, keeps_brackets, keeps_text, member
from .tool_calls import DEEPEST, MARK, QUOTE, SPELLED, UNCLOSED, Body, Reader, Unreadable, unspelled, value_of
from .tools import NAME, ToolCall, Tools, new_id

LONG = 32  # characters of a string from which on a call is given away as it comes
_HEAD = re.compile(rf"call:({NAME}(?<!:))\{{")
Place = str | int  # of an element: a key, or a number


@dataclass
class _Open:
    """An object or an array that is open. schema: of it. keys: so far, None for an array. count: elements so far. key:
    the newest one.
    """

    schema: dict[str, Any]
    keys: set[str] | None
    count: int = 0
    key: str = ""

    @classmethod
    def of(cls, value: Any, schema: Any) -> _Open:
        """An empty one of a value's kind."""
        return cls(schema if isinstance(schema, dict) else {}, set() if isinstance(value, dict) else None)

    @property
    def brackets(self) -> str:
        return "[]" if self.keys is None else "{}"

    def elements(self, value: Any, first: int = 0) -> list[tuple[Place, Any]]:
        """The elements that a value has, from number `first` on, with their places."""
        return list(enumerate(value, first) if self.keys is None else value.items())

    def part(self, place: Place) -> Any:
        """The schema of an element."""
        return item(self.schema, place) if isinstance(place, int) else member(self.schema, place)

    def add(self, place: Place) -> str:
        """Takes an element in. Returns the JSON before its value."""
        comma = ", " if self.count else ""
        self.count += 1
        if isinstance(place, int):
            return comma
        self.key = place
        self.keys.add(place)
        return f"{comma}{json.dumps(self.key, ensure_ascii=False)}: "


class PartialCall:
    """Follows a call, and tells its arguments as JSON text in pieces.

    It tells nothing before a string, an argument or a part of one, is long: what is short is soon whole, and then it
    can be mended. It follows calls in the trained form alone, and tells no more from the first thing that is none on.
    What the schema fits as a whole, by `anyOf` and its like, waits until a string in fewer brackets begins. The last
    characters of a string that is open wait while they may be the brackets and blanks behind a string without end.

    tools: the caller's. quote: what is around strings, MARK where the vocabulary has a token for it. id, name: of the
    call. begun: whether any of it was told. at: characters of its body that were looked at.
    """

    def __init__(self, tools: Tools, quote: str):
        self.id, self.name, self.begun, self.at = new_id(), "", False, 0
        self._tools, self._quote = tools, quote
        self._open: list[_Open] = []  # brackets, outermost first
        self._sure: list[str] = []  # what may be told
        self._told: list[str] = []
        self._edges = 0  # marks of the body that were looked at
        self._waits = DEEPEST + 1  # strings in so many brackets wait
        self._place: Place | None = None  # of the string that is open and does not wait
        self._live = False  # whether it is told as it comes
        self._length = 0  # of what is sure of it
        self._held: list[str] = []  # its last characters
        self._lost = False  # whether the call is not followed any more

    def push(self, body: Body) -> str:
        """Returns what the newest characters of the call's body make sure."""
        for start, end, level in body.edges[self._edges :]:
            if self._lost:
                break
            self._edges += 1
            if self._place is not None:
                self._end(body.text[self.at : start])
                self.at = end
            elif self._edges % 2 and level < self._waits and self._begin(body.text[self.at : end]):
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
        end = '"' * self._live + "".join(each.brackets[1] for each in reversed(self._open))
        fault = "what follows cannot be read, and was left out"
        arguments = json.loads("".join(self._told) + end)
        return ToolCall(self.name, arguments, faults=(fault,), id=self.id), end

    def _tell(self) -> str:
        self._told += self._sure
        text = "".join(self._sure)
        self._sure.clear()
        return text

    def _begin(self, text: str) -> bool:
        """A string begins after what the text has. Returns whether that is taken in."""
        if not self._open:
            text = self._head(text)
        value = self._value(text)
        new = None if value is None else self._new(value)
        if new is None:
            self._lost = True
            return False
        going_on = next(depth for depth, elements in enumerate(new) if elements)
        around, (place, inner) = self._open[going_on], new[going_on][-1]
        schema, level = around.part(place), going_on + 1
        while not isinstance(inner, str):
            level += 1
            if not keeps_brackets(schema):
                self._waits = level
                return False
            opened = _Open.of(inner, schema)
            place, inner = opened.elements(inner)[-1]
            schema = opened.part(place)
        self._waits, self._live = DEEPEST + 1, keeps_text(schema)
        while len(self._open) > going_on + 1:
            self._add(new[len(self._open) - 1])
            self._sure.append(self._open.pop().brackets[1])
        self._place = self._descend(new[going_on])
        return True

    def _end(self, text: str) -> None:
        """The string that is open ends with the text."""
        if self._live:
            self._sure.append(_escaped("".join(self._held) + text) + '"')
        else:
            self._add([(self._place, text)])
        self._held.clear()
        self._place, self._live, self._length = None, False, 0

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

    def _head(self, text: str) -> str:
        """What follows the beginning of a call, whose tool is now known; empty where that needs to be whole."""
        found = _HEAD.match(text)
        if not found:
            return ""
        known = found[1] in self._tools.names
        schema = self._tools.parameters(found[1]) if known else {}
        if not keeps_brackets(schema):
            return ""
        self.name, self.at = found[1], found.end()
        self._open, self._sure = [_Open.of({}, schema)], ["{"]
        return text[found.end() :]

    def _value(self, text: str) -> dict[str, Any] | None:
        """The brackets that are open with what the text puts into them, each one the first element of the one around
        it. The last string is empty: its opening quote ends the text. None where the text is not written as the model
        was trained to.
        """
        if not self._open or not text.endswith(self._quote):
            return None
        inner = self._open[-1]
        if inner.count and not text.startswith(inner.brackets[1]):
            if not text.startswith(","):
                return None
            text = text[1:]
        if self._quote == MARK:
            text = text.replace(QUOTE, SPELLED).replace(MARK, QUOTE)
        around = [each.brackets[0] + (f"{each.key}:" if each.keys is not None else "") for each in self._open[:-1]]
        reader = Reader(f"{''.join(around)}{inner.brackets[0]}{text}{QUOTE}", closed=True)
        try:
            found = reader.value()
        except Unreadable:
            return None
        if set(reader.notes) - {UNCLOSED} or reader.at < len(reader.text) or _has_words(found):
            return None
        return unspelled(found)

    def _new(self, value: dict[str, Any]) -> list[list[tuple[Place, Any]]] | None:
        """The elements that a value of `_value` adds to each of the brackets. None where a key comes again."""
        new, last = [], len(self._open) - 1
        for depth, each in enumerate(self._open):
            elements = each.elements(value, each.count - (depth < last))
            if depth < last:
                value = elements.pop(0)[1]
            if each.keys is not None and any(key in each.keys for key, _ in elements):
                return None
            new.append(elements)
        return new

    def _add(self, elements: Sequence[tuple[Place, Any]]) -> None:
        """Elements of the innermost brackets are whole."""
        around = self._open[-1]
        for place, value in elements:
            fitted = Fitting(Notes(), value_of).fit(value, around.part(place), "")
            self._sure.append(around.add(place) + json.dumps(fitted, ensure_ascii=False))

    def _descend(self, elements: Sequence[tuple[Place, Any]]) -> Place:
        """Takes in elements of the innermost brackets, and the brackets that the last of them opens, up to the string
        that begins. Returns its place.
        """
        self._add(elements[:-1])
        place, value = elements[-1]
        around = self._open[-1]
        if isinstance(value, str):
            if self._live:
                self._sure.append(f'{around.add(place)}"')
            return place
        opened = _Open.of(value, around.part(place))
        self._sure.append(around.add(place) + opened.brackets[0])
        self._open.append(opened)
        return self._descend(opened.elements(value))


def _has_words(value: Any) -> bool:
    """Whether a value has words without quotes, which may end elsewhere than it seems."""
    if isinstance(value, Bare):
        return isinstance(constant(value.word), str)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_words, inner))


def _escaped(text: str) -> str:
    """A string's characters as JSON has them."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
