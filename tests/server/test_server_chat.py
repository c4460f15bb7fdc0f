"""Chat completions through the real openai client: every parameter, texts equal to the engine's own."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import ASKED, NAME, NOW, WEATHER, ids_of, post

from mlx_gemma_mtp import SamplingParams

SHORT = {"model": NAME, "messages": ASKED, "max_tokens": 24}


def own(engine, prompt=ASKED, options=None, **params) -> Any:
    return engine.generate(prompt, SamplingParams(**({"max_tokens": 24} | params)), **(options or {}))


def streamed(client, **body) -> tuple[str, list[Any]]:
    """The text of the first choice, and all chunks."""
    chunks = list(client.chat.completions.create(**body, stream=True))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and not c.choices[0].index), chunks


PARAMETERS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "seed": 3, "top_p": 0.9},
    {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    {"temperature": 0.0, "logit_bias": {"6": -100.0}},
    {"temperature": 0.0, "stop": "\n"},
    {"temperature": 0.0, "stop": ["def", "zzz"]},
]
EXTRA = [
    {"top_k": 5},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"ignore_eos": True},
    {"num_draft_tokens": 0},
    {"num_draft_tokens": "auto"},
    {"num_draft_tokens": 5, "priority": 3, "timeout": 60},
]


@pytest.mark.parametrize("given", PARAMETERS, ids=str)
def test_parameters_give_the_engine_s_text(client, engine, given):
    params = {name: value for name, value in given.items()}
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    if isinstance(params.get("stop"), str):
        params["stop"] = (params["stop"],)
    expected = own(engine, **params)
    whole = client.chat.completions.create(**SHORT, **given)
    text, chunks = streamed(client, **SHORT, **given)
    assert whole.choices[0].message.content == text == expected.text
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason] == [expected.finish_reason]


@pytest.mark.parametrize("given", EXTRA, ids=str)
def test_further_parameters_give_the_engine_s_text(client, engine, given):
    sampling = {"temperature": 1.0, "seed": 11}
    options = {name: value for name, value in given.items() if name in ("num_draft_tokens", "priority", "timeout")}
    params = {name: value for name, value in given.items() if name not in options}
    expected = own(engine, options=options, **sampling, **params)
    whole = client.chat.completions.create(**SHORT, **sampling, extra_body=given)
    text, _ = streamed(client, **SHORT, **sampling, extra_body=given)
    assert whole.choices[0].message.content == text == expected.text


def test_a_text_that_repeats_itself_ends(client, engine, url):
    """The end is a stop, as by a stop string; the choice tells what it was."""
    token = ids_of(engine, "again")[-1]
    given = {"messages": ASKED, "max_tokens": 400, "logit_bias": {str(token): 100.0}, "temperature": 0}
    expected = own(engine, max_tokens=400, logit_bias={token: 100.0}, temperature=0.0, stop_repetition=16)
    assert expected.finish_reason == "repetition" and len(expected.tokens) < 400
    whole = client.chat.completions.create(model=NAME, **given, extra_body={"stop_repetition": 16})
    text, chunks = streamed(client, model=NAME, **given, extra_body={"stop_repetition": 16})
    last = chunks[-1].choices[0]
    assert whole.choices[0].message.content == text == expected.text
    assert whole.choices[0].finish_reason == last.finish_reason == "stop"
    assert whole.choices[0].model_extra["stop_reason"] == last.model_extra["stop_reason"] == "repetition"
    plain = post(
        url, "/v1/completions", {"prompt": "x", "max_tokens": 400} | given | {"stop_repetition": 16, "messages": None}
    )
    assert plain.json()["choices"][0]["stop_reason"] == "repetition"
    spoken = {"messages": ASKED, "max_tokens": 40, "temperature": 0.0}
    assert post(url, "/v1/messages", spoken | {"stop_repetition": 4}).json()["stop_reason"] in (
        "end_turn",
        "max_tokens",
    )
    for path in ("/v1/chat/completions", "/v1/messages"):
        for length in (3, 5000):
            refused = post(url, path, spoken | {"stop_repetition": length})
            assert refused.status_code == 400 and "stop_repetition" in refused.json()["error"]["message"]


def test_the_answer_s_shape(client, engine):
    whole = client.chat.completions.create(**SHORT, temperature=0)
    expected = own(engine, temperature=0.0)
    assert whole.id.startswith("chatcmpl-") and whole.object == "chat.completion" and whole.model == NAME
    assert whole.system_fingerprint.startswith("fp_")
    usage, stats = whole.usage, expected.stats
    assert usage.prompt_tokens == stats.prompt_tokens and usage.completion_tokens == len(expected.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0
    timings = whole.choices[0].model_extra["timings"]
    assert timings["draft_n_accepted"] == details.accepted_prediction_tokens and timings["mtp"] is True
    # The first token is the prefill's, each round gives its accepted drafts and one more.
    assert usage.completion_tokens == 1 + timings["rounds"] + timings["draft_n_accepted"]


def test_the_stream_s_shape(client):
    _, chunks = streamed(client, **SHORT, temperature=0, stream_options={"include_usage": True})
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    roles = [chunk.choices[0].delta.role for chunk in chunks if chunk.choices]
    assert roles[0] == "assistant" and set(roles[1:]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2].choices[0].finish_reason and chunks[-2].choices[0].delta.content is None


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_usage_comes_only_where_it_is_asked_for(client, options):
    _, chunks = streamed(client, **SHORT, extra_body={"stream_options": options})
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_the_streaming_helper_makes_the_whole_answer(client):
    """It joins every string that is repeated, so roles, ids and names must come once."""
    given = SHORT | {"max_tokens": 64, "temperature": 0, "n": 2}  # it ends by itself, else the helper raises
    whole = client.chat.completions.create(**given)
    with client.chat.completions.stream(**given) as stream:
        for _ in stream:
            pass
        joined = stream.get_final_completion()
    for one, other in zip(whole.choices, joined.choices, strict=True):
        assert one.message.content == other.message.content and one.finish_reason == other.finish_reason
        assert other.message.role == "assistant"


def test_choices_have_seeds_that_follow_each_other(client, engine):
    asked = [{"role": "user", "content": "What does the Python function `platform.machine` do?"}]
    expected = [own(engine, asked, temperature=1.0, seed=seed).text for seed in (5, 6, 7)]
    given = SHORT | {"messages": asked, "temperature": 1.0, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**given)
    assert [choice.message.content for choice in whole.choices] == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**given, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected and len(set(texts)) > 1
    assert whole.usage.prompt_tokens == engine.generate(asked, SamplingParams(max_tokens=1)).stats.prompt_tokens


def test_without_a_seed_choices_differ(client):
    whole = client.chat.completions.create(**(SHORT | {"max_tokens": 48}), temperature=1.5, n=4)
    assert len({choice.message.content for choice in whole.choices}) > 1


@pytest.mark.parametrize("top", [0, 5, 20])
def test_logprobs_are_the_text_s(client, engine, top):
    expected = own(engine, temperature=0.0, logprobs=top)
    given = {"temperature": 0, "logprobs": True, "top_logprobs": top}
    entries = client.chat.completions.create(**SHORT, **given).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == expected.text
    assert [entry.logprob for entry in entries] == [each.logprob for each in expected.logprobs]
    assert all(len(entry.top_logprobs) == top for entry in entries)
    _, chunks = streamed(client, **SHORT, **given)
    pieces = [piece.choices[0] for piece in chunks if piece.choices and piece.choices[0].delta.content]
    assert [entry for piece in pieces for entry in piece.logprobs.content] == entries
    for piece in pieces:
        assert "".join(entry.token for entry in piece.logprobs.content) == piece.delta.content


def test_logprobs_out_of_range_are_refused(client):
    for given in ({"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**SHORT, **given)
        assert caught.value.param == "top_logprobs" and "top_logprobs is" in caught.value.message
    assert client.chat.completions.create(**SHORT).choices  # and it goes on


def test_json_schema_is_enforced(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    for seed in range(3):
        given = {"temperature": 1.0, "seed": seed, "response_format": form, "max_tokens": 64}
        whole = client.chat.completions.create(**(SHORT | given)).choices[0]
        found = json.loads(whole.message.content)
        assert found.keys() == {"ok", "kind"} and isinstance(found["ok"], bool) and found["kind"] in "ab"
        assert streamed(client, **(SHORT | given))[0] == whole.message.content


def test_the_parse_helper_gets_its_object(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Point(BaseModel):
        even: bool
        odd: bool

    whole = client.chat.completions.parse(**(SHORT | {"max_tokens": 64}), temperature=0, response_format=Point)
    assert isinstance(whole.choices[0].message.parsed, Point)
    with client.chat.completions.stream(**(SHORT | {"max_tokens": 64}), temperature=0, response_format=Point) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == whole.choices[0].message.parsed


def test_json_object_regex_and_grammar(client):
    pytest.importorskip("llguidance")
    given = SHORT | {"max_tokens": 64, "temperature": 0}
    digits = client.chat.completions.create(**given, extra_body={"regex": "[0-9]{3}"})
    assert digits.choices[0].message.content.isdecimal()
    lark = client.chat.completions.create(**given, extra_body={"grammar": 'start: "yes" | "no"'})
    assert lark.choices[0].message.content in ("yes", "no")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**given, response_format={"type": "json_object"}, extra_body={"regex": "a"})


def test_a_schema_that_cannot_be_enforced_is_refused(client):
    pytest.importorskip("llguidance")
    unique = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    for schema in (unique, {"type": "nonsense"}, {"$ref": "#/nowhere"}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                **SHORT, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            )
    for form in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "xml"}, {}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**SHORT, response_format=form)
        assert caught.value.param.startswith("response_format")


def test_a_forced_call_and_its_answer(client):
    """The whole way of a tool: a forced call, its result in the next turn, by both ways of reading."""
    pytest.importorskip("llguidance")
    given = SHORT | {"tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 64}
    choice = {"type": "function", "function": {"name": "get_weather"}}
    whole = client.chat.completions.create(**given, tool_choice=choice).choices[0]
    (call,) = whole.message.tool_calls[:1]
    assert whole.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
    with client.chat.completions.stream(**given, tool_choice=choice) as stream:
        for _ in stream:
            pass
        joined = stream.get_final_completion().choices[0]
    assert [each.function.arguments for each in joined.message.tool_calls] == [
        each.function.arguments for each in whole.message.tool_calls
    ]
    history = [*ASKED, whole.message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": each.id, "content": "15"} for each in whole.message.tool_calls]
    after = client.chat.completions.create(**(given | {"messages": history}), tool_choice="none").choices[0]
    assert after.message.tool_calls is None


def test_required_one_call_and_none(client):
    pytest.importorskip("llguidance")
    given = SHORT | {"tools": [WEATHER, NOW], "temperature": 1.0, "seed": 2, "max_tokens": 96}
    one = client.chat.completions.create(**given, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    none = client.chat.completions.create(**given, tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**given, tool_choice={"type": "function", "function": {"name": "other"}})
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize(
    "given, thinks",
    [
        ({}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}, False),
        ({"thinking_budget": 8}, True),
    ],
)
def test_thoughts_are_asked_of_the_template(client, engine, given, thinks):
    expected = len(engine.text.encode(ASKED, thinking=thinks))
    assert client.chat.completions.create(**SHORT, extra_body=given).usage.prompt_tokens == expected


def test_a_message_is_continued(client, engine):
    messages = [*ASKED, {"role": "assistant", "content": "```python\ndef fib"}]
    expected = engine.generate(messages, SamplingParams(max_tokens=24, temperature=0.0), continue_final_message=True)
    given = SHORT | {"messages": messages, "temperature": 0, "extra_body": {"continue_final_message": True}}
    assert client.chat.completions.create(**given).choices[0].message.content == expected.text


def test_what_changes_nothing_is_taken(client, engine):
    """nulls are defaults, unknown fields are ignored, a prediction is taken."""
    nulls = dict.fromkeys(("temperature", "top_p", "stop", "seed", "n", "tools", "response_format", "logit_bias"))
    nulls |= dict.fromkeys(("stream", "stream_options", "tool_choice", "max_tokens", "audio", "functions"))
    unknown = {f"unknown_{i}": i for i in range(20)} | {"metadata": {"a": "b"}, "store": True, "user": "me"}
    unknown |= {"service_tier": "auto", "prompt_cache_key": "k", "verbosity": "low", "keep_alive": 1, "options": {}}
    neutral = {"best_of": 1, "echo": False, "modalities": ["text"], "min_tokens": 0, "length_penalty": 1.0}
    prediction = {"prediction": {"type": "content", "content": "def"}}
    whole = client.chat.completions.create(
        model=NAME, messages=ASKED, max_completion_tokens=24, extra_body=nulls | unknown | neutral | prediction
    )
    assert whole.choices[0].message.content == own(engine).text


@pytest.mark.parametrize(
    "given",
    [
        {"audio": {"voice": "a"}},
        {"functions": [{}]},
        {"best_of": 2},
        {"echo": True},
        {"guided_json": {}, "suffix": "x"},
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(client, given):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**SHORT, extra_body=given)
    assert caught.value.param in given and caught.value.param in str(caught.value.message)


def test_names_of_the_model(client):
    ids = [model.id for model in client.models.list()]
    assert ids == [NAME, "background"]  # a pattern is no name
    for name in (*ids, "claude-3-5-haiku"):
        assert client.chat.completions.create(**(SHORT | {"model": name})).model == name
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**(SHORT | {"model": "/etc/passwd"}))
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("most", [1, 2, 7])
def test_max_tokens_are_never_exceeded(client, most):
    """Though a round gives several."""
    whole = client.chat.completions.create(**(SHORT | {"max_tokens": most}), extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == most and whole.choices[0].finish_reason == "length"


def test_all_kinds_of_rows_at_once(url, engine):
    """Plain, bound, biased, penalised and thinking rows share rounds; each text is its own alone."""
    pytest.importorskip("llguidance")
    kinds = [
        {},
        {"regex": "[0-9]{8}"},
        {"logit_bias": {"6": -100.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"reasoning_effort": "low"},
        {"logprobs": True, "top_logprobs": 3},
    ]
    bodies = [{"messages": ASKED, "max_tokens": 16, "temperature": 1.0, "seed": 3} | kind for kind in kinds]
    alone = [post(url, "/v1/chat/completions", body).json()["choices"][0]["message"] for body in bodies]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(lambda body: post(url, "/v1/chat/completions", body).json(), bodies * 2))
    assert [answer["choices"][0]["message"] for answer in together] == alone * 2
    assert alone[1]["content"].isdecimal() and len(alone[1]["content"]) == 8


def test_paths_without_the_version(url, engine):
    assert post(url, "/chat/completions", {"messages": ASKED, "max_tokens": 4}).status_code == 200


def test_many_clients_at_once(url, engine):
    """32 requests together, streamed and not, each with the text that it has alone."""
    prompts = [f"def f{i}(x):" + " y" * (7 * i) for i in range(32)]
    params = [SamplingParams(max_tokens=12 + i % 5, temperature=i % 2 * 1.0, seed=i) for i in range(32)]
    expected = [engine.generate(prompt, each).text for prompt, each in zip(prompts, params, strict=True)]

    async def ask(client, i: int) -> str:
        body = {"model": NAME, "messages": [{"role": "user", "content": prompts[i]}], "seed": i}
        body |= {"max_tokens": params[i].max_tokens, "temperature": params[i].temperature}
        if i % 3:
            return (await client.chat.completions.create(**body)).choices[0].message.content
        text = ""
        async for chunk in await client.chat.completions.create(**body, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(32)))

    assert asyncio.run(all_of_them()) == expected
