"""The page at `/`: who gets it, and what it may do."""

from __future__ import annotations

import re

import httpx
import pytest
from serving import Scripted, post, serving

from mlx_gemma_mtp.server.page import FILE, page_headers


@pytest.fixture(scope="module")
def locked(engine):
    with serving(Scripted(engine, lambda number: [[6]]), keys=("right",)) as url:
        yield url


def test_it_needs_no_key_and_the_rest_does(locked):
    answer = httpx.get(locked)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == FILE.read_bytes()
    assert httpx.get(f"{locked}/v1/models").status_code == 401
    assert httpx.get(locked, headers={"host": "evil.example"}).status_code == 403
    assert post(locked, "/", {}).status_code == 405


def test_its_headers_allow_nothing_but_itself(locked):
    headers = httpx.get(locked).headers
    policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    for each in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[each])
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_page_that_is_changed_has_other_hashes():
    text = b"<style>a</style><script>b</script>"
    assert page_headers(text) != page_headers(text.replace(b"b<", b"c<"))


def test_the_file_loads_nothing_and_writes_no_html():
    text = FILE.read_text()
    addresses = set(re.findall(r"https?://[^\s'\"`]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|@import|url\(", text)
    assert not re.search(r"<(script|link|img|iframe)[^>]* src=|<link(?! rel=\"icon\" href=\"data:)|\son\w+=\"", text)
    assert len(re.findall(r"<script>", text)) == len(re.findall(r"<style>", text)) == 1 and "style=" not in text
