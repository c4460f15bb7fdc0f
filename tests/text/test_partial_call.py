"""Calls in pieces, as their tokens come: joined they are the call that the reply has, whatever the tokens are."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from effort import calls_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import CONTROL, Bytes
from test_tool_calls import KEYS, TOOLS, VALUES, Q, rendered

from mlx_gemma_mtp.text.reply import Reply
from mlx_gemma_mtp.text.tool_calls import read
from mlx_gemma_mtp.text.tools import ToolCall, Tools

GOOGLE, PLAIN = Bytes(), Bytes(CONTROL[:-1])  # the quote as a token, and as plain text
LINES = "if x[0] == \"}\":\n    print('\U0001f600 \\n')\n" * 3
FREE = Tools.of([{"name": "f"}])
WRITE = {"path": {"type": "string"}, "text": {"type": "string"}, "count": {"type": "integer"}}
WRITE |= {"also": {"anyOf": [{"type": "null"}, {"type": "string"}]}, "either": {"anyOf": [{"type": "integer"}]}}
TYPED = Tools.of([{"name": "f", "parameters": {"type": "object", "properties": WRITE}}])


class Told(NamedTuple):
    """What a reply gave away. pieces: of each call's JSON, by its id. calls: those that are whole."""

    text: str
    pieces: dict[str, list[str]]
    calls: list[ToolCall]

    @property
    def joined(self) -> list[str]:
        """The JSON of each call."""
        return ["".join(each) for each in self.pieces.values()]


def told(reply: str, tools: Tools = FREE, ended: bool = True, vocabulary: Bytes = GOOGLE) -> Told:
    return told_of(vocabulary.reply(tools), vocabulary.encode(reply), ended)


def told_of(stream: Reply, tokens: list[int], ended: bool = True) -> Told:
    """Fails where a call's pieces are not those of its JSON, or come after it."""
    found, whole = Told("", {}, []), set()
    for piece in [*map(stream.push, tokens), stream.finish(ended)]:
        for delta in piece.call_deltas:
            assert delta.json and delta.id not in whole
            found.pieces.setdefault(delta.id, []).append(delta.json)
        whole |= {call.id for call in piece.tool_calls}
        found = found._replace(text=found.text + piece.text, calls=[*found.calls, *piece.tool_calls])
    for call in found.calls:
        assert "".join(found.pieces[call.id]) == call.json == json.dumps(call.arguments, ensure_ascii=False)
    assert len(found.pieces) - len(found.calls) in (0, 1) if not ended else found.pieces.keys() == whole
    return found


@pytest.mark.parametrize("vocabulary", [GOOGLE, PLAIN], ids=["token", "plain"])
@pytest.mark.parametrize("tools", [FREE, TYPED], ids=["free", "typed"])
def test_a_long_string_comes_as_it_is_made(tools, vocabulary):
    reply = f"<|tool_call>call:f{{count:3,path:{Q}a.py{Q},text:{Q}{LINES}{Q}}}<tool_call|>Done."
    found = told(reply, tools, vocabulary=vocabulary)
    [pieces] = found.pieces.values()
    assert pieces[0].startswith('{"count": 3, "path": "a.py", "text": "if x[0] == \\"}\\":\\n ')
    assert len(pieces) > 40 and max(map(len, pieces[1:])) < 20
    assert found.calls == [ToolCall("f", {"count": 3, "path": "a.py", "text": LINES})] and found.text == "Done."


EDITS = {"type": "object", "properties": {"at": {"type": "integer"}, "new": {"type": "string"}}}
NESTED = {"edits": {"type": "array", "items": EDITS}, "names": {"type": "array", "items": {"type": "string"}}}
NESTED |= {"counts": {"type": "array", "items": {"type": "integer"}}, "more": {"additionalProperties": EDITS}}
NESTED |= {"pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}}
NESTED |= {"maybe": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}}
DEEP = Tools.of([{"name": "f", "parameters": {"type": "object", "properties": NESTED}}])
X, Y = "x" * 40, "y" * 40


