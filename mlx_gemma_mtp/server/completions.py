"""OpenAI's text completions: the object, and the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .chat import ChoiceStream, ending, head, report_of
from .logprobs import completion_logprobs
from .stream import event
from .usage import usage_of

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from .run import Run

KIND, PREFIX = "text_completion", "cmpl-"


def completion_object(run: Run, model: str, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the whole answer."""
    choices = []
    for index, result in enumerate(results):
        logprobs = None
        if result.logprobs is not None:
            logprobs = completion_logprobs(report_of(run, index).whole(result), 0)
        thoughts = run.served.thoughts(result.reasoning) if result.reasoning else {}
        choices.append({"index": index, "text": result.text, "logprobs": logprobs} | thoughts | ending(result))
    usage = usage_of(run.served, run.ask, results)
    return head(run, model, KIND, PREFIX) | {"choices": choices, "usage": usage}


class CompletionStream(ChoiceStream):
    """The events of a text completion that is streamed. usage: whether a last chunk tells the usage."""

    def __init__(self, run: Run, model: str, usage: bool):
        super().__init__(run, head(run, model, KIND, PREFIX), usage)
        choices = range(run.ask.choices)
        self._said = dict.fromkeys(choices, 0)  # characters of each choice so far
        self._reports = {i: report_of(run, i) for i in choices}

    def opening(self) -> bytes:
        """Returns the first events: there are none."""
        return b""

    def of(self, chunk: Chunk) -> bytes:
        """Returns the events of a chunk, which may be none."""
        logprobs, found = None, b""
        if chunk.logprobs is not None:
            logprobs = completion_logprobs(self._reports[chunk.index].take(chunk), self._said[chunk.index])
        self._said[chunk.index] += len(chunk.text)
        if chunk.reasoning:
            found += self._event(chunk.index, "", **self._run.served.thoughts(chunk.reasoning))
        if chunk.text or (logprobs and logprobs["tokens"]):
            found += self._event(chunk.index, chunk.text, logprobs=logprobs)
        if chunk.result is not None:
            found += self._event(chunk.index, "", **ending(chunk.result))
        return found

    def _event(self, index: int, text: str, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None} | more
        return event(self._head | {"choices": [choice]})
