"""How replies are printed: thoughts dimmed on a terminal alone, a line for each call, what was mended as a note."""

import io
import sys

import pytest

from mlx_gemma_mtp.cli.replies import Printer
from mlx_gemma_mtp.engine.request import Chunk, Result
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.text.tools import CallDelta, ToolCall

CALL = ToolCall("get_weather", {"city": "Köln", "days": 2})
PIECES = [
    Chunk(0, "", [1], reasoning="Let me"),
    Chunk(0, "", [2], reasoning=" see."),
    Chunk(0, "It is", [3]),
    Chunk(0, " so.", [4], tool_calls=[CALL, CALL]),
]
TEXT = 'It is so.\ncall get_weather {"city": "Köln", "days": 2}\ncall get_weather {"city": "Köln", "days": 2}\n'
DIMMED = "\033[2mLet me\033[22m\033[2m see.\033[22m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch, out: io.StringIO, pieces, hide: bool = False) -> str:
    monkeypatch.setattr(sys, "stdout", out)
    printer = Printer(hide)
    for piece in pieces:
        printer(piece)
    printer.end()
    return out.getvalue()


@pytest.mark.parametrize(
    "out, env, hide, expected",
    [
        (io.StringIO, {}, False, TEXT),
        (Terminal, {}, True, TEXT),
        (Terminal, {}, False, f"{DIMMED}\n\n{TEXT}"),
        (Terminal, {"NO_COLOR": "1"}, False, f"Let me see.\n\n{TEXT}"),
        (Terminal, {"TERM": "dumb"}, False, f"Let me see.\n\n{TEXT}"),
    ],
)
def test_thoughts_are_for_terminals(monkeypatch, out, env, hide, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert printed(monkeypatch, out(), PIECES, hide) == expected


@pytest.mark.parametrize(
    "pieces, expected",
    [
        ([], "\n"),
        ([Chunk(0, "a", [1])], "a\n"),
        ([Chunk(0, "a\n", [1])], "a\n\n"),
        ([Chunk(0, "", [1], tool_calls=[ToolCall("f", {})])], "call f {}\n"),
        ([Chunk(0, "", [1], tool_calls=[ToolCall("f", {})]), Chunk(0, "a", [1])], "call f {}\na\n"),
    ],
)
def test_every_reply_ends_its_line(monkeypatch, pieces, expected):
    assert printed(monkeypatch, io.StringIO(), pieces) == expected


def test_a_thought_alone_ends_its_line(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(monkeypatch, Terminal(), PIECES[:2]) == "Let me see.\n\n\n"


def test_a_call_that_is_cut_off_is_a_note(monkeypatch, capsys):
    result = Result("", [1], "length", Stats(1), cut_call=CallDelta("1", "f", '{"a": "x'))
    assert printed(monkeypatch, io.StringIO(), [Chunk(0, "Well.", [1], result)]) == "Well.\n"
    assert capsys.readouterr().err == 'note: the call of f is cut off, its arguments so far: \'{"a": "x\'\n'


def test_what_was_mended_or_does_not_fit_is_a_note(monkeypatch, capsys):
    call = ToolCall("f", {"a": 1}, ("keys were in quotes",), ("'b' is missing",))
    assert printed(monkeypatch, io.StringIO(), [Chunk(0, "", [1], tool_calls=[call])]) == 'call f {"a": 1}\n'
    expected = "note: the call of f: keys were in quotes\nnote: the call of f: 'b' is missing\n"
    assert capsys.readouterr().err == expected
