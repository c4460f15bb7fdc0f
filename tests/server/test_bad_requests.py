"""What is wrong with a request is said by status, field and one line, in the client's own shape; nothing runs."""

from __future__ import annotations

import gzip
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import ASKED, NAME, Scripted, post, serving

from mlx_gemma_mtp.server.limits import Limits
from mlx_gemma_mtp.server.schema import ChatRequest, CompletionRequest, MessagesRequest

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def url(engine):
    limits = Limits(body=200_000, stops=4, biases=10, choices=8, schema=2000, tools=3, messages=50)
    with serving(Scripted(engine, lambda number: [[6]]), limits=limits) as url:
        yield url


def refused(response: httpx.Response, status: int = 400) -> dict:
    """The error of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    for leak in ("Traceback", "pydantic", "site-packages", ".py"):
        assert leak not in response.text
    return error


SINGLE = {"type": "auto", "disable_parallel_tool_use": "no"}
RESULT = {"type": "tool_result", "tool_use_id": "1"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def user(content) -> list:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000, b"{}", b"nul"]
)
def test_what_is_no_request(url, body):
    refused(post(url, CHAT, body))


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [],
        [123],
        [{}],
        [None],
        [{"role": 3, "content": "x"}],
        [{"role": "robot", "content": "x"}],
        user(None),
        user(5),
        user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        user([{"type": "text"}]),
        user("\ud800"),
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": "", "tool_calls": "x"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    ],
    ids=str,
)
def test_bad_messages(url, messages):
    refused(post(url, CHAT, {"messages": messages}))


@pytest.mark.parametrize(
    "messages",
    [
        [*ASKED, {"role": "assistant", "content": None}, *ASKED],
        [*ASKED, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, *ASKED],
        [{"role": "developer", "content": "x"}, *ASKED],
        user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]),
        [
            *ASKED,
            {
                "role": "assistant",
                "content": " ",
                "reasoning_content": "hm",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}]},
        ],
    ],
    ids=str,
)
def test_messages_as_clients_send_them(url, messages):
    assert post(url, CHAT, {"messages": messages}).status_code == 200


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -7),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", -5),
        ("max_completion_tokens", "9"),
        ("seed", -1),
        ("seed", 2**64),
        ("n", 0),
        ("n", 9),
        ("n", "2"),
        ("stop", 3),
        ("stop", [1]),
        ("stop", ["a"] * 5),
        ("stop", ["a" * 2000]),
        ("stop", [""]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {str(i): 1 for i in range(11)}),
        ("logit_bias", [1]),
        ("presence_penalty", 1e300),
        ("frequency_penalty", "x"),
        ("repetition_penalty", 0),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("tools", [{}]),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"name": f"t{i}"} for i in range(4)]),
        ("tool_choice", "sometimes"),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 3000}}}),
        ("regex", "a" * 3000),
        ("num_draft_tokens", -1),
        ("num_draft_tokens", "many"),
        ("timeout", 0),
        ("priority", 1000),
        ("reasoning_effort", "enormous"),
        ("thinking_budget", -1),
        ("chat_template_kwargs", {"tokenize": False}),
        ("chat_template_kwargs", {"enable_thinking": "yes"}),
        ("audio", {"voice": "x"}),
        ("model", 5),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_named(url, field, value):
    error = refused(post(url, CHAT, {"messages": ASKED, field: value}))
    assert field in (error["param"] or "") or field in error["message"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("logit_bias", {"99999999": 1}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}),
        ("regex", "("),
        ("grammar", "start: missing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_named(url, field, value, stream):
    if field != "logit_bias":
        pytest.importorskip("llguidance")  # else nobody reads it
    assert refused(post(url, CHAT, {"messages": ASKED, field: value, "stream": stream}))["param"] == field


def test_a_reply_that_goes_on_and_begins_is_refused(url):
    """vLLM's pair of switches, of which one says the contrary of the other."""
    both = {"continue_final_message": True, "add_generation_prompt": True}
    asked = {"messages": [*ASKED, {"role": "assistant", "content": "So"}], "max_tokens": 1}
    assert refused(post(url, CHAT, asked | both))["param"] == "add_generation_prompt"
    assert post(url, CHAT, asked | both | {"continue_final_message": False}).status_code == 200


