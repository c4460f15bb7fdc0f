"""What agents send: every request is noted, and what this server does not know of it is named.

Each such thing has a decision here. One without is a fault of the run.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_gemma_mtp.server.responses_schema import Reasoning, ResponsesRequest, TextOptions
from mlx_gemma_mtp.server.schema import ChatRequest, CountRequest, MessagesRequest, StreamOptions

SCHEMAS = {
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/chat/completions": ChatRequest,
}
# What is known of the parts: by the field, the keys that the server reads.
INNER = {
    "thinking": {"type", "budget_tokens"},
    "output_config": {"effort", "format"},
    "reasoning": set(Reasoning.model_fields) - {"summary"},
    "text": set(TextOptions.model_fields) - {"verbosity"},
    "stream_options": set(StreamOptions.model_fields),
}
TURN = {"role", "content", "tool_calls", "tool_call_id", "name", "type", "call_id", "arguments", "output", "namespace"}
TURN |= {"encrypted_content", "reasoning_content"}
PART = {"type", "text", "thinking", "id", "name", "input", "tool_use_id", "content", "is_error", "refusal"}
TOOL = {"type", "name", "description", "input_schema", "parameters", "strict", "function", "tools"}
# Decided: what it is, by its place -> why it may be as it is.
DECIDED = {
    "metadata": "a name for whoever asks; it says nothing to a model",
    "client_metadata": "the same, of Codex",
    "prompt_cache_key": "beginnings are found by their tokens, and kept by key and cache_salt",
    "safety_identifier": "a name for whoever asks",
    "context_management": "clears old thoughts: Gemma's template leaves out those before the last user's turn anyway",
    "service_tier": "there is one",
    "include": "reasoning.encrypted_content is made; others are a 400",
    "thinking.display": "how much of the thoughts is shown: all of it",
    "reasoning.summary": "no summary is made: the thoughts themselves come",
    "text.verbosity": "no model here was trained on it",
    "output_config.task_budget": "a hint to the model of Anthropic's service",
    "messages.system": "a system's turn amid a conversation: it is rendered as one",
    "messages.content.cache_control": "beginnings are kept without being asked for",
    "system.cache_control": "beginnings are kept without being asked for",
    "tools.cache_control": "beginnings are kept without being asked for",
    "tools.defer_loading": "a tool to be found later: it is declared with the others, which says more and not less",
    "tools.eager_input_streaming": "long strings of arguments stream anyway",
    "input.id": "names an item for OpenAI's service; nothing goes by it",
    "input.status": "an item that comes back is over",
    "input.summary": "of thoughts; read where there is neither content nor encrypted_content",
    "input.content.annotations": "of a text that comes back",
    "input.content.logprobs": "of a text that comes back",
    "input.metadata": "notes of Codex for itself",
    "input.phase": "whether a text is a comment or the answer: Gemma knows no such difference",
    "messages.content.signature": "nobody checks it",
    "messages.content.caller": "who called the tool: the model did",
    "tools:web_search": "left out: this package runs no tools, and nothing forces it",
    "tools.external_web_access": "of web_search",
}


class Noting:
    """An app that notes its requests, and cuts the first stream of a route where it is told to.

    cut: how many pieces of the first stream with tools come before the connection breaks; None never. bare: whether
    that of a stream without tools is meant.
    """

    def __init__(self, app: ASGIApp, cut: int | None = None, bare: bool = False):
        self._app, self._cut, self._bare = app, cut, bare
        self.requests: list[tuple[str, str, int]] = []  # method, path, status
        self.unknown: Counter[str] = Counter()
        self.bodies: list[Mapping[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, messages = b"", []
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        given = _json(body)
        if isinstance(given, dict):
            self.unknown.update(unknown_of(scope["path"], given))
            self.bodies.append(given)
        sent = 0

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        async def noting(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                self.requests.append((scope["method"], scope["path"], message["status"]))
            elif self._cut is not None and isinstance(given, dict) and self._may_be_cut(given):
                sent += 1
                if sent > self._cut:
                    self._cut = None
                    self.requests.append(("CUT", scope["path"], 0))
                    raise ConnectionAbortedError("cut by the test")
            await send(message)

        await self._app(scope, again, noting)

    def _may_be_cut(self, body: Mapping[str, Any]) -> bool:
        return bool(body.get("stream")) and (self._bare or bool(body.get("tools")))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def unknown_of(path: str, body: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the server does not know of a body, by its place."""
    schema = SCHEMAS.get(path)
    if schema is None:
        yield f"route {path}"
        return
    yield from body.keys() - schema.model_fields.keys()
    for name, known in INNER.items():
        if isinstance(body.get(name), dict):
            yield from (f"{name}.{key}" for key in body[name].keys() - known)
    for name in ("messages", "input", "system"):
        if isinstance(body.get(name), list):
            for each in body[name]:
                yield from _of_turn(path, name, each)
    for tool in body.get("tools") or ():
        yield from (f"tools.{key}" for key in tool.keys() - TOOL)
        if tool.get("type") not in (None, "function", "custom", "namespace"):
            yield f"tools:{tool['type']}"


def _of_turn(path: str, name: str, turn: Mapping[str, Any]) -> Iterator[str]:
    known = PART if name == "system" else TURN
    yield from (f"{name}.{key}" for key in turn.keys() - known)
    if path.startswith("/v1/messages") and turn.get("role") == "system":
        yield "messages.system"
    content = turn.get("content")
    for part in content if isinstance(content, list) else ():
        yield from (f"{name}.content.{key}" for key in part.keys() - PART)


class Outside:
    """A proxy that lets nothing out, and notes who wanted to go where."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                try:
                    self.asked[connection.recv(300).split(b"\r\n")[0].decode(errors="replace")[:100]] += 1
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                except OSError:
                    pass

    def close(self) -> None:
        self._server.close()
