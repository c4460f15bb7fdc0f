"""OpenAI's Responses: the real client, and scripted replies event by event."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from serving import ASKED, NAME, NOW, WEATHER, Noting, Scripted, events, ids_of, post, serving
from test_clients import Endless, ask, figure, until

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.server.responses_input import sealed

PATH = "/v1/responses"
TOOL = {"type": "function", "strict": False, **WEATHER["function"]}
CLOCK = {"type": "function", "strict": False, **NOW["function"]}
GIVEN = {"model": NAME, "input": "def fibonacci(n):", "max_output_tokens": 16}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nHm.\n<channel|>"
END, QUOTE = "<turn|>", '<|"|>'
WRITE = f"<|tool_call>call:write{{path:{QUOTE}a{{b}}.py{QUOTE},n:1,text:{QUOTE}" + 'if "x":\n    say(1)\n' * 3
WRITER = {"type": "function", "name": "write", "parameters": {"type": "object", "properties": {
    "path": {"type": "string"}, "n": {"type": "integer"}, "text": {"type": "string"}}}}  # fmt: skip
SCRIPTED = GIVEN | {"max_output_tokens": 2048}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def script(engine):
    """A client of a server whose replies are `rounds`."""
    rounds: list[list[int]] = []
    scripted = Scripted(engine, lambda number: rounds)
    with (
        serving(scripted) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        client.rounds, client.url, client.scripted = rounds, url, scripted
        yield client


def play(script, engine, text: str, size: int = 3) -> None:
    ids = ids_of(engine, text)
    script.rounds[:] = [ids[at : at + size] for at in range(0, len(ids), size)]


def stream_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a response, without the mark that ends every stream."""
    *told, mark = events(url, PATH, body)
    assert mark == "[DONE]" and "[DONE]" not in told
    return told


def bare(items: Any) -> list[dict[str, Any]]:
    """Items without what differs from one answer to the next."""
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


# ---- texts


def test_texts_are_the_engine_s(client, engine):
    """Whole, streamed through the helper, and by the engine itself: one text and one count of tokens."""
    expected = engine.generate(ASKED, SamplingParams(max_tokens=16, seed=5, temperature=0.0))
    given = GIVEN | {"temperature": 0.0, "extra_body": {"seed": 5}}
    whole = client.responses.create(**given)
    with client.responses.stream(**given) as stream:
        kinds = [event.type for event in stream]
    assert whole.output_text == expected.text and whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.input_tokens == expected.stats.prompt_tokens
    assert whole.usage.output_tokens == len(expected.tokens) == 16
    assert whole.usage.total_tokens == whole.usage.input_tokens + 16
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"


def test_usage_tells_what_the_prompt_reads_from_the_prefixes_and_writes_there(client):
    """In Responses and in a chat alike."""
    asked = {"model": NAME, "input": "def written(n):\n" * 90, "max_output_tokens": 2}
    first, again = (client.responses.create(**asked).usage.input_tokens_details for _ in range(2))
    with client.responses.stream(**asked) as stream:
        *_, last = stream
    streamed = last.response.usage.input_tokens_details
    assert first.cached_tokens == 0 < first.cache_write_tokens
    assert again.cached_tokens == streamed.cached_tokens == first.cache_write_tokens
    assert again.cache_write_tokens == streamed.cache_write_tokens == 0
    said = [{"role": "user", "content": "def chatted(n):\n" * 90}]
    chats = [client.chat.completions.create(model=NAME, messages=said, max_tokens=2) for _ in range(2)]
    first, again = (chat.usage.prompt_tokens_details for chat in chats)
    assert first.cached_tokens == 0 < first.cache_write_tokens == again.cached_tokens
    assert again.cache_write_tokens == 0


def test_instructions_are_the_system_s(engine):
    script = Noting(engine, ids_of(engine, "Yes." + END))
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"role": "developer", "content": "Be quick."},
        {"role": "user", "content": "Well?"},
    ]
    chat = [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": "Be quick."},
        {"role": "user", "content": "Well?"},
    ]
    with serving(script) as url:
        assert post(url, PATH, {"input": items, "instructions": "Be brief."}).status_code == 200
    assert script.seen == [engine.text.encode(chat)]


