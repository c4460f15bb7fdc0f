"""Who may ask: keys, names, web pages; and what a body may be."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import httpx
import pytest
from serving import ASKED, Scripted, post, serving

from mlx_gemma_mtp import SamplingParams, UserError
from mlx_gemma_mtp.server.ask import Ask, salted
from mlx_gemma_mtp.server.security import Rules, digest

CHAT = "/v1/chat/completions"
BODY = {"messages": ASKED, "max_tokens": 2}
PATHS = ["/v1/models", "/models", "/v1/models/demo", "/metrics", "/v1/nothing", "/openapi.json"]


@pytest.fixture(scope="module")
def scripted(engine):
    return Scripted(engine, lambda number: [[6]])


@pytest.fixture(scope="module")
def locked(scripted):
    with serving(scripted, keys=("right", "other")) as url:
        yield url


@pytest.fixture(scope="module")
def free(scripted):
    with serving(scripted, rules={"origins": ("http://page.example",), "hosts": ("mac.example",)}) as url:
        yield url


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers", [{}, {"x-api-key": "s3cret"}, {"authorization": "Bearer s3cret"}, {"authorization": "right"}]
)
def test_every_route_needs_the_key(locked, path, headers):
    response = httpx.get(locked + path, headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error" and "s3cret" not in response.text


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "right"}, {"authorization": "Bearer other"}, {"authorization": "bearer right"}]
)
def test_the_right_key(locked, headers):
    assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200
    assert post(locked, CHAT, BODY, **headers).status_code == 200
    assert post(locked, "/v1/messages", BODY, **headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/metrics", "/nothing"])
def test_head_is_get_without_a_body(free, path):
    with httpx.Client() as client:
        got, head = client.get(free + path), client.head(free + path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"] and "content-length" in head.headers
        assert client.get(f"{free}/ready").json() == {"ready": True}  # over the same connection


def test_head_needs_the_key_where_get_does(locked):
    assert httpx.head(f"{locked}/v1/models").status_code == 401 and httpx.head(locked).status_code == 200
    assert httpx.head(f"{locked}{CHAT}", headers={"x-api-key": "right"}).status_code == 405


def test_health_needs_no_key(locked):
    for path in ("/health", "/ready"):
        assert httpx.get(locked + path).status_code == 200
    assert "settings" not in httpx.get(f"{locked}/health").json()
    assert "settings" in httpx.get(f"{locked}/health", headers={"x-api-key": "right"}).json()
    denied = post(locked, "/v1/messages", BODY)
    assert denied.status_code == 401 and denied.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("localhost:9999", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("mac.example", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.0.1", 403),
        ("", 403),
    ],
)
def test_names_of_the_server(free, host, status):
    """A web page whose own name leads to 127.0.0.1 (DNS rebinding) sends that name."""
    assert httpx.get(f"{free}/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://page.example", "http://page.example.evil"])
def test_foreign_pages_run_nothing(free, origin):
    assert post(free, CHAT, BODY, origin=origin).status_code == 403
    assert httpx.options(free + CHAT, headers={"origin": origin}).status_code == 403


def test_an_allowed_page_and_the_server_s_own(free):
    response = post(free, CHAT, BODY, origin="http://page.example")
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://page.example"
    assert "origin" in response.headers["vary"].lower() and "access-control-allow-credentials" not in response.headers
    asked = {"origin": "http://page.example", "access-control-request-headers": "content-type"}
    before = httpx.options(free + CHAT, headers=asked)
    assert before.status_code == 204 and before.headers["access-control-allow-headers"] == "content-type"
    own = post(free, CHAT, BODY, origin=free)
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_a_form_of_a_page_is_no_request(free, kind):
    assert post(free, CHAT, BODY, content_type=kind).status_code == 415


def test_every_answer_has_an_id(free):
    ids = {httpx.get(free + path).headers["x-request-id"] for path in ("/health", "/v1/models", "/v1/nothing")}
    assert len(ids) == 3 and all(id.startswith("req_") for id in ids)
    answer = post(free, CHAT, BODY)
    assert answer.headers["x-request-id"].removeprefix("req_") == answer.json()["id"].removeprefix("chatcmpl-")


def test_a_huge_header_is_refused(free):
    with suppress(httpx.HTTPError):  # the connection was cut
        assert httpx.get(f"{free}/v1/models", headers={"x-long": "a" * 1_000_000}).status_code == 400
    assert httpx.get(f"{free}/v1/models").status_code == 200


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "192.168.0.5", "::", "mac.local"):
        with pytest.raises(UserError, match="api-key"):
            Rules.of(host, (), 100)
        assert Rules.of(host, ("k",), 100).addresses
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert not Rules.of(host, (), 100).addresses


@pytest.mark.parametrize("key", ["", " ", " k", "k\n", "\u00fc", "a\0b"])
def test_a_key_that_nobody_can_send_is_none(key):
    """The empty one would be everybody's who sends none: --api-key "$UNSET"."""
    with pytest.raises(UserError, match="--api-key"):
        Rules.of("0.0.0.0", ("right", key), 100)


@pytest.mark.parametrize("origin", ["*", "null", "", "localhost:3000", "http://page.example/", "http://*.example"])
def test_an_origin_that_no_page_has_is_refused(origin):
    """It would match nothing, and nobody would know why."""
    with pytest.raises(UserError, match="--allowed-origin"):
        Rules.of("127.0.0.1", (), 100, origins=("http://page.example", origin))
    assert Rules.of("127.0.0.1", (), 100, origins=("HTTP://Page.example:80",)).origins == {"http://page.example:80"}


def test_on_every_address_names_stay_checked():
    rules = Rules.of("0.0.0.0", ("k",), 100)
    rules.check_host("192.168.0.7:8080")
    rules.check_host("[fe80::1]:80")
    with pytest.raises(Exception, match="Host"):
        rules.check_host("evil.example")


def test_a_salt_that_is_half_a_character_is_a_salt():
    """JSON can spell one."""
    salts = [
        salted(Ask([[1]], SamplingParams(), {"cache_salt": f"\ud800{more}"}), "key").options["cache_salt"]
        for more in ("", "1")
    ]
    assert salts[0] != salts[1] and all(len(each) == 64 for each in salts)


def test_prefixes_are_kept_apart_by_key_and_salt(engine):
    """What the engine gets as cache_salt: one for each key and salt, and never the key."""
    salts: list[str | None] = []

    class Listening(Scripted):
        def astream(self, prompts: Any, params: Any, **options: Any) -> Any:
            salts.append(options["cache_salt"])
            return super().astream(prompts, params, **options)

    listening = Listening(engine, lambda number: [[6]])
    with serving(listening, keys=("right", "other")) as url:
        for key in ("right", "other", "right"):
            post(url, CHAT, BODY, x_api_key=key)
            post(url, "/v1/messages", BODY, x_api_key=key)
        post(url, CHAT, BODY | {"cache_salt": "mine"}, x_api_key="right")
    first, second, again = salts[:2], salts[2:4], salts[4:6]
    assert first == again and first[0] == first[1] != second[0] and salts[6] not in (None, "mine", *salts[:6])
    assert not any("right" in salt or salt == digest("right").hex() for salt in salts)
    salts.clear()
    with serving(listening) as url:
        post(url, CHAT, BODY)
        post(url, CHAT, BODY | {"cache_salt": "mine"})
    assert salts == [None, "mine"]
