"""Calls by grammar: what a tool's schema allows and refuses in Gemma's call syntax. Needs extra `grammar`."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("llguidance")

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.files.hub import DEMO
from mlx_gemma_mtp.speculative.guide import allows
from mlx_gemma_mtp.text.grammar import Grammar, Grammars
from mlx_gemma_mtp.text.tool_calls import CALL_CLOSE as CALL_END
from mlx_gemma_mtp.text.tool_calls import CALL_OPEN as CALL
from mlx_gemma_mtp.text.tool_calls import QUOTE, read
from mlx_gemma_mtp.text.tool_grammar import Marks
from mlx_gemma_mtp.text.tools import Tools

ENDS, VOCAB = [1, 6], 4160


class Kit:
    """A tokenizer, and calls bound by its grammars."""

    def __init__(self, quote: bool):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "target" / "tokenizer.json"))
        if quote:
            self.tokenizer.add_tokens([AddedToken(QUOTE, special=True)])
        known = self.tokenizer.get_vocab()
        self.marks = Marks(known[CALL], known[CALL_END], known.get(QUOTE))
        self.grammars = Grammars(self.tokenizer, VOCAB, ENDS)

    def grammar(self, *tools: dict) -> Grammar:
        """One call of one of the tools."""
        asked = Tools.of(tools)
        return self.grammars.calls(asked, asked.names, self.marks)

    def refused(self, text: str, *tools: dict) -> str | None:
        """What of a text the grammar of one call refuses, None where it is a whole call."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        grammar = self.grammar(*tools)
        for i, token in enumerate([*ids, ENDS[0]]):
            if not allows(grammar.mask(), token):
                return self.tokenizer.decode(ids[i:])
            grammar.advance(token)
        return None


@pytest.fixture(scope="module", params=[True, False], ids=["quote token", "quote of plain text"])
def kit(request):
    return Kit(request.param)


def tool(name: str, parameters: dict | None, strict: bool = False) -> dict:
    return {"name": name, "parameters": parameters, "strict": strict}


def thing(**properties) -> dict:
    return {"type": "object", "properties": properties}


def call(arguments: str, name: str = "f") -> str:
    """A call with arguments in which ' stands for the quote token."""
    return f"{CALL}call:{name}{arguments}{CALL_END}".replace("'", QUOTE)


NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
POINT = thing(x={"type": "integer"}, y={"type": "integer"})
MIXED = thing(a={"enum": ["x", "y z", 3, None, True, [1, "q"], {"k": "v"}, ""]})
LEAST_ONE = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}
PAIR = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}
# Parameters, calls that they allow, calls that they refuse.
SCHEMAS = {
    "no parameters": (None, ["{}"], ["{a:1}", ""]),
    "empty": ({}, ["{}"], ["{a:1}"]),
    "an object without properties": ({"type": "object"}, ["{}"], ["{a:1}"]),
    "any properties": (
        {"type": "object", "additionalProperties": True},
        ["{}", "{a:1,b:{c:['x',null,-1.5e3,[]],d:{}},a-b:''}"],
        ["{a}", "{a:}", "{a:x}", "{a: 1}", "{a:'x}"],
    ),
    "types": (
        thing(b={"type": "boolean"}, i={"type": "integer"}, n={"type": "number"}, s={"type": "string"}),
        ["{b:true,i:-5,n:2.5,s:'a \"b\" {c}, d: \\n'}", "{s:''}", "{}", "{i:5}", "{b:false,s:'x'}"],
        ["{b:1}", "{i:'5'}", "{i:2.5}", "{i:05}", "{s:x}", "{n:true}", "{s:'',b:true}", "{z:1}", "{i:5,}", "{,i:5}"],
    ),
    "types as OpenAPI writes them": (thing(s={"type": "STRING"}), ["{s:'1'}"], ["{s:1}"]),
    "required": (POINT | {"required": ["y"]}, ["{y:1}", "{x:1,y:2}"], ["{}", "{x:1}"]),
    "required and unknown": (
        {"type": "object", "required": ["z"]},
        ["{z:1}", "{z:{a:'b'}}"],
        ["{}", "{b:2}", "{z:1,b:2}"],
    ),
    "order": (thing(b={}, A={}, c={}), ["{A:1,b:2,c:3}", "{A:1,c:3}"], ["{b:2,A:1}"]),
    "enum": (MIXED, [f"{{a:{v}}}" for v in ("'y z'", "3", "null", "true", "[1,'q']", "{k:'v'}", "''")], ["{a:'z'}"]),
    "const": (thing(a={"const": "x"}), ["{a:'x'}"], ["{a:'y'}", "{a:''}"]),
    "union types": (thing(a={"type": ["string", "null"]}), ["{a:null}", "{a:'null'}"], ["{a:1}"]),
    "nullable": (thing(a={"type": "string", "nullable": True}), ["{a:null}", "{a:'x'}"], ["{a:1}"]),
    "anyOf": (
        thing(a={"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}], "description": "d"}),
        ["{a:3}", "{a:null}"],
        ["{a:2}", "{a:'3'}"],
    ),
    "anyOf of keys": (
        thing(a=POINT | {"anyOf": [{"required": ["x"]}, {"required": ["y"]}]}),
        ["{a:{y:1}}"],
        ["{a:{}}"],
    ),
    "oneOf": (thing(a={"oneOf": [{"const": "x"}, {"const": "y"}]}), ["{a:'x'}", "{a:'y'}"], ["{a:'z'}"]),
    "bounds": (thing(a={"type": "integer", "minimum": -3, "maximum": 12}), ["{a:-3}", "{a:12}"], ["{a:-4}", "{a:13}"]),
    "exclusive bounds": (
        thing(a={"type": "number", "minimum": 0, "exclusiveMinimum": True}),
        ["{a:0.5}", "{a:3}"],
        ["{a:0}", "{a:-1}"],
    ),
    "bounds in parts": (
        thing(a={"allOf": [{"type": "integer", "minimum": 1}, {"minimum": 3, "maximum": 5}, {"maximum": 9}]}),
        ["{a:3}", "{a:5}"],
        ["{a:2}", "{a:6}"],
    ),
    "numbers that no reader holds": (
        thing(a={"type": "number"}, b={}, i={"type": "integer"}),
        ["{a:-12.5e+20}", "{a:1E-99}", "{b:0}", f"{{i:{'9' * 60}}}"],
        ["{a:1e400}", "{b:7E0344713}", f"{{i:{'9' * 61}}}", f"{{a:{'9' * 61}}}"],
    ),
    "multiples": (thing(a={"type": "integer", "multipleOf": 7}), ["{a:14}"], ["{a:15}"]),
    "lengths": (
        thing(a={"type": "string", "minLength": 2, "maxLength": 3}),
        ["{a:'ab'}", "{a:'abc'}"],
        ["{a:''}", "{a:'a'}", "{a:'abcd'}"],
    ),
    "no length": (thing(a={"type": "string", "maxLength": 0}), ["{a:''}"], ["{a:'a'}"]),
    "a whole pattern": (
        thing(a={"type": "string", "pattern": "^[a-c/]*$"}),
        ["{a:'ab/c'}", "{a:''}"],
        ["{a:'abd'}", "{a:'A'}"],
    ),
    "a pattern within": (thing(a={"type": "string", "pattern": "b+\\$"}), ["{a:'axbb$x'}"], ["{a:'axb'}", "{a:''}"]),
    "a pattern of alternatives": (
        thing(a={"type": "string", "pattern": "^(a|b(c|d))$"}),
        ["{a:'a'}", "{a:'bd'}"],
        ["{a:''}", "{a:'ab'}", "{a:'b'}"],
    ),
    "bounds as floats": (thing(a={"type": "string", "maxLength": 2.0}), ["{a:'ab'}"], ["{a:'abc'}"]),
    "a pattern and a length": (
        thing(a={"type": "string", "pattern": "^a+", "maxLength": 3}),
        ["{a:'a'}", "{a:'aab'}"],
        ["{a:'b'}", "{a:'aaaa'}", "{a:''}"],
    ),
    "lists": (thing(a=LEAST_ONE), ["{a:[1]}", "{a:[1,2]}"], ["{a:[]}", "{a:[1,2,3]}", "{a:['x']}", "{a:[1,]}"]),
    "lists of one": (thing(a=LEAST_ONE | {"maxItems": 1}), ["{a:[1]}"], ["{a:[]}", "{a:[1,1]}"]),
    "empty lists": (thing(a={"type": "array", "maxItems": 0}), ["{a:[]}"], ["{a:[1]}"]),
    "lists of anything": (thing(a={"type": "array"}), ["{a:[]}", "{a:[1,'x',{}]}"], ["{a:[1 2]}"]),
    "tuples": (thing(a=PAIR | {"items": False}), ["{a:[]}", "{a:[1]}", "{a:[1,'x']}"], ["{a:['x']}", "{a:[1,'x',2]}"]),
    "tuples and more": (thing(a=PAIR | {"minItems": 3}), ["{a:[1,'x',2]}", "{a:[1,'x',2,3]}"], ["{a:[1,'x']}"]),
    "other keys": (
        thing(a={"type": "integer"}) | {"additionalProperties": {"type": "string"}},
        ["{a:1,my-x:'y'}", "{b:'y',c:'z'}", "{}"],
        ["{a:'y'}", "{b:1}", "{a:1,a:'x'}"],
    ),
    "odd keys": (
        thing(**{"my key": {"type": "integer"}, "a:b": {}, "x/ä": {}}),
        ["{'a:b':1,'my key':1,x/ä:2}"],
        ["{my key:1}", "{a:b:1}", "{'x/ä':2}"],
    ),
    "references": (
        thing(n={"$ref": "#/$defs/node"}) | {"$defs": {"node": NODE}},
        ["{n:{}}", "{n:{next:{next:{v:3},v:'from here on anything'},v:1}}"],
        ["{n:{next:1}}", "{n:{v:'x'}}"],
    ),
    "a reference alone": ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, ["{x:1}"], ["{z:1}"]),
    "allOf": (
        thing(a={"allOf": [{"$ref": "#/$defs/p"}, {"required": ["y"]}]}) | {"$defs": {"p": POINT}},
        ["{a:{x:1,y:2}}", "{a:{y:2}}"],
        ["{a:{x:1}}", "{a:{}}"],
    ),
    "nothing may stand there": (
        thing(a=False, b={"not": {}}, c={"enum": []}, d={"anyOf": [False, {"type": "integer"}]}, e={"anyOf": [False]}),
        ["{d:1}", "{}"],
        ["{a:1}", "{b:1}", "{c:1}", "{d:'x'}", "{e:1}"],
    ),
    "lists of nothing": (
        thing(a={"type": "array", "items": {"not": {}}}, b={"type": "array", "prefixItems": [{}, False, {}]}),
        ["{a:[],b:[]}", "{b:[1]}"],
        ["{a:[1]}", "{b:[1,2]}", "{b:[1,2,3]}"],
    ),
    "an enum beside a type": (
        thing(a={"type": ["string", "integer"], "enum": ["x", 1, True]}, b={"type": "string", "enum": ["y", None]}),
        ["{a:'x'}", "{a:1}", "{b:null}"],
        ["{a:true}"],
    ),
    "an enum of floats that are whole": (thing(a={"type": "integer", "enum": [1.0, 2]}), ["{a:1.0}", "{a:2}"], []),
    "an enum of another type": (thing(a={"type": "integer", "enum": ["1", "2"]}), ["{a:'1'}"], ["{a:1}"]),
    # What cannot be said allows more.
    "a type beside what cannot be said": (
        thing(a={"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}),
        ["{a:'zz'}"],
        ["{a:1}"],
    ),
    "not": (thing(a={"not": {"type": "null"}}), ["{a:null}", "{a:1}"], ["{b:1}"]),
    "looking ahead": (thing(a={"type": "string", "pattern": "(?=x)a"}), ["{a:'zz'}"], ["{a:1}"]),
    "anchors within": (thing(a={"type": "string", "pattern": "^a|b$"}), ["{a:'zz'}"], ["{a:1}"]),
    "what contradicts itself": (
        thing(a={"allOf": [{"type": "string"}, {"type": "null"}]}, b={"type": "null"}),
        ["{a:1,b:null}"],
        ["{b:1}"],
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_allow_and_refuse(kit, name):
    parameters, allowed, refused = SCHEMAS[name]
    asked = tool("f", parameters)
    assert {each: kit.refused(call(each), asked) for each in allowed} == dict.fromkeys(allowed)
    assert [each for each in refused if kit.refused(call(each), asked) is None] == []


def test_a_call_is_of_one_of_the_tools(kit):
    """Names may begin alike, and hold what names of tools hold elsewhere."""
    names = ["get", "get_time", "a-b__c", "google-workspace:calendar.list"]
    tools = [tool(name, thing(**{f"p{i}": {"type": "integer"}})) for i, name in enumerate(names)]
    for i, name in enumerate(names):
        assert kit.refused(call(f"{{p{i}:1}}", name), *tools) is None
        assert kit.refused(call(f"{{p{(i + 1) % 4}:1}}", name), *tools) is not None
    for text in (call("{}", "got"), call("{}", ""), "call:get{}", call("{}") + "x", f"{CALL}{CALL_END}"):
        assert kit.refused(text, *tools) is not None


def test_control_tokens_are_no_text(kit):
    asked = tool("f", thing(a={"type": "string"}))
    assert kit.refused(call("{a:'<turn|>'}"), asked) is not None
    if kit.marks.quote is not None:  # spelled by other tokens they are text
        spelled = [kit.tokenizer.convert_tokens_to_ids(c) for c in "<turn|>"]
        grammar = kit.grammar(asked)
        head = kit.tokenizer.encode(f"{CALL}call:f{{a:{QUOTE}", add_special_tokens=False)
        tail = kit.tokenizer.encode(f"{QUOTE}}}{CALL_END}", add_special_tokens=False)
        for token in [*head, *spelled, *tail]:
            assert allows(grammar.mask(), token)
            grammar.advance(token)


@pytest.mark.parametrize(
    "bad, message",
    [
        (thing(a={"not": {"type": "null"}}), "parameters.a has 'not'"),
        (thing(a=thing(b={"type": "array", "uniqueItems": True})), "parameters.a.b has 'uniqueItems'"),
        (thing(a={"type": "string", "pattern": "(?=x)a"}), "parameters.a has 'pattern'"),
        (thing(a={"type": "string", "pattern": "["}), "parameters.a has 'pattern'"),
        (thing(a={"type": "integer", "minimum": 5, "maximum": 3}), "parameters.a has 'minimum, maximum'"),
        (thing(a={"allOf": [{"pattern": "a"}, {"pattern": "b"}]}), "parameters.a has 'pattern'"),
        (thing(a={"allOf": [{"minimum": 1}, {"minimum": "2"}]}), "parameters.a has 'minimum'"),
        (thing(a={}) | {"required": ["b"], "additionalProperties": False}, "parameters has 'required'"),
    ],
)
def test_what_cannot_be_said_is_refused_where_the_tool_is_strict(bad, message):
    kit = Kit(True)
    kit.grammar(tool("f", bad))
    with pytest.raises(UserError) as raised:
        kit.grammar(tool("f", bad, strict=True))
    assert f"the tool 'f': {message}" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "bad, message",
    [
        (thing(a={"type": "array", "minItems": 3, "maxItems": 2}), "minItems 3 above maxItems 2"),
        (thing(a={"type": "string", "maxLength": -1}), "maxLength -1, expected a whole number"),
        (thing(a={"enum": []}) | {"required": ["a"]}, "parameters.a has no alternatives; no call satisfies that"),
        (thing(a={"anyOf": [False]}) | {"required": ["a"]}, "parameters.a has no alternatives"),
        (thing(a=thing(b=False) | {"required": ["b"]}) | {"required": ["a"]}, "parameters.a.b is false; no call"),
        (thing(a={"not": {}}) | {"required": ["a"]}, "parameters.a forbids everything; no call"),
        (
            thing(a={"type": "array", "items": False, "minItems": 1}) | {"required": ["a"]},
            "parameters.a has minItems",
        ),
    ],
)
def test_schemas_that_cannot_be_used(bad, message):
    with pytest.raises(UserError) as raised:
        Kit(True).grammar(tool("f", bad))
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_deep_schemas_are_bound():
    schema: dict = {"type": "null"}
    for _ in range(24):
        schema = thing(a=schema)
    kit, deep = Kit(True), tool("f", schema, strict=True)
    assert kit.refused(call("{a:" * 24 + "null" + "}" * 24), deep) is None
    assert kit.refused(call("{a:" * 23 + "null" + "}" * 23), deep) is not None


def test_deep_lists_are_bound_in_no_time():
    """Each part is looked at once: twice would be a million times here."""
    schema: dict = {"type": "null"}
    for _ in range(20):
        schema = {"type": "array", "items": schema, "description": "d"}
    kit, deep = Kit(True), tool("f", thing(a=schema), strict=True)
    assert kit.refused(call("{a:" + "[" * 20 + "null" + "]" * 20 + "}"), deep) is None


def drawn(rng: np.random.Generator, depth: int = 0) -> dict:
    """A schema of a value."""
    words = ["red", "a b", "", "{x:1}", "null"]
    makers = [
        lambda: {"type": "string", "maxLength": int(rng.integers(0, 5))},
        lambda: {"type": "integer", "minimum": int(rng.integers(-20, 5)), "maximum": int(rng.integers(5, 500))},
        lambda: {"type": ["boolean", "null"]},
        lambda: {"enum": [words[i] for i in rng.permutation(5)[: rng.integers(1, 4)]] + [int(rng.integers(10))]},
        lambda: {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    ]
    if depth < 3:
        makers += [
            lambda: {"type": "array", "items": drawn(rng, depth + 1), "maxItems": int(rng.integers(0, 4))},
            lambda: {"anyOf": [drawn(rng, depth + 1), {"type": "null"}]},
            lambda: drawn_object(rng, depth + 1),
        ]
    return makers[rng.integers(len(makers))]()


def drawn_object(rng: np.random.Generator, depth: int = 0) -> dict:
    names = [["path", "a b", "Size", "x.y", "k:v"][i] for i in rng.permutation(5)[: rng.integers(0, 4)]]
    required = [name for name in names if rng.random() < 0.5]
    return {"type": "object", "properties": {name: drawn(rng, depth) for name in names}, "required": required}


@pytest.mark.parametrize("seed", range(30))
def test_whatever_a_grammar_allows_is_read_as_a_call_that_fits(kit, seed):
    """A random walk through the grammar, with the schema's own strings among its steps."""
    rng = np.random.default_rng(seed)
    tools = Tools.of([tool(f"f{i}", drawn_object(rng), strict=True) for i in range(2)])
    grammar, tokens = kit.grammars.calls(tools, tools.names, kit.marks), []
    while not tokens or tokens[-1] != kit.marks.close:
        bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")[: len(kit.tokenizer)]
        (allowed,) = np.nonzero(bits)
        short = [token for token in (kit.marks.quote, kit.marks.close) if token in allowed]
        token = short[0] if short and rng.random() < 0.4 else int(rng.choice(allowed))
        grammar.advance(token)
        tokens.append(token)
    text = kit.tokenizer.decode(tokens[1:-1])
    (found,) = read(text, tools, closed=True)
    assert found.name in tools.names and found.repaired == found.faults == (), text
