"""Awkward replies, token by token: streams in every cut, and the same answer in one piece."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import ASKED, NAME, NOW, WEATHER, Scripted, events, ids_of, post, serving

from mlx_gemma_mtp.server.stream import COMMENT, EventStream

BODY = {"model": NAME, "messages": ASKED, "max_tokens": 1000}
TOOLS = BODY | {"tools": [WEATHER, NOW]}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
BARE = "<|tool_call>call:now{}<tool_call|>"
THOUGHT = "<|channel>thought\nHm, so.\n<channel|>"
NASTY = (
    '<|tool_call>call:write{path:<|"|>a{b}.py<|"|>,text:<|"|>if x[0] == "}":\n    print(\'\U0001f600\')<|"|>,'
    "lines:[1,[2,null]],force:true}<tool_call|>"
)
END = "<turn|>"
LINES = "if x[0] == \"}\":\n    print('\U0001f600 \\n')\n" * 3
LONG = f'<|tool_call>call:write{{force:true,path:<|"|>a.py<|"|>,text:<|"|>{LINES}'
REPLIES = {
    "plain": "Hello there." + END,
    "empty": END,
    "thought": THOUGHT + "The answer." + END,
    "call": CALL + END,
    "no arguments": BARE + END,
    "text around": "Let me see. " + CALL + "Done." + END,
    "two calls": THOUGHT + CALL + BARE + END,
    "thoughts between": THOUGHT + CALL + THOUGHT + BARE + END,
    "call in a thought": "<|channel>thought\nI call" + CALL + END,
    "thought left open": "<|channel>thought\nand so on" + END,
    "call left open": "<|tool_call>call:get_weather{city:" + END,
    "no call": "<|tool_call>nonsense<tool_call|>" + END,
    "nasty": NASTY + END,
    "long call": "So. " + LONG + '<|"|>}<tool_call|>' + END,
    "long calls": LONG + '<|"|>}<tool_call|>Now.' + THOUGHT + LONG + '<|"|>,to:[]}<tool_call|>' + CALL + "Done." + END,
    "long call that is cut off": CALL + LONG + "and so on",
    "long call that is broken": LONG + '<|"|> oops}<tool_call|>Done.' + END,
    "long string that is not closed": LONG + "}<tool_call|>" + END,
    "marker in prose": "One writes call:get_weather{city} there." + END,
    "emoji": "\U0001f469\u200d\U0001f4bb\U0001f600 é" + END,
    "cut": "no end of it",
}
WRITE = {"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """The ids in rounds of these sizes, the last one again and again."""
    rounds, at = [], 0
    while at < len(ids):
        size = sizes[min(len(rounds), len(sizes) - 1)]
        rounds.append(ids[at : at + size])
        at += size
    return rounds


def joined(found: list[Any]) -> dict[str, Any]:
    """A streamed choice as a whole one. Fails where a rule of streams is broken."""
    assert found[-1] == "[DONE]"
    chunks = [each for each in found[:-1] if each["choices"]]
    assert len({(each["id"], each["created"], each["model"]) for each in chunks}) == 1
    choice: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "ends": []}
    for place, chunk in enumerate(chunks):
        (piece,) = chunk["choices"]
        delta = piece["delta"]
        assert ("role" in delta) == (place == 0)
        carried = [key for key in ("content", "reasoning_content", "tool_calls") if delta.get(key)]
        assert len(carried) <= 1 and not (carried and piece["finish_reason"])
        choice["content"] += delta.get("content") or ""
        choice["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(choice["calls"]) and call["type"] == "function"
                choice["calls"].append(call["function"] | {"id": call["id"]})
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        if piece["finish_reason"]:
            choice["ends"].append(piece["finish_reason"])
    assert len(choice["ends"]) == 1 and len({call["id"] for call in choice["calls"]}) == len(choice["calls"])
    return choice


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = [call["function"] | {"id": call["id"]} for call in message.get("tool_calls", ())]
    said = {"content": message["content"] or "", "reasoning_content": message.get("reasoning_content", "")}
    return said | {"calls": calls, "ends": [choice["finish_reason"]]}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    return choice | {"calls": [{k: v for k, v in call.items() if k != "id"} for call in choice["calls"]]}


@pytest.fixture(scope="module")
def script(engine):
    """An address whose replies are those of `script.rounds`."""

    script = SimpleNamespace(rounds=[])
    with serving(Scripted(engine, lambda number: script.rounds)) as script.url:
        yield script


@pytest.mark.parametrize("name", REPLIES)
@pytest.mark.parametrize("sizes", [[1], [1, 4], [1000]], ids=str)
def test_a_stream_is_the_whole_answer(script, engine, name, sizes):
    script.rounds = cut(ids_of(engine, REPLIES[name]), sizes)
    body = TOOLS | {"tools": [WEATHER, NOW, WRITE]}
    answer = post(script.url, "/v1/chat/completions", body).json()
    assert without_ids(joined(events(script.url, "/v1/chat/completions", body))) == without_ids(whole(answer))


def test_a_long_call_comes_as_it_is_made(script, engine):
    """Its end is not waited for; one that is cut off is no call that may run, and one that is broken says so."""
    body = TOOLS | {"tools": [WEATHER, NOW, WRITE], "stream": True}
    script.rounds = cut(ids_of(engine, REPLIES["long call"]), [1])
    pieces = [
        call["function"]["arguments"]
        for each in events(script.url, "/v1/chat/completions", body)[:-1]
        for call in each["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert pieces[:2] == ["", pieces[1]] and pieces[1].startswith('{"force": true, "path": "a.py", "text": "if x[0]')
    assert len(pieces) > 20 and max(map(len, pieces[2:])) < 40
    found = reply(script, engine, REPLIES["long call that is cut off"], tools=[WEATHER, WRITE])
    assert found["ends"] == ["length"] and found["content"] == ""
    assert found["calls"][1]["arguments"].endswith("and so on")
    script.rounds = cut(ids_of(engine, REPLIES["long call that is broken"]), [1, 5])
    last = events(script.url, "/v1/chat/completions", body)[-2]["choices"][0]
    assert last["finish_reason"] == "tool_calls" and "cannot be read" in last["repaired"][0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(REPLIES)), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_any_cut_gives_the_same(script, engine, name, sizes):
    ids = ids_of(engine, REPLIES[name])
    script.rounds = cut(ids, [1])
    one = without_ids(joined(events(script.url, "/v1/chat/completions", TOOLS)))
    script.rounds = cut(ids, sizes)
    assert without_ids(joined(events(script.url, "/v1/chat/completions", TOOLS))) == one


def reply(script, engine, text: str, **more: Any) -> dict[str, Any]:
    script.rounds = cut(ids_of(engine, text), [1, 3])
    return joined(events(script.url, "/v1/chat/completions", TOOLS | more))


def test_what_each_reply_is(script, engine):
    found = reply(script, engine, REPLIES["two calls"])
    assert [call["name"] for call in found["calls"]] == ["get_weather", "now"] and found["ends"] == ["tool_calls"]
    assert json.loads(found["calls"][0]["arguments"]) == {"city": "Paris"} and found["calls"][1]["arguments"] == "{}"
    assert found["reasoning_content"] == "Hm, so." and found["content"] == ""
    found = reply(script, engine, REPLIES["text around"])
    assert found["content"] == "Let me see.Done." and len(found["calls"]) == 1
    found = reply(script, engine, REPLIES["call in a thought"])
    assert found["calls"][0]["name"] == "get_weather" and found["ends"] == ["tool_calls"]
    found = reply(script, engine, REPLIES["no call"])
    assert found["calls"] == [] and "nonsense" in found["content"] and found["ends"] == ["stop"]
    found = reply(script, engine, REPLIES["thought left open"])
    assert found["content"] == "" and found["reasoning_content"] == "and so on"
    assert reply(script, engine, REPLIES["empty"]) == {
        "content": "", "reasoning_content": "", "calls": [], "ends": ["stop"]
    }  # fmt: skip
    assert reply(script, engine, REPLIES["cut"])["ends"] == ["length"]
    found = reply(script, engine, NASTY + END, tools=[WRITE])
    arguments = json.loads(found["calls"][0]["arguments"])
    assert arguments["path"] == "a{b}.py" and "\U0001f600" in arguments["text"] and arguments["lines"] == [1, [2, None]]


def test_the_label_of_a_thought_never_leaks(script, engine):
    """<|channel>, th, ought, newline: no cut of it shows in the text."""
    control = engine.text.template.control
    script.rounds = [[control["<|channel>"]], ids_of(engine, "th"), ids_of(engine, "ought"), ids_of(engine, "\nx")]
    script.rounds += [[control["<channel|>"]], ids_of(engine, "yes"), ids_of(engine, END)]
    found = joined(events(script.url, "/v1/chat/completions", BODY))
    assert (found["reasoning_content"], found["content"]) == ("x", "yes")


@pytest.mark.parametrize("stop", ["lo th", "Hello", ".", "there.x"])
def test_stop_strings_over_borders_of_tokens(script, engine, stop):
    ids = ids_of(engine, "Hello there. And more." + END)
    expected = "Hello there. And more.".split(stop)[0]
    for sizes in ([1], [2], [1, 5], [100]):
        script.rounds = cut(ids, sizes)
        body = BODY | {"stop": stop, "logprobs": True, "top_logprobs": 1}
        found = events(script.url, "/v1/chat/completions", body)
        assert joined(found)["content"] == expected and joined(found)["ends"] == ["stop"]
        entries = [each["choices"][0].get("logprobs") for each in found[:-1] if each["choices"]]
        told = b"".join(bytes(entry["bytes"]) for each in entries if each for entry in each["content"])
        assert expected.encode().startswith(told)


def test_a_stop_string_within_a_thought_stops_nothing(script, engine):
    found = reply(script, engine, THOUGHT + "Well so. End" + END, stop="so.")
    assert (found["reasoning_content"], found["content"]) == ("Hm, so.", "Well ")


def test_usage_counts_thoughts_and_drafts(script, engine):
    thought, text = ids_of(engine, "thought\nHm, so.\n"), ids_of(engine, "Yes.")
    script.rounds = cut(ids_of(engine, THOUGHT + "Yes." + END), [1, 4])
    usage = post(script.url, "/v1/chat/completions", BODY).json()["usage"]
    details = usage["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(thought)
    assert usage["completion_tokens"] == len(thought) + len(text) + 2
    assert details["accepted_prediction_tokens"] == usage["completion_tokens"] + 1 - len(script.rounds)


def test_log_probabilities_are_the_text_s_alone(script, engine):
    script.rounds = cut(ids_of(engine, THOUGHT + "Yes \U0001f600." + CALL + END), [1, 3])
    body = TOOLS | {"logprobs": True, "top_logprobs": 2}
    choice = post(script.url, "/v1/chat/completions", body).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert (
        b"".join(bytes(entry["bytes"]) for entry in entries).decode()
        == choice["message"]["content"]
        == "Yes \U0001f600."
    )
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_an_emoji_that_is_cut_off_gives_one_mark(script, engine):
    script.rounds = cut(ids_of(engine, "\U0001f600")[:-1], [1])
    found = joined(events(script.url, "/v1/chat/completions", BODY))["content"]
    assert found.replace("\ufffd", "").strip() == "" and found.count("\ufffd") <= 1


def test_what_was_mended_is_told(script, engine):
    script.rounds = cut(ids_of(engine, "<|tool_call>call:get_weather{city:'Paris',}<tool_call|>" + END), [1])
    response = post(script.url, "/v1/chat/completions", TOOLS)
    assert "get_weather" in response.headers["x-tool-calls-repaired"]
    assert response.json()["choices"][0]["repaired"]
    last = events(script.url, "/v1/chat/completions", TOOLS)[-2]
    assert last["choices"][0]["repaired"]
    script.rounds = cut(ids_of(engine, CALL + END), [1])
    assert "x-tool-calls-repaired" not in post(script.url, "/v1/chat/completions", TOOLS).headers


def test_thoughts_under_both_names(engine):
    rounds = cut(ids_of(engine, THOUGHT + "x" + END), [2])
    with serving(Scripted(engine, lambda number: rounds), reasoning="both") as url:
        message = post(url, "/v1/chat/completions", BODY).json()["choices"][0]["message"]
        deltas = [each["choices"][0]["delta"] for each in events(url, "/v1/chat/completions", BODY)[:-1]]
    assert message["reasoning"] == message["reasoning_content"] == "Hm, so."
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm, so."


def test_the_helper_takes_every_reply(script, engine):
    """openai's accumulator joins what is repeated, and fails without an index."""
    with openai.OpenAI(base_url=f"{script.url}/v1", api_key="any", max_retries=0) as client:
        for name in ("two calls", "text around", "thought", "empty", "nasty", "long calls"):
            script.rounds = cut(ids_of(engine, REPLIES[name]), [1, 3])
            answer = whole(post(script.url, "/v1/chat/completions", TOOLS | {"tools": [WEATHER, NOW, WRITE]}).json())
            with client.chat.completions.stream(**(TOOLS | {"tools": [WEATHER, NOW, WRITE]})) as stream:
                for _ in stream:
                    pass
                message = stream.get_final_completion().choices[0].message
            assert (message.content or "") == answer["content"]
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
            assert calls == [(call["name"], call["arguments"]) for call in answer["calls"]]


