"""What the server takes at most, of one request and of all together."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass

from .errors import Refusal, full


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all.

    body: bytes. prompt_tokens, output_tokens: None is the context. choices: of a request, prompts times n. stops,
    stop_length: stop strings, and the characters of one. biases: entries of logit_bias. schema: characters of a
    JSON schema, a grammar or a regular expression. repetition: tokens of stop_repetition. tools, messages: of a
    request. seconds: that a request may take, waiting included. waiting: choices of all requests that have no row.
    reading: seconds that a client may leave its stream unread. beat: seconds of silence after which a stream's
    client, and proxies, are told that it still goes on.
    """

    body: int = 16 << 20
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    choices: int = 64
    stops: int = 16
    stop_length: int = 1024
    biases: int = 1024
    schema: int = 256 << 10
    repetition: int = 4096
    tools: int = 256
    messages: int = 10_000
    seconds: float = 600.0
    waiting: int = 256
    reading: float = 30.0
    beat: float = 5.0

    def check(self, name: str, what: Sized | None, most: int, unit: str) -> None:
        """Raises Refusal where a part of a request, called `name`, is longer than `most`. unit: what is counted."""
        if what is not None and len(what) > most:
            raise Refusal(400, f"{name} has {len(what)} {unit}, expected at most {most}", param=name)


class Places:
    """How many choices are asked for now, and how many may be: those that have a row, and those that wait."""

    def __init__(self, most: int):
        self.most, self.taken, self.refused = most, 0, 0

    def take(self, count: int) -> None:
        """Takes places for a request. Raises Refusal where there are too few; a request that is alone has its places
        whatever it asks for.
        """
        if self.taken and self.taken + count > self.most:
            self.refused += 1
            raise full()
        self.taken += count

    def give_back(self, count: int) -> None:
        """Gives the places of a request back."""
        self.taken -= count
