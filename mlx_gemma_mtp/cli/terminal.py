"""A terminal: what may reach it, and a line below the text that follows what happens."""

from __future__ import annotations

import os
import re
import shutil
import sys
import termios
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
DIM, BRIGHT = "\033[2m", "\033[22m"
STYLE = re.compile(r"\033\[[0-9;]*m")
TAB = " " * 4  # what a tab is at the last column, terminals disagree about
ERASE = "\033[J"  # from the cursor to the end of the screen
# Makes sure of a row below without leaving the column, then goes to its beginning; the second comes back.
BELOW, BACK = "\033D\033[A\0337\r\033[B", "\0338"
SEPARATOR = " · "


def printable(text: str) -> str:
    """Returns a text whose control characters are spelled out, all but newlines and tabs: `\\x1b` for an escape."""
    return text.translate(CONTROL)


def colours() -> bool:
    """Returns whether a terminal is to get colours and the like: not where NO_COLOR is set, nor from a dumb one."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dimmed(text: str) -> str:
    """Returns a text as a terminal shows it dimmed; as it is where there are no colours."""
    return f"{DIM}{text}{BRIGHT}" if text and colours() else text


def cells(character: str) -> int:
    """Returns how many columns a character takes: 0 (it joins the one before), 1 or 2."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fitted(parts: Sequence[str], width: int) -> str:
    """Returns as many parts of a line as fit into so many columns; of the first one what fits."""
    line = _cut(parts[0], width) if parts else ""
    for part in parts[1:]:
        longer = line + SEPARATOR + part
        if sum(map(cells, longer)) > width:
            break
        line = longer
    return line


def _cut(text: str, width: int) -> str:
    used = 0
    for place, character in enumerate(text):
        used += cells(character)
        if used > width:
            return text[:place]
    return text


class Screen:
    """Standard output as a terminal, with a line below the text, which is dimmed and written anew with each piece.

    A dumb terminal has no such line. The text is wrapped by the terminal itself, so it can be copied as it is.
    """

    def __init__(self) -> None:
        self._moves = os.environ.get("TERM", "dumb") != "dumb"
        self._column = 0  # of the cursor; the terminal's width where the next character wraps
        self._shown = False  # whether there is a line below

    def write(self, text: str, below: Sequence[str] = ()) -> None:
        """Writes text, and parts of a line in the row below: as many as fit."""
        width = max(shutil.get_terminal_size().columns, 1)
        text, out = text.replace("\t", TAB), ERASE if self._shown else ""
        self._column = advanced(self._column, STYLE.sub("", text), width)
        # Behind the last column the cursor waits to wrap, which going down and up again would make it forget.
        self._shown = self._moves and bool(below) and self._column < width
        line = f"{BELOW}{dimmed(fitted(below, width - 1))}{BACK}" if self._shown else ""
        sys.stdout.write(out + text + line)
        sys.stdout.flush()

    def end(self, parts: Sequence[str] = ()) -> None:
        """Ends the text's last line, and writes parts of a line that stays, with an empty one behind it."""
        width = max(shutil.get_terminal_size().columns, 1)
        below = f"{dimmed(fitted(parts, width - 1))}\n\n" if parts else ""
        self.write(("\n" if self._column else "") + below)


def advanced(column: int, text: str, width: int) -> int:
    """Returns the column behind a text that begins at a column: `width` where the next character wraps."""
    tail = text.rpartition("\n")
    column = 0 if tail[1] else column
    for character in tail[2]:
        taken = cells(character)
        column = taken if taken and column + taken > width else column + taken
    return column


@contextmanager
def unechoed(by_key: bool) -> Iterator[None]:
    """Keeps the terminal from showing what is typed until the block ends; whoever reads next gets it.

    by_key: that reader takes keys one by one, not lines. Does nothing where standard input is no terminal.
    """
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (AttributeError, ValueError, OSError, termios.error):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | (termios.ICANON if by_key else 0))
    quiet[0] &= ~(termios.ICRNL if by_key else 0)
    try:
        termios.tcsetattr(number, termios.TCSANOW, quiet)
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(number, termios.TCSANOW, before)
