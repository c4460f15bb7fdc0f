"""Gemma's tool calls as a grammar: Lark for llguidance, made from the JSON schemas of the tools' parameters.

A call is written as `<|tool_call>call:NAME{key:value,key:value}<tool_call|>`, without white space, with keys in the
order in which the chat template writes them, and with strings between two quote tokens, as they are.

A schema binds as far as a grammar can say it. An object with properties has no others, unless additionalProperties
allows them. oneOf is taken as anyOf, and formats of strings are ignored. What else cannot be said is left out, so that
the grammar allows more than the schema; for a tool that asks for `strict` it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import UserError, clipped, shown
from .fitting import fits
from .fitting import kinds_of as types_of
from .schemas import Schema
from .tool_calls import QUOTE
from .tools import Tools

# Keywords that no grammar here can say.
UNSAID = (
    *("not", "if", "patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired"),
    *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "contains", "uniqueItems"),
)
NOTES = ("title", "description", "default", "examples", "example", "$comment", "$defs", "definitions", "$id", "$schema")
KINDS = {  # of a schema without a type: what its keywords are about
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
LEAST, MOST = ("minimum", "minLength", "minItems"), ("maximum", "maxLength", "maxItems")
KEY = r"""[^\s:,=|{}\[\]<>"']+"""  # a key that needs no quotes
# Numbers within what a float and Python's reader of integers hold, so that each is read back as what it is.
INTEGER = "-?(0|[1-9][0-9]{0,59})"
NUMBER = rf"{INTEGER}(\.[0-9]{{1,60}})?([eE][+-]?[0-9]{{1,2}})?"


class Marks(NamedTuple):
    """Ids of the tokens around a call and of the one around a string; None where a quote is plain text."""

    open: int
    close: int
    quote: int | None


class Unsaid(Exception):
    """A keyword that a grammar cannot say."""


class Never(Exception):
    """No value satisfies a schema. Says which part of it."""


def call_grammar(tools: Tools, names: Sequence[str], marks: Marks, wrong: Callable[[str], str | None]) -> str:
    """Returns the Lark grammar of one call of one of these tools, from its opening to its closing token.

    wrong: says what is wrong with a Lark grammar, None if nothing is. Raises UserError for a strict tool whose schema
    cannot be said, and for schemas that contradict themselves.
    """
    lark = Lark(marks, wrong)
    calls = [Parameters(lark, name, tools.parameters(name), tools.strict(name)).call() for name in names]
    start = f"start: <[{marks.open}]> ({' | '.join(calls)}) <[{marks.close}]>"
    return "\n".join([start, *(f"{name}: {body}" for name, body in lark.rules.items())])


class Lark:
    """Rules of a Lark grammar by name, and those that every schema shares."""

    def __init__(self, marks: Marks, wrong: Callable[[str], str | None]):
        self.rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # by body
        self.wrong = wrong
        special = marks.quote is not None
        self.quote = f"<[{marks.quote}]>" if special else literal(QUOTE)
        self.char = "(?s:.)" if special else "[^<]"  # text holds no control token, nor what begins the quote's text

    def rule(self, body: str, name: str | None = None) -> str:
        """Returns the name of a rule with this body. name: where it must have its own."""
        if name is None and body in self._names:
            return self._names[body]
        name = name or f"r{len(self.rules)}"
        self._names[body], self.rules[name] = name, body
        return name

    def terminal(self, body: str) -> str:
        """Returns the name of a terminal, a rule that is one regular expression."""
        return self.rule(body) if body in self._names else self.rule(body, f"T{len(self.rules)}")

    def string(self, body: str, empty: bool) -> str:
        """Returns the rule of a quoted string. body: a terminal of the text; empty: whether it may have none."""
        return self.rule(f"{self.quote} {self.terminal(body)}{'?' if empty else ''} {self.quote}")

    def anything(self) -> str:
        """Returns the rule of any value."""
        if "any" not in self.rules:
            self.rules["any"] = ""
            scalar = f'{self.terminal(f"/{NUMBER}/")} | "true" | "false" | "null"'
            string = self.string(f"/{self.char}+/", empty=True)
            self.rules["any"] = f'{string} | {scalar} | "[" (any ("," any)*)? "]" | {self.any_object()}'
        return "any"

    def any_object(self) -> str:
        """Returns the rule of an object with any keys."""
        pair = self.pair(self.anything())
        return self.rule(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def pair(self, value: str, others: Sequence[str] = ()) -> str:
        """Returns the rule of a key and its value. others: keys that it is not."""
        but = f" & ~/{'|'.join(map(slashed, map(re.escape, others)))}/" if others else ""
        return self.rule(f'{self.terminal(f"/{KEY}/{but}")} ":" {value}')

    def key(self, key: str) -> str:
        """Returns a key that the schema names, and its colon. One that cannot stand alone is quoted."""
        return literal(f"{key}:") if re.fullmatch(KEY, key) else f'{self.text(key)} ":"'

    def text(self, text: str) -> str:
        """Returns a string that the schema names, between its quotes."""
        return " ".join([self.quote, *([literal(text)] if text else []), self.quote])

    def json(self, schema: Mapping[str, Any]) -> str:
        """Returns the rule of what llguidance itself knows: numbers within bounds."""
        return self.rule(f"%json {json.dumps(schema)}")


class Parameters:
    """The arguments of one tool as rules. schema: without references, as `Tools.parameters` returns it."""

    def __init__(self, lark: Lark, name: str, schema: Schema, strict: bool):
        self.lark, self.name, self.strict = lark, name, strict
        # Whoever names no property means that there is none, as many do with {"type": "object"} alone.
        self.schema = {"properties": {}} | schema

    def call(self) -> str:
        """Returns the rule of a call of the tool. Raises UserError."""
        try:
            arguments = self.value(self.schema, "parameters", Lark.any_object)
        except Never as error:
            raise UserError(f"{error}; no call satisfies that: mend the schema") from None
        return self.lark.rule(f"{literal(f'call:{self.name}')} {arguments}")

    def value(self, schema: Schema | bool, at: str, loose: Callable[[Lark], str] = Lark.anything) -> str:
        """Returns the rule of a value that satisfies the schema. at: where it stands, for messages. loose: makes the
        rule of what is allowed where neither the schema nor a type can be said. Raises Never.
        """
        if schema is True:
            return self.lark.anything()
        if schema is False:
            raise Never(f"{self._where(at)} is false")
        try:
            return self._alternatives(whole(schema), at)
        except Unsaid as error:
            self._unsaid(str(error), at)
        kinds = kinds_of(schema.get("type", []))
        return self._any_of([self._typed(kind, {}, at) for kind in kinds], at) if kinds else loose(self.lark)

    def _possible(self, schemas: Iterable[tuple[Schema | bool, str]], at: str) -> list[str]:
        """The rules of alternatives, each with its place, without those that no value satisfies. Raises Never where
        none is left.
        """
        rules = []
        for schema, place in schemas:
            with suppress(Never):
                rules.append(self.value(schema, place))
        if not rules:
            raise Never(f"{self._where(at)} has no alternatives")
        return rules

    def _unsaid(self, keyword: str, at: str) -> None:
        """A keyword that is left out, or refused."""
        if self.strict:
            raise UserError(
                f"{self._where(at)} has {shown(keyword)}, which no grammar of calls says; leave it out, or 'strict'"
            )

    def _where(self, at: str) -> str:
        return f"the tool {shown(self.name)}: {clipped(at, 80)}"

    def _alternatives(self, schema: Schema, at: str) -> str:
        """The rule of a schema without allOf: of its alternatives, or of its types."""
        if schema.get("not") in ({}, True) and "not" in schema:
            raise Never(f"{self._where(at)} forbids everything")
        for keyword in UNSAID:
            if schema.get(keyword):  # `false`, 0 and the like forbid nothing
                self._unsaid(keyword, at)
        if schema.get("nullable") is True:
            return self._any_of([self._alternatives(schema | {"nullable": False}, at), '"null"'], at)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                rest = {key: each for key, each in schema.items() if key not in (keyword, *NOTES)}
                options = [merged(rest, each) if rest and each is not False else each for each in schema[keyword]]
                return self._any_of(self._possible([(each, f"{at}.{keyword}") for each in options], at), at)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            kinds = types_of(schema)
            values = [each for each in values if not kinds or fits(_whole(each), kinds)] or (
                [] if self.strict else values
            )
            return self._any_of([self._literal(each) for each in values], at)
        kinds = schema.get("type", next((kind for kind, words in KINDS.items() if set(words) & set(schema)), None))
        if kinds is None:
            return self.lark.anything()
        return self._any_of([self._typed(kind, schema, at) for kind in kinds_of(kinds)], at)

    def _any_of(self, rules: Sequence[str], at: str) -> str:
        if not rules:
            raise Never(f"{self._where(at)} has no alternatives")
        return rules[0] if len(rules) == 1 else self.lark.rule(" | ".join(dict.fromkeys(rules)))

    def _typed(self, kind: str, schema: Schema, at: str) -> str:
        """The rule of a value of one type."""
        if kind in ("boolean", "null"):
            return '("true" | "false")' if kind == "boolean" else '"null"'
        if kind in ("integer", "number"):
            return self._number(kind, schema, at)
        return {"string": self._string, "array": self._array, "object": self._object}[kind](schema, at)

    def _literal(self, value: Any) -> str:
        """A value as the template writes it."""
        if isinstance(value, str):
            return self.lark.text(value)
        if isinstance(value, list):
            return " ".join(['"["', *_joined([self._literal(each) for each in value]), '"]"'])
        if isinstance(value, Mapping):
            pairs = [f"{self.lark.key(key)} {self._literal(value[key])}" for key in ordered(value)]
            return " ".join(['"{"', *_joined(pairs), '"}"'])
        return literal(json.dumps(value))

    def _number(self, kind: str, schema: Schema, at: str) -> str:
        said = {"type": kind} | {key: schema[key] for key in KINDS["number"] if key in schema}
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(said.get(exclusive), bool) and said.pop(exclusive) and bound in said:
                said[exclusive] = said.pop(bound)  # as OpenAPI 3.0 has it
        if len(said) > 1 and self.lark.wrong(f"start: %json {json.dumps(said)}"):
            self._unsaid(", ".join(key for key in said if key != "type"), at)
            said = {"type": kind}
        if len(said) == 1:
            return self.lark.terminal(f"/{INTEGER if kind == 'integer' else NUMBER}/")
        return self.lark.json(said)

    def _string(self, schema: Schema, at: str) -> str:
        least, most = self._bounds(schema, "Length", at)
        plain, text = f"{self.lark.char}{{{max(least, 1)},{most}}}", f"/{self.lark.char}+/"
        if most == "0":
            return self.lark.text("")
        if least > 0 or most:
            text = f"/{plain}/"
        pattern = schema.get("pattern")
        if pattern is not None:
            try:
                found = f"/{slashed(unanchored(pattern, self.lark.char))}/ & {text}"
                empty = least == 0 and re.search(pattern, "") is not None
                if self.lark.wrong(f"start: T\nT: {found}"):
                    raise Unsaid("pattern")
                return self.lark.string(found, empty)
            except (Unsaid, re.error, RecursionError):
                self._unsaid("pattern", at)
        return self.lark.string(text, least == 0)

    def _bounds(self, schema: Schema, what: str, at: str) -> tuple[int, str]:
        """The least and the most of a schema's minLength and maxLength, or minItems and maxItems; the most as text."""
        least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}")
        for name, each in ((f"min{what}", least), (f"max{what}", most if most is not None else 0)):
            whole_number = isinstance(each, int) or (isinstance(each, float) and each.is_integer())
            if not whole_number or isinstance(each, bool) or each < 0:
                raise UserError(f"{self._where(at)} has {name} {shown(each)}, expected a whole number from 0 on")
        if most is not None and most < least:
            raise UserError(f"{self._where(at)} has min{what} {least} above max{what} {most}; no value satisfies it")
        return int(least), "" if most is None else str(int(most))

    def _array(self, schema: Schema, at: str) -> str:
        least, most = self._bounds(schema, "Items", at)
        items = schema.get("items", True)
        first = schema.get("prefixItems", items if isinstance(items, list) else [])
        more = schema.get("additionalItems", True) if isinstance(items, list) else items
        first = first[: int(most)] if most else first
        if False in first:  # a list ends before a place where nothing may stand
            first, more = first[: first.index(False)], False
        value = None
        with suppress(Never):
            value = self.value(more, f"{at}[]")
        if value is None and least > len(first):
            raise Never(f"{self._where(at)} has minItems {least}")
        # From the end: what may follow the items so far, each with the comma before it.
        tail, rest = "", max(least - len(first), 0)
        if value is not None and (not most or int(most) > len(first)):
            more_of_it = repeated(f'"," {value}', max(rest - (not first), 0), most and int(most) - max(len(first), 1))
            if not first:
                return self.lark.rule(f'"[" ({value} {more_of_it}){"" if least else "?"} "]"')
            tail = more_of_it
        for i in reversed(range(len(first))):
            value = self.value(first[i], f"{at}[{i}]")
            tail = self.lark.rule(f"{'' if i == 0 else literal(',')} {value} {tail}".strip())
            tail = f"({tail})?" if i >= least else tail
        return self.lark.rule(f'"[" {tail} "]"')

    def _object(self, schema: Schema, at: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        extra = schema.get("additionalProperties", "properties" not in schema)
        if extra is False and not set(required) <= properties.keys():
            self._unsaid("required", at)
        others = extra if isinstance(extra, Mapping) else True
        properties = {key: others for key in required} | dict(properties)
        # From the end: what may follow the keys so far, with its comma, and what may come first, without one.
        more = first = '""'
        if extra is not False:
            pair = self.lark.pair(self.value(others, f"{at}.*"), list(properties))
            more, first = f'("," {pair})*', f'({pair} ("," {pair})*)?'
        for key in reversed(ordered(properties)):
            optional = key not in required
            try:
                value = self.value(properties[key], f"{at}.{key}")
            except Never:
                if optional:
                    continue
                raise
            pair = f"{self.lark.key(key)} {value}"
            first = self.lark.rule(f"{pair} {more}" + (f" | {first}" if optional else ""))
            more = self.lark.rule(f'"," {pair} {more}' + (f" | {more}" if optional else ""))
        return self.lark.rule(f'"{{" {first} "}}"')


def whole(schema: Schema) -> Schema:
    """Returns the schema with what its allOf adds to it. Raises Unsaid where they cannot be put together."""
    found: Schema = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema.get("allOf", []):
        found = merged(found, part if isinstance(part, bool) else whole(part))
    return found


def merged(one: Schema, other: Schema | bool) -> Schema:
    """Returns one schema for what satisfies both. Raises Unsaid for a keyword on which they disagree."""
    if isinstance(other, bool):
        if other:
            return one
        raise Unsaid("false")
    both = dict(one)
    for key, value in other.items():
        if key not in both or both[key] == value or key in NOTES:
            both[key] = value
        elif key == "required":
            both[key] = [*both[key], *value]
        elif (key in LEAST or key in MOST) and all(isinstance(each, (int, float)) for each in (both[key], value)):
            both[key] = (max if key in LEAST else min)(both[key], value)
        elif key == "properties":
            shared = {name: merged(both[key][name], each) for name, each in value.items() if name in both[key]}
            both[key] = {**both[key], **value, **shared}
        elif key == "type" and (kinds := [kind for kind in kinds_of(both[key]) if kind in kinds_of(value)]):
            both[key] = kinds
        else:
            raise Unsaid(key)
    return both


def kinds_of(kinds: str | list[str]) -> list[str]:
    """Returns the types of a schema as a list."""
    return [kinds] if isinstance(kinds, str) else kinds


def repeated(body: str, least: int, most: int | str) -> str:
    """Returns a body so many times in Lark. most: "" is no limit."""
    return '""' if most == 0 else f"({body}){{{least},{most}}}"


def ordered(keys: Iterable[str]) -> list[str]:
    """Returns the keys in the order in which the chat template writes them: jinja's dictsort."""
    return sorted(keys, key=str.lower)


def literal(text: str) -> str:
    """Returns text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def slashed(expression: str) -> str:
    """Returns a regular expression as it stands between the slashes of Lark."""
    return re.sub(r"\\.|/|\n", lambda m: {"/": r"\/", "\n": r"\n"}.get(m[0], m[0]), expression)


def unanchored(pattern: Any, char: str) -> str:
    """Returns the regular expression of whole texts in which the pattern is found. Raises Unsaid for anchors within it.

    char: the expression of one character.
    """
    if not isinstance(pattern, str):
        raise Unsaid("pattern")
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    bare = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "", inner)  # without escapes and classes
    outer = bare
    while (grouped := re.sub(r"\([^()]*\)", "", outer)) != outer:
        outer = grouped
    if re.search(r"[\^$]|\(\?[=!<]", bare) or ("|" in outer and (begins or ends)):
        raise Unsaid("pattern")
    return f"{'' if begins else f'{char}*'}({inner}){'' if ends else f'{char}*'}"


def _whole(value: Any) -> Any:
    """The value as an integer where it is one: JSON's 1.0 is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _joined(parts: Sequence[str]) -> list[str]:
    """The parts with commas between them."""
    return [each for i, part in enumerate(parts) for each in ('","', part)[i == 0 :]]
