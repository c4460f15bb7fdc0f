"""A request, and what comes back of it: chunks, and the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import in_a_line
from ..sampling.params import SamplingParams
from ..speculative.depth import AUTO
from ..speculative.guide import Constraint
from ..speculative.readback import TokenLogprob
from ..text.reply import Piece, Reply
from ..text.tools import CallDelta, ToolCall
from .prefix_disk import Restored
from .repetition import Repetition
from .stats import Stats


@dataclass(frozen=True)
class Result:
    """The answer to one prompt.

    text: the generated text, without thoughts and calls. tokens: all generated ids but the end token; a stop string's
    tokens are kept. finish_reason: 'stop' (an end token or a stop string), 'tool_calls' (the same, after calls of
    tools), 'length' (max_tokens, or the context is full), 'repetition' (stop_repetition), 'timeout', 'cancelled' or
    'error'. stats: figures. logprobs: one entry for each token, where the request asked for them. error: why the text
    could not go on, in one line, with finish_reason 'error'; text and tokens hold what came before. reasoning: the
    thoughts. tool_calls: the calls of tools, where the request has tools. end_token: the end token that came, None
    where another thing ended the text. cut_call: the call that the reply ended in the middle of, where some of it was
    given away: its arguments are JSON without an end.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    end_token: int | None = None
    cut_call: CallDelta | None = None

    def message(self) -> dict[str, Any]:
        """Returns the reply as the assistant's message in OpenAI's form, for the messages of the next turn; with
        `reasoning` and `tool_calls` where there are any.
        """
        return reply_message(self.text, self.reasoning, self.tool_calls)


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer to one prompt.

    index: the prompt's number in its call. text, tokens: the piece. result: the whole answer, in the last chunk alone.
    logprobs: one entry for each token of the piece, where the request asked for them. reasoning: the piece of a
    thought. tool_calls: the calls that are complete with this piece. call_deltas: pieces of calls, complete ones and
    those that are being made. What is held back of text, thoughts and calls comes in a later chunk than its tokens.
    drafted, accepted: drafts that its round verified and kept, as in Stats.
    """

    index: int
    text: str
    tokens: list[int]
    result: Result | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    call_deltas: list[CallDelta] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def cut_call(self) -> CallDelta | None:
        """The call that the answer ended in the middle of, in the last chunk alone."""
        return None if self.result is None else self.result.cut_call


@dataclass(frozen=True)
class Delivery:
    """A chunk of a request. id: the request's."""

    id: int
    chunk: Chunk


@dataclass(frozen=True)
class Advance:
    """How far a request's prompt is prefilled. id: the request's. done, total: tokens."""

    id: int
    done: int
    total: int


