"""Replies taken apart as their tokens come: text, thoughts and calls, whatever the tokens are."""

import json
from pathlib import Path

import chats
import pytest
from effort import calls_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import CONTROL, Bytes, Split, cut, split

from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.reply import NOTHING
from mlx_gemma_mtp.text.tools import Tools

CASES = json.loads((Path(__file__).parents[1] / "data" / "tool_calls.json").read_text())["cases"]
GOOGLE, PLAIN = Bytes(), Bytes(CONTROL[:-1])  # the quote of a call's strings as a token, and as plain text
NAMES = ("f", "bash", "get_weather", "server.tool", "files/read:all", "find-it")
TOOLS = Tools.of([{"name": name} for name in NAMES])
Q = '<|"|>'


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(hub.DEMO / "target", 4096)


def whole(reply: str, tools: Tools | None = TOOLS, stop: tuple[str, ...] = (), in_thought: bool = False) -> Split:
    """What both vocabularies of bytes make of a reply: the same."""
    google, plain = (split(each.reply(tools, stop, in_thought), each.encode(reply)) for each in (GOOGLE, PLAIN))
    assert google == plain
    return google


def expected(case: dict) -> Split:
    calls = [(call["name"], call["arguments"]) for call in case["calls"]]
    return Split(case["text"], case["reasoning"], calls)


def tools_of(case: dict) -> Tools:
    return Tools.of([{"name": name} for name in {call["name"] for call in case["calls"]} | {"another"}])


@pytest.fixture(scope="module")
def google(tmp_path_factory) -> Text:
    return chats.google_text(tmp_path_factory.mktemp("google") / "model")


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_what_gemma_writes(case):
    assert whole(case["reply"], tools_of(case)) == expected(case)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
@settings(max_examples=25, deadline=None)
@given(places=st.lists(st.integers(0, 200), max_size=30))
@example(places=[])
@example(places=list(range(200)))
def test_however_it_is_cut(text, google, case, places):
    """The bundled vocabulary, and Google's with its token for quotes: their tokens cut anywhere."""
    for each in (text, google):
        assert split(each.stream((), tools_of(case)), cut(each, case["reply"], places)) == expected(case)


