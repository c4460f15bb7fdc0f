"""JSON schemas of tools: checked, references written out, and told so that Gemma's template drops nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from ..errors import UserError, shown

Schema = dict[str, Any]

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
MOST_PARTS, DEEPEST = 10_000, 96  # of a schema whose references are written out
# Keywords whose values hold schemas. What other keywords hold, such as default and enum, is data.
OF_ONE = (
    *("items", "additionalProperties", "additionalItems", "unevaluatedItems", "unevaluatedProperties", "contains"),
    *("propertyNames", "not", "if", "then", "else"),
)
OF_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
BY_NAME = ("properties", "patternProperties", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
UNTOLD = ("$schema", "$id", "$comment", "$anchor", "title", *DEFINITIONS)  # what says nothing to a model
# Values that say nothing. A closed object is what everybody expects of one with properties.
VACANT = {"additionalProperties": (None, False, True, {}), "items": (None, True, {}), "required": (None, [])}
ALTERNATIVES = ("allOf", "anyOf", "oneOf")
# What Gemma's template renders of a property, by its type; of the schema of an array's items it renders all.
RENDERED = {"string": ("enum",), "array": ("items",), "object": ("properties", "required")}
ALWAYS = ("description", "nullable", "type")
LISTED = ("required", "enum", *OF_SEVERAL)


def resolved(what: str, schema: Schema) -> Schema:
    """Returns the schema without references: each is written out, and where it leads back into itself it allows
    whatever has its type.

    what: how messages name it. Raises UserError for what is no schema, and for references that lead nowhere or outside.
    """
    return Resolver(what, schema).part(schema, what, ())


class Resolver:
    """One schema, whose parts may refer to each other."""

    def __init__(self, what: str, root: Schema):
        self.what, self.root, self.parts, self.depth = what, root, 0, 0

    def part(self, schema: Any, where: str, within: tuple[str, ...]) -> Any:
        """Returns a part of the schema, written out. where: its place, for messages. within: the references that led
        here.
        """
        self.parts += 1
        self.depth += 1
        if self.parts > MOST_PARTS or self.depth > DEEPEST:
            raise UserError(
                f"{self.what} has more than {MOST_PARTS} parts or {DEEPEST} levels once its references are written "
                "out; make it smaller"
            )
        found = schema if isinstance(schema, bool) else self._part(schema, where, within)
        self.depth -= 1
        return found

    def _part(self, schema: Any, where: str, within: tuple[str, ...]) -> Any:
        if isinstance(schema, dict):  # null says that a keyword is absent, where it is no value
            schema = {key: value for key, value in schema.items() if value is not None or key in ("default", "const")}
        _check(schema, where)
        if "$ref" in schema:
            return self._referred(schema, where, within)
        return {
            key: self._of(key, value, f"{where}.{key}", within)
            for key, value in schema.items()
            if key not in DEFINITIONS
        }

    def _of(self, key: str, value: Any, where: str, within: tuple[str, ...]) -> Any:
        if key in BY_NAME:
            return {name: self.part(each, f"{where}.{name}", within) for name, each in value.items()}
        if key in OF_SEVERAL or (key == "items" and isinstance(value, list)):
            return [self.part(each, f"{where}[{place}]", within) for place, each in enumerate(value)]
        if key in OF_ONE:
            return self.part(value, where, within)
        if key == "type":
            return [each.lower() for each in value] if isinstance(value, list) else value.lower()
        return value

    def _referred(self, schema: Schema, where: str, within: tuple[str, ...]) -> Any:
        reference = schema["$ref"]
        beside = {key: value for key, value in schema.items() if key not in ("$ref", *DEFINITIONS)}
        target = self._target(reference, where)
        if reference in within:  # again, and so for ever: any value of its type
            kind = target.get("type") if isinstance(target, dict) else None
            target = {"type": kind} if isinstance(kind, (str, list)) else {}
        found = self.part(target, where, (*within, reference))
        if not beside:
            return found
        beside = self.part(beside, where, within)
        return found | beside if isinstance(found, dict) else beside

    def _target(self, reference: Any, where: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise UserError(
                f"{where} refers to {shown(reference)}, expected a place in the same schema such as '#/$defs/NAME': "
                "write it out there"
            )
        found: Any = self.root
        for name in reference.split("/")[1:]:
            name = unquote(name).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and len(name) < 6 and int(name) < len(found):
                found = found[int(name)]
            else:
                raise UserError(f"{where} refers to {shown(reference)}, which is not there: mend the reference")
        return found


def _check(schema: Any, where: str) -> None:
    """Raises UserError, naming the place, for what is no schema. Looks at this part alone."""
    if not isinstance(schema, dict):
        raise UserError(f"{where} is {shown(schema)}, expected a JSON schema, which is an object")
    kinds = schema.get("type", "object")
    for kind in kinds if isinstance(kinds, list) and kinds else [kinds]:
        if not isinstance(kind, str) or kind.lower() not in TYPES:
            raise UserError(f"{where}.type is {shown(kinds)}, expected one of {', '.join(TYPES)}, or a list of them")
    for key in BY_NAME:
        if not isinstance(schema.get(key, {}), dict):
            raise UserError(f"{where}.{key} is {shown(schema[key])}, expected an object of schemas")
    for key in LISTED:
        if not isinstance(schema.get(key, []), list):
            raise UserError(f"{where}.{key} is {shown(schema[key])}, expected a list")
    for name in schema.get("required", []):
        if not isinstance(name, str):
            raise UserError(f"{where}.required has {shown(name)}, expected names of properties")
    for key in ("description", "title"):
        if not isinstance(schema.get(key, ""), str):
            raise UserError(f"{where}.{key} is {shown(schema[key])}, expected text")
    if not isinstance(schema.get("nullable", False), bool):
        raise UserError(f"{where}.nullable is {shown(schema['nullable'])}, expected true or false")


def told(schema: Any) -> Schema:
    """Returns a schema of a property that says to Gemma's template what `schema`, a resolved one, says.

    The template renders a type and its few keywords. So alternatives become the first of them, null among them becomes
    `nullable`, and what cannot be rendered is told in the description, as JSON. What the template renders anyway stays
    as it is, to the letter.
    """
    schema, untold = _single(schema if isinstance(schema, dict) else {} if schema else {"not": {}})
    found = {}
    for key, value in schema.items():
        if key in ALWAYS or key in RENDERED.get(str(schema.get("type")), ()):
            found[key] = value
        elif key not in UNTOLD and not key.startswith("x-") and value not in VACANT.get(key, (None,)):
            untold[key] = value
    if isinstance(found.get("properties"), dict):
        found["properties"] = {name: told(each) for name, each in found["properties"].items()}
    if "items" in found:
        if isinstance(found["items"], dict):
            found["items"] = _of_items(found["items"])
        elif isinstance(items := found.pop("items"), list) or items is False:
            untold["items"] = items
    return with_notes(found, untold)


def with_notes(schema: Schema, untold: Mapping[str, Any]) -> Schema:
    """Returns the schema with keywords and their values in its description."""
    if not untold:
        return schema
    pairs = ((key, json.dumps(value, ensure_ascii=False)) for key, value in untold.items())
    notes = f"({', '.join(f'{key}: {value}' for key, value in pairs)})"
    return schema | {"description": " ".join(filter(None, [schema.get("description"), notes]))}


def top(schema: Schema) -> Schema:
    """Returns what Gemma's template renders of a tool's parameters, a resolved schema: type, properties and required.
    The description, which it does not render, holds the rest.
    """
    return {"type": "object"} | {key: value for key, value in told(schema).items() if key != "nullable"}


def _of_items(schema: Schema) -> Schema:
    """The schema of an array's items: the template renders every keyword of it, and its properties as ever."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return schema
    return schema | {"properties": {name: told(each) for name, each in properties.items()}}


