"""What a user types: with an editor, line by line, or out of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import UserError
from .terminal import colours

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT, MORE = "> ", "  "
FILES = ("/save", "/load")  # commands that take a file's name
Read = Callable[[], str]


class Entry(Protocol):
    """Reads what is said next.

    by_key: whether the terminal is read key by key, not by lines. Calling it raises EOFError at the end,
    KeyboardInterrupt where Ctrl-C was typed with nothing before it, and UserError for what is no text.
    """

    by_key: bool

    def __call__(self) -> str: ...


def entry(commands: Sequence[str], history: Path | None) -> Entry:
    """Returns what reads standard input: an editor where prompt_toolkit is installed and both sides are a terminal.

    commands: to be completed. history: the file that keeps what was typed; None keeps nothing.
    """
    if not sys.stdin.isatty():
        return Pipe()
    if sys.stdout.isatty():
        with suppress(ImportError):
            return Editor(commands, history)
    return Lines()


class Pipe:
    """Each line of standard input is a turn."""

    by_key = False

    def __call__(self) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            byte = f"{error.object[error.start]:#04x} at {error.start}"
            raise UserError(f"a line of standard input is not UTF-8 (byte {byte}); convert it to UTF-8") from None


class Lines:
    """Lines of a terminal, with what the system's readline offers; a backslash at the end goes on with the next one."""

    by_key = False

    def __init__(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() uses it from now on

    def __call__(self) -> str:
        text = self._line(PROMPT)
        while text.endswith("\\"):
            text = f"{text[:-1]}\n{self._line(MORE)}"
        return text

    @staticmethod
    def _line(prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # standard output is for replies
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


class Editor:
    """An editor of one or more lines with a history. Raises ImportError without prompt_toolkit.

    Enter sends, but not behind a backslash; Alt-Enter and Ctrl-J begin a new line; what is pasted may have several.
    Ctrl-C clears what was typed. Tab completes commands and names of files.
    """

    by_key = True

    def __init__(self, commands: Sequence[str], history: Path | None):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth
        from prompt_toolkit.shortcuts import CompleteStyle

        if history is not None:
            _make_private(history)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=MORE,
            key_bindings=_keys(),
            history=InMemoryHistory() if history is None else FileHistory(history),
            completer=_completer(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            color_depth=None if colours() else ColorDepth.DEPTH_1_BIT,
            enable_open_in_editor=True,
            enable_suspend=True,
        )

    def __call__(self) -> str:
        return self._session.prompt()


def _make_private(path: Path) -> None:
    """Makes a file that its user alone can read, if there is none. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise UserError(f"--history: {path} cannot be written ({error.strerror}); leave it out") from None


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def go_on(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def _completer(commands: Sequence[str]) -> object:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            word, space, name = document.text_before_cursor.partition(" ")
            if space and word in FILES:
                yield from files.get_completions(Document(name), event)
            elif not space and word.startswith("/"):
                yield from (Completion(each, -len(word)) for each in commands if each.startswith(word))

    return Commands()
