"""A chat in a terminal: the conversation, what holds for its next replies, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, shown
from ..sampling.params import SamplingParams
from . import transcripts
from .transcripts import Transcript

if TYPE_CHECKING:
    from ..engine.conversation import Conversation
    from ..engine.engine import Engine
    from ..engine.request import Chunk, Result

WHOLE = ("stop", "tool_calls")  # ends that are the reply's own
CUT = {"status": "incomplete"}  # what a message has whose reply was cut off, as in OpenAI's Responses


@dataclass(frozen=True)
class Settings:
    """What holds for the next replies. drafts: how many a round, 'auto', or None for the engine's.

    timeout: of a reply, in seconds.
    """

    params: SamplingParams
    drafts: int | str | None = None
    timeout: float | None = None


class Session:
    """A chat with an engine.

    model: its name, which saved chats carry. last: the result of the last reply, None before the first one. Every
    method raises UserError for what it cannot do, and changes nothing then.
    """

    def __init__(self, engine: Engine, settings: Settings, model: str, system_prompt: str | None = None):
        self.engine, self.settings, self.model = engine, settings, model
        self.last: Result | None = None
        self.conversation: Conversation = engine.conversation(system_prompt)
        self._budget = settings.params.thinking_budget
        self._file: Path | None = None  # that was saved or loaded last

    def reply(self, text: str, **options: Any) -> Iterator[Chunk]:
        """Says something and yields the reply's pieces. options: of `Engine.stream`.

        Of a reply that was cut off, what came stays in the chat with the status 'incomplete'.
        """
        now, before, result = self.settings, self.turns, None
        options |= {"num_draft_tokens": now.drafts, "timeout": now.timeout}
        try:
            with closing(self.conversation.stream(text, now.params, **options)) as chunks:
                for chunk in chunks:
                    self.last = result = chunk.result or result
                    yield chunk
        finally:
            if self.turns > before and (result is None or result.finish_reason not in WHOLE):
                *messages, reply = self.conversation.messages
                self._go_on_with([*messages, reply | CUT])

    def _go_on_with(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self.conversation = self.engine.conversation(self.system_prompt, messages=messages)

    @property
    def system_prompt(self) -> str | None:
        """What comes before all turns."""
        return self.conversation.system_prompt

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.conversation.reset()
        self.last = None

    def undo(self) -> None:
        """Takes the last turn and its reply back."""
        if not self.conversation.undo():
            raise UserError("there is no turn to take back")

    def instruct(self, system_prompt: str | None) -> None:
        """Gives the chat another system prompt, or none; its turns stay."""
        self.conversation.system_prompt = system_prompt

    def draft(self, drafts: int | str) -> None:
        """Sets how many tokens are drafted a round: 0 is plain decoding, 'auto' follows cost and acceptance."""
        if self.engine.drafter is None and drafts:
            raise UserError("there is no drafter, so every reply is decoded plainly; start with --draft-model PATH")
        self.settings = replace(self.settings, drafts=drafts)

    def think(self, on: bool) -> None:
        """Sets whether the next replies begin with a thought."""
        params = replace(self.settings.params, thinking=on, thinking_budget=self._budget if on else None)
        self.settings = replace(self.settings, params=params)

    def save(self, name: str) -> Path:
        """Writes the chat to a file, the one of the last time where the name is empty, and returns it."""
        path = self._named(name)
        transcripts.save(path, Transcript(self.conversation.messages, self.system_prompt, self.model))
        self._file = path
        return path

    def load(self, name: str) -> Path:
        """Goes on with a chat from a file, the one of the last time where the name is empty, and returns it."""
        path = self._named(name)
        found = transcripts.load(path)
        self.conversation = self.engine.conversation(found.system_prompt, messages=found.messages)
        self._file, self.last = path, None
        return path

    def _named(self, name: str) -> Path:
        if not name and self._file is None:
            raise UserError("there is no file yet; expected its name, such as chat.json")
        return transcripts.named(name) if name else self._file

    @property
    def turns(self) -> int:
        """How often the user spoke."""
        return sum(message["role"] == "user" for message in self.conversation.messages)


def read_switch(text: str) -> bool:
    """Returns whether a switch is to be on. Raises UserError."""
    if text not in ("on", "off"):
        raise UserError(f"{shown(text)} is neither on nor off")
    return text == "on"
