"""What reaches a terminal: no control characters of a reply, and a live line that leaves the text as it is."""

import io
import os
import sys

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cli.replies import Printer
from mlx_gemma_mtp.cli.terminal import Screen, advanced, cells, dimmed, fitted, printable, unechoed
from mlx_gemma_mtp.engine.request import Chunk
from mlx_gemma_mtp.text.tools import ToolCall

ALPHABET = "ab \n\té"  # pyte does not wrap a wide character that half fits


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_control_characters_are_spelled_out():
    assert printable("a\x1b[31m\x9b\x7f\r\0b\n\tc é你") == "a\\x1b[31m\\x9b\\x7f\\x0d\\x00b\n\tc é你"
    kept = {chr(code) for code in range(0x110000) if chr(code) in printable(chr(code))}
    assert not kept & {*map(chr, range(32)), *map(chr, range(127, 160))} - {"\n", "\t"} and len(kept) > 0x10FF00


@pytest.mark.parametrize("kind", [Tty, io.StringIO])
def test_a_reply_cannot_steer_a_terminal(monkeypatch, kind, plain_environment):
    """Text, thoughts and calls; a pipe gets the text as it is."""
    monkeypatch.setattr(sys, "stdout", out := kind())
    printer = Printer()
    call = ToolCall("f", {"a": "\x9b2J\x1b"})
    printer(Chunk(0, "a\x1b]0;title\x07", [1], reasoning="\x1b[2Jthought", tool_calls=[call]))
    found = out.getvalue().replace("\033[2m", "").replace("\033[22m", "")
    assert ("\x1b" in found or "\x9b" in found) == (kind is io.StringIO)
    assert kind is Tty or found.startswith("a\x1b]0;title\x07")


def test_parts_of_a_line_that_fit():
    parts = ["12.5 tokens/s", "61% of drafts kept", "你好"]
    assert fitted(parts, 80) == "12.5 tokens/s · 61% of drafts kept · 你好"
    assert fitted(parts, 40) == "12.5 tokens/s · 61% of drafts kept"  # the last part has four columns
    assert fitted(parts, 41) == "12.5 tokens/s · 61% of drafts kept · 你好"
    assert fitted(parts, 6) == "12.5 t" and fitted(["你好"], 3) == "你" and fitted([], 9) == "" == fitted(parts, 0)


@pytest.mark.parametrize("text, columns", [("a", 1), ("é", 1), ("e\u0301", 1), ("你", 2), ("😀", 2), ("\u200d", 0)])
def test_columns_of_characters(text, columns):
    assert sum(map(cells, text)) == columns


@pytest.mark.parametrize(
    "column, text, width, expected",
    [
        (0, "", 5, 0),
        (3, "ab", 5, 5),  # waits behind the last column
        (5, "a", 5, 1),
        (1, "x\nab", 5, 2),
        (0, "你你", 5, 4),
        (4, "你", 5, 2),  # does not fit, so it wraps
        (0, "你e\u0301", 3, 3),
        (5, "\u0301", 5, 5),
    ],
)
def test_where_the_cursor_is_behind_a_text(column, text, width, expected):
    assert advanced(column, text, width) == expected


def shown(data: str, columns: int, rows: int = 40) -> tuple[list[str], int]:
    """The lines that a terminal shows, and its cursor's column."""
    screen = pyte.Screen(columns, rows)
    pyte.Stream(screen).feed(data.replace("\n", "\r\n"))  # as a terminal's driver does
    return [line.rstrip() for line in screen.display], min(screen.cursor.x, columns)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=9), max_size=12), st.integers(2, 12), st.integers(2, 40))
def test_the_live_line_leaves_the_text_as_it_is(pieces, columns, rows):
    """Whatever the width, also at the last column and at the screen's last row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, rows)))
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", out := Tty())
        screen, ended = Screen(), "".join(pieces).replace("\t", " " * 4)
        for piece in pieces:
            screen.write(piece, ["12345678", "90"])
        screen.end()
    ended += "" if not ended or ended.endswith("\n") else "\n"
    found, column = shown(out.getvalue(), columns, rows)
    text, expected = shown(ended, columns, rows)
    # A live line in the last row has scrolled the screen by one more.
    scrolled = [*text[1:], ""]
    assert column == expected and found in (text, scrolled)


def test_the_live_line_is_below_the_text(monkeypatch, plain_environment):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 5)))
    monkeypatch.setattr(sys, "stdout", out := Tty())
    screen = Screen()
    screen.write("one\ntwo", ["3 tokens", "of many that do not fit"])
    assert shown(out.getvalue(), 20, 5)[0] == ["one", "two", "3 tokens", "", ""]
    screen.write(" and\nmore", ["4 tokens"])
    assert shown(out.getvalue(), 20, 5)[0] == ["one", "two and", "more", "4 tokens", ""]
    screen.end(["done"])
    assert shown(out.getvalue(), 20, 5)[0] == ["two and", "more", "done", "", ""]


def test_no_colours_and_no_live_line(monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := Tty())
    monkeypatch.setenv("TERM", "dumb")
    assert dimmed("a") == "a"
    Screen().write("a", ["below"])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert dimmed("a") == "a" and out.getvalue() == "a"
    monkeypatch.delenv("NO_COLOR")
    assert dimmed("a") == "\033[2ma\033[22m" and dimmed("") == ""


def test_what_is_no_terminal_is_left_alone(monkeypatch):
    with open(os.devnull) as nothing:
        for stdin in (io.StringIO(), None, nothing):
            monkeypatch.setattr(sys, "stdin", stdin)
            with unechoed(True):
                pass