@pytest.mark.parametrize("vocabulary", [GOOGLE, PLAIN], ids=["token", "plain"])
@pytest.mark.parametrize("tools", [FREE, DEEP], ids=["free", "typed"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ["a", LINES]},
        {"edits": [{"at": 5, "new": LINES}]},
        {"edits": [{"at": 2, "new": "x"}, {"at": 3, "new": LINES}]},
        {"more": {"k": {"at": [[], {}, ""], "new": LINES}}, "n": [None]},
        {"edits": [], "names": ["a"], "pair": [4, LINES]},
        {"e": {}, "edits": [], "names": [], "x": {"y": {"z": [[LINES]]}}},
    ],
)
def test_a_long_string_within_another_argument_comes_as_it_is_made(arguments, tools, vocabulary):
    found = told(f"<|tool_call>call:f{rendered(arguments)}<tool_call|>Done.", tools, vocabulary=vocabulary)
    [pieces] = found.pieces.values()
    assert 32 < len(pieces[0]) < 100 and len(pieces) > 40 and max(map(len, pieces[1:])) < 40
    assert [call.arguments for call in found.calls] == [arguments] and found.text == "Done."


def test_every_long_string_of_a_list_comes_as_it_is_made():
    arguments = {"edits": [{"at": i + 2, "new": f"{i}{LINES}"} for i in range(4)], "names": [LINES, LINES]}
    found = told(f"<|tool_call>call:f{rendered(arguments)}<tool_call|>", DEEP)
    [pieces] = found.pieces.values()
    assert len(pieces) > 6 * 40 and max(map(len, pieces[1:])) < 40 and found.calls == [ToolCall("f", arguments)]


@pytest.mark.parametrize(
    "written, arguments, live",
    [
        (f"counts:[{Q}{'1' * 40}{Q},{Q}z{Q}]", {"counts": [int("1" * 40), "z"]}, False),
        (f"maybe:[{Q}{X}{Q},{Q}7{Q}],names:[{Q}{X}{Q}],z:{Q}{Y}{Q}", {"maybe": [X, "7"], "names": [X], "z": Y}, True),
        (f"pair:[{Q}7{Q},{Q}7{Q},{Q}{X}{Q}]", {"pair": [7, "7", X]}, True),
        (f"edits:[{{at:{Q}7{Q},new:{Q}{X}{Q}}},{{new:{Q}7{Q}}}]", {"edits": [{"at": 7, "new": X}, {"new": "7"}]}, True),
    ],
)
def test_what_a_schema_changes_within_another_argument_waits(written, arguments, live):
    found = told(f"<|tool_call>call:f{{{written}}}<tool_call|>", DEEP)
    [pieces] = found.pieces.values()
    assert [call.arguments for call in found.calls] == [arguments] and (len(pieces) > 8) == live
    if "maybe" in arguments:
        assert pieces[0].startswith(f'{{"maybe": ["{X}", "7"], "names": ["{X}"], "z": "y')


@pytest.mark.parametrize(
    "end", ["", f"{Q}", f"{Q}]", f"{Q},{{b:", f"{Q}]}},a:1,a:2}}", f"{Q}}}]}}", "]}", f"{Q}],c:(}}"]
)
def test_whatever_ends_a_list_what_was_given_away_stays(end):
    found = told(f"<|tool_call>call:f{{a:{{b:[{Q}x{Q},{Q}{LINES}{end}<tool_call|>Done.")
    [call] = found.calls
    assert call.arguments["a"]["b"][0] == "x" and call.arguments["a"]["b"][1].startswith(LINES.rstrip())
    assert found.text == "Done." and (call.faults or call.repaired)
    cut = told(f"<|tool_call>call:f{{a:{{b:[{Q}x{Q},{Q}{LINES}{end}", ended=False)
    assert cut.text == "" and "".join(cut.joined).startswith('{"a": {"b": ["x", "if x[0]')


def test_what_is_short_comes_at_once():
    found = told(f"<|tool_call>call:f{{a:{Q}{'x' * 31}{Q},b:[{Q}{'x' * 31}{Q}]}}<tool_call|>")
    assert [len(each) for each in found.pieces.values()] == [1]


@pytest.mark.parametrize(
    "name, live",
    [("text", True), ("also", True), ("other", True), ("count", False), ("either", False)],
)
def test_a_string_that_may_become_another_value_waits(name, live):
    found = told(f"<|tool_call>call:f{{{name}:{Q}{'1' * 40}{Q},z:{Q}{'z' * 40}{Q}}}<tool_call|>", TYPED)
    [pieces] = found.pieces.values()
    assert (len(pieces) > 45) == live and pieces[0].startswith(f'{{"{name}": ' + ('"1' if live else "1"))