@dataclass
class Request:
    """One prompt and the state of its answer.

    id: unique in the engine. index: the prompt's number in its call. limit: the most tokens to generate, by max_tokens
    and the context. drafts: how many to make a round, or 'auto'. priority: the higher goes first. deadline: when the
    request ends, in time.monotonic's seconds; None is never. salt: prefixes are shared with requests of the same salt
    alone. borders: where turns begin in the prompt, rising. restored: K/V of a beginning of the prompt that somebody
    has read for it; they are used where they hold more than what is in memory. tokens, pieces, logprobs: what was
    generated so far. finish_reason: set once the request is done. error: why its text cannot go on; then it is to be
    cancelled, if it is not done. repetition: watches the tokens where the request asks for that. prediction: tokens of
    what the reply is expected to be like, for copies.

    A round's tokens are taken in first, by `take`, and made into text afterwards, by `chunk`, so that the next round
    need not wait for that.
    """

    id: int
    index: int
    prompt: list[int]
    params: SamplingParams
    stream: Reply
    end_tokens: frozenset[int]
    limit: int
    stats: Stats
    constraint: Constraint | None = None
    drafts: int | str = AUTO
    priority: int = 0
    deadline: float | None = None
    salt: str | None = None
    borders: tuple[int, ...] = ()
    restored: Restored | None = None
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    end_token: int | None = None
    prediction: tuple[int, ...] = ()
    repetition: Repetition | None = field(init=False, repr=False)
    _pushed: int = field(default=0, init=False, repr=False)  # tokens that the stream has
    _new: list[Piece] = field(default_factory=list, init=False, repr=False)  # what it released since the last chunk
    _chunked: int = field(default=0, init=False, repr=False)  # tokens of earlier chunks
    _drafted: int = field(default=0, init=False, repr=False)  # drafts verified and kept since the last chunk
    _accepted: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        length = self.params.stop_repetition
        self.repetition = None if length is None else Repetition(length)

    @property
    def remaining(self) -> int:
        """How many tokens the request may still generate."""
        return self.limit - len(self.tokens)

    def goes_on(self, emitted: Sequence[int]) -> bool:
        """Returns whether the request surely goes on behind these tokens of a round. It is asked before `take`: where
        that alone can tell, the answer is False.
        """
        told = self.error is None and self.finish_reason is None and not self.stream.stopped
        told = told and not self.params.stop and self.repetition is None
        return told and 0 < len(emitted) < self.remaining and self.end_tokens.isdisjoint(emitted)

    def take(
        self,
        emitted: Sequence[int],
        drafted: int | None,
        reason: str = "",
        logprobs: Sequence[TokenLogprob] | None = None,
        error: str | None = None,
        sources: Sequence[str] = (),
        refused: int = 0,
    ) -> None:
        """Adds the tokens of a round, up to the one that ends the request. Drafts after that token do not count as
        accepted. A request whose text has failed takes nothing.

        drafted: how many drafts the round verified; None for the token of the prefill. reason: why it verified so many.
        error: why the request cannot go on after these tokens. sources, refused: see Stats.count_round.
        """
        if self.error is not None:
            return
        before, used = len(self.tokens), 0
        for used, token in enumerate(emitted, 1):  # noqa: B007
            if token in self.end_tokens:
                self.finish_reason, self.end_token = "stop", token
            else:
                self.tokens.append(token)
                if self.params.stop:  # any token may complete a stop string
                    self._push()
                self.finish_reason = self.finish_reason or self._end()
            if self.finish_reason:
                break
        if error is not None and self.finish_reason is None:
            self.finish_reason, self.error = "error", error
        accepted = 0 if drafted is None else max(used - 1, 0)
        if drafted is not None:
            self.stats.count_round(drafted, accepted, reason, sources, refused)
            self._drafted += drafted
            self._accepted += accepted
        if self.params.logprobs is not None:
            kept = logprobs[: len(self.tokens) - before]
            self.logprobs += [replace(each, top=each.top[: self.params.logprobs]) for each in kept]

    def _end(self) -> str | None:
        """The finish_reason that the newest token brings, which is no end token."""
        repeats = self.repetition is not None and self.repetition.ends(self.tokens)
        if self.error is not None:
            return "error"
        if self.stream.stopped:
            return "stop"
        return "repetition" if repeats else None if self.remaining else "length"

    def cancel(self, reason: str = "cancelled", error: str | None = None) -> None:
        """Ends the request with what it has.

        reason: its finish_reason. error: why it cannot go on, in one line, with the reason 'error'. A request whose
        text has failed ends with that.
        """
        self.error = self.error or error
        self.finish_reason = reason if self.error is None else "error"

    def chunk(self) -> Chunk:
        """Returns what was taken in since the last chunk, as a chunk: the last one where the request is done. What the
        stream raises becomes the error: the tokens after it are dropped.
        """
        self._push()
        if self.finish_reason:
            self._safely(self.stream.finish, self.end_token is not None)
        pieces, start, logprobs = self._new, self._chunked, None
        drafted, accepted = self._drafted, self._accepted
        self.pieces += pieces
        self._new, self._chunked, self._drafted, self._accepted = [], len(self.tokens), 0, 0
        if self.params.logprobs is not None:
            logprobs = self.logprobs[start:]
        result = self._result() if self.finish_reason else None
        text, reasoning, calls = joined(pieces)
        deltas = [delta for piece in pieces for delta in piece.call_deltas]
        return Chunk(
            self.index, text, self.tokens[start:], result, logprobs, reasoning, calls, deltas, drafted, accepted
        )

    def _push(self) -> None:
        """Makes text of the tokens that the stream has not, up to one that it fails with."""
        while self._pushed < len(self.tokens):
            token, failed = self.tokens[self._pushed], self.error is not None
            self._pushed += 1
            self._safely(self.stream.push, token)
            if self.error is not None and not failed:
                del self.tokens[self._pushed :], self.logprobs[self._pushed :]

    def _result(self) -> Result:
        text, reasoning, calls = joined(self.pieces)
        if calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return Result(
            text,
            self.tokens,
            self.finish_reason,
            self.stats,
            None if self.params.logprobs is None else self.logprobs,
            self.error,
            reasoning,
            calls,
            self.end_token,
            cut_call(self.pieces, calls),
        )

    def _safely(self, call: Callable[..., Piece], *args: int | bool) -> None:
        """Adds the piece that a call of the stream gives. What it raises, whatever it is, ends this request alone."""
        try:
            self._new.append(call(*args))
        except BaseException as error:  # a library's panic is no Exception
            if self.error is None:
                self.error = in_a_line(error)
                self.finish_reason = self.finish_reason and "error"


def joined(pieces: Sequence[Piece | Chunk]) -> tuple[str, str, list[ToolCall]]:
    """Returns the text, the thoughts and the calls of pieces in order."""
    calls = [call for piece in pieces for call in piece.tool_calls]
    return "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces), calls


def cut_call(pieces: Sequence[Piece], calls: Sequence[ToolCall]) -> CallDelta | None:
    """Returns the call that pieces end in the middle of, None where there is none. calls: those that are complete."""
    last = next((piece.call_deltas[-1] for piece in reversed(pieces) if piece.call_deltas), None)
    if last is None or any(call.id == last.id for call in calls):
        return None
    told = (delta.json for piece in pieces for delta in piece.call_deltas if delta.id == last.id)
    return replace(last, json="".join(told))


def reply_message(text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Returns a reply as the assistant's message, as `Result.message` does."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = [call.as_openai() for call in calls]
    return message
