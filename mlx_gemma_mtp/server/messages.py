"""Anthropic's messages: the object, and the events of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from .calls import parted
from .errors import Refusal
from .stream import event
from .usage import cached_tokens, kept_tokens, repairs_of, timings_of

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from ..text.tools import CallDelta
    from .run import Run

REASONS = {
    "stop": "end_turn",
    "repetition": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "timeout": "max_tokens",
}
PATH = "/v1/messages"
UNSIGNED = "unsigned"  # the signature of a thought: clients send it back, and nobody checks it
Block = dict[str, Any]


def message_object(run: Run, model: str, result: Result) -> dict[str, Any]:
    """Returns the whole answer."""
    content: list[Block] = []
    if result.reasoning:
        content.append(_thinking(result.reasoning, UNSIGNED))
    if result.text:
        content.append({"type": "text", "text": result.text})
    content += [_call(call.id, call.name, call.arguments) for call in result.tool_calls]
    if (cut := result.cut_call) is not None:
        content.append(_call(cut.id, cut.name, from_json(cut.json, allow_partial=True)))
    return _head(run, model) | {"content": content, "timings": timings_of(result)} | _ending(run, result)


def _head(run: Run, model: str) -> dict[str, Any]:
    return {"id": f"msg_{run.id}", "type": "message", "role": "assistant", "model": model}


def _ending(run: Run, result: Result) -> dict[str, Any]:
    """How a message ended, and what it used."""
    stop = _stop_sequence(run, result)
    reason = "stop_sequence" if stop is not None else REASONS[result.finish_reason]
    if result.finish_reason == "repetition" and (result.tool_calls or result.cut_call):
        reason = REASONS["tool_calls" if result.cut_call is None else "length"]
    repaired = repairs_of(result)
    more = {"repaired": repaired} if repaired else {}
    return {"stop_reason": reason, "stop_sequence": stop, "usage": _usage(run, [result])} | more


def _usage(run: Run, results: list[Result]) -> dict[str, int]:
    """input_tokens: of the prompt, without those that were read from the prefixes or written there."""
    cached, kept = cached_tokens(run.ask, results), kept_tokens(run.ask, results)
    return {
        "input_tokens": run.ask.prompt_tokens - cached - kept,
        "output_tokens": sum(len(result.tokens) for result in results),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": kept,
    }


def _stop_sequence(run: Run, result: Result) -> str | None:
    """The stop string that ended a text, None where another thing did."""
    stops = run.ask.params.stop
    if result.finish_reason != "stop" or result.end_token is not None or not stops:
        return None
    whole, before = run.served.engine.text.fast_tokenizer.decode(result.tokens), result.text[-32:]
    return next((stop for stop in stops if before + stop in whole), stops[0])


def _thinking(text: str, signature: str) -> Block:
    return {"type": "thinking", "thinking": text, "signature": signature}


def _call(id: str, name: str, arguments: Block) -> Block:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments}


class MessageStream:
    """The events of a message that is streamed: blocks of thoughts, text and calls, one after the other."""

    def __init__(self, run: Run, model: str):
        self._run, self._model = run, model
        self._index = -1  # of the newest block
        self._open: str | None = None  # the newest block's type, None where it has ended
        self._call: str | None = None  # the id of the newest call

    def opening(self) -> bytes:
        """Returns the first events."""
        nothing = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(self._run, [])}
        return _event("message_start", message=_head(self._run, self._model) | nothing) + _event("ping")

    def of(self, chunk: Chunk) -> bytes:
        """Returns the events of a chunk, which may be none."""
        going_on, others = parted(chunk.call_deltas, self._call)
        found = b"".join(self._arguments(delta) for delta in going_on)
        if chunk.reasoning:
            found += self._block("thinking", _thinking("", ""))
            found += self._delta("thinking_delta", thinking=chunk.reasoning)
        if chunk.text:
            found += self._block("text", {"type": "text", "text": ""})
            found += self._delta("text_delta", text=chunk.text)
        for delta in others:
            if delta.id != self._call:
                self._call = delta.id
                found += self._end() + self._block("tool_use", _call(delta.id, delta.name, {}))
            found += self._arguments(delta)
        return found

    def _arguments(self, delta: CallDelta) -> bytes:
        return self._delta("input_json_delta", partial_json=delta.json)

    def closing(self) -> bytes:
        """Returns the last events."""
        result = self._run.results[0]
        told = _ending(self._run, result)
        delta = {name: told.pop(name) for name in ("stop_reason", "stop_sequence")}
        last = _event("message_delta", delta=delta, timings=timings_of(result), **told)
        return self._end() + last + _event("message_stop")

    def failed(self, refusal: Refusal) -> bytes:
        """Returns the last event of a stream that cannot go on."""
        return event(refusal.body(PATH), "error")

    def _block(self, kind: str, block: Block) -> bytes:
        """Begins a block, unless one of that kind is open."""
        if self._open == kind:
            return b""
        ended = self._end()
        self._open, self._index = kind, self._index + 1
        return ended + _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **more: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind} | more)

    def _end(self) -> bytes:
        """Ends the block that is open."""
        kind, self._open = self._open, None
        if kind is None:
            return b""
        signature = self._delta("signature_delta", signature=UNSIGNED) if kind == "thinking" else b""
        return signature + _event("content_block_stop", index=self._index)


def _event(kind: str, **more: Any) -> bytes:
    return event({"type": kind} | more, kind)
