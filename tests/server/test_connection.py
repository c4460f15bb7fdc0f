"""How long a request may take to arrive."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

import pytest
from serving import Scripted, serving

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
