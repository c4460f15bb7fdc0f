"""A conversation: what was said so far, and turns that add to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from copy import deepcopy
from itertools import takewhile
from threading import Lock
from typing import Any, Protocol

from ..errors import UserError, shown
from ..sampling.params import SamplingParams
from ..text.messages import Message, normalised, plain
from ..text.tools import ToolCall
from .request import Chunk, Result, joined, reply_message
from .streams import AsyncStream, Stream

CUT = ("timeout", "cancelled", "error")  # ends that are not the reply's own
FIXED = {"n": 1, "chat_template": True, "continue_final_message": False}  # what a conversation leaves no choice of


class Speaker(Protocol):
    """Who makes the replies: an Engine."""

    def generate(self, prompt: Any, params: SamplingParams | None, **options: Any) -> Result: ...

    async def agenerate(self, prompt: Any, params: SamplingParams | None, **options: Any) -> Result: ...

    def stream(self, prompt: Any, params: SamplingParams | None, **options: Any) -> Stream: ...

    def astream(self, prompt: Any, params: SamplingParams | None, **options: Any) -> AsyncStream: ...


class Conversation:
    """What was said so far, and the way to say more; make it with `Engine.conversation`.

    Each turn renders the whole history through the chat template, which drops earlier thoughts. There is one turn at a
    time. The history grows when a turn has ended, by what was said and the reply. A turn that ended early ('timeout',
    'cancelled', 'error', a stream that was closed) adds them if the reply has text or a call by then; otherwise, and
    where a turn raises, the history is as before.

    system_prompt, tools, params, options: hold for every turn that does not give its own; they may be changed between
    two turns. options: those of `Engine.stream`. tokens: how many the prompt had in the last turn with a Result, 0
    before.
    """

    def __init__(
        self,
        engine: Speaker,
        system_prompt: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        params: SamplingParams | None = None,
        messages: Iterable[Message] = (),
        **options: Any,
    ):
        self.system_prompt, self.tools, self.params = system_prompt, tools, params
        self.options, self.tokens = _checked(options), 0
        self._engine, self._messages = engine, _said(messages)
        normalised(self._messages)  # raises for what no turn could render
        self._lock, self._busy = Lock(), False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the history in OpenAI's form, without the system prompt: plain data."""
        return deepcopy(self._messages)

    def say(
        self,
        said: str | Message | Sequence[Message] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Result:
        """Returns the reply to what is said: text, a message, a list of messages, or nothing more than the results that
        were given since the last reply.

        params, options: of this turn alone. Raises UserError where another turn is not over, where a call has no result
        yet, where there is nothing to reply to, and for what `Engine.generate` refuses.
        """
        turn = self._begin(said)
        try:
            turn.result = self._engine.generate(turn.prompt, params or self.params, **self._of_turn(options))
            return turn.result
        finally:
            turn.finish()

    async def asay(
        self,
        said: str | Message | Sequence[Message] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Result:
        """Returns what `say` does. A task that is cancelled meanwhile leaves the history as before."""
        turn = self._begin(said)
        try:
            turn.result = await self._engine.agenerate(turn.prompt, params or self.params, **self._of_turn(options))
            return turn.result
        finally:
            turn.finish()

    def stream(
        self,
        said: str | Message | Sequence[Message] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Yields the reply of `say` as it is made. The turn begins, and raises, when the first chunk is asked for.

        It is over with the last chunk, or when the iterator is closed or forgotten: the history has what was read then.
        """
        turn = self._begin(said)
        try:
            with closing(self._engine.stream(turn.prompt, params or self.params, **self._of_turn(options))) as stream:
                for chunk in stream:
                    turn.take(chunk)
                    yield chunk
        finally:
            turn.finish()

    async def astream(
        self,
        said: str | Message | Sequence[Message] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncIterator[Chunk]:
        """Yields what `stream` does, to `async for`."""
        turn = self._begin(said)
        try:
            stream = self._engine.astream(turn.prompt, params or self.params, **self._of_turn(options))
            async with aclosing(stream):
                async for chunk in stream:
                    turn.take(chunk)
                    yield chunk
        finally:
            turn.finish()

    def result(self, call: ToolCall | str, content: Any) -> None:
        """Adds the result of a call that the last reply made; `say` goes on with it.

        call: the call, its id, or its tool's name where one open call has that. content: text, or a JSON value, which
        is given as JSON text. Raises UserError where no open call is meant, or several, and while a turn runs.
        """
        with self._lock:
            self._check_idle()
            wanted, waiting = call.id if isinstance(call, ToolCall) else call, _open_calls(normalised(self._messages))
            found = [each for each in waiting if wanted in (each["id"], each["function"]["name"])]
            if len(found) != 1:
                known = ", ".join(f"{each['id']} ({each['function']['name']})" for each in waiting) or "none is open"
                raise UserError(f"a result is for the call {shown(wanted)}, expected one open call: {known}")
            content = plain("the result of a call", content)
            content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            answers = {"tool_call_id": found[0]["id"], "name": found[0]["function"]["name"]}
            message = {"role": "tool", **answers, "content": content}
            normalised([*self._messages, message])
            self._messages.append(message)

    def undo(self) -> bool:
        """Drops the user's last message and all that came after it. Returns whether there was one. Raises UserError
        while a turn runs.
        """
        with self._lock:
            self._check_idle()
            last = max((i for i, each in enumerate(self._messages) if each["role"] == "user"), default=None)
            if last is not None:
                del self._messages[last:]
            return last is not None

    def reset(self) -> None:
        """Forgets the history; system prompt, tools and settings stay. Raises UserError while a turn runs."""
        with self._lock:
            self._check_idle()
            self._messages.clear()
            self.tokens = 0

    def fork(self) -> Conversation:
        """Returns a conversation with the same history and settings, which goes its own way. One turn that runs is not
        in it.
        """
        made = Conversation(
            self._engine, self.system_prompt, self.tools, self.params, list(self._messages), **self.options
        )
        made.tokens = self.tokens
        return made

    def _begin(self, said: Any) -> _Turn:
        """Begins a turn. Raises UserError where none may begin."""
        said = [] if said is None else _said(said)
        with self._lock:
            self._check_idle()
            prompt = [*self._messages, *said]
            messages = normalised(prompt)
            if waiting := _open_calls(messages):
                raise UserError(
                    f"the call {waiting[0]['id']} of {waiting[0]['function']['name']} has no result; expected one "
                    "before the next turn: give it with result(), or drop the call with undo()"
                )
            if not messages or messages[-1]["role"] == "assistant":
                raise UserError("nothing is said that a reply could answer; expected text, a message or results")
            self._busy = True
        return _Turn(self, said, prompt)

    def _of_turn(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"system_prompt": self.system_prompt, "tools": self.tools, **self.options, **_checked(options)}

    def _check_idle(self) -> None:
        if self._busy:
            raise UserError("a turn of this conversation runs; expected one at a time: read it to its end, or fork()")

    def _end(self, messages: Sequence[dict[str, Any]], result: Result | None) -> None:
        # No lock: until now nothing else may change, and a collector may close a stream anywhere.
        self._messages += messages
        if result is not None:
            self.tokens = result.stats.prompt_tokens
        self._busy = False


class _Turn:
    """A turn that runs. prompt: all messages that the reply answers, the last ones of them `said`. result: of the
    reply, once it is there.
    """

    def __init__(self, conversation: Conversation, said: list[dict[str, Any]], prompt: list[dict[str, Any]]):
        self.prompt, self.result = prompt, None
        self._conversation, self._said = conversation, said
        self._chunks: list[Chunk] = []
        self._over = False

    def take(self, chunk: Chunk) -> None:
        """Takes in a chunk of the reply; the last one ends the turn."""
        self._chunks.append(chunk)
        if chunk.result is not None:
            self.result = chunk.result
            self.finish()

    def finish(self) -> None:
        """Ends the turn with what came. Does nothing once it is over."""
        if self._over:
            return
        self._over, result = True, self.result
        message = reply_message(*joined(self._chunks)) if result is None else result.message()
        whole = result is not None and result.finish_reason not in CUT
        counts = whole or message["content"] or "tool_calls" in message
        self._conversation._end([*self._said, message] if counts else [], result)


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options. Raises UserError for one that a conversation leaves no choice of."""
    for name, only in FIXED.items():
        if options.get(name, only) != only:
            raise UserError(f"{name} is {shown(options[name])} in a conversation, expected {only}; leave it out")
    return dict(options)


def _said(said: Any) -> list[dict[str, Any]]:
    """Returns copies of messages; text is the user's. Raises UserError for anything else, token ids included."""
    if isinstance(said, str):
        said = {"role": "user", "content": said}
    said = [said] if isinstance(said, Mapping) else said
    listed = list(said) if isinstance(said, Iterable) and not isinstance(said, (bytes, bytearray)) else [said]
    for each in listed:
        if not isinstance(each, Mapping):
            raise UserError(f"{shown(each)} is said, expected text, a message or a list of messages, as objects")
    return [plain("a message", each) for each in listed]


def _open_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the calls of the last reply in normalised messages that have no result yet; each has an id."""
    last = max((i for i, each in enumerate(messages) if each["role"] == "assistant"), default=0)
    waiting = list(messages[last].get("tool_calls", ())) if messages else []
    for answer in takewhile(lambda each: each["role"] == "tool", messages[last + 1 :]):
        mine = [each for each in waiting if each["id"] == answer.get("tool_call_id")]
        mine += [each for each in waiting if each["function"]["name"] == answer["name"]]
        waiting = [each for each in waiting if each is not mine[0]] if mine else waiting
    return waiting
