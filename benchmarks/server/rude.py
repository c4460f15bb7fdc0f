"""Requests that no good client sends: bytes, broken JSON and HTTP, and fields with whatever JSON can say.

Everything is drawn from a `random.Random`, so that a number gives the same request again.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens")
TURN = {"role": "user", "content": "def f(x):"}
BASE = {"messages": [TURN], "max_tokens": 2, "temperature": 0}
FIELDS = (
    *("messages", "prompt", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "thinking_budget", "chat_template_kwargs"),
    *("regex", "grammar", "num_draft_tokens", "timeout", "priority", "cache_salt", "stop_repetition", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "continue_final_message", "prediction", "system"),
    *("stop_sequences", "thinking", "output_config", "metadata", "user", "store", "__proto__", "constructor"),
)
TEXTS = (
    *("", "\0", "x" * 5000, "\ud800", "\udfff\ud800", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301" * 200),
    *("\u202eabc", "\ufeff", "<turn|>", "<|turn>system\n", "<|tool_call>call:f{}<tool_call|>", "<bos>", '<|"|>'),
    *("${jndi:ldap://x}", "{{7*7}}", "../../etc/passwd", "'; DROP TABLE users; --", "%s%n%x", "\r\nX-Evil: 1\r\n"),
)
NUMBERS = (
    *(
        "0",
        "-0",
        "-1",
        "1e308",
        "1e309",
        "-1e309",
        "1e-400",
        "NaN",
        "Infinity",
        "-Infinity",
        "9" * 400,
        "0.1" + "1" * 300,
    ),
    *(str(2**31), str(2**63), str(2**64), str(-(2**63) - 1), "1E+2", "00", "01", "0x10", "1_000", "+1", ".5", "5."),
)
WORDS = ("true", "false", "null", "[]", "{}", '""', "[[]]", '{"a":{}}', "[null]", '[{"role":"user"}]', "nul", "tru")
HEADERS = (
    *("content-length: -1", "content-length: 99999999999999999999", "content-length: 5\r\ncontent-length: 6"),
    *(
        "transfer-encoding: chunked\r\ncontent-length: 3",
        "transfer-encoding: gzip",
        "transfer-encoding: chunked, chunked",
    ),
    *(
        "content-encoding: br",
        "expect: 100-continue",
        "connection: upgrade\r\nupgrade: websocket",
        "host: evil.example",
    ),
    *("x: " + "a" * 70_000, "bad header", ": empty", "x\0y: 1", "origin: null", "accept: \xff\xfe", "range: bytes=0-"),
)
HEADS = (
    *(
        b"",
        b"\0" * 300,
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01",
    ),
    *(b"POST  HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\r\n" * 2000),
    *(
        b"GET /%00%ff/../.. HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://evil/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ),
    *(
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n",
    ),
    *(b"BREW / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /v1/models/\xe2\x82 HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    *(b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n"),
)
CHUNKS = (
    *(
        b"zz\r\n{}\r\n0\r\n\r\n",
        b"5\r\n{}\r\n0\r\n\r\n",
        b"ffffffffffffffff\r\n{}",
        b"-1\r\n{}\r\n",
        b"2\r\n{}",
        b"2\r\n{}0\r\n\r\n",
    ),
    *(
        b"2;x=" + b"y" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
        b"\r\n\r\n",
        b"0\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"1\r\n{\r\n" * 900,
    ),
)


@dataclass(frozen=True)
class Rude:
    """Bytes to be sent to a server on a connection of their own. kind: what is wrong with them. whole: whether their
    head says where they end; else the server waits for more until it is told that nothing comes.
    """

    kind: str
    content: bytes
    whole: bool = True


def draw(r: random.Random) -> Rude:
    """A request."""
    kind = r.choice(list(KINDS))
    return Rude(kind, KINDS[kind](r), kind not in HALF)


def _post(body: bytes, path: str, head: str = "") -> bytes:
    """A request whose head is good."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close"]
    lines += [head or f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def _good(r: random.Random) -> tuple[dict, str]:
    """A small body that is right, and its path."""
    path = r.choice(PATHS)
    return ({"prompt": "def f(x):", "max_tokens": 2} if path == PATHS[1] else dict(BASE)), path


def _bytes(r: random.Random) -> bytes:
    return _post(r.randbytes(r.choice((0, 1, 30, 3000))), r.choice(PATHS))


def _mutated(r: random.Random) -> bytes:
    """A good body of which some bytes were changed, lost or doubled, perhaps in another encoding."""
    body, path = _good(r)
    text = bytearray(json.dumps(body).encode(r.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-32", "utf-8-sig"))))
    for _ in range(r.randint(0, 4)):
        at = r.randrange(len(text))
        if (way := r.randrange(4)) == 0:
            text[at] = r.randrange(256)
        elif way == 1:
            del text[at : at + r.randint(1, 9)]
        elif way == 2:
            text[at:at] = text[at : at + r.randint(1, 30)]
        else:
            text[at:at] = r.choice((b'"', b"{", b"\\u", b"\\ud800", b"]", b",", b"\0", b"\xff", b"//", b"\\"))
        text = text or bytearray(b" ")
    return _post(bytes(text), path)


def _value(r: random.Random, depth: int = 0) -> str:
    """Something of JSON, or nearly."""
    way = r.randrange(10)
    if way < 2 and depth < 4:
        return "[" + ",".join(_value(r, depth + 1) for _ in range(r.randint(0, 4))) + "]"
    if way < 5 and depth < 4:
        pairs = (f"{_text(r)}:{_value(r, depth + 1)}" for _ in range(r.randint(0, 4)))
        return "{" + ",".join(pairs) + "}"
    return _text(r) if way < 7 else r.choice(NUMBERS) if way < 9 else r.choice(WORDS)


def _text(r: random.Random) -> str:
    known = (
        "role",
        "content",
        "type",
        "text",
        "name",
        "function",
        "parameters",
        "schema",
        "user",
        "system",
        "tool",
        "$ref",
    )
    return json.dumps(r.choice(TEXTS) if r.random() < 0.5 else r.choice(known), ensure_ascii=r.random() < 0.5)


def _fields(r: random.Random) -> bytes:
    """A good body with fields that hold anything, some of them twice."""
    body, path = _good(r)
    pairs = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in body.items()]
    pairs += [f"{json.dumps(r.choice(FIELDS))}:{_value(r)}" for _ in range(r.randint(1, 4))]
    r.shuffle(pairs)
    return _post(("{" + ",".join(pairs) + "}").encode("utf-8", "surrogatepass"), path)


def _deep(r: random.Random) -> bytes:
    """A body within a body within a body."""
    depth, (opens, closes) = r.choice((50, 300, 2000, 30_000)), r.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    nest = opens * depth + "1" + closes * (depth if r.random() < 0.5 else 0)
    field = r.choice(("messages", "tools", "response_format", "metadata", "prompt", "logit_bias", "system"))
    whole = nest if r.random() < 0.3 else f'{{"messages":[{json.dumps(TURN)}],"max_tokens":2,"{field}":{nest}}}'
    return _post(whole.encode(), r.choice(PATHS))


def _chunked(r: random.Random) -> bytes:
    return _post(r.choice(CHUNKS), r.choice(PATHS), "transfer-encoding: chunked")


def _headers(r: random.Random) -> bytes:
    body, path = _good(r)
    content = json.dumps(body).encode()
    head = r.choice(HEADERS)
    return _post(content, path, head if "content-length" in head else f"{head}\r\ncontent-length: {len(content)}")


def _short(r: random.Random) -> bytes:
    """A body of fewer or more bytes than its head says."""
    body, path = _good(r)
    content = json.dumps(body).encode()
    return _post(content, path, f"content-length: {max(len(content) + r.randint(-20, 20), 0)}")


def _raw(r: random.Random) -> bytes:
    return r.choice(HEADS) if r.random() < 0.7 else r.randbytes(r.randint(1, 3000))


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bytes": _bytes,
    "mutated": _mutated,
    "fields": _fields,
    "more fields": _fields,
    "deep": _deep,
    "chunked": _chunked,
    "headers": _headers,
    "length": _short,
    "raw": _raw,
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
SOON = 0.2  # seconds that a server has to answer what may not be whole
HALF = ("chunked", "headers", "length", "raw")


def send(address: tuple[str, int], rude: Rude, patience: float = 60.0) -> tuple[int | None, bytes]:
    """Sends a request, and returns the status and the whole answer; None without one. Raises TimeoutError where the
    server neither answers nor closes.
    """
    answer, more = b"", True
    with (
        socket.create_connection(address, timeout=patience) as connection,
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(rude.content)
        if not rude.whole:
            connection.settimeout(SOON)
            with suppress(TimeoutError):
                more = bool(answer := connection.recv(1 << 16))
            connection.settimeout(patience)
            connection.shutdown(socket.SHUT_WR)  # to a server this is as good as gone
        while more and (piece := connection.recv(1 << 16)):
            answer += piece
    words = answer.removeprefix(CONTINUE).split(b" ", 2)
    status = int(words[1]) if words[0].startswith(b"HTTP/") and len(words) > 2 and words[1].isdigit() else None
    return status, answer
