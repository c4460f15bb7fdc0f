"""What a chat shows: replies as they come, with a live line on a terminal, and what is to be said beside them."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

from . import figures
from .command import note, tell
from .replies import Printer
from .terminal import Screen, dimmed, printable, unechoed

if TYPE_CHECKING:
    from ..engine.request import Chunk, Result
    from .session import Session

STOP = "Ctrl-C stops"
ENDS = {  # what is said of a reply that did not end by itself
    "cancelled": "stopped",
    "length": "cut off: length",
    "timeout": "cut off: timeout",
    "repetition": "cut off: repetition",
}


class Console:
    """Standard output and standard error of a chat.

    Where standard output is a terminal, it gets what commands answer, and a line of figures below each reply; else it
    gets the replies alone. hide_thinking: leaves thoughts out. by_key: how the terminal is read (see unechoed).
    """

    def __init__(self, hide_thinking: bool, by_key: bool):
        self._terminal = sys.stdout.isatty()
        self._hide_thinking, self._by_key = hide_thinking, by_key
        self._notices: list[str] = []  # that came during a reply

    def show(self, lines: str) -> None:
        """Shows what a command answers."""
        if self._terminal:
            print(dimmed(lines), end="\n\n", flush=True)
        else:
            tell(lines)

    def error(self, error: object) -> None:
        """Shows what went wrong, in a line."""
        tell(f"error: {printable(' '.join(str(error).split()))}", *[""] * self._terminal)

    def notice(self, message: str) -> None:
        """Keeps a note for the user until the reply has ended. Any thread may call it."""
        self._notices.append(message)

    def reply(self, session: Session, text: str, cancel: threading.Event) -> Result:
        """Says something, shows the reply as it comes, and returns its result. Raises what `Engine.stream` raises."""
        shown = _OnScreen(self._hide_thinking) if self._terminal else _Plain()
        with unechoed(self._by_key), closing(session.reply(text, cancel=cancel, progress=shown.reading)) as chunks:
            try:
                for chunk in chunks:
                    shown.take(chunk)
            except BaseException:
                shown.leave()
                raise
            shown.end(chunk.result)
        self.tell_notices()
        return chunk.result

    def tell_notices(self) -> None:
        """Shows the notes that wait."""
        while self._notices:
            note(self._notices.pop(0))


class _Plain:
    """A reply in a pipe or a file: its text."""

    reading = None

    def __init__(self) -> None:
        self._printer = Printer()

    def take(self, chunk: Chunk) -> None:
        self._printer(chunk)

    def end(self, result: Result) -> None:
        self._printer.end()

    def leave(self) -> None:
        pass


class _OnScreen:
    """A reply on a terminal: its text, and below it how it goes, then how it went."""

    def __init__(self, hide_thinking: bool):
        self._screen, self._live = Screen(), figures.Live(time.monotonic())
        self._printer = Printer(hide_thinking, self._screen.write)
        self._screen.write("\n", ["reading the prompt", STOP])

    def reading(self, done: int, total: int) -> None:
        """Shows how far the prompt is."""
        self._screen.write("", [*figures.reading(done, total), STOP])

    def take(self, chunk: Chunk) -> None:
        """Shows a piece of the reply."""
        now = time.monotonic()
        self._live.take(chunk, now)
        self._printer(chunk)
        self._screen.write("", [*self._live.parts(now), STOP])

    def end(self, result: Result) -> None:
        """Shows the figures of the whole reply, and why it ended where it did not do so by itself."""
        self._printer.end()
        why = ENDS.get(result.finish_reason)
        self._screen.end([*([why] if why else []), *figures.summary(result)])

    def leave(self) -> None:
        """Leaves the reply as it is."""
        self._screen.end()