def test_a_call_that_is_cut_off_has_no_end():
    """Nor is it text, or a call that may be run."""
    for end in ("", "}", "\n]}", f"{Q},b", f"{Q}}}<"):
        found = told(f"<|tool_call>call:f{{a:{Q}{LINES}x{end}", ended=False)
        assert found.calls == [] and found.text == ""
        assert found.joined == [json.dumps({"a": LINES + "x"}, ensure_ascii=False)[: -1 if Q in end else -2]]
    found = told(f"<|tool_call>call:f{{a:{Q}short", ended=False)
    assert found.pieces == {} and found.text == f"<|tool_call>call:f{{a:{Q}short"


@pytest.mark.parametrize("end", ["}", "}\n", "\n}<tool_call|>", "}<tool_call|>more"])
def test_a_string_without_its_end_is_mended(end):
    found = told(f"<|tool_call>call:f{{a:{Q}{LINES}x{end}")
    [call] = found.calls
    assert call.arguments == {"a": LINES + "x" + "\n" * end.startswith("\n")} and not call.faults
    assert any("not closed" in each for each in call.repaired) and found.text == "more" * end.endswith("more")


@pytest.mark.parametrize(
    "end, arguments",
    [
        (f"{Q},b:", {}),
        (f"{Q},b:(}}", {"b": "("}),
        (f"{Q},b:1,b:2}}", {"b": 1}),
        (f"{Q} oops}}", None),
        (f"{Q}}} and {{", None),
        ("", None),
        ("<|channel>x<channel|>", None),
        (f"<|channel>x{Q},b:]}}", None),
    ],
)
def test_what_cannot_be_read_ends_what_was_given_away(end, arguments):
    found = told(f"<|tool_call>call:f{{a:{Q}{LINES}x{end}<tool_call|>Done.")
    [call] = found.calls
    assert call.arguments["a"].startswith(LINES + "x") and found.text == "Done."
    assert bool(call.faults) == (arguments is None or not arguments)
    assert {key: value for key, value in call.arguments.items() if key != "a"} == (arguments or {})


def test_calls_within_the_same_tokens():
    found = told(f"<|tool_call>call:f{{a:{Q}{LINES}{Q}}}, call:f{{b:{Q}{LINES}{Q}}}<tool_call|>")
    assert [call.arguments for call in found.calls] == [{"a": LINES}, {"b": LINES}]
    assert [len(each) > 1 for each in found.pieces.values()] == [True, False]


def test_a_control_token_in_a_string_waits_for_its_end():
    reply = f"<|tool_call>call:f{{a:{Q}{LINES}<|channel>thought\n"
    found = told(f"{reply}{LINES}{Q}}}<tool_call|>")
    assert found.calls == [ToolCall("f", {"a": f"{LINES}<|channel>thought\n{LINES}"})]
    found = told(f"{reply}hm<channel|>yes", ended=False)
    assert found.joined == [json.dumps({"a": LINES.rstrip()}, ensure_ascii=False)[:-2]] and found.calls == []


LONG = st.text(st.characters(exclude_categories=["Cs"]), min_size=20, max_size=60).filter(lambda text: "<" not in text)
BLANK = st.text(" \n\t]}\u2028x", min_size=25, max_size=60)


@settings(max_examples=50, deadline=None)
@given(arguments=st.dictionaries(KEYS, VALUES | LONG | BLANK, max_size=5), vocabulary=st.sampled_from([GOOGLE, PLAIN]))
@example(arguments={"a": "x" * 40, "b": {"c": ["d", {"e": "f" * 50}]}, "g": "y" * 40, "h": -1.5e-9}, vocabulary=PLAIN)
def test_what_the_template_writes_comes_whole(arguments, vocabulary):
    text = f"call:f{rendered(arguments)}"
    found = told(f"<|tool_call>{text}<tool_call|>", FREE, vocabulary=vocabulary)
    assert found.calls == read(text, FREE, closed=True) == [ToolCall("f", arguments)]


@settings(max_examples=50, deadline=None)
@given(data=st.data(), vocabulary=st.sampled_from([GOOGLE, PLAIN]))
def test_what_a_schema_changes_comes_whole(data, vocabulary):
    keys = st.sampled_from([*TOOLS.parameters("f")["properties"], "unknown"])
    strings = LONG | BLANK | st.sampled_from(["1", "true", "null", "[1,2]", "low", " 7 " + " " * 40, "9" * 40])
    arguments = data.draw(st.dictionaries(keys, VALUES | strings, max_size=5))
    text = f"call:f{rendered(arguments)}"
    expected = read(text, TOOLS, closed=True)
    assert told(f"<|tool_call>{text}<tool_call|>", TOOLS, vocabulary=vocabulary).calls == expected


