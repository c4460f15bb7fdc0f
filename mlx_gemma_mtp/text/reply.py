"""A reply as its tokens come, in three channels: thoughts, calls of tools, and text.

Gemma writes `<|channel>thought\\n...\\n<channel|>` and `<|tool_call>call:NAME{...}<tool_call|>`. The tokens around them
are known by their ids: the same characters spelled by other tokens are text.
"""

from __future__ import annotations

import string
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .control import CLOSE, OPEN
from .partial_call import PartialCall
from .stream import Characters, Stops
from .tool_calls import BARE, CALL_CLOSE, CALL_OPEN, MARK, QUOTE, Body, read, spelled
from .tools import CallDelta, ToolCall, Tools

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import StreamingDetokenizer

HEADER = "thought\n"  # what a thought begins with
MOST_ATTEMPTS = 8  # at reading a call without its tokens, one each time its braces close


@dataclass(frozen=True)
class Piece:
    """What a token releases: characters of the text, characters of a thought, calls that are complete, and pieces of
    calls: those of a complete call came with it or before.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_deltas: tuple[CallDelta, ...] = ()


NOTHING = Piece()


@dataclass(frozen=True)
class Controls:
    """The ids of the tokens around thoughts, calls, and the strings of calls; None where the vocabulary has none."""

    open_thought: int | None
    close_thought: int | None
    open_call: int | None
    close_call: int | None
    quote: int | None = None

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> Controls:
        """Returns the ids of a vocabulary, by its tokens."""
        return cls(*map(vocabulary.get, (OPEN, CLOSE, CALL_OPEN, CALL_CLOSE, QUOTE)))


class Thought:
    """A thought as it comes, without its header and without the white space at its end.

    opened: whether a token of the reply opened it, so that the header is still to come; else the prompt did.
    """

    def __init__(self, opened: bool):
        self._opened = opened
        self._head: str | None = ""  # what may become the header; None once that is decided
        self._blanks: list[str] = []

    def push(self, text: str) -> str:
        """Returns the characters that are certainly of the thought."""
        if self._head is not None:
            name, newline, rest = (head := self._head + text).partition("\n")
            if not newline and (HEADER.startswith(name) or _is_header(name)):
                self._head = head
                return ""
            self._head, text = None, rest if newline and _is_header(name) else head
        return _without_blanks(text, self._blanks)

    def close(self) -> str:
        """Returns what was held back, now that the thought is closed."""
        head, self._head = self._head, None
        return "" if head is None or _is_header(head) else head.rstrip()

    def cut(self) -> str:
        """Returns what was held back, now that no token follows."""
        head = self._head
        return "" if head is not None and self._opened and HEADER.startswith(head) else self.close()


def _is_header(name: str) -> bool:
    return name.rstrip() == HEADER.rstrip()


def _without_blanks(text: str, blanks: list[str]) -> str:
    """Returns the text up to its last character that is no white space, after the blanks held so far. `blanks` then
    holds what follows it.
    """
    kept = text.rstrip()
    if not kept:
        blanks.append(text)
        return ""
    before = "".join(blanks)
    blanks[:] = [text[len(kept) :]]
    return before + kept


class Start:
    """The beginning of a stretch of text, where a call without its tokens may stand.

    trim: characters that are dropped before the first other one. names: the tools whose call would be one. done:
    whether the text is known. call: whether it is such a call.
    """

    def __init__(self, trim: str, names: Sequence[str]):
        self._trim, self._names, self._text = trim, names, ""
        self.done = self.call = False

    def push(self, text: str) -> str:
        """Returns the text once it is known."""
        self._text = (self._text + text).lstrip(self._trim) if self._trim else self._text + text
        begun = _begins_call(self._text.lstrip(), self._names)
        self.call, self.done = begun is True, begun is not None
        return self._text if self.done else ""

    def finish(self) -> str:
        """Returns what was held back, now that something else follows."""
        return self._text


def _begins_call(text: str, names: Sequence[str]) -> bool | None:
    """Whether the text begins with a call of one of these tools, None where more of it is needed."""
    if not text:
        return None
    if not names or not text.startswith(BARE[: len(text)]):
        return False
    name, brace, _ = text[len(BARE) :].partition("{")
    if brace:
        return name in names
    return None if any(each.startswith(name) for each in names) else False


class Answer:
    """The text of a reply, up to the first stop string.

    calls: whether white space is held back, since none is shown before a call.
    """

    def __init__(self, stop: Sequence[str], calls: bool):
        self._stops, self._calls = Stops(stop), calls
        self._blanks: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._stops.stopped

    def push(self, text: str) -> str:
        """Returns the characters that may be shown."""
        if self._calls:
            text = _without_blanks(text, self._blanks)
        return self._stops.push(text) if text else ""

    def call(self) -> None:
        """A call comes next: the white space before it is dropped."""
        self._blanks.clear()

    def finish(self) -> str:
        """Returns what was held back, now that no text follows."""
        return self._stops.push("".join(self._blanks)) + self._stops.finish()


class Reply:
    """The channels of one reply, released as its tokens come.

    detokenizer: makes a new one of mlx-lm's. known: how many tokens the tokenizer has. stop: strings that end the text;
    they are sought in the text alone, as if nothing stood between its parts. tools: the caller's; None leaves the
    tokens of calls in the text, as they are spelled. in_thought: whether the prompt opened a thought.

    A call ends a thought that is still open. A control token amid a string of a call is part of the string, if the
    string ends later. What cannot be read as a call becomes text, unless pieces of it were given away: then the call
    is what was given away, and a call that is cut off has no end.
    """

    def __init__(
        self,
        detokenizer: Callable[[], StreamingDetokenizer],
        stop: Sequence[str],
        known: int,
        controls: Controls,
        tools: Tools | None = None,
        in_thought: bool = False,
    ):
        self._characters, self._tools = Characters(detokenizer, known), tools
        kinds = {controls.open_thought: OPEN, controls.close_thought: CLOSE}
        if tools is not None:
            kinds |= {controls.open_call: CALL_OPEN, controls.close_call: CALL_CLOSE}
        self._quote = controls.quote
        self._kinds = {token: kind for token, kind in kinds.items() if token is not None}
        self._answer = Answer(stop, tools is not None)
        self._thought = Thought(opened=False) if in_thought else None
        self._body: Body | None = None
        self._partial: PartialCall | None = None  # of a call with its tokens
        self._attempts = 0  # at reading a call without its tokens
        self._start = None if tools is None else Start("", tools.names)
        self._tokens: deque[int] = deque()  # to be taken in
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._deltas: list[CallDelta] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._answer.stopped

    def push(self, token: int) -> Piece:
        """Returns what `token` releases. Sets `stopped` when a stop string is complete; the text ends before it."""
        self._tokens.append(token)
        self._drain()
        return self._released()

    def finish(self, ended: bool = False) -> Piece:
        """Returns what was held back, now that no token follows. ended: whether the model ended it, so that a call
        whose end is missing was not cut off.
        """
        if not self.stopped:
            self._feed(self._characters.end())
            while self._body is not None and not self.stopped:
                self._end_call(None, ended)
                self._drain()
            if self._thought is not None:
                self._reasoning.append(self._thought.cut())
            self._end_start()
            if not self.stopped:
                self._text.append(self._answer.finish())
        return self._released()

    def _released(self) -> Piece:
        text, reasoning = "".join(self._text), "".join(self._reasoning)
        piece = Piece(text, reasoning, tuple(self._calls), tuple(self._deltas))
        for channel in (self._text, self._reasoning, self._calls, self._deltas):
            channel.clear()
        return NOTHING if piece == NOTHING else piece

    def _drain(self) -> None:
        while self._tokens and not self.stopped:
            token = self._tokens.popleft()
            kind = self._kinds.get(token)
            if self._body is not None:
                self._take_of_call(token, kind)
            elif kind is None:
                self._feed(self._characters.push(token))
            else:
                self._feed(self._characters.end())
                if self._body is not None:  # the last characters made it a call
                    self._tokens.appendleft(token)
                else:
                    self._switch(kind)

    def _feed(self, text: str) -> None:
        """Takes in characters of the channel that is open."""
        if not text:
            return
        if self._body is not None:
            self._extend(text)
        elif self._thought is not None:
            self._reasoning.append(self._thought.push(text))
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        if self._start is not None:
            text = self._start.push(text)
            if self._start.call:
                self._body, self._partial, self._start, self._attempts = Body(bare=True), None, None, 0
                self._extend(text)
                return
            if self._start.done:
                self._start = None
        self._text.append(self._answer.push(text))

    def _switch(self, kind: str) -> None:
        """A control token outside of a call."""
        if self._thought is not None and kind != CALL_CLOSE:
            self._reasoning.append(self._thought.close())
            self._thought = None
            if kind == CLOSE:
                self._begin("\r\n")
        if kind in (OPEN, CALL_OPEN):
            self._end_start()
            self._thought = Thought(opened=True) if kind == OPEN else None
            if kind == CALL_OPEN:
                quote = QUOTE if self._quote is None else MARK
                self._body, self._partial = Body(bare=False), PartialCall(self._tools, quote)

    def _begin(self, trim: str) -> None:
        """Text may begin, after a thought or a call."""
        self._start = Start(trim, self._tools.names if self._tools is not None else ())

    def _end_start(self) -> None:
        if self._start is not None:
            text, self._start = self._start.finish(), None
            self._text.append(self._answer.push(text))

    def _take_of_call(self, token: int, kind: str | None) -> None:
        """A token after the beginning of a call."""
        body = self._body
        if body.later:
            body.later.append(token)
        if kind is None and token != self._quote:
            self._feed(self._characters.push(token))
            return
        self._feed(self._characters.end())
        if self._body is not body:  # the last characters ended it
            self._tokens.appendleft(token)
        elif kind is None:
            self._extend(MARK)
        elif body.in_string:
            body.interrupt(token)
            self._feed(self._characters.push(token) + self._characters.end())
        else:
            self._end_call(token)

    def _extend(self, text: str) -> None:
        """Takes in characters of a call. One without its tokens ends with its braces."""
        body = self._body
        ends = body.push(text)
        if self._partial is not None:
            self._tell(self._partial.push(body))
        for end in ends if body.bare else ():
            self._attempts += 1
            if calls := read(body.text[:end], self._tools, closed=False):
                rest = body.text[end:]
                self._deliver(calls)
                self._say(spelled(rest))
                return
            if self._attempts == MOST_ATTEMPTS:
                self._give_back(spelled(body.text))
                return

    def _end_call(self, token: int | None, ended: bool = True) -> None:
        """The call ends, with the token that follows it; None is the end of the reply. ended: whether the model ended
        it.
        """
        body, whole, begun = self._body, self._body.text, self._partial is not None and self._partial.begun
        calls = self._read(whole, ended)
        if not calls and body.later:
            # A string that is never closed: the call ended at the first control token within it, and what follows is
            # read once more.
            calls = self._read(body.first, closed=True)
            if calls or not begun or (ended and self._partial.at <= len(body.first)):
                self._tokens.extendleft(reversed(body.later if token is None else [*body.later, token]))
                whole, token = body.first, self._tokens.popleft()
        mark = CALL_CLOSE if token is not None and self._kinds[token] == CALL_CLOSE else ""
        if token is not None and not mark:
            self._tokens.appendleft(token)
        if calls:
            self._deliver(calls)
        elif not begun:
            whole = spelled(whole)
            self._give_back(whole if body.bare else CALL_OPEN + whole + mark)
        elif token is not None or ended:
            self._deliver_begun(*self._partial.ended())
        else:
            self._body = None

    def _read(self, text: str, closed: bool) -> list[ToolCall] | None:
        """The calls that a text is; None where it is none, or begins otherwise than what was given away."""
        calls = read(text, self._tools, closed)
        begun = calls and self._partial is not None and self._partial.begun
        return None if begun and self._partial.rest(calls[0]) is None else calls

    def _deliver(self, calls: Sequence[ToolCall]) -> None:
        """Calls are whole. The first one may have been given away in part."""
        if self._partial is not None and self._partial.begun:
            self._deliver_begun(replace(calls[0], id=self._partial.id), self._partial.rest(calls[0]))
            calls = calls[1:]
        for call in calls:
            self._deltas.append(CallDelta(call.id, call.name, call.json))
        self._end_of_calls(calls)

    def _deliver_begun(self, call: ToolCall, rest: str) -> None:
        """The call that was given away in part is whole. rest: of its JSON."""
        self._tell(rest)
        self._end_of_calls([call])

    def _end_of_calls(self, calls: Sequence[ToolCall]) -> None:
        self._body = None
        self._calls += calls
        self._answer.call()
        self._begin(string.whitespace)

    def _tell(self, json: str) -> None:
        """Gives a piece of the call away."""
        if json:
            self._deltas.append(CallDelta(self._partial.id, self._partial.name, json))

    def _give_back(self, text: str) -> None:
        self._body = None
        self._text.append(self._answer.push(text))