# ---- items and events


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text, kinds, status",
    [
        ("Hello." + END, ["message"], "completed"),
        (END, [], "completed"),
        (THOUGHT + "Yes." + END, ["reasoning", "message"], "completed"),
        (THOUGHT + CALL + END, ["reasoning", "function_call"], "completed"),
        ("So: " + CALL + CALL + END, ["message", "function_call", "function_call"], "completed"),
        ("no end", ["message"], "incomplete"),
        ("<|channel>thought\nNever", ["reasoning"], "incomplete"),
        ("So: " + WRITE + QUOTE + "}<tool_call|>" + CALL + END, ["message"] + ["function_call"] * 2, "completed"),
        (CALL + WRITE, ["function_call", "function_call"], "incomplete"),
    ],
)
def test_a_stream_is_the_whole_response(script, engine, text, kinds, status, size):
    play(script, engine, text, size)
    given = SCRIPTED | {"tools": [TOOL, WRITER], "reasoning": {"effort": "low"}}
    whole = post(script.url, PATH, given).json()
    told = stream_of(script.url, given)
    assert [item["type"] for item in whole["output"]] == kinds and whole["status"] == status
    assert bare(told[-1]["response"]["output"]) == bare(whole["output"])
    assert told[-1]["response"]["usage"] == whole["usage"]
    check_order(told)
    if status == "incomplete":
        assert [item["status"] for item in whole["output"]] == ["completed"] * (len(kinds) - 1) + ["incomplete"]
    for item in whole["output"]:
        if item["type"] == "function_call" and item["status"] == "completed":
            json.loads(item["arguments"])