PIECES = [*CONTROL, "call:f{", "a:", ",", "b:", "text:", "{", "}", "[", "]", "1", "word", " ", "\n", '"', "é😀" * 20]
PIECES += ["a:[", "b:{", f"[{Q}{LINES}", f"{{b:{Q}{LINES}", "},{", "],", f"{Q},{Q}", f"{Q},b:{Q}"]
PIECES += ["x" * 40, f"{Q}{LINES}{Q}", f"a:{Q}{LINES}", f"<|tool_call>call:f{{a:{Q}{LINES}{Q},"]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PIECES), max_size=20),
    begun=st.booleans(),
    ended=st.booleans(),
    tools=st.sampled_from([FREE, TYPED, TOOLS, DEEP]),
    vocabulary=st.sampled_from([GOOGLE, PLAIN]),
)
def test_whatever_comes_the_pieces_are_the_calls(parts, begun, ended, tools, vocabulary):
    """Rules of `told_of`; what has no end is the beginning of JSON."""
    found = told(f"<|tool_call>call:f{{text:{Q}" * begun + "".join(parts), tools, ended, vocabulary)
    if len(found.pieces) > len(found.calls):
        last = found.joined[-1]
        assert _begins(last)


def _begins(text: str) -> bool:
    """Whether a text is the beginning of a JSON object, up to an element's end or amid a string."""
    closers, in_string, escaped = [], False, False
    for each in text:
        if in_string:
            escaped, in_string = each == "\\" and not escaped, each != '"' or escaped
        elif each == '"':
            in_string = True
        elif each in "{[":
            closers.append("}" if each == "{" else "]")
        elif each in "}]" and (not closers or closers.pop() != each):
            return False
    return _is_json(text + '"' * in_string + "".join(reversed(closers)))


def _is_json(text: str) -> Any:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def valued(schema: Any) -> st.SearchStrategy[Any]:
    """Values for a schema, and others."""
    strings = LONG | BLANK | st.sampled_from(["1", "true", "[1,2]", "9" * 40, "", '"\\'])
    if not isinstance(schema, dict) or "anyOf" in schema or schema.get("type") == "string":
        return strings | VALUES
    if schema.get("type") == "array":
        return st.lists(valued(schema.get("items")), max_size=3) | strings
    if "properties" in schema or "additionalProperties" in schema:
        parts = {key: valued(part) for key, part in schema.get("properties", {}).items()}
        others = st.dictionaries(KEYS, valued(schema.get("additionalProperties")), max_size=2)
        return st.builds(lambda some, more: more | some, st.fixed_dictionaries({}, optional=parts), others)
    return strings | st.integers()


@settings(max_examples=150, deadline=None)
@given(
    arguments=valued({"properties": NESTED}),
    tools=st.sampled_from([FREE, DEEP]),
    vocabulary=st.sampled_from([GOOGLE, PLAIN]),
)
def test_what_lies_in_others_comes_whole(arguments, tools, vocabulary):
    text = f"call:f{rendered(arguments)}"
    expected = read(text, tools, closed=True)
    assert told(f"<|tool_call>{text}<tool_call|>", tools, vocabulary=vocabulary).calls == expected


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(0, 300), max_size=40), places=st.lists(st.integers(0, 90), max_size=6))
def test_any_tokens_are_taken(tokens, places):
    ids = GOOGLE.encode(f"<|tool_call>call:f{{a:{Q}{LINES}{Q},b:1,c:{Q}{LINES}{Q}}}<tool_call|>")
    for place, token in zip(places, tokens, strict=False):
        ids.insert(place, token)
    told_of(GOOGLE.reply(FREE), ids + tokens)


UNITS = [
    f"{Q},{Q}",
    f"{Q}]}},{{a:[{Q}",
    f"{Q},maybe:[{Q}{X}{Q}],b:{Q}",
    "x",
    " ",
    "}",
    f"{Q},a:{Q}",
    f"{Q},a:[{Q}",
    f"{Q},{Q}",
    f",b:{Q}x{Q}",
    "\\",
    "<|",
    "<|channel>",
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("tools", [FREE, TYPED], ids=["free", "typed"])
def test_work_grows_with_the_tokens_alone(unit, tools):
    def calls(count: int) -> int:
        tokens, stream = GOOGLE.encode(f"<|tool_call>call:f{{a:{Q}{LINES}" + unit * count), GOOGLE.reply(tools)
        return calls_of(lambda: [*map(stream.push, tokens), stream.finish()])

    assert calls(200) <= 2 * calls(100) + 100