def test_numbers_that_are_none(url):
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000):
        refused(post(url, CHAT, f'{{"messages":[{{"role":"user","content":"x"}}],"temperature":{text}}}'.encode()))


def test_the_context_is_told_before_anything_is_sent(url, engine):
    context = engine.target.config.context
    for stream in (False, True):
        error = refused(post(url, CHAT, {"messages": user("x y " * context), "stream": stream}))
        assert error["code"] == "context_length_exceeded" and str(context) in error["message"]


def test_an_unknown_model_and_route(url):
    assert refused(post(url, CHAT, {"model": "gpt-9", "messages": ASKED}), 404)["code"] == "model_not_found"
    refused(httpx.get(f"{url}/v1/nothing"), 404)
    refused(httpx.get(url + CHAT), 405)
    refused(httpx.delete(f"{url}/v1/models"), 405)


@pytest.mark.parametrize(
    "body", [{"prompt": []}, {"prompt": ""}, {"prompt": [[]]}, {"prompt": [""]}, {"prompt": 3}, {"prompt": [99999999]}]
)
def test_bad_prompts(url, body):
    refused(post(url, "/v1/completions", body))


def test_too_many_prompts_for_one_request(url):
    refused(post(url, "/v1/completions", {"prompt": ["a"] * 5, "n": 2}))
    assert post(url, "/v1/completions", {"prompt": ["a"] * 4, "n": 2}).status_code == 200


