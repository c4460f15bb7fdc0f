"""Arguments that a model wrote, fitted to a tool's JSON schema.

What reads as the right type becomes it, and that is said. What does not fit is left, and that is said, too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import clipped, shown
from .schemas import Schema, kind_of, kind_of_value

NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
LOOSE_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # as other languages write them
WORDS = {"true": True, "false": False, "null": None}  # of JSON; other languages write them with a capital
OTHER_WORDS = {"True": True, "False": False, "None": None}
BRACKETS = {"array": "[", "object": "{"}


@dataclass(frozen=True)
class Bare:
    """A value that was written without quotes."""

    word: str


@dataclass
class Notes:
    """What is to be said of a call: what was mended, and what does not fit the schema and was left."""

    repaired: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fitting:
    """Fits values to schemas.

    notes: takes what is to be said. read: a value that is written in a string, raising ValueError for what is none.
    """

    notes: Notes
    read: Callable[[str], Any]

    def fit(self, value: Any, schema: Any, where: str, part: bool = False) -> Any:
        """Returns the value in JSON's types, of the schema's type where it can be read so.

        where: its place. part: whether the schema is one of several that the value follows, so that another one may
        know the names that this one does not.
        """
        if not isinstance(schema, dict):
            if schema is False:
                self._fault(f"{where} is not allowed")
            schema = {}
        for each in schema.get("allOf", ()):
            value = self.fit(value, each, where, part=True)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                value = self._alternative(value, schema[key], where, part or "properties" in schema)
        kinds = kinds_of(schema)
        value = self._typed(value, kinds, where)
        if isinstance(value, dict):
            value = self._object(value, schema, where, part or "allOf" in schema)
        elif isinstance(value, list):
            value = self._array(value, schema, where)
        self._check(value, kinds, schema, where)
        return value

    def _alternative(self, value: Any, schemas: list[Any], where: str, part: bool) -> Any:
        """The value fitted to the alternative of which the fewest faults, then the fewest repairs, are to be said."""
        tried = []
        for schema in schemas:
            inner = Fitting(Notes(), self.read)
            tried.append((inner.fit(value, schema, where, part), inner.notes))
        if not tried:
            return value
        best, notes = min(tried, key=lambda each: (len(each[1].faults), len(each[1].repaired)))
        self.notes.repaired += notes.repaired
        self.notes.faults += notes.faults
        return best

    def _typed(self, value: Any, kinds: set[str], where: str) -> Any:
        if isinstance(value, Bare):
            return self._word(value.word, kinds, where)
        if isinstance(value, str) and kinds and "string" not in kinds:
            return self._string(value, kinds, where)
        if isinstance(value, float) and "integer" in kinds and "number" not in kinds and value.is_integer():
            return int(value)
        return value

    def _word(self, word: str, kinds: set[str], where: str) -> Any:
        """A word without quotes: a number or a constant, unless the schema wants text."""
        value = constant(word)
        if isinstance(value, str):
            self._mended(f"{where} was not in quotes")
            return self._typed(value, kinds, where)
        if kinds and not fits(value, kinds) and "string" in kinds:
            self._mended(f"{where} was {clipped(word, 40)}, it is text now")
            return word
        if word in OTHER_WORDS and word not in WORDS:
            self._mended(f"{where} was {word}")
        return self._typed(value, kinds, where)

    def _string(self, text: str, kinds: set[str], where: str) -> Any:
        """Text where the schema wants another type, as what it reads as."""
        word = text.strip()
        value = constant(word if word in OTHER_WORDS else word.lower() if word.lower() in WORDS else word)
        if value == word and kinds & {"integer", "number"}:
            value = loose_number(word)
        value = int(value) if isinstance(value, float) and value.is_integer() and "number" not in kinds else value
        if not isinstance(value, str) and fits(value, kinds):
            self._mended(f"{where} was the text {shown(text, 40)}, it is {json.dumps(value)} now")
            return value
        for kind in kinds & BRACKETS.keys():
            if word.startswith(BRACKETS[kind]):
                try:
                    value = self.read(word)
                except ValueError:
                    break
                self._mended(f"{where} was {'an' if kind[0] in 'ao' else 'a'} {kind} written as text")
                return value
        return text

    def _object(self, value: dict[str, Any], schema: Schema, where: str, part: bool) -> dict[str, Any]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        known = properties and not part and "patternProperties" not in schema
        closed = others is False or (others is None and known)
        for name in schema.get("required", ()):
            if name not in value:
                self._fault(f"{_inside(where, name)} is missing")
        found = {}
        for name, each in value.items():
            if name not in properties and name not in schema.get("required", ()) and closed:
                self._fault(f"{_inside(where, name)} is unknown")
            found[name] = self.fit(each, member(schema, name), _inside(where, name))
        return found

    def _array(self, value: list[Any], schema: Schema, where: str) -> list[Any]:
        return [self.fit(each, item(schema, place), f"{where}[{place}]") for place, each in enumerate(value)]

    def _check(self, value: Any, kinds: set[str], schema: Schema, where: str) -> None:
        if kinds and not fits(value, kinds):
            self._fault(f"{where} is {shown(value, 40)}, expected {' or '.join(sorted(kinds))}")
            return
        allowed = [schema["const"]] if "const" in schema else schema.get("enum")
        if allowed is not None and not any(_same(value, each) for each in allowed):
            self._fault(f"{where} is {shown(value, 40)}, expected one of {shown(allowed)}")

    def _mended(self, what: str) -> None:
        self.notes.repaired.append(what)

    def _fault(self, what: str) -> None:
        self.notes.faults.append(what)


def member(schema: Schema, name: str) -> Any:
    """Returns the schema of an object's member."""
    return schema.get("properties", {}).get(name, schema.get("additionalProperties") or {})


