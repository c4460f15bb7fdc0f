"""Anthropic's messages: the real client, and scripted replies event by event."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from serving import ASKED, NAME, Noting, Scripted, events, ids_of, post, serving

from mlx_gemma_mtp import SamplingParams

PATH = "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": CITY}
GIVEN = {"model": NAME, "max_tokens": 16, "messages": ASKED}
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
THOUGHT = "<|channel>thought\nHm.\n<channel|>"
END = "<turn|>"
QUOTE = '<|"|>'
WRITE = f"<|tool_call>call:write{{path:{QUOTE}a{{b}}.py{QUOTE},n:1,text:{QUOTE}" + 'if "x":\n    say(1)\n' * 3


@pytest.fixture
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "more, params",
    [
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 40}, {"temperature": 1.0, "top_p": 0.9, "top_k": 40}),
        ({"temperature": 0.0, "stop_sequences": ["def", "zz"]}, {"temperature": 0.0, "stop": ("def", "zz")}),
    ],
    ids=str,
)
def test_texts_are_the_engine_s(claude, engine, more, params):
    expected = engine.generate(ASKED, SamplingParams(max_tokens=16, seed=5, **params))
    given = GIVEN | {"extra_body": {"seed": 5} | more}  # newer clients have no temperature of their own
    message = claude.messages.create(**given)
    with claude.messages.stream(**given) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert message.content[0].text == text == final.content[0].text == expected.text
    assert message.stop_reason == final.stop_reason and message.stop_sequence == final.stop_sequence
    assert message.stop_reason == ("stop_sequence" if "stop_sequences" in more else "max_tokens")
    assert message.stop_sequence == ("def" if "stop_sequences" in more else None)
    assert message.usage.input_tokens == final.usage.input_tokens == expected.stats.prompt_tokens
    assert message.usage.output_tokens == final.usage.output_tokens == len(expected.tokens)


def test_tokens_are_counted(claude, engine):
    counted = claude.messages.count_tokens(model=NAME, messages=ASKED, system="Be kind.", tools=[TOOL])
    spoken = [{"role": "system", "content": "Be kind."}, *ASKED]
    function = {"type": "function", "function": {"name": TOOL["name"], "description": TOOL["description"]}}
    function["function"]["parameters"] = CITY
    from mlx_gemma_mtp.text.tools import Tools

    assert counted.input_tokens == len(engine.text.encode(spoken, tools=Tools.of([function]).schemas))
    assert claude.messages.count_tokens(model=NAME, messages=ASKED).input_tokens < counted.input_tokens


def test_usage_tells_what_the_prompt_reads_from_the_prefixes_and_writes_there(claude):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "def kept(n):\n" * 90}], "max_tokens": 2}
    first, again = (claude.messages.create(**asked).usage for _ in range(2))
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message().usage
    whole = claude.messages.count_tokens(model=NAME, messages=asked["messages"]).input_tokens
    assert first.cache_creation_input_tokens > whole // 2 and first.cache_read_input_tokens == 0
    assert again.cache_read_input_tokens == first.cache_creation_input_tokens and again.cache_creation_input_tokens == 0
    assert streamed.cache_read_input_tokens == again.cache_read_input_tokens
    for usage in (first, again, streamed):
        parts = (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
        assert sum(parts) == whole


def test_a_forced_tool_and_its_result(claude):
    pytest.importorskip("llguidance")
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    given = GIVEN | {"max_tokens": 64, "tools": [TOOL], "extra_body": {"temperature": 0.0}}
    message = claude.messages.create(**given, tool_choice=choice)
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and use.input["city"] in ("Paris", "Oslo")
    with claude.messages.stream(**given, tool_choice=choice) as stream:
        assert stream.get_final_message().content[-1].input == use.input
    turns = [*ASKED, {"role": "assistant", "content": [block.model_dump() for block in message.content]}]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "15 degrees"}]}
    turns.append({"role": "user", "content": [result, {"type": "text", "text": "And now?"}]})
    assert claude.messages.create(**(given | {"messages": turns, "max_tokens": 4})).usage.output_tokens > 0


@pytest.fixture(scope="module")
def script(engine):
    """A client of a server whose replies are `rounds`."""
    rounds: list[list[int]] = []
    with (
        serving(Scripted(engine, lambda number: rounds)) as url,
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client,
    ):
        client.rounds, client.url = rounds, url
        yield client


def play(script, engine, text: str, size: int = 3) -> None:
    ids = ids_of(engine, text)
    script.rounds[:] = [ids[at : at + size] for at in range(0, len(ids), size)]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text, kinds",
    [
        ("Hello." + END, ["text"]),
        (END, []),
        (THOUGHT + "Yes." + END, ["thinking", "text"]),
        (THOUGHT + CALL + END, ["thinking", "tool_use"]),
        ("So: " + CALL + CALL + END, ["text", "tool_use", "tool_use"]),
        ("no end", ["text"]),
        ("So: " + WRITE + QUOTE + "}<tool_call|>" + CALL + WRITE + "}<tool_call|>" + END, ["text"] + ["tool_use"] * 3),
        (CALL + WRITE, ["tool_use", "tool_use"]),
    ],
)
def test_a_stream_is_the_whole_message(script, engine, text, kinds, size):
    play(script, engine, text, size)
    given = GIVEN | {"tools": [TOOL], "thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}
    whole = script.messages.create(**given)
    with script.messages.stream(**given) as stream:
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == [block.type for block in final.content] == kinds
    for one, other in zip(whole.content, final.content, strict=True):
        assert one.model_dump(exclude={"id", "parsed_output"}) == other.model_dump(exclude={"id", "parsed_output"})
    assert whole.stop_reason == final.stop_reason
    assert whole.stop_reason == ("max_tokens" if END not in text else "tool_use" if "call:" in text else "end_turn")


@pytest.mark.parametrize("calls, reason", [("", "end_turn"), (CALL, "tool_use")])
def test_a_text_that_repeats_itself_ends(script, engine, calls, reason):
    play(script, engine, calls + "again and again and " * 20 + END)
    given = GIVEN | {"tools": [TOOL], "max_tokens": 2048, "stop_repetition": 12}
    message = post(script.url, PATH, given).json()
    assert message["stop_reason"] == reason and message["usage"]["output_tokens"] < 60


def test_the_model_under_its_names_as_anthropic_lists_models(claude, url):
    ids = [model.id for model in claude.models.list()]
    assert ids == [NAME, "background"]
    found = claude.models.retrieve("claude-3-5-haiku")
    assert (found.id, found.type) == ("claude-3-5-haiku", "model") and found.created_at.year > 2000
    page = claude.models.list(limit=1)
    assert page.has_more and [model.id for model in page] == ids and page.first_id == page.last_id == NAME
    assert [model.id for model in claude.models.list(before_id="background").data] == [NAME]
    assert claude.models.list(after_id="background").data == []
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.models.retrieve("gpt-9")
    assert caught.value.body["error"]["type"] == "not_found_error"
    for query in ("limit=0", "limit=x", "after_id=gpt-9"):
        refused = httpx.get(f"{url}/v1/models?{query}", headers={"anthropic-version": "2023-06-01"})
        assert refused.status_code == 400 and refused.json()["type"] == "error"
    assert httpx.get(f"{url}/v1/models", headers={"x-api-key": "k"}).json()["object"] == "list"


def test_what_every_route_takes(engine):
    """And what changes nothing is taken and ignored."""
    asked: list[dict[str, Any]] = []

    class Listening(Scripted):
        def astream(self, prompts: Any, params: Any, **options: Any) -> Any:
            asked.append(options | {"top_k": params.top_k})
            return super().astream(prompts, params, **options)

    given = {"timeout": 5.0, "priority": 3, "cache_salt": "mine", "num_draft_tokens": 2, "top_k": 0}
    more = {"service_tier": "auto", "metadata": {"user_id": "x"}, "cache_control": {"type": "ephemeral"}}
    with serving(Listening(engine, lambda number: [[6]])) as url:
        for path in (PATH, "/v1/chat/completions"):
            assert post(url, path, GIVEN | given | more).status_code == 200
    assert asked[0] == asked[1] | {"n": 1} and asked[0].items() >= (given | {"top_k": -1}).items()


def test_effort_is_a_budget_of_thoughts(engine):
    """Where the thinking names none; what is no effort is refused."""
    asked: list[tuple[bool, int | None]] = []

    class Listening(Scripted):
        def astream(self, prompts: Any, params: Any, **options: Any) -> Any:
            asked.append((params.thinking, params.thinking_budget))
            return super().astream(prompts, params, **options)

    adaptive, fixed = {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2000}
    with serving(Listening(engine, lambda number: [[6]])) as url:
        for thinking in (adaptive, fixed, {"type": "disabled"}):
            body = GIVEN | {"thinking": thinking, "output_config": {"effort": "low"}}
            assert post(url, PATH, body).status_code == 200
        assert post(url, PATH, GIVEN | {"output_config": {"effort": "some"}}).status_code == 400
    assert asked == [(True, 1024), (True, 2000), (False, None)]


@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize(
    "reply, expected",
    [
        (THOUGHT + "Yes." + CALL + END, 3),
        (WRITE + QUOTE + "}<tool_call|>Well." + THOUGHT + WRITE + QUOTE + "}<tool_call|>Done." + END, 5),
    ],
)
def test_the_order_of_events(script, engine, reply, expected, size):
    play(script, engine, reply, size)
    body = GIVEN | {"tools": [TOOL], "stream": True, "max_tokens": 500}
    lines = post(script.url, PATH, body).text.split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names == [each["type"] for each in found]
    assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
    open_block: int | None = None
    blocks = 0
    for each in found:
        kind: Any = each["type"]
        if kind == "content_block_start":
            assert open_block is None and each["index"] == blocks
            open_block, blocks = each["index"], blocks + 1
        elif kind == "content_block_delta":
            assert each["index"] == open_block
        elif kind == "content_block_stop":
            assert each["index"] == open_block
            open_block = None
    assert blocks in (expected, expected - 1) and open_block is None  # text joins a call's end in a large round


def test_what_was_mended_is_told(script, engine):
    """In the header of an answer in one piece, and in the last but one event of a stream."""
    play(script, engine, "<|tool_call>call:get_weather{city:'Paris',}<tool_call|>" + END)
    body = GIVEN | {"tools": [TOOL], "max_tokens": 100}
    whole = post(script.url, PATH, body)
    assert "other quotes" in whole.headers["x-tool-calls-repaired"]
    last = [event for event in events(script.url, PATH, body) if event["type"] == "message_delta"]
    assert whole.json()["repaired"] == last[0]["repaired"] and "other quotes" in last[0]["repaired"][0]
    play(script, engine, CALL + END)
    assert "repaired" not in post(script.url, PATH, body).json()


def test_turns_as_claude_code_sends_them(script, engine):
    """Blocks with cache marks, thoughts that come back signed, failures of tools, a reply that is begun."""
    play(script, engine, "ok" + END)
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": "no city"},
                {"type": "tool_result", "tool_use_id": "t1"},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ]
    body = GIVEN | {"messages": turns, "system": [{"type": "text", "text": "Be kind.", "cache_control": None}]}
    body |= {"tools": [TOOL | {"cache_control": {"type": "ephemeral"}}], "metadata": {"user_id": "x"}}
    assert script.messages.create(**body).content[0].text == "ok"
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning": "hm",
            "tool_calls": [
                {"id": "t1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
                {"id": "t2", "function": {"name": "get_weather", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no city"},
        {"role": "tool", "tool_call_id": "t1", "content": ""},
        {"role": "assistant", "content": "It is"},
    ]
    from mlx_gemma_mtp.text.tools import Tools

    expected = engine.text.encode(prompt, tools=Tools.of([TOOL]).schemas, continue_final_message=True)
    count = {key: body[key] for key in ("model", "messages", "system", "tools")}
    assert script.messages.count_tokens(**count).input_tokens == len(expected)


def test_a_system_s_turn_amid_a_conversation(engine):
    """As Claude Code sends it; it is rendered where it stands."""
    script = Noting(engine, ids_of(engine, "Yes." + END))
    turns = [*ASKED, {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": {}}]}]
    turns.append({"role": "system", "content": "It is noon."})
    with serving(script) as url:
        assert post(url, PATH, GIVEN | {"messages": turns, "system": "Be kind."}).status_code == 200
    chat = [("system", "Be kind."), ("user", ASKED[0]["content"]), ("system", "Be brief."), ("system", "It is noon.")]
    assert script.seen == [engine.text.encode([{"role": role, "content": text} for role, text in chat])]
