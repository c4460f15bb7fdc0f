"""The output of OpenAI's Responses: items as they grow, each step an event, and the object that holds them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .calls import parted
from .chat import finish_reason, report_of
from .responses_input import THOUGHTS, Functions, sealed
from .responses_schema import ResponsesRequest
from .usage import repairs_of, timings_of, usage_of

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from ..text.tools import CallDelta
    from .run import Run

Event = tuple[str, dict[str, Any]]  # its type, and its fields
PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
PARTS = {"reasoning": "reasoning_text", "message": "output_text"}  # types of the one part of each


class Output:
    """The items of one response: thoughts, messages and calls, one after the other as they come.

    functions: of the request. body: the request. A whole answer is made of the same steps as a stream, so that its
    items are the same.
    """

    def __init__(self, run: Run, functions: Functions, body: ResponsesRequest):
        self.run, self.functions, self.body = run, functions, body
        self.items: list[dict[str, Any]] = []
        self._call: str | None = None  # the id of the newest call
        self._open = False  # whether the newest item goes on
        self._seals = THOUGHTS in (body.include or ())
        self._report = report_of(run, 0) if run.ask.logprobs else None

    def take(self, chunk: Chunk) -> Iterator[Event]:
        """Yields the events of a chunk."""
        going_on, others = parted(chunk.call_deltas, self._call)
        for delta in going_on:
            yield self._arguments(delta)
        if chunk.reasoning:
            yield from self._piece("reasoning", chunk.reasoning)
        entries = self._report.take(chunk) if self._report is not None else []
        if chunk.text or entries:
            yield from self._piece("message", chunk.text, [entry.as_chat() for entry in entries])
        for delta in others:
            if delta.id != self._call:
                yield from self._begin_call(delta)
            yield self._arguments(delta)
        if any(call.id == self._call for call in chunk.tool_calls):
            yield from self._end("completed")  # clients begin to run it
        if chunk.result is not None:
            yield from self._end(status_of(chunk.result))

    def break_off(self) -> None:
        """Marks an item that goes on no more."""
        if self._open:
            self.items[-1]["status"] = "incomplete"

    def _piece(self, kind: str, text: str, logprobs: Sequence[Any] = ()) -> Iterator[Event]:
        """A piece of a thought, or of the text."""
        if not self._open or self.items[-1]["type"] != kind:
            yield from self._begin(kind, {"role": "assistant"} if kind == "message" else {"summary": []}, content=[])
            part = _part(kind)
            yield "response.content_part.added", self._place() | {"content_index": 0, "part": dict(part)}
            self.items[-1]["content"].append(part)
        part, more = self.items[-1]["content"][0], {}
        part["text"] += text
        if kind == "message":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        fields = self._place() | {"content_index": 0, "delta": text} | more
        yield f"response.{PARTS[kind]}.delta", fields

    def _begin_call(self, delta: CallDelta) -> Iterator[Event]:
        self._call = delta.id
        named = self.functions.named(delta.name)
        yield from self._begin("function_call", {"call_id": delta.id} | named, arguments="")

    def _begin(self, kind: str, about: Mapping[str, Any], **empty: Any) -> Iterator[Event]:
        """Begins an item, after the one before it."""
        yield from self._end("completed")
        id = f"{PREFIXES[kind]}{self.run.id}{len(self.items):04x}"
        item = {"id": id, "type": kind, "status": "in_progress"} | about | empty
        self.items.append(item)
        self._open = True
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": _copied(item)}

    def _arguments(self, delta: CallDelta) -> Event:
        self.items[-1]["arguments"] += delta.json
        return "response.function_call_arguments.delta", self._place() | {"delta": delta.json}

    def _end(self, status: str) -> Iterator[Event]:
        """Ends the item that is open."""
        if not self._open:
            return
        self._open, item, place = False, self.items[-1], self._place()
        item["status"] = status
        if (kind := item["type"]) == "function_call":
            fields = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", place | fields
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            yield f"response.{PARTS[kind]}.done", place | {"content_index": 0, "text": part["text"]} | more
            yield "response.content_part.done", place | {"content_index": 0, "part": part}
        if kind == "reasoning" and self._seals:
            item["encrypted_content"] = sealed(item["content"][0]["text"])
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        """Where the newest item stands."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _part(kind: str) -> dict[str, Any]:
    empty = {"annotations": [], "logprobs": []} if kind == "message" else {}
    return {"type": PARTS[kind], "text": ""} | empty


def _copied(item: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an item that has just begun, which the rest of it does not change."""
    return {name: [] if value == [] else value for name, value in item.items()}


def status_of(result: Result) -> str:
    """Returns the status of a response that ended so."""
    return "incomplete" if finish_reason(result) == "length" else "completed"


def response_object(
    output: Output, model: str, result: Result | None = None, error: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns the response as it stands. result: how it ended, None where it goes on. error: why it failed."""
    run, body, params = output.run, output.body, output.run.ask.params.resolved(output.run.served.engine.defaults)
    status = "failed" if error else "in_progress" if result is None else status_of(result)
    reasoning, text = body.reasoning, body.text
    found: dict[str, Any] = {
        "id": f"resp_{run.id}",
        "object": "response",
        "created_at": run.created,
        "completed_at": None if result is None else int(time.time()),
        "status": status,
        "background": False,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": list(output.items),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {
            "format": (None if text is None else text.format) or {"type": "text"},
            "verbosity": (None if text is None else text.verbosity) or "medium",
        },
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": output.functions.told,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
    if result is None:
        return found
    repaired = repairs_of(result)
    found |= {"usage": responses_usage(run, result), "timings": timings_of(result)}
    return found | ({"repaired": repaired} if repaired else {})


def responses_usage(run: Run, result: Result) -> dict[str, Any]:
    """Returns the usage of a response: that of a chat under the names of Responses."""
    usage = usage_of(run.served, run.ask, [result])
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