@pytest.mark.parametrize(
    "reply, text, reasoning, calls",
    [
        # names
        (f"<|tool_call>call:server.tool{{a:{Q}x{Q}}}<tool_call|>", "", "", [("server.tool", {"a": "x"})]),
        ("<|tool_call>call:files/read:all{n:1}<tool_call|>", "", "", [("files/read:all", {"n": 1})]),
        ("<|tool_call>call:nobody_knows{n:1}<tool_call|>", "", "", [("nobody_knows", {"n": 1})]),
        # text on all sides
        ("<|tool_call>call:f{}<tool_call|> Done.", "Done.", "", [("f", {})]),
        ("A\n<|tool_call>call:f{}<tool_call|>\n\nb <|tool_call>call:f{}<tool_call|>", "Ab", "", [("f", {})] * 2),
        ("\n<|tool_call>call:f{}<tool_call|>\n", "", "", [("f", {})]),
        ("A.<|channel>thought\nb\n<channel|>\nC", "A.C", "b", []),
        ("<|channel>thought\nb\n<channel|>\n    indented", "    indented", "b", []),
        ("  spaced  ", "  spaced  ", "", []),
        # thoughts
        ("<|channel>thought<channel|>x", "x", "", []),
        ("<|channel>thought \nb<channel|>x", "x", "b", []),
        ("<|channel>no header<channel|>x", "x", "no header", []),
        ("<|channel>thoughtful<channel|>x", "x", "thoughtful", []),
        ("<|channel>analysis\nb<channel|>x", "x", "analysis\nb", []),
        ("<|channel>tho", "", "", []),
        ("<|channel>", "", "", []),
        ("<|channel>thought\na\n\n  b \n", "", "a\n\n  b", []),
        ("<|channel>thought\na<|channel>thought\nb<channel|>x", "x", "ab", []),
        ("<|channel>thought\na<channel|><channel|>x<channel|>y", "xy", "a", []),
        ("<|channel>thought\na<|tool_call>call:f{}<tool_call|><channel|>x", "x", "a", [("f", {})]),
        ("<|channel>thought\na<tool_call|>b<channel|>x", "x", "ab", []),
        # a call without its tokens
        (f"call:f{{a:{Q}}}{Q}}}", "", "", [("f", {"a": "}"})]),
        ("\ncall:f{}\ncall:f{a:{b:1}} and", "and", "", [("f", {}), ("f", {"a": {"b": 1}})]),
        ("call:f{}<tool_call|>", "", "", [("f", {})]),
        ("<|channel>thought\na<channel|>call:f{}call:f{}", "", "a", [("f", {})] * 2),
        ("I say call:f{}", "I say call:f{}", "", []),
        ("call:unknown{}", "call:unknown{}", "", []),
        ("call: me", "call: me", "", []),
        ("cal", "cal", "", []),
        ("call:f{this is} prose} and more", "call:f{this is} prose} and more", "", []),
        (f"call:f{{a:{Q}x", f"call:f{{a:{Q}x", "", []),
        # the end is missing, or something else comes
        ("<|tool_call>call:f{a:1}<|tool_call>call:f{b:2}<tool_call|>", "", "", [("f", {"a": 1}), ("f", {"b": 2})]),
        ("<|tool_call>call:f{a:1}<|channel>thought\nx<channel|>y", "y", "x", [("f", {"a": 1})]),
        ("<|tool_call>call:f{a:1", "<|tool_call>call:f{a:1", "", []),
        ("a <|tool_call>", "a <|tool_call>", "", []),
        ("<|tool_call>I will<tool_call|> see", "<|tool_call>I will<tool_call|> see", "", []),
        ("<|tool_call><tool_call|>x", "<|tool_call><tool_call|>x", "", []),
        ("<|tool_call>:call:f{a:1}", "", "", [("f", {"a": 1})]),
        ("<|tool_call>call:f(a:1)<tool_call|>x", "x", "", [("f", {"a": 1})]),
        (
            f"<|tool_call>call:f{{a:'x'{Q}}}<tool_call|><|tool_call>call:f{{b:{Q}y{Q}}}<tool_call|>Done",
            "Done",
            "",
            [("f", {"a": "x"}), ("f", {"b": "y"})],
        ),
        # control tokens amid a string
        (f"<|tool_call>call:f{{a:{Q}b <tool_call|> c{Q}}}<tool_call|>", "", "", [("f", {"a": "b <tool_call|> c"})]),
        (
            f"<|tool_call>call:f{{a:{Q}<|channel>b<channel|><|tool_call>call:f{{}}<tool_call|>{Q}}}<tool_call|>ok",
            "ok",
            "",
            [("f", {"a": "<|channel>b<channel|><|tool_call>call:f{}<tool_call|>"})],
        ),
        (f"<|tool_call>call:f{{a:{Q}b}}<tool_call|>Then text.", "Then text.", "", [("f", {"a": "b"})]),
        (
            f"<|tool_call>call:f{{a:{Q}b}}<tool_call|><|tool_call>call:f{{a:{Q}c{Q}}}<tool_call|>",
            "",
            "",
            [("f", {"a": "b"}), ("f", {"a": "c"})],
        ),
        (
            f"<|tool_call>call:f{{a:{Q}b <tool_call|> and it is cut",
            f"<|tool_call>call:f{{a:{Q}b <tool_call|> and it is cut",
            "",
            [],
        ),
    ],
)  # fmt: skip
def test_every_kind(reply, text, reasoning, calls):
    assert whole(reply) == Split(text, reasoning, calls)


def test_without_tools_calls_stay_as_they_are():
    reply = f"Look:\n<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>\n"
    assert whole(reply, tools=None) == Split(reply, "", [])
    assert whole("call:f{} ", tools=None).text == "call:f{} "
    assert whole(f"<|channel>thought\nx<channel|>{reply}", tools=None) == Split(reply, "x", [])


@pytest.mark.parametrize(
    "reply, text, reasoning",
    [
        ("deep\n<channel|>An answer.", "An answer.", "deep"),
        ("thought\ndeep\n<channel|>An answer.", "An answer.", "deep"),  # where the prompt ends before the header
        ("<channel|>x", "x", ""),
        ("tho", "", "tho"),
        ("deep", "", "deep"),
        ("deep<|channel>thought\nb<channel|>x", "x", "deepb"),
    ],
)
def test_a_thought_that_the_prompt_opened(reply, text, reasoning):
    assert whole(reply, in_thought=True) == Split(text, reasoning, [])


def test_a_quote_is_a_token_where_the_vocabulary_has_one():
    """Then the same characters, spelled by other tokens, are text in a string."""
    ids = [*GOOGLE.encode(f"<|tool_call>call:f{{a:{Q}say "), *Q.encode(), *GOOGLE.encode(f" now{Q}}}<tool_call|>")]
    assert split(GOOGLE.reply(TOOLS), ids).calls == [("f", {"a": f"say {Q} now"})]
    spelled = [GOOGLE.ids["<|tool_call>"], *f"call:f{{a:{Q}x{Q}}}".encode(), GOOGLE.ids["<tool_call|>"]]
    assert split(GOOGLE.reply(TOOLS), spelled).calls == [("f", {"a": "x"})]


def test_control_strings_spelled_by_other_tokens_are_text():
    reply = "<|channel>thought\nx<channel|><|tool_call>call:f{}<tool_call|>"
    assert split(GOOGLE.reply(TOOLS), list(reply.encode())) == Split(reply, "", [])