def _single(schema: Schema) -> tuple[Schema, dict[str, Any]]:
    """Returns a schema of one type where the template would hide what others say, and what that leaves unsaid: keywords
    and their values.
    """
    untold: dict[str, Any] = {}
    while key := next((key for key in ALTERNATIVES if key in schema), None):
        parts = schema[key]
        schema = {name: value for name, value in schema.items() if name != key}
        if key == "allOf":
            schema, whole = _merged(schema, parts)
        else:
            schema, whole = _one_of(schema, parts)
        if not whole:
            untold.setdefault(key, parts)
    if "const" in schema and "enum" not in schema:
        schema = {name: value for name, value in schema.items() if name != "const"} | {"enum": [schema["const"]]}
    kinds = schema.get("type")
    if isinstance(kinds, list):
        schema, whole = _of_one_type(schema, kinds)
        if not whole:
            untold["type"] = kinds
    elif kinds is None and (kind := kind_of(schema)):
        schema = schema | {"type": kind}
    if schema.get("nullable") and None in schema.get("enum", ()):
        schema = schema | {"enum": [each for each in schema["enum"] if each is not None]}
    return schema, untold


def _merged(schema: Schema, parts: list[Any]) -> tuple[Schema, bool]:
    """Returns the schema with all that these parts demand, too, and whether that says it all."""
    found, whole = dict(schema), all(isinstance(part, dict) for part in parts)
    for part in parts:
        for key, value in part.items() if isinstance(part, dict) else ():
            if key == "properties":
                known = found.get(key, {})
                both = {name: {"allOf": [known[name], value[name]]} for name in value if name in known}
                found[key] = known | value | both
            elif key == "required":
                found[key] = list(dict.fromkeys([*found.get(key, []), *value]))
            elif key == "description":
                found[key] = " ".join(filter(None, [found.get(key), value]))
            else:
                whole = found.setdefault(key, value) == value and whole
    return found, whole