def fails(engine: Any, after: int, error: Exception) -> Scripted:
    """An engine that raises in a round."""
    left = [after]

    def wait() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    return Scripted(engine, lambda number: cut(ids_of(engine, "Hello there." + END), [1]), wait)


def test_an_error_before_the_first_token_is_a_status(engine):
    with serving(fails(engine, 0, RuntimeError("secret /home/me"))) as url:
        response = post(url, "/v1/chat/completions", BODY)
        assert response.status_code == 500 and "secret" not in response.text
        assert response.headers["x-should-retry"] == "false" and response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_an_error_amid_a_stream_is_an_event(engine, path):
    body = BODY if path != "/v1/completions" else {"prompt": "def", "max_tokens": 9}
    with serving(fails(engine, 2, RuntimeError("secret /home/me"))) as url:
        text = post(url, path, body | {"stream": True}).text
    assert "secret" not in text and '"error":{' in text
    if path == "/v1/messages":
        assert text.rstrip().rpartition("event: ")[2].startswith("error\n")
    else:
        assert text.endswith("data: [DONE]\n\n")


def test_the_client_raises_what_went_wrong_amid_a_stream(engine):
    with (
        serving(fails(engine, 2, RuntimeError("secret"))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(openai.APIError, match="mistake"),
    ):
        for _ in client.chat.completions.create(**BODY, stream=True):
            pass


def test_a_comment_that_is_not_read_ends_the_stream_too():
    """What was sent fills the socket, the engine is silent, and the comment waits for a client that never reads."""
    never, closed, sent = asyncio.Event(), [], []

    async def send(message: dict) -> None:
        sent.append(message)
        if len(sent) > 2:  # uvicorn waits before it writes, not behind it
            await never.wait()

    async def texts():
        yield b"data: {}\n\n"
        await never.wait()

    async def main() -> None:
        stream = EventStream(texts(), lambda: closed.append(True), reading=0.05, beat=0.01)
        await asyncio.wait_for(stream({}, never.wait, send), 60)

    asyncio.run(main())
    assert closed == [True] and sent[-1]["body"] == COMMENT
