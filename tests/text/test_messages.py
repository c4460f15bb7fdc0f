"""Messages as clients send them: each part is taken or refused by name, in a line."""

import json

import chats
import numpy as np
import pytest
from chats import VOCAB, assistant, tool, user

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.text.encode import Text
from mlx_gemma_mtp.text.messages import normalised, without_thoughts

CALLED = [user("Hi"), assistant(None, ("f", {"a": 1}))]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    return chats.google_text(tmp_path_factory.mktemp("google") / "model")


def prompt(text: Text, *messages: object, **options) -> str:
    before = repr(messages)
    ids = text.encode(list(messages), **options)
    assert repr(messages) == before  # what was given is as it was
    return text.tokenizer.decode(ids)


def refused(text: Text, messages: object, *parts: str) -> None:
    with pytest.raises(UserError) as raised:
        text.encode(messages)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert part in message, message


def parts(*given: object) -> dict:
    return user(list(given))


@pytest.mark.parametrize(
    "messages, said",
    [
        ([user("Hi"), assistant("Hello"), parts({"type": "input_text", "text": "secret"})], "user\nsecret<turn|>"),
        ([user("Hi"), assistant([{"type": "output_text", "text": "secret"}]), user("Hi")], "model\nsecret<turn|>"),
        ([user("Hi"), assistant("Hello"), parts({"text": "secret"})], "user\nsecret<turn|>"),
        ([parts({"type": "text", "text": "one "}, {"text": "two"})], "user\none two<turn|>"),
        ([*CALLED, tool([{"type": "text", "text": "42"}], id="c1")], 'response:f{value:<|"|>42<|"|>}'),
        ([{"role": "system", "content": [{"type": "text", "text": "secret"}]}, user("Hi")], "system\nsecret<turn|>"),
        ([{"role": "developer", "content": "secret"}, user("Hi")], "system\nsecret<turn|>"),
        ([user("Hi"), {"role": "model", "content": "secret"}, user("Hi")], "model\nsecret<turn|>"),
        ([user("Hi"), assistant(None, ("f", None)), tool("42", id="c1")], "call:f{}"),
        ([user("Hi"), assistant(None, ("f", "")), tool("42", id="c1")], "call:f{}"),
        ([user("Hi"), assistant(None, ("f", "null")), tool("42", id="c1")], "call:f{}"),
        ([user("Hi"), assistant(None, ("f", '{"b": [1, true], "a": null}'))], "call:f{a:null,b:[1,true]}"),
        ([user("Hi"), assistant(None, ("f", {"a": np.float32(0.5), "b": np.int64(3), "c": np.True_}))],
         "call:f{a:0.5,b:3,c:true}"),
        ([user("Hi"), assistant(None, tool_calls=[{"name": "f", "arguments": {"a": 1}}])], "call:f{a:1}"),
        ([*CALLED, tool(None, id="c1")], 'response:f{value:<|"|><|"|>}'),
        ([*CALLED, tool("42")], 'response:f{value:<|"|>42<|"|>}'),
        ([*CALLED, tool("42", name="g")], 'response:g{value:<|"|>42<|"|>}'),
        ([*CALLED, tool("42", id="c1", name="f")], 'response:f{value:<|"|>42<|"|>}'),
        ([user("Hi"), assistant("", ("f", {}), reasoning_content="hm")], "<|channel>thought\nhm\n<channel|>"),
        ([user("Hi"), assistant("", ("f", {}), thinking="hm")], "<|channel>thought\nhm\n<channel|>"),
        ([user("Hi"), assistant("", ("f", {}), reasoning="hm", reasoning_content="hm")], "thought\nhm\n<channel|>"),
        ([user("Hi"), assistant("<|channel>thought\nhm\n<channel|>", ("f", {}))], "thought\nhm\n<channel|><|tool"),
        ([user("Hi"), assistant("Ho", refusal=None, prefix=False, annotations=[{"a": "b"}], id="m1"), user("x")],
         "Ho<turn|>"),
        ([{"role": "user", "content": "Hi", "name": "ann"}], "user\nHi<turn|>"),
        ([{"role": "user", "content": "Hi", "metadata": {"a": "b"}, "timestamp": "noon"}], "user\nHi<turn|>"),
        ([*CALLED, {"role": "tool", "content": "42", "tool_name": "g"}], 'response:g{value:<|"|>42<|"|>}'),
        ([user("Hi"), assistant("", ("f", {}), thinking_blocks=[{"type": "thinking", "thinking": "h", "signature": "x"},
                                                                {"thinking": "m"}])], "thought\nhm\n<channel|>"),
        ([user("Hi"), assistant("", ("f", {}), reasoning_details=[{"type": "reasoning.text", "text": "hm"}])],
         "thought\nhm\n<channel|>"),
        ([user("Hi"), assistant("", ("f", {}), reasoning="hm", thinking_blocks=[{"thinking": "h"}, {"thinking": "m"}])],
         "thought\nhm\n<channel|>"),
    ],
)  # fmt: skip
def test_what_clients_send_reaches_the_prompt(text, messages, said):
    assert said in prompt(text, *messages)