# ---- stop strings


@pytest.mark.parametrize(
    "reply, stop, text, reasoning, calls, stopped",
    [
        ("<|channel>thought\nSTOP<channel|>aSTOPb", "STOP", "a", "STOP", [], True),
        ("<|channel>thought\nx<channel|>y", "thought", "y", "x", [], False),
        (f"<|tool_call>call:f{{a:{Q}STOP{Q}}}<tool_call|>ab STOP", "STOP", "ab ", "", [("f", {"a": "STOP"})], True),
        ("aST<|channel>thought\nx<channel|>OPb", "STOP", "a", "x", [], True),  # no text has a stop string in it
        ("aST<|tool_call>call:f{}<tool_call|>", "STOP", "aST", "", [("f", {})], False),
        ("a\n<|tool_call>call:f{}<tool_call|>", "\n", "a", "", [("f", {})], False),  # dropped: nobody sees it
        ("a\nb<|tool_call>call:f{}<tool_call|>", "\n", "a", "", [], True),
        ("<|tool_call>no call STOP", "STOP", "<|tool_call>no call ", "", [], True),
        ("a  ", "  ", "a", "", [], True),
    ],
)
def test_stop_strings_look_at_the_text_alone(reply, stop, text, reasoning, calls, stopped):
    assert whole(reply, stop=(stop,)) == Split(text, reasoning, calls, stopped)


# ---- whatever comes

PIECES = st.sampled_from(
    [
        *CONTROL,
        "thought",
        "thought\n",
        "call:f{",
        "call:",
        "a:",
        "{",
        "}",
        "b",
        " ",
        "\n",
        "é😀",
        "1",
        ",",
        "STOP",
        "ST",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=25),
    places=st.lists(st.integers(0, 120), max_size=40),
    stop=st.sampled_from([(), ("STOP",), ("\n", "b ")]),
    tools=st.sampled_from([None, TOOLS]),
    in_thought=st.booleans(),
)
def test_nothing_depends_on_the_cut(text, pieces, places, stop, tools, in_thought):
    reply = "".join(pieces)
    found = whole(reply, tools, stop, in_thought)
    assert split(text.stream(stop, tools, in_thought), cut(text, reply, places)) == found
    assert not any(each in found.text for each in stop)
    if not stop and CONTROL[2] not in reply and "call:f{" not in reply:
        said = found.text + found.reasoning
        assert [reply.count(each) for each in "bé1"] == [said.count(each) for each in "bé1"]


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 300), max_size=60), tools=st.sampled_from([None, TOOLS]))
def test_any_tokens_are_taken(tokens, tools):
    """Broken bytes, unknown ids, control tokens anywhere: nothing raises, and one piece after the other adds up."""
    stream = GOOGLE.reply(tools)
    pieces = [stream.push(token) for token in tokens]
    assert all(piece is NOTHING or any(vars(piece).values()) for piece in pieces)
    stream.finish()


def test_text_is_given_as_it_comes():
    """Without tools nothing is held back; with tools white space waits for what follows."""
    plain, ready = GOOGLE.reply(None), GOOGLE.reply(TOOLS)
    assert [plain.push(byte).text for byte in b"a \nb"] == ["a", " ", "\n", "b"]
    assert [ready.push(byte).text for byte in b"a \nb "] == ["a", "", "", " \nb", ""] and ready.finish().text == " "
    thought = GOOGLE.reply(None, in_thought=True)
    assert [thought.push(byte).reasoning for byte in b"a b"] == ["a", "", " b"]


def test_a_half_character_before_a_control_token_stays_in_its_channel():
    half = "é".encode()[0]
    ids = [half, GOOGLE.ids["<|channel>"], *b"thought\nx", half, GOOGLE.ids["<channel|>"], *b"y"]
    assert split(GOOGLE.reply(None), ids) == Split("\ufffdy", "x\ufffd", [])


WORK = ["a", " ", "\n", "aST", "<|channel>x", "<|channel>thought\n", "<channel|>", "<|tool_call>", f"{Q}<tool_call|>"]


@pytest.mark.parametrize("unit", [*WORK, f"<|tool_call>call:f{{a:{Q}", f"<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>"])
@pytest.mark.parametrize("before", ["", "<|channel>thought\n", "<|tool_call>call:f{a:", f"call:f{{a:{Q}", "call:f{"])
def test_work_grows_with_the_tokens_alone(unit, before):
    """Twice the tokens take at most twice the calls of Python functions and methods."""

    def calls(count: int) -> int:
        tokens, stream = GOOGLE.encode(before + unit * count), GOOGLE.reply(TOOLS, ("STOP",))
        return calls_of(lambda: [*map(stream.push, tokens), stream.finish()])

    assert calls(200) <= 2 * calls(100) + 100