def check_order(told: list[dict[str, Any]]) -> None:
    """Every event is one that the client's types know; numbers rise by one; items begin, grow, and end in turn; what
    ended is the joined deltas, and is in the last event.
    """
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in told:
        EVENT.validate_python(event)
    Response.model_validate(told[-1]["response"], strict=False)
    opened, ended, joined = None, [], ""
    for event in told[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert opened is None and event["output_index"] == len(ended)
            assert event["item"]["status"] == "in_progress" and not event["item"].get("content")
            opened, joined = event["item"]["id"], ""
            continue
        assert event.get("item_id", opened) == opened and event["output_index"] == len(ended)
        if kind.endswith(".delta"):
            joined += event["delta"]
        elif kind.endswith("text.done"):
            assert event["text"] == joined
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == joined and event["name"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == opened
            ended.append(event["item"])
            opened = None
    assert opened is None and told[-1]["response"]["output"] == ended
    assert told[0]["response"]["status"] == "in_progress" and told[0]["response"]["output"] == []


def test_the_helper_follows_a_stream(script, engine):
    """openai's own: it asserts that items, parts and pieces come in order, and parses what has ended."""
    pytest.importorskip("llguidance")  # for a strict tool
    play(script, engine, THOUGHT + "So: " + CALL + END)
    with script.responses.stream(**SCRIPTED, tools=[TOOL | {"strict": True}], reasoning={"effort": "low"}) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "So:" and final.output[2].parsed_arguments == {"city": "Paris"}
    assert final.output[0].content[0].text == "Hm."
    assert [event.snapshot for event in seen if event.type == "response.output_text.delta"][-1] == "So:"


def test_a_call_ends_as_soon_as_it_is_whole(script, engine):
    """So that a client may run it while the next one is written."""
    ids = ids_of(engine, CALL)
    script.rounds[:] = [ids, ids_of(engine, "And"), ids_of(engine, " so on." + END)]
    kinds = [event["type"] for event in stream_of(script.url, SCRIPTED | {"tools": [TOOL]})]
    assert kinds.index("response.output_item.done") < kinds.index("response.output_text.delta")


def test_a_repaired_call_is_told(script, engine):
    tool = TOOL | {"parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    play(script, engine, f"<|tool_call>call:get_weather{{n:{QUOTE}5{QUOTE}}}<tool_call|>" + END)
    answer = post(script.url, PATH, SCRIPTED | {"tools": [tool]})
    assert json.loads(answer.json()["output"][0]["arguments"]) == {"n": 5}
    assert "n was the text" in answer.json()["repaired"][0] and answer.headers["x-tool-calls-repaired"]
    assert stream_of(script.url, SCRIPTED | {"tools": [tool]})[-1]["response"]["repaired"]


def test_logprobs_are_those_of_the_text(client):
    given = GIVEN | {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0.0}
    whole = client.responses.create(**given)
    told = stream_of(str(client.base_url).removesuffix("/v1/"), given)
    part = whole.output[0].content[0]
    assert "".join(entry.token for entry in part.logprobs) == part.text and len(part.logprobs[0].top_logprobs) == 2
    deltas = [event for event in told if event["type"] == "response.output_text.delta"]
    joined = [entry["token"] for event in deltas for entry in event["logprobs"]]
    assert joined == [entry.token for entry in part.logprobs]


def test_a_text_follows_its_schema(client):
    pytest.importorskip("llguidance")

    class Verdict(BaseModel):
        good: bool

    found = client.responses.parse(**(GIVEN | {"max_output_tokens": 64}), text_format=Verdict)
    assert isinstance(found.output_parsed, Verdict)
    with client.responses.stream(**(GIVEN | {"max_output_tokens": 64}), text_format=Verdict) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Verdict)


def test_a_forced_call(client):
    pytest.importorskip("llguidance")
    more = {"max_output_tokens": 64, "temperature": 0.0, "tools": [TOOL, CLOCK]}
    choice = {"type": "function", "name": "get_weather"}
    found = client.responses.create(**(GIVEN | more), tool_choice=choice)
    (call,) = [item for item in found.output if item.type == "function_call"]
    assert call.name == "get_weather" and json.loads(call.arguments)["city"] in ("Paris", "Oslo")


# ---- conversations


class Remembering(Scripted):
    """A model that notes its prompts, and says what it is told to."""

    def __init__(self, engine: Any, says: list[str]):
        super().__init__(engine, lambda number: [])
        self.says, self.prompts = says, []

    def rounds_of(self, number: int, prompt: list[int]) -> Any:
        self.prompts.append(prompt)
        return [ids_of(self, self.says[(len(self.prompts) - 1) % len(self.says)])]


ROUND = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning": "Hm.",
        "tool_calls": [
            {"id": "a", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
            {"id": "b", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "warm"},
    {"role": "tool", "tool_call_id": "b", "content": "wet"},
]


def expected(engine, thinking: bool = True) -> list[int]:
    from mlx_gemma_mtp.text.tools import Tools

    return engine.text.encode(ROUND, tools=Tools.of([TOOL]).schemas, thinking=thinking)


def outputs_of(answer: Any) -> list[dict[str, Any]]:
    calls = [item.call_id for item in answer.output if item.type == "function_call"]
    said = ["warm", [{"type": "input_text", "text": "wet"}]]
    return [
        {"type": "function_call_output", "call_id": id, "output": each} for id, each in zip(calls, said, strict=True)
    ]


@pytest.mark.parametrize("way", ["kept", "sent back", "as codex sends it back"])
def test_a_tool_loop_goes_on(engine, way):
    """By id, or with all items: the prompt is the one of a chat with the same turns."""
    model = Remembering(engine, [THOUGHT + CALL + CALL + END, "Well.\n<channel|>Warm." + END])  # within a thought
    with serving(model) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        given = {"model": NAME, "tools": [TOOL], "reasoning": {"effort": "high"}}
        asked = {"role": "user", "content": "Weather?"}
        first = client.responses.create(input=[asked], include=["reasoning.encrypted_content"], **given)
        if way == "kept":
            more = {"previous_response_id": first.id, "input": outputs_of(first)}
        else:
            back = [item.model_dump(exclude_none=True) for item in first.output]
            if way != "sent back":
                back[0].pop("content")
            more = {"store": False, "input": [asked, *back, *outputs_of(first)]}
        second = client.responses.create(**more, **given)
    assert second.output_text == "Warm." and model.prompts[1] == expected(engine)


def test_a_chain_goes_on_and_instructions_do_not(engine):
    model = Remembering(engine, ["One." + END, "Two." + END, "Three." + END])
    with serving(model) as url:
        first = post(url, PATH, {"input": "a", "instructions": "Be brief."}).json()
        second = stream_of(url, {"input": "b", "previous_response_id": first["id"]})[-1]["response"]
        third = post(url, PATH, {"input": "c", "previous_response_id": second["id"]}).json()
        assert third["previous_response_id"] == second["id"]
        turns = [("user", "a"), ("assistant", "One."), ("user", "b"), ("assistant", "Two."), ("user", "c")]
        assert model.prompts[2] == engine.text.encode([{"role": role, "content": text} for role, text in turns])
        branch = post(url, PATH, {"input": "d", "previous_response_id": first["id"]})
        assert branch.status_code == 200  # what was said since does not matter
        told = httpx.get(f"{url}{PATH}/{second['id']}").json()
        assert told == second
        items = httpx.get(f"{url}{PATH}/{second['id']}/input_items").json()
        assert [item["content"][0]["text"] for item in items["data"]] == ["b"]
        assert httpx.delete(f"{url}{PATH}/{first['id']}").json()["deleted"]
        assert httpx.get(f"{url}{PATH}/{first['id']}").status_code == 404
        gone = post(url, PATH, {"input": "e", "previous_response_id": third["id"]})
        assert gone.status_code == 400 and gone.json()["error"]["code"] == "previous_response_not_found"


def test_what_is_not_to_be_kept_is_not(engine):
    with serving(Remembering(engine, ["One." + END])) as url:
        first = post(url, PATH, {"input": "a", "store": False}).json()
        assert first["store"] is False and httpx.get(f"{url}{PATH}/{first['id']}").status_code == 404
        answer = post(url, PATH, {"input": "b", "previous_response_id": first["id"]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "previous_response_id"


def test_a_response_is_its_key_s_own(engine):
    with serving(Remembering(engine, ["One." + END]), keys=("one", "other")) as url:
        mine, theirs = {"authorization": "Bearer one"}, {"authorization": "Bearer other"}
        id = post(url, PATH, {"input": "a"}, **mine).json()["id"]
        assert httpx.get(f"{url}{PATH}/{id}", headers=mine).status_code == 200
        assert httpx.get(f"{url}{PATH}/{id}", headers=theirs).status_code == 404
        assert httpx.delete(f"{url}{PATH}/{id}", headers=theirs).status_code == 404
        more = {"input": "b", "previous_response_id": id}
        assert post(url, PATH, more, **theirs).status_code == 400
        assert post(url, PATH, more, **mine).status_code == 200


# ---- tools as Codex has them


def test_functions_of_a_namespace(script, engine):
    """A call tells its namespace, and finds it again when it comes back."""
    space = {"type": "namespace", "name": "agents", "description": "Others.", "tools": [CLOCK]}
    play(script, engine, "<|tool_call>call:agents.now{}<tool_call|>" + END)
    given = SCRIPTED | {"tools": [TOOL, space, {"type": "web_search", "external_web_access": False}]}
    answer = post(script.url, PATH, given).json()
    [call] = answer["output"]
    assert (call["namespace"], call["name"], call["arguments"]) == ("agents", "now", "{}")
    assert answer["tools"] == [TOOL, space]  # without what this package does not do
    check_order(stream_of(script.url, given))
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
    again = post(script.url, PATH, given | {"input": [{"role": "user", "content": "?"}, call, output]})
    assert again.status_code == 200


def test_thoughts_are_sealed_where_they_are_asked_for(script, engine):
    play(script, engine, THOUGHT + "Yes." + END)
    asked = SCRIPTED | {"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    told = stream_of(script.url, asked)
    assert told[-1]["response"]["output"][0]["encrypted_content"] == sealed("Hm.")
    assert "encrypted_content" not in post(script.url, PATH, SCRIPTED).json()["output"][0]


# ---- ends


def test_a_failure_amid_a_stream(engine):
    async def fail() -> None:
        raise RuntimeError("bang")

    rounds = iter(range(9))
    scripted = Scripted(engine, lambda number: [ids_of(engine, "x")] * 9, lambda: fail() if next(rounds) > 1 else None)
    with serving(scripted) as url:
        told = stream_of(url, GIVEN)
        last = told[-1]
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "invalid_prompt"  # clients do not try again
        assert last["response"]["output"][0]["status"] == "incomplete" and "bang" not in json.dumps(told)
        assert httpx.get(f"{url}{PATH}/{last['response']['id']}").status_code == 404
        for event in told:
            EVENT.validate_python(event)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_response(engine, streams):
    scripted = Endless(engine)
    with serving(scripted) as url:
        body = {"input": "x", "stream": streams}
        connection = ask(url, body, PATH)
        until(lambda: scripted.rounds_done > 5)
        connection.close()
        until(lambda: scripted.open == 0)
        until(lambda: figure(url, "request_cancelled_total") == 1)
        assert scripted.rounds_done < 1500 and figure(url, "num_requests_running") == 0


# ---- what is refused


@pytest.mark.parametrize(
    "more, param",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"messages": ASKED}, "messages"),
        ({"stop": ["x"]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"tools": [{"type": "file_search"}]}, "tools.0.type"),
        (
            {"tools": [{"type": "namespace", "name": "x", "tools": [{"type": "custom", "name": "y"}]}]},
            "tools.0.tools.0",
        ),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(url, more, param):
    for stream in (False, True):
        answer = post(url, PATH, {"input": "x", "max_output_tokens": 4, "stream": stream} | more)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == param, error
        assert (error["type"] == "invalid_request_error" and "expected" in error["message"]) or "give" in error[
            "message"
        ]


def test_fields_of_its_own_service_change_nothing(client):
    more = {
        "client_metadata": {"x": "y"}, "prompt_cache_key": "k", "service_tier": "auto", "metadata": {"a": "b"},
        "stream_options": {"include_obfuscation": False}, "user": None, "text": {"verbosity": "low"},
        "safety_identifier": "me",
    }  # fmt: skip
    one = client.responses.create(**GIVEN, temperature=0.0)
    other = client.responses.create(**GIVEN, temperature=0.0, extra_body=more)
    assert one.output_text == other.output_text and other.metadata == {"a": "b"} and other.prompt_cache_key == "k"