@pytest.mark.parametrize(
    "messages, named",
    [
        ([user("Hi"), assistant("Hello"), parts({"type": "file", "file": {"file_id": "x"}})], ["user", "'file'"]),
        ([parts({"type": "image_url", "image_url": {"url": "x"}})], ["'image_url'"]),
        ([parts({"image_url": {"url": "x"}})], ["'image_url'"]),
        ([parts({"type": "refusal", "refusal": "no"})], ["'refusal'"]),
        ([parts({"type": ["text"], "text": "x"})], ["['text']"]),
        ([parts("a", "b")], ["the part 'a'"]),
        ([parts({"type": "text"})], ["the text None"]),
        ([parts({"type": "text", "text": None})], ["the text None"]),
        ([parts({"type": "text", "text": "a", "image_url": {"url": "x"}})], ["'image_url'"]),
        ([parts({"type": "text", "text": "\udcff"})], ["the content of a user message", "no character"]),
        ([user("Hi"), assistant(None, ("f", '{"a":')), tool("42", id="c1")], ["call of 'f'", "JSON object"]),
        ([user("Hi"), assistant(None, ("f", "[1]"))], ["call of 'f'", "'[1]'", "JSON object"]),
        ([user("Hi"), assistant(None, ("f", [1]))], ["call of 'f'", "[1]", "JSON object"]),
        ([user("Hi"), assistant(None, ("f", 5))], ["call of 'f'", "5", "JSON object"]),
        ([user("Hi"), assistant(None, ("f", '{"a": 1, "a": 2}'))], ["call of 'f'", "twice"]),
        ([user("Hi"), assistant(None, ("f", '{"a": NaN}'))], ["call of 'f'", "nan"]),
        ([user("Hi"), assistant(None, ("f", {"a": b"x"}))], ["call of 'f'", "b'x'"]),
        ([user("Hi"), assistant(None, ("f", {1: 2}))], ["call of 'f'", "the key 1"]),
        ([user("Hi"), assistant(None, ("f", "[" * 100_000))], ["call of 'f'"]),
        ([user("Hi"), assistant(None, ("f", '{"a":' * 500 + "1" + "}" * 500))], ["call of 'f'", "64 levels"]),
        ([user("Hi"), assistant(None, ("f", '{"a": ' + "9" * 5000 + "}"))], ["call of 'f'"]),
        ([user("Hi"), assistant(None, ("", {}))], ["the name of a tool call is ''"]),
        ([user("Hi"), assistant(None, (None, {}))], ["the name of a tool call is None"]),
        ([user("Hi"), assistant(None, tool_calls=[{"type": "custom", "custom": {"name": "f"}}])], ["custom"]),
        ([user("Hi"), assistant(None, tool_calls={"name": "f"})], ["tool_calls", "a list"]),
        ([user("Hi"), assistant(None, tool_calls=["f"])], ["a tool call is 'f'"]),
        ([user("Hi"), assistant(None, function_call={"name": "f", "arguments": "{}"})], ["'function_call'"]),
        ([user("Hi"), assistant("a", refusal="no")], ["'refusal'"]),
        ([user({"type": "text", "text": "a"})], ["a user message has the content {'type': 'text'"]),
        ([user(5)], ["a user message has the content 5"]),
        ([user(None)], ["a user message has no content"]),
        ([{"role": "user"}], ["a user message has no content"]),
        ([user(b"Hi")], ["b'Hi'"]),
        ([{"role": "user", "content": "Hi", "images": ["aGk="]}], ["'images'"]),
        ([{"role": "user", "content": "Hi", "tool_calls": [{"name": "f"}]}], ["'tool_calls'"]),
        ([{"role": "user", "content": "Hi", "name": 5}], ["name of a user message is 5"]),
        ([{"content": "a"}], ["the role None"]),
        ([{"role": ["user"], "content": "a"}], ["the role ['user']"]),
        ([{"role": "narrator", "content": "a"}], ["'narrator'", "system, developer, user"]),
        ([{"role": "function", "name": "f", "content": "a"}], ["'function'"]),
        (["Hi", user("Hi")], ["a message is 'Hi'"]),
        ([user("Hi"), "Hi"], ["a message is 'Hi'"]),
        ([*CALLED, tool("\udcff", id="c1")], ["the content of a tool message", "no character"]),
        ([user("Hi"), assistant(None, ("f", {}), reasoning_content="\udcff")], ["reasoning_content", "no character"]),
        ([user("Hi"), assistant(None, ("f", {"a": ["\udcff"]}))], ["call of 'f'", "no character"]),
        ([user("Hi"), assistant(None, ("f", {"\udcff": 1}))], ["call of 'f'", "no character"]),
        ([user("Hi"), assistant(None, ("f", '{"a": "\udcff"}'))], ["call of 'f'", "no character"]),
        ([user("Hi"), assistant(None, ("f", '{"a": "\\udcff"}'))], ["call of 'f'", "no character"]),
        ([user("Hi"), assistant(None, ("f\udcff", {}))], ["the name of a tool call", "no character"]),
        ([user("Hi"), assistant("a", reasoning=5)], ["reasoning", "5"]),
        ([user("Hi"), assistant("a", thinking_blocks=[{"type": "redacted"}])], ["thinking_blocks", "'redacted'"]),
        ([user("Hi"), assistant("a", prefix=True)], ["'prefix'", "continue_final_message"]),
        ([user("Hi"), assistant("a", partial=True)], ["'partial'", "continue_final_message"]),
        ([user("Hi"), assistant("a", thinking_blocks="hm")], ["thinking_blocks", "'hm'", "a list"]),
        ([*CALLED, {"role": "tool", "content": "42", "tool_name": 5}], ["tool_name", "5"]),
        ([user("Hi"), tool("42", id="c1")], ["a tool message comes after a user message", "tool_calls"]),
        ([tool("42", id="c1")], ["a tool message comes first"]),
        ([*CALLED, user("wait"), tool("42", id="c1")], ["a tool message comes after a user message"]),
        ([*CALLED, tool("42", id="c9")], ["the call 'c9'", "c1"]),
        ([*CALLED, tool("42", id="c1", name="g")], ["'g'", "'c1' of 'f'"]),
        ([*CALLED, tool("42"), tool("43")], ["2 tool messages answer 1 calls"]),
        ([*CALLED, tool({"a": 1}, id="c1")], ["a tool message has the content {'a': 1}"]),
        ([user(""), assistant("")], ["empty"]),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_named(text, messages, named):
    refused(text, messages, *named)


def test_texts_beside_messages_are_no_list_of_prompts(text):
    with pytest.raises(UserError, match="a list begins with 'Hi' and has the message"):
        text.prompts(["Hi", user("Hi")])
    assert text.prompts(["Hi", [user("Hi")]]) == (["Hi", [user("Hi")]], False)
    assert text.prompts((user("Hi"), assistant("Ho"), user("Hi")))[1]


def test_no_word_of_a_system_prompt_is_a_surrogate(text):
    with pytest.raises(UserError, match=r"the system prompt has .* no character"):
        text.encode("Hi", system_prompt="\udcff")


def test_calls_are_answered_by_their_ids_or_in_their_order():
    calls = assistant("", ("f", {}), ("g", {}))
    by_id = normalised([user("Hi"), calls, tool("1", id="c2"), tool("2", id="c1")])
    assert [each["name"] for each in by_id[2:]] == ["g", "f"]
    in_order = normalised([user("Hi"), calls, tool("1"), tool("2"), calls, tool("3")])
    assert [each["name"] for each in in_order if each["role"] == "tool"] == ["f", "g", "f"]
    unnamed = [{"function": {"name": "f"}}, {"function": {"name": "g"}}]
    without_ids = normalised([user("Hi"), assistant("", tool_calls=unnamed), tool("1", id="x"), tool("2", id="y")])
    assert [each["name"] for each in without_ids[2:]] == ["f", "g"]
    one_of_two = [{"id": "c1", "function": {"name": "f"}}, {"function": {"name": "g"}}]
    some = normalised([user("Hi"), assistant("", tool_calls=one_of_two), tool("1", name="g"), tool("2", id="c1")])
    assert [each["name"] for each in some[2:]] == ["g", "f"] and some[3]["tool_call_id"] == "c1"


@pytest.mark.parametrize("ids", [(None, None), ("c", "c"), ("c", None), ("", "")])
def test_templates_find_the_call_of_a_response_whatever_the_ids(ids):
    """Google's names a response after the last call that has the response's id, or none as it has none."""
    calls = [{"id": id, "function": {"name": name}} for id, name in zip(ids, "fg", strict=True)]
    asked, *answers = normalised([assistant("", tool_calls=calls), tool("1", id=ids[0]), tool("2", id=ids[1])])
    named = {call["id"]: call["function"]["name"] for call in asked["tool_calls"]}
    assert [named.get(each.get("tool_call_id"), each["name"]) for each in answers] == ["f", "g"]
    assert len(named) == 2 and asked["tool_calls"] != calls


@pytest.mark.parametrize(
    "reply, thoughts, rest",
    [
        ("<|channel>thought\nhm\n<channel|>4", ["hm"], "4"),
        ("<|channel>thought\n<channel|>4", [], "4"),
        ("a<|channel>thought\none<channel|>b<|channel>thought\ntwo<channel|>c", ["one", "two"], "abc"),
        ("<|channel>thought\nhm", ["hm"], ""),
        ("<|channel>thought", [], ""),
        ("<|channel>other<channel|>4", [], "4"),
        ("a mark is <|channel> and ends", [], "a mark is <|channel> and ends"),
        ("a mark is <channel|> and ends", [], "a mark is <channel|> and ends"),
    ],
)
def test_thoughts_are_taken_out_of_replies(reply, thoughts, rest):
    assert without_thoughts(reply) == (thoughts, rest)


def test_an_assistants_other_control_strings_are_text(text):
    said = "<|turn>user\n<channel|> and <|channel>"
    ids = text.encode([user("Hi"), assistant(said), user("Hi")])
    assert said in text.tokenizer.decode(ids)
    known = set(text.template.control.values())
    assert [id for id in ids if id in known] == [2, 5, 6, 5, 6, 5, 6, 5]


def test_messages_of_json_are_those_of_python(text):
    messages = [user("Hi"), assistant("", ("f", {"a": [1, {"b": "c"}]})), tool("42", id="c1"), assistant("It is")]
    wire = json.loads(json.dumps(messages))
    wire[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"a": [1, {"b": "c"}]})
    assert text.encode(wire) == text.encode(tuple(messages)) == text.encode(iter(messages))


def test_ids_in_place_of_the_vocabulary_are_refused(text):
    with pytest.raises(UserError, match=f"token id {VOCAB}"):
        text.encode(np.array([2, VOCAB]))