def item(schema: Schema, place: int) -> Any:
    """Returns the schema of an array's element."""
    items, first = schema.get("items", {}), schema.get("prefixItems", ())
    if isinstance(items, list):  # as older schemas write the first ones
        items, first = {}, items
    return first[place] if place < len(first) else items


def keeps_brackets(schema: Any) -> bool:
    """Returns whether the elements of an object or an array are fitted one by one, whatever the others are."""
    return not isinstance(schema, dict) or not schema.keys() & {"allOf", "anyOf", "oneOf"}


def keeps_text(schema: Any) -> bool:
    """Returns whether text is left as it is, whatever it says, where it is fitted to a schema."""
    if not isinstance(schema, dict):
        return True
    choices = [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    return "allOf" not in schema and _is_text(schema) and all(any(map(_plain_text, each)) for each in choices)


def _plain_text(schema: Any) -> bool:
    """Whether a schema allows any text, so that no other alternative is better."""
    more = {"allOf", "anyOf", "oneOf", "enum", "const"}
    return schema is True or (isinstance(schema, dict) and not schema.keys() & more and _is_text(schema))


def _is_text(schema: Schema) -> bool:
    kinds = kinds_of(schema)
    return not kinds or "string" in kinds


def constant(word: str) -> Any:
    """Returns the JSON value that a word is, a constant of Python's included; the word itself where it is none."""
    if word in WORDS or word in OTHER_WORDS:
        return (WORDS | OTHER_WORDS)[word]
    if not NUMBER.fullmatch(word):
        return word
    try:
        value = json.loads(word)
    except ValueError:  # an integer of thousands of digits
        return word
    return word if isinstance(value, float) and not math.isfinite(value) else value


def loose_number(word: str) -> Any:
    """Returns the number that a word is in other languages than JSON; the word itself where it is none."""
    if not LOOSE_NUMBER.fullmatch(word):
        return word
    try:
        value = float(word) if set(".eE").intersection(word) else int(word)
    except ValueError:  # an integer of thousands of digits
        return word
    return word if isinstance(value, float) and not math.isfinite(value) else value


def kinds_of(schema: Schema) -> set[str]:
    """Returns the types that a schema allows, none where it does not say."""
    kinds = schema.get("type") or kind_of(schema) or map(kind_of_value, schema.get("enum", ()))
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    if None in schema.get("enum", ()):
        found.add("null")
    return found | {"null"} if found and schema.get("nullable") else found


def fits(value: Any, kinds: set[str]) -> bool:
    """Returns whether a value is of one of these types. Every integer is a number."""
    kind = kind_of_value(value)
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
