"""OpenAI's chat completions: the object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .calls import calls_of, parted
from .errors import Refusal
from .logprobs import Report, chat_logprobs
from .positions import Positions
from .stream import DONE, event
from .usage import repairs_of, timings_of, usage_of

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from ..text.tools import CallDelta
    from .run import Run

FINISH = {"timeout": "length"}  # OpenAI knows no other end of a text that goes on


def finish_reason(result: Result) -> str:
    """Returns OpenAI's word for the end of a result. One by stop_repetition is an end that was asked for, like that by
    a stop string.
    """
    if result.finish_reason == "repetition" and result.cut_call is not None:
        return "length"
    if result.finish_reason == "repetition":
        return "tool_calls" if result.tool_calls else "stop"
    return FINISH.get(result.finish_reason, result.finish_reason)


def head(run: Run, model: str, kind: str, prefix: str = "chatcmpl-") -> dict[str, Any]:
    """Returns what every object of an answer begins with."""
    served = run.served
    return {
        "id": prefix + run.id,
        "object": kind,
        "created": run.created,
        "model": model,
        "system_fingerprint": served.fingerprint,
    }


def chat_object(run: Run, model: str, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the whole answer."""
    choices = [_choice(run, index, result) for index, result in enumerate(results)]
    usage = usage_of(run.served, run.ask, results)
    return head(run, model, "chat.completion") | {"choices": choices, "usage": usage}


def _choice(run: Run, index: int, result: Result) -> dict[str, Any]:
    served = run.served
    calls = [call.as_openai() for call in calls_of(result)]
    message: dict[str, Any] = {"role": "assistant", "content": result.text or (None if calls else "")}
    if result.reasoning:
        message |= served.thoughts(result.reasoning)
    if calls:
        message["tool_calls"] = calls
    logprobs = None
    if result.logprobs is not None:
        logprobs = chat_logprobs(report_of(run, index).whole(result))
    return {"index": index, "message": message, "logprobs": logprobs} | ending(result)


def ending(result: Result) -> dict[str, Any]:
    """Returns how a choice ended, and its figures."""
    repaired = repairs_of(result)
    more: dict[str, Any] = {"repaired": repaired} if repaired else {}
    if result.finish_reason == "repetition":
        more["stop_reason"] = "repetition"
    return {"finish_reason": finish_reason(result), "timings": timings_of(result)} | more


@dataclass
class _Choice:
    """A choice that is streamed. calls: the ids of its calls so far."""

    index: int
    report: Report | None
    positions: Positions | None
    calls: list[str] = field(default_factory=list)

    @property
    def newest(self) -> str | None:
        """The id of the newest call."""
        return self.calls[-1] if self.calls else None


class ChoiceStream:
    """How the streams of OpenAI's routes end. usage: whether a last chunk tells the usage. head: of every chunk."""

    def __init__(self, run: Run, head: dict[str, Any], usage: bool):
        self._run, self._head, self._usage = run, head, usage

    def closing(self) -> bytes:
        """Returns the last events, after every choice has ended."""
        if not self._usage:
            return DONE
        results = [self._run.results[index] for index in range(self._run.ask.choices)]
        usage = usage_of(self._run.served, self._run.ask, results)
        return event(self._head | {"choices": [], "usage": usage}) + DONE

    def failed(self, refusal: Refusal) -> bytes:
        """Returns the last events of a stream that cannot go on."""
        return event(refusal.body("")) + DONE


class ChatStream(ChoiceStream):
    """The events of a chat that is streamed.

    usage: whether a last chunk tells the usage. positions: whether chunks tell which drafts their text is. The role
    comes once, in the first chunk of each choice; text, thoughts and calls never share a chunk, nor does the finish
    reason with any of them.
    """

    def __init__(self, run: Run, model: str, usage: bool, positions: bool = False):
        super().__init__(run, head(run, model, "chat.completion.chunk"), usage)
        self._choices = [self._new_choice(index, positions) for index in range(run.ask.choices)]

    def _new_choice(self, index: int, positions: bool) -> _Choice:
        run = self._run
        report = report_of(run, index) if run.ask.logprobs else None
        channels = run.ask.channels(run.served.engine.text, index)
        return _Choice(index, report, Positions(run.served.spell, channels) if positions else None)

    def opening(self) -> bytes:
        """Returns the first event of each choice."""
        first = {"role": "assistant", "content": ""}
        return b"".join(self._event(choice, first) for choice in self._choices)

    def of(self, chunk: Chunk) -> bytes:
        """Returns the events of a chunk, which may be none."""
        choice = self._choices[chunk.index]
        return b"".join(self._pieces(choice, chunk))

    def _pieces(self, choice: _Choice, chunk: Chunk) -> Iterator[bytes]:
        going_on, others = parted(chunk.call_deltas, choice.newest)
        for delta in going_on:
            yield self._arguments(choice, delta)
        if chunk.reasoning:
            yield self._event(choice, self._run.served.thoughts(chunk.reasoning))
        entries = choice.report.take(chunk) if choice.report is not None else []
        drafts = choice.positions.take(chunk) if choice.positions is not None else None
        if chunk.text or entries or drafts:
            more = {} if choice.report is None else {"logprobs": chat_logprobs(entries)}
            more |= {} if drafts is None else {"draft_positions": drafts}
            yield self._event(choice, {"content": chunk.text}, **more)
        for delta in others:
            if delta.id != choice.newest:
                yield self._begun(choice, delta)
            yield self._arguments(choice, delta)
        if chunk.result is not None:
            yield self._event(choice, {}, **ending(chunk.result))

    def _begun(self, choice: _Choice, delta: CallDelta) -> bytes:
        """A call's name, before its arguments."""
        choice.calls.append(delta.id)
        call = replace(delta, json="").as_openai()
        return self._event(choice, {"tool_calls": [{"index": len(choice.calls) - 1} | call]})

    def _arguments(self, choice: _Choice, delta: CallDelta) -> bytes:
        """A piece of the newest call's arguments."""
        piece = {"index": len(choice.calls) - 1, "function": {"arguments": delta.json}}
        return self._event(choice, {"tool_calls": [piece]})

    def _event(self, choice: _Choice, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        said = {"index": choice.index, "delta": delta, "finish_reason": finish_reason} | more
        return event(self._head | {"choices": [said]})


def report_of(run: Run, index: int) -> Report:
    """Returns a new report of a choice's log-probabilities."""
    return Report(run.served.spell, run.ask.channels(run.served.engine.text, index))