def _one_of(schema: Schema, parts: list[Any]) -> tuple[Schema, bool]:
    """Returns the schema with the first of these alternatives, and whether that says it all."""
    some = [part for part in parts if not (isinstance(part, dict) and part.get("type") == "null")]
    if "type" in schema or "properties" in schema or not all(isinstance(part, dict) for part in some):
        return schema, False  # they refine what is said already
    if len(some) < len(parts):
        schema = schema | ({"nullable": True} if some else {"type": "null"})
    if len(some) <= 1:
        return _merged(schema, some)
    if all("const" in part or "enum" in part for part in some):
        values = [value for part in some for value in ([part["const"]] if "const" in part else part["enum"])]
        return schema | {"enum": values}, all(part.keys() <= {"const", "enum", "type"} for part in some)
    first = {key: value for key, value in some[0].items() if key != "description"}  # which is told with all of them
    return _merged(schema, [first])[0], False


def _of_one_type(schema: Schema, kinds: list[str]) -> tuple[Schema, bool]:
    """Returns the schema with one of its types, if a list would hide a keyword, and whether that says it all."""
    hidden = [kind for kind in kinds if any(schema.get(key) for key in RENDERED.get(kind, ()))]
    others = [kind for kind in kinds if kind != "null"]
    if len(kinds) > 1 and not hidden:
        return schema, True  # it is rendered as a list
    kind = (hidden or others or kinds)[0]
    null = {"nullable": True} if "null" in kinds and kind != "null" else {}
    return schema | {"type": kind} | null, len(others) <= 1


def kind_of(schema: Schema) -> str | None:
    """Returns the type of a schema that names none, None where its keywords do not tell."""
    if "properties" in schema or "required" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    kinds = {kind_of_value(value) for value in schema.get("enum", ())} - {"null"}
    return kinds.pop() if len(kinds) == 1 else None


def kind_of_value(value: Any) -> str:
    """Returns the JSON type of a value; a whole number is an integer."""
    if value is None:
        return "null"
    for kind, types in (("boolean", bool), ("integer", int), ("number", float), ("string", str), ("array", list)):
        if isinstance(value, types):
            return kind
    return "object"
