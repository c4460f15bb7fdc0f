"""Tools as callers give them: checked, their schemas written out, and told to the chat template without a loss."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.tool_calls import read
from mlx_gemma_mtp.text.tools import Tools

CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
STRING = {"type": "string"}
WEATHER = {"name": "weather", "description": "The weather", "parameters": CITY}


def told(properties: dict, **more) -> dict:
    """What the template is given of a tool with these properties."""
    schema = {"type": "object", "properties": properties} | more
    [tool] = Tools.of([{"name": "f", "parameters": schema}]).schemas
    return tool["function"]["parameters"]["properties"]


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": WEATHER},
        {"type": "function", **WEATHER},
        WEATHER,
        {"type": "function", "function": WEATHER | {"strict": None}, "cache_control": {"type": "ephemeral"}},
        {"name": "weather", "description": "The weather", "input_schema": CITY},
        {"name": "weather", "description": "The weather", "inputSchema": CITY},
    ],
    ids=["openai", "responses", "bare", "with more", "anthropic", "mcp"],
)
def test_every_form_of_a_tool_is_the_same(tool):
    tools = Tools.of((tool,))
    assert tools.names == ("weather",) and tools.parameters("weather") == CITY and not tools.strict("weather")
    assert tools.schemas == [{"type": "function", "function": WEATHER}]


def test_what_is_left_out_stays_out():
    tools = Tools.of([{"name": "now"}, {"name": "b", "parameters": {}, "strict": True}])
    assert tools.schemas == [{"type": "function", "function": {"name": name}} for name in ("now", "b")]
    assert tools.parameters("now") == {"type": "object"} and tools.strict("b") and not tools.strict("now")
    assert Tools.of([]).names == ()


@pytest.mark.parametrize(
    "raw, message",
    [
        (5, "tools is 5, expected a list"),
        ("[]", "expected a list"),
        (WEATHER, "expected a list"),
        (["weather"], "a tool is 'weather', expected an object"),
        ([{"type": "web_search"}], "a tool is of type 'web_search', expected 'function'"),
        ([{"type": "function"}], "has the name None"),
        ([{"type": "function", "function": []}], "has the name None"),
        ([{"name": ""}], "has the name ''"),
        ([{"name": "get weather"}], "has the name 'get weather', expected one of letters"),
        ([{"name": "f{}"}], "has the name 'f{}'"),
        ([{"name": "<turn|>"}], "has the name '<turn|>'"),
        ([{"name": "f\udcff"}], "no character"),
        ([{"name": "f"}, {"name": "g"}, {"name": "f"}], "two tools are named 'f'"),
        ([{"name": "f", "description": 5}], "'f' has the description 5, expected text"),
        ([{"name": "f", "strict": "yes"}], r"f.strict is 'yes', expected true or false"),
        ([{"name": "f", "parameters": 5}], r"f.parameters is 5, expected a JSON schema"),
        ([{"name": "f", "parameters": {"type": "string"}}], r"expected a JSON schema of type object"),
        ([{"name": "f", "parameters": {"anyOf": [{"type": "string"}]}}], r"expected a JSON schema of type object"),
        ([{"name": "f", "parameters": {"default": float("nan")}}], "expected what JSON can say"),
        ([{"name": "f", "parameters": {"default": {1, 2}}}], "expected what JSON can say"),
        ([{"name": "f", "parameters": {"default": "\udcff"}}], "no character"),
        ([{"name": "f", "parameters": {1: 2}}], "the key 1, expected text"),
    ],
)
def test_what_is_no_tool_is_named(raw, message):
    with pytest.raises(UserError, match=message) as raised:
        Tools.of(raw)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "str"}, r"f.parameters.properties.x.type is 'str', expected one of object, array"),
        ({"type": ["string", 5]}, r"x.type is \['string', 5\], expected one of"),
        ({"type": []}, r"x.type is \[\], expected one of"),
        (5, r"x is 5, expected a JSON schema"),
        (None, r"x is None, expected a JSON schema"),
        ({"properties": []}, r"x.properties is \[\], expected an object of schemas"),
        ({"items": "string"}, r"x.items is 'string', expected a JSON schema"),
        ({"required": "a"}, r"x.required is 'a', expected a list"),
        ({"required": [5]}, r"x.required has 5, expected names"),
        ({"enum": "a"}, r"x.enum is 'a', expected a list"),
        ({"anyOf": {}}, r"x.anyOf is {}, expected a list"),
        ({"anyOf": [5]}, r"x.anyOf\[0\] is 5, expected a JSON schema"),
        ({"description": []}, r"x.description is \[\], expected text"),
        ({"nullable": "yes"}, r"x.nullable is 'yes', expected true or false"),
        ({"$ref": "https://example.org/x"}, r"x refers to 'https://example.org/x', expected a place in the same"),
        ({"$ref": 5}, r"x refers to 5"),
        ({"$ref": "#/$defs/nobody"}, r"x refers to '#/\$defs/nobody', which is not there"),
        ({"items": {"items": {"$ref": "#x"}}}, r"x.items.items refers to '#x'"),
    ],
)
def test_what_is_no_schema_is_named_with_its_place(part, message):
    with pytest.raises(UserError, match=message):
        Tools.of([{"name": "f", "parameters": {"type": "object", "properties": {"x": part}}}])


# ---- references


def test_references_are_written_out():
    place = {"type": "object", "properties": {"lat": {"type": "number"}}}
    schema = {
        "$defs": {"Place": place, "a/b": {"type": "integer"}},
        "definitions": {"Old": {"$ref": "#/$defs/Place"}},
        "properties": {
            "to": {"$ref": "#/$defs/Place", "description": "Where to"},
            "by": {"type": "array", "items": {"$ref": "#/definitions/Old"}},
            "count": {"$ref": "#/$defs/a~1b"},
            "same": {"$ref": "#/properties/to"},
            "$ref": {"type": "string"},  # a property of that name
            "shown": {"default": {"$ref": "#/nowhere"}},  # a value is no schema
        },
    }
    tools = Tools.of([{"name": "f", "parameters": schema}])
    there = place | {"description": "Where to"}
    assert tools.parameters("f") == {
        "type": "object",
        "properties": {
            "to": there,
            "by": {"type": "array", "items": place},
            "count": {"type": "integer"},
            "same": there,
            "$ref": {"type": "string"},
            "shown": {"default": {"$ref": "#/nowhere"}},
        },
    }


def test_a_reference_back_into_itself_allows_its_type():
    node = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}}
    tools = Tools.of([{"name": "f", "parameters": {"$ref": "#/$defs/Node", "$defs": {"Node": node}}}])
    kids = {"type": "array", "items": {"type": "object"}}
    assert tools.parameters("f") == {"type": "object", "properties": {"kids": kids}}
    root = Tools.of([{"name": "f", "parameters": {"type": "object", "properties": {"inner": {"$ref": "#"}}}}])
    inner = {"type": "object", "properties": {"inner": {"type": "object"}}}
    assert root.parameters("f")["properties"]["inner"] == inner
    alone = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    assert Tools.of([{"name": "f", "parameters": alone}]).parameters("f") == {"type": "object"}


@pytest.mark.parametrize("places", [("x", "y"), ("x",)], ids=["wide", "deep"])
def test_references_that_never_end_are_refused(places):
    """Two references to the one before, forty times, are 2^40 parts; one, a thousand times, is a thousand levels."""
    definitions = {"d0": {"type": "string"}}
    for level in range(1, 40 if len(places) > 1 else 1000):
        part = {"$ref": f"#/$defs/d{level - 1}"}
        definitions[f"d{level}"] = {"type": "object", "properties": dict.fromkeys(places, part)}
    schema = {"$defs": definitions, "properties": {"x": {"$ref": f"#/$defs/d{len(definitions) - 1}"}}}
    with pytest.raises(UserError, match=r"f.parameters has more than .* make it smaller"):
        Tools.of([{"name": "f", "parameters": schema}])


# ---- what the template would drop


PLAIN = [
    {"type": "string"},
    {"type": "string", "description": "A", "enum": ["a", "b"], "nullable": True},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "description": "A"},
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "number"}}, "minProperties": 1}},
    {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}},
    {"type": ["string", "null"], "description": "A"},  # a list of types is rendered
    {"type": "array", "items": {"type": ["string", "null"]}},
    {"type": "object"},
    {"type": "array"},
    {},
]


@pytest.mark.parametrize("schema", PLAIN)
def test_what_the_template_renders_stays_as_it_is(schema):
    assert told({"x": schema})["x"] == schema


@pytest.mark.parametrize(
    "schema, expected",
    [
        ({"anyOf": [STRING, {"type": "null"}]}, STRING | {"nullable": True}),
        ({"anyOf": [{"type": "null"}, STRING], "title": "A", "default": None}, STRING | {"nullable": True}),
        ({"oneOf": [{"type": "null"}]}, {"type": "null"}),
        (
            {"anyOf": [STRING | {"description": "one"}, {"type": "array"}], "description": "A"},
            STRING | {"description": 'A (anyOf: [{"type": "string", "description": "one"}, {"type": "array"}])'},
        ),
        (
            {"allOf": [{"properties": {"a": {}}}, {"properties": {"a": STRING, "b": {"const": 1}}, "required": ["b"]}]},
            {
                "type": "object",
                "properties": {"a": {"type": "string"}, "b": {"type": "integer", "description": "(enum: [1])"}},
                "required": ["b"],
            },
        ),
        ({"anyOf": [{"anyOf": [{"type": "null"}, {"type": "boolean"}]}]}, {"type": "boolean", "nullable": True}),
        ({"oneOf": [{"const": "a"}, {"enum": ["b", "c"]}]}, {"type": "string", "enum": ["a", "b", "c"]}),
        ({"type": ["string", "null"], "enum": ["a", None]}, {"type": "string", "enum": ["a"], "nullable": True}),
        (
            {"type": ["string", "integer"], "enum": ["a", 1]},
            {"type": "string", "enum": ["a", 1], "description": '(type: ["string", "integer"])'},
        ),
        (
            {"type": ["null", "object"], "properties": {"a": {"type": ["array", "null"], "items": {"type": "string"}}}},
            {
                "type": "object",
                "nullable": True,
                "properties": {"a": {"type": "array", "nullable": True, "items": {"type": "string"}}},
            },
        ),
        ({"type": "STRING"}, {"type": "string"}),
        ({"type": ["string"]}, {"type": "string"}),
        ({"enum": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
        ({"const": "a"}, {"type": "string", "enum": ["a"]}),
        ({"enum": [1, 2], "type": "integer"}, {"type": "integer", "description": "(enum: [1, 2])"}),
        ({"properties": {"a": True}}, {"type": "object", "properties": {"a": {}}}),
        (
            {"type": "integer", "minimum": 1, "default": 0, "description": "A"},
            {"type": "integer", "description": "A (minimum: 1, default: 0)"},
        ),
        (
            {"type": "object", "additionalProperties": {"type": "string"}},
            {"type": "object", "description": '(additionalProperties: {"type": "string"})'},
        ),
        ({"type": "object", "properties": {}, "additionalProperties": False}, {"type": "object", "properties": {}}),
        ({"type": "array", "items": [STRING]}, {"type": "array", "description": '(items: [{"type": "string"}])'}),
        (
            {"type": "array", "items": {"properties": {"a": {"const": "b"}}}},
            {"type": "array", "items": {"properties": {"a": STRING | {"enum": ["b"]}}}},
        ),
        (False, {"description": "(not: {})"}),
        ({"type": "string", "enum": None, "description": None, "pattern": None}, {"type": "string"}),
    ],
)  # fmt: skip
def test_what_the_template_would_drop_is_told(schema, expected):
    assert told({"x": schema})["x"] == expected


def test_what_parameters_say_beside_their_properties_is_told_with_the_tool():
    either = [{"required": ["a"]}, {"required": ["b"]}]
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": either, "additionalProperties": False}
    [tool] = Tools.of([{"name": "f", "description": "Does it.", "parameters": schema}]).schemas
    assert tool["function"] == {
        "name": "f",
        "description": f"Does it. (anyOf: {json.dumps(either)})",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    assert Tools.of([{"name": "f", "parameters": schema}]).parameters("f") == schema


NAMES = st.sampled_from(["alpha", "beta", "properties", "type", "$ref", "anyOf"])
SCALARS = st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")])
ODD = st.sampled_from([{}, True, {"enum": ["one", 2, None]}, {"const": "only"}, {"type": ["string", "null"]}])
SCHEMAS = st.recursive(
    SCALARS | ODD,
    lambda part: st.one_of(
        st.fixed_dictionaries({"anyOf": st.lists(part, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"allOf": st.lists(part, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"oneOf": st.lists(part, min_size=1, max_size=2), "description": st.just("said")}),
        st.fixed_dictionaries({"type": st.just("array"), "items": part, "minItems": st.just(7)}),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["object", ["object", "null"]]), "properties": st.dictionaries(NAMES, part)}
        ),
    ),
    max_leaves=8,
)


def words(schema) -> set[str]:
    """The types, values, names and descriptions that a schema speaks of, null apart."""
    if not isinstance(schema, dict):
        return set()
    found = set(schema.get("properties", ()))
    for part in [*schema.get("properties", {}).values(), schema.get("items")]:
        found |= words(part)
    for key in ("anyOf", "allOf", "oneOf"):
        found |= {word for part in schema.get(key, ()) for word in words(part)}
    kinds = schema.get("type", [])
    values = [schema.get("const"), schema.get("description"), schema.get("minItems"), *schema.get("enum", ())]
    return found | {str(each) for each in [*([kinds] if isinstance(kinds, str) else kinds), *values]} - {"None", "null"}


@settings(max_examples=300, deadline=None)
@given(schema=SCHEMAS)
def test_nothing_is_lost(schema):
    """Every type, value and description of any schema is somewhere in what the template is given."""
    there = json.dumps(told({"x": schema}))
    assert not [word for word in words(schema) if word not in there]


KEYS = ["type", "properties", "items", "anyOf", "allOf", "oneOf", "enum", "const", "required", "$ref", "$defs", "a"]
MORE = ["additionalProperties", "description", "nullable", "prefixItems", "not", "default", "patternProperties"]
KEYWORDS = st.sampled_from([*KEYS, *MORE])
WORDS = st.sampled_from([None, True, 0, 1.5, "string", "object", "null", "#", "#/$defs/a", "#/properties/a", "a", ""])
ANYTHING = st.recursive(WORDS, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYWORDS, part, max_size=4))


@settings(max_examples=1000, deadline=None)
@given(parameters=st.dictionaries(KEYWORDS, ANYTHING, max_size=4), arguments=ANYTHING)
def test_any_parameters_are_taken_or_refused(parameters, arguments):
    """No schema, however odd, raises anything but UserError, when it is taken or when a call is fitted to it."""
    try:
        tools = Tools.of([{"name": "f", "parameters": parameters}])
    except UserError:
        return
    assert Tools.of(tools.schemas).names == ("f",)  # what the template is given is a tool again
    written = json.dumps({"name": "f", "arguments": {"a": arguments}})
    [call] = read(written, tools, closed=True)
    assert call.name == "f" and call.arguments.keys() == {"a"}


def test_a_schema_as_deep_as_they_may_be():
    definitions = {"d0": {"type": "string"}}
    for level in range(1, 40):
        part = {"anyOf": [{"$ref": f"#/$defs/d{level - 1}"}, {"type": "null"}]}
        definitions[f"d{level}"] = {"type": "object", "properties": {"x": part}}
    tools = Tools.of(
        [{"name": "f", "parameters": {"$defs": definitions, "properties": {"x": {"$ref": "#/$defs/d30"}}}}]
    )
    [call] = read("call:f{x:" + "{x:" * 30 + "1" + "}" * 31, tools, closed=True)
    assert call.repaired == (f"x{'.x' * 30} was 1, it is text now",) and call.faults == ()


def test_the_bundled_template_renders_it():
    text = Text(hub.DEMO / "target", 4096)
    place = {"anyOf": [{"type": "object", "properties": {"lat": {"type": "number"}}}, {"type": "null"}]}
    tools = Tools.of(
        [{"name": "go", "description": "Go", "parameters": {"type": "object", "properties": {"to": place}}}]
    )
    prompt = text.tokenizer.decode(text.encode("hello", tools=tools.schemas))
    where = 'to:{nullable:true,properties:{lat:{type:<|"|>NUMBER<|"|>}},type:<|"|>OBJECT<|"|>}'
    assert f'declaration:go{{description:<|"|>Go<|"|>,parameters:{{properties:{{{where}}},' in prompt
