"""How long a request may take to arrive, and what is none."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

import pytest
from serving import Scripted, serving
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_gemma_mtp.server import connection

ASK = b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def client(engine, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_IN", 1.5)
    monkeypatch.setattr(connection, "BODY_IN", 1.5)
    with (
        serving(Scripted(engine, lambda number: [[6]])) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def address(engine):
    with serving(Scripted(engine, lambda number: [[6]])) as url:
        yield "127.0.0.1", int(url.rpartition(":")[2])


def answer(client: socket.socket) -> bytes:
    """Returns an answer to ASK, whose head and body may come apart."""
    came = b""
    while not came.endswith(b"}"):
        some = client.recv(1 << 16)
        assert some, came
        came += some
    return came


def is_cut(client: socket.socket, said: bytes) -> bool:
    """Whether the server ends a connection that goes on with this, byte by byte, and for ever if need be."""
    with suppress(ConnectionError, TimeoutError):
        client.settimeout(0.1)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            client.sendall(said)
            with suppress(TimeoutError):
                if not client.recv(1 << 16):
                    return True
        return False
    return True


def test_a_head_that_never_ends(client):
    client.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nx: ")
    assert is_cut(client, b"a")


def test_a_client_that_says_nothing(client):
    assert is_cut(client, b"")


def test_a_body_that_never_ends(client):
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
    client.sendall(b"content-length: 100000\r\n\r\n")
    assert is_cut(client, b" ")


def test_a_second_request_has_its_own_time(client):
    """And one that has come whole has no limit: a connection is kept for further ones."""
    client.sendall(ASK)
    assert answer(client).startswith(b"HTTP/1.1 200")
    time.sleep(2.0)  # longer than a head may take, shorter than a connection is kept
    client.sendall(ASK[:20])
    client.sendall(ASK[20:])
    assert answer(client).startswith(b"HTTP/1.1 200")
    client.sendall(ASK[:20])
    assert is_cut(client, b"a")


def test_the_parser_does_not_depend_on_what_else_is_installed():
    """uvicorn's other one loses the body of a request that offers HTTP/2, and knows no limit for a head."""
    assert issubclass(connection.Connection, H11Protocol)


@pytest.mark.parametrize(
    "said",
    [
        b"GET /ready HTTP/1.1\r\n\r\n",
        b"GET /ready HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n",
        b"GET /ready HTTP/1.1\r\nhost : localhost\r\n\r\n",
        b"GET /ready HTTP/1.1\r\nhost: localhost\r\nx: \0\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: +2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /ready HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000,
    ],
    ids=["no host", "two hosts", "space", "nul", "path", "two lengths", "length", "encoding", "TLS", "long head"],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(address, said):
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(said)
        came = b""
        with suppress(ConnectionError):
            while some := client.recv(1 << 16):
                came += some
        lost = not came and len(said) > 1 << 16  # an answer, where more of the request was on its way
        assert lost or came.startswith(b"HTTP/1.1 400 ")


def test_a_body_beside_an_offer_of_http_2(address):
    """As Java's client sends it."""
    body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":1}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    offer = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(head + offer + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert answer(client).startswith(b"HTTP/1.1 200 ")