@pytest.mark.parametrize(
    "body, param",
    [
        ({"max_tokens": 5, "messages": [{"role": "narrator", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": 5, "messages": user([{"type": "image", "source": {}}])}, "messages.0.content.0.type"),
        ({"max_tokens": 5, "messages": ASKED, "thinking": {"type": "maybe"}}, "thinking.type"),
        ({"max_tokens": 5, "messages": ASKED, "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"max_tokens": 5, "messages": ASKED, "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"max_tokens": 5, "messages": ASKED, "thinking": {"type": "enabled", "budget_tokens": "x"}}, "budget_tokens"),
        ({"max_tokens": 5, "messages": ASKED, "tools": [{"name": "f"}], "tool_choice": SINGLE}, "disable_parallel"),
        ({"max_tokens": 5, "messages": user([{"type": "text"}])}, "messages.0.content.0.text"),
        ({"max_tokens": 5, "messages": user([RESULT | {"content": [{"type": "text"}]}])}, "content.0.content.0.text"),
        ({"max_tokens": 5, "messages": user([RESULT | {"content": [IMAGE]}])}, "messages.0.content.0.content.0.type"),
        ({"max_tokens": 5, "messages": ASKED, "timeout": 0}, "timeout"),
        ({"messages": ASKED}, "max_tokens"),
        ({"max_tokens": 0, "messages": ASKED}, "max_tokens"),
        ({"max_tokens": 5, "messages": ASKED, "mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_anthropic_s_shape_of_an_error(url, body, param):
    response = post(url, "/v1/messages", body)
    assert response.status_code == 400
    found = response.json()
    assert found.keys() == {"type", "error"} and found["type"] == "error"
    assert found["error"]["type"] == "invalid_request_error" and param in found["error"]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("messages", "prompt", "tools", "tool_choice", "stop", "n", "logit_bias", "response_format", "system")
FIELDS += ("max_tokens", "stream", "stream_options", "thinking", "chat_template_kwargs", "logprobs", "seed", "model")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([CHAT, "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"]),
    more=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=5),
)
def test_no_body_is_a_fault_of_the_server(url, path, more):
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": ASKED}
    body |= {"max_tokens": 3} | more
    try:
        content = json.dumps(body).encode()
    except ValueError:
        return
    response = post(url, path, content)
    assert response.status_code in (200, 400, 404), response.text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200))
def test_no_bytes_are_a_fault_of_the_server(url, content):
    assert post(url, CHAT, content).status_code == 400


def test_a_body_beyond_the_limit(url):
    big = b'{"messages":[{"role":"user","content":"' + b"x" * 300_000 + b'"}]}'
    refused(post(url, CHAT, big), 413)

    def pieces():
        for _ in range(30):
            yield b"x" * 10_000

    head = {"content-type": "application/json"}
    try:
        response = httpx.post(url + CHAT, content=pieces(), headers=head, timeout=30)
    except httpx.WriteError:
        return  # the server closed before all was written
    refused(response, 413)
    assert post(url, "/v1/messages", big).json()["error"]["type"] == "request_too_large"


def test_a_packed_body_is_not_unpacked(url):
    """A few bytes of gzip could become gigabytes."""
    refused(post(url, CHAT, gzip.compress(json.dumps({"messages": ASKED}).encode()), content_encoding="gzip"))


@pytest.mark.parametrize(
    "path, field, value",
    [
        (CHAT, "system", "Be brief."),
        (CHAT, "stop_sequences", ["x"]),
        (CHAT, "thinking", {"type": "enabled"}),
        (CHAT, "enable_thinking", True),
        ("/v1/completions", "tools", [{"name": "f"}]),
        ("/v1/completions", "max_completion_tokens", 5),
        ("/v1/completions", "reasoning_effort", "high"),
        ("/v1/messages", "response_format", {"type": "json_object"}),
        ("/v1/messages", "output_format", {"type": "json_schema", "schema": {"type": "object"}}),
        ("/v1/messages", "stop", ["x"]),
        ("/v1/messages", "n", 2),
    ],
)
def test_a_field_of_another_route_is_refused(url, path, field, value):
    """It would change the reply, so it is not ignored; what asks for nothing is."""
    body = {"max_tokens": 3} | ({"prompt": "x"} if path == "/v1/completions" else {"messages": ASKED})
    response = post(url, path, body | {field: value})
    assert response.status_code == 400 and field in response.json()["error"]["message"]
    assert post(url, path, body | {field: None}).status_code == 200


def test_what_asks_for_nothing_is_ignored_on_every_route(url):
    nothing = {"n": 1, "presence_penalty": 0, "repetition_penalty": 1, "ignore_eos": False, "tool_choice": None}
    more = {"parallel_tool_calls": True, "stream_options": {"include_usage": True}, "user": "u", "metadata": {"a": "b"}}
    assert post(url, "/v1/messages", {"messages": ASKED, "max_tokens": 3} | nothing | more).status_code == 200


@pytest.mark.parametrize("field", ["model", "cache_salt", "stop"])
def test_half_a_character_is_no_text(engine, field):
    with serving(Scripted(engine, lambda number: [[6]]), keys=("k",), aliases=("*",)) as url:
        error = refused(post(url, CHAT, {"messages": ASKED, field: "\ud800"}, x_api_key="k"))
    assert error["param"] == field


@pytest.mark.parametrize(
    "kind, body",
    [
        (CompletionRequest, {"prompt": [0.5] * 10_000}),
        (CompletionRequest, {"prompt": [[0.5] * 10_000]}),
        (ChatRequest, {"messages": [1] * 10_000}),
        (ChatRequest, {"messages": ASKED, "tools": [1] * 10_000}),
        (ChatRequest, {"messages": ASKED, "stop": [1] * 10_000}),
        (MessagesRequest, {"messages": ASKED, "max_tokens": 5, "system": [1] * 10_000}),
    ],
)
def test_a_long_list_of_wrong_parts_is_not_told_part_by_part(kind, body):
    """Each part would be an error of a kilobyte, and a body has millions of parts."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 4


def test_biases_are_counted_before_they_are_looked_at(url):
    error = refused(post(url, CHAT, {"messages": ASKED, "logit_bias": {str(i): "x" for i in range(10_000)}}))
    assert "10000 entries" in error["message"]


def test_the_field_of_a_long_prompt_is_named(url, engine):
    error = refused(post(url, "/v1/completions", {"prompt": "x y " * engine.target.config.context}))
    assert error["param"] == "prompt"


def test_the_model_s_name_is_the_default(url):
    for name in (None, "", NAME):
        assert post(url, CHAT, {"model": name, "messages": ASKED}).json()["model"] == NAME
