"""Calls as Gemma writes them, read: `call:NAME{key:value,...}`, strings between `<|"|>`.

Inside a string every character stands for itself, backslashes too. What is not the trained form is read where only one
reading is likely, and it is said; anything else is no call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring
from typing import Any

from .fitting import Bare, Fitting, Notes, constant
from .tools import NAME, ToolCall, Tools

CALL_OPEN, CALL_CLOSE, QUOTE, BARE = "<|tool_call>", "<tool_call|>", '<|"|>', "call:"
# Half a character each, which no tokens spell: a quote that is a token, and a quote's text amid a string.
MARK, SPELLED = "\udc00", "\udc01"
DEEPEST = 64  # of objects and arrays in each other
UNCLOSED = "closing brackets were missing"

_MARKS = re.compile(rf'<\|"\|>|[{MARK}{{}}\[\]]')
_BLANKS = re.compile(r"\s*")
_NAME = re.compile(rf"(:?\s*call\s*:\s*)?({NAME})\s*")
_KEY = re.compile(r"""[^\s:=,{}\[\]"'<>]+(?:[ \t]+[^\s:=,{}\[\]"'<>]+)*""")
# The template writes keys as they are. Before a string it is plain where one ends, whatever it has in it.
_KEY_OF_STRING = re.compile(r"""[^\s,{}\[\]"'<>]+(?=\s*:\s*<\|"\|>)""")
_NEXT_KEY = re.compile(
    r"""\s*(?:<\|"\|>(?P<quoted>[^<]*)<\|"\|>|(?:<\|"\|>|["'])?(?P<bare>[^\s:=,|{}()\[\]"'<>]+)(?:<\|"\|>|["'])?)"""
    r"\s*[:=](?!//)"
)
_PLAIN = re.compile(r"[\w$@.\-]+")  # a key that may follow words, unless the tool is known not to have it
# A quote of the trained kind may follow one of another kind: models have closed strings twice.
_AFTER_QUOTED = r'(?:<\|"\|>)?(?=\s*[,}\]])'
_AFTER_VALUE = re.compile(_AFTER_QUOTED)
_END_OF_QUOTED = {quote: re.compile(f"({quote}){_AFTER_QUOTED}") for quote in "\"'"}
_ANOTHER_ROUND = re.compile(r"\)[\s,;]*call\s*:")
_BRACKETS = re.compile(r'[{}\[\],]|<\|"\|>')
_CLOSERS = {"{": "}", "[": "]"}


class Body:
    """The characters of a call as they come.

    bare: whether it came without its tokens, so that its braces end it. in_string: whether a string is open. later: the
    tokens from the first control token within a string on; first: the characters before it. edges: begin and end of
    each mark around strings, and in how many brackets it stands; a mark that opens one and a mark that closes it take
    turns. size: of the characters that were looked at, all but what may begin a quote; fresh: the newest of them.
    """

    def __init__(self, bare: bool):
        self.bare, self.in_string = bare, False
        self.later: list[int] = []
        self.first = self.fresh = ""
        self.edges: list[tuple[int, int, int]] = []
        self.size = 0
        self._parts: list[str] = []
        self._marked = False  # whether quotes are tokens, so that their text is text
        self._tail = ""  # not looked at yet: it may begin a quote
        self._depth = self._level = 0  # of braces, and of all brackets

    @property
    def text(self) -> str:
        """All characters."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, text: str) -> list[int]:
        """Takes in characters, and returns the places where the braces close."""
        self._parts.append(text)
        seen = self._tail + text
        held = next((size for size in range(len(QUOTE) - 1, 0, -1) if seen.endswith(QUOTE[:size])), 0)
        self.fresh, self._tail = seen[: len(seen) - held], seen[len(seen) - held :]
        ends = [self.size + end for end in self._ends(self.fresh)]
        self.size += len(self.fresh)
        return ends

    def interrupt(self, token: int) -> None:
        """Notes a control token within a string."""
        if not self.later:
            self.first, self.later = self.text, [token]

    def _ends(self, text: str) -> Iterator[int]:
        for mark in _MARKS.finditer(text):
            if mark[0] in (QUOTE, MARK):
                self._marked = self._marked or mark[0] == MARK
                if mark[0] == MARK or not self._marked:
                    self._turn(mark)
            elif not self.in_string:
                step = 1 if mark[0] in "{[" else -1
                self._level += step
                if mark[0] in "{}":
                    self._depth += step
                    if self._depth <= 0:
                        yield mark.end()

    def _turn(self, mark: re.Match[str]) -> None:
        """A string begins or ends."""
        self.in_string = not self.in_string
        self.edges.append((self.size + mark.start(), self.size + mark.end(), self._level))


def read(text: str, tools: Tools, closed: bool) -> list[ToolCall] | None:
    """Returns the calls in the characters between the tokens of a call, None where they are no calls.

    closed: whether the closing token came, so that nothing was cut off and a missing end may be mended.
    """
    plain = spelled(text)
    marked = [text.replace(QUOTE, SPELLED).replace(MARK, QUOTE)] if MARK in text and QUOTE in text else []
    for each in (*marked, plain):
        try:
            found = list(Reader(each, closed, _keys(tools)).calls())
        except Unreadable:
            continue
        return [_call(name, arguments, notes, tools) for name, arguments, notes in found]
    return None


def _keys(tools: Tools) -> dict[str, set[str] | None]:
    """The names of each tool's arguments, None where there may be others."""
    found: dict[str, set[str] | None] = {}
    for name in tools.names:
        schema = tools.parameters(name)
        listed = schema.get("properties") and not schema.keys() & {"patternProperties", "allOf", "anyOf", "oneOf"}
        found[name] = set(schema["properties"]) if listed and not schema.get("additionalProperties") else None
    return found


def spelled(text: str) -> str:
    """Returns the characters of a call as the vocabulary spells them."""
    return text.replace(MARK, QUOTE)


def _call(name: str, arguments: dict[str, Any], repaired: list[str], tools: Tools) -> ToolCall:
    """The call with arguments that fit the tool's schema as far as they can."""
    notes, known = Notes(repaired), name in tools.names
    arguments = Fitting(notes, value_of).fit(unspelled(arguments), tools.parameters(name) if known else {}, "")
    if not known:
        notes.faults.append(f"there is no tool {name!r}")
    return ToolCall(name, arguments, tuple(dict.fromkeys(notes.repaired)), tuple(dict.fromkeys(notes.faults)))


def unspelled(value: Any) -> Any:
    """The value with the text of quotes in its strings."""
    if isinstance(value, str):
        return value.replace(SPELLED, QUOTE)
    if isinstance(value, Bare):
        return Bare(value.word.replace(SPELLED, QUOTE))
    if isinstance(value, dict):
        return {unspelled(key): unspelled(each) for key, each in value.items()}
    return [unspelled(each) for each in value] if isinstance(value, list) else value


def value_of(text: str) -> Any:
    """The object or array that a text is. Raises ValueError for anything else."""
    reader = Reader(text, closed=False)
    value = reader.value()
    if reader.at != len(text):
        raise Unreadable
    return value


class Unreadable(ValueError):
    """The characters are no call."""


@dataclass
class Reader:
    """Reads calls and values from a text, from the left, in time linear in its length.

    closed: whether the text is whole, so that closing brackets may be missing. tools: the names of each tool's
    arguments, None where there may be others; these tools are called even without 'call:'. at: the next character.
    notes: what was mended, in words. Its methods raise Unreadable where the text is none of what they read.
    """

    text: str
    closed: bool
    tools: Mapping[str, set[str] | None] = field(default_factory=dict)
    at: int = 0
    notes: list[str] = field(default_factory=list)
    _keys: set[str] | None = None  # of the call that is read
    _begun: int = 0  # where the member's value begins, white space included
    _open: list[str] = field(default_factory=list)  # the brackets that must still close

    def calls(self) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
        """Yields name, arguments and what was mended of each call, up to the text's end."""
        self._blanks()
        while True:
            self.notes = []
            name, arguments = self._json() if self.text.startswith("{", self.at) else self._call()
            self._blanks()
            if self._skip("}") or self._skip(")"):
                self._note("there was a bracket too many at the end")
                while self._skip("}") or self._skip(")"):
                    pass
            yield name, arguments, self.notes
            if self._skip(",") or self._skip(";"):
                self._blanks()
            if self.at == len(self.text):
                return

    def value(self, array: bool = False) -> Any:
        """Returns the value that begins here: JSON values, Bare for a word without quotes."""
        if self.text.startswith(QUOTE, self.at):
            return self._string()
        first = self.text[self.at : self.at + 1]
        if first and first in "\"'":
            return self._quoted(first)
        if first == "{":
            return self._object()
        return self._array() if first == "[" else self._word(array)

    def _call(self) -> tuple[str, dict[str, Any]]:
        found = _NAME.match(self.text, self.at)
        if not found:
            raise Unreadable
        name, self.at = found[2], found.end()
        if name not in self.tools and name.rstrip(":") in self.tools:
            name = name.rstrip(":")
        if name != found[2] or (found[1] or "").startswith(":"):
            self._note("there was a colon too many")
        self._keys = self.tools.get(name)
        if not found[1] and name not in self.tools:
            raise Unreadable
        if found[1] and name in self.tools:
            self._mend_round()
        if self.text.startswith("{", self.at):
            if not found[1]:
                self._note("'call:' was missing")
            return name, self._object()
        if not found[1] or self.at < len(self.text) or not self.closed:
            raise Unreadable
        self._note("the braces were missing")
        return name, {}

    def _mend_round(self) -> None:
        """Takes round brackets around the arguments, up to the text's end, for braces."""
        end = len(self.text.rstrip()) - 1
        whole = self.text.startswith("(", self.at) and end > self.at and self.text[end] == ")"
        if whole and not _ANOTHER_ROUND.search(self.text, self.at):
            self.text = f"{self.text[: self.at]}{{{self.text[self.at + 1 : end]}}}"
            self._note("the brackets were round")

    def _json(self) -> tuple[str, dict[str, Any]]:
        """A call as other models write it: an object of its name and its arguments."""
        found = self._object()
        name, arguments = found.get("name"), found.get("arguments", found.get("parameters"))
        name = name.word if isinstance(name, Bare) else name
        if isinstance(arguments, str):  # as OpenAI writes them
            arguments = value_of(arguments)
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise Unreadable
        self._note("the call was an object of name and arguments")
        return name, arguments

    def _object(self) -> dict[str, Any]:
        self._enter("{")
        found: dict[str, Any] = {}
        while not self._left("}"):
            key = self._key()
            if key in found:
                self._note(f"{key!r} was there twice, the first one counts")
            found.setdefault(key, self._member())
            self._separator("}")
        return found

    def _array(self) -> list[Any]:
        self._enter("[")
        found = []
        while not self._left("]"):
            found.append(self.value(array=True))
            self._separator("]")
        return found

    def _enter(self, bracket: str) -> None:
        self._open.append(_CLOSERS[bracket])
        if len(self._open) > DEEPEST:
            raise Unreadable
        self.at += 1
        self._blanks()

    def _left(self, closer: str) -> bool:
        """Whether the bracket closes here."""
        if self.at == len(self.text) and self.closed:
            self._note(UNCLOSED)
        elif not self.text.startswith(closer, self.at):
            return False
        else:
            self.at += 1
        self._open.pop()
        return True

    def _separator(self, closer: str) -> None:
        """The comma between two members, or nothing before the closing bracket."""
        before = self.at
        self._blanks()
        if self._skip(","):
            self._blanks()
            if self.text.startswith(closer, self.at):
                self._note("there was a comma too many")
        elif not self.text.startswith(closer, self.at) and self.at < len(self.text):
            if before == self.at or closer == "]" or not _NEXT_KEY.match(self.text, self.at):
                raise Unreadable
            self._note("a comma was missing")
        elif self.at == len(self.text) and not self.closed:
            raise Unreadable

    def _key(self) -> str:
        if self.text.startswith(QUOTE, self.at):
            key = self._string(key=True)
        elif self.text[self.at : self.at + 1] in ('"', "'"):
            quote = self.text[self.at]
            end = self.text.find(quote, self.at + 1)
            if end < 0:
                raise Unreadable
            key, self.at = self.text[self.at + 1 : end], end + 1
            self._note("keys were in quotes")
        else:
            found = _KEY_OF_STRING.match(self.text, self.at) or _KEY.match(self.text, self.at)
            if not found:
                raise Unreadable
            key, self.at = found[0], found.end()
        self._blanks()
        self._begun = self.at + 1
        if self._skip("="):
            self._note("'=' stood for ':'")
        elif not self._skip(":"):
            raise Unreadable
        self._blanks()
        return key

    def _member(self) -> Any:
        if self.text[self.at : self.at + 1] in (",", "}"):
            self._note("a value was missing, it is empty now")
            return ""
        return self.value()

    def _string(self, key: bool = False) -> str:
        start = self.at + len(QUOTE)
        end = self.text.find(QUOTE, start)
        if end >= 0:
            self.at = end + len(QUOTE)
            return self.text[start:end]
        if not self.closed or key:
            raise Unreadable
        return self._unended(start)

    def _unended(self, start: int) -> str:
        """A last string whose closing quote is missing: all up to the closing brackets, every one of which must stand
        there.
        """
        end = len(self.text)
        for closer in self._open:
            while end > start and self.text[end - 1].isspace():
                end -= 1
            if end <= start or self.text[end - 1] != closer:
                raise Unreadable
            end -= 1
        self._note("the last string was not closed")
        self.at = end
        return self.text[start:end]

    def _quoted(self, quote: str) -> str:
        """A string in quotes of another kind."""
        start = self.at + 1
        self._note("a string was in other quotes")
        if quote == '"':
            try:
                string, end = scanstring(self.text, start, False)
                string.encode()  # an escape may have made half a character
                if after := _AFTER_VALUE.match(self.text, end):
                    self.at = after.end()
                    return string
            except ValueError:
                pass  # quotes or backslashes that are no JSON: then they stand for themselves
        found = _END_OF_QUOTED[quote].search(self.text, start)
        if not found:
            raise Unreadable
        self.at = found.end()
        return self.text[start : found.start()]

    def _word(self, array: bool) -> Bare:
        """A number, a constant, or words without quotes. In an object they may have commas that no key follows."""
        depth, start, words = 0, self.at if array else self._begun, False
        for mark in _BRACKETS.finditer(self.text, start):
            what, at = mark[0], mark.start()
            if what == QUOTE:
                raise Unreadable
            if what in "{[":
                depth += 1
            elif what in "}]" and depth:
                depth -= 1
            elif what in "}]":
                if what != self._open[-1]:
                    raise Unreadable
                return self._bare(start, at)
            elif not depth:
                words = words or isinstance(constant(self.text[start:at].strip()), str)
                if array or self._ends_member(at + 1, words):
                    return self._bare(start, at)
                words = True
        if depth or not self.closed:
            raise Unreadable
        return self._bare(start, len(self.text))

    def _ends_member(self, at: int, words: bool) -> bool:
        """Whether the comma before `at` ends a member of an object: a key follows, or the closing brace. words: whether
        words stand before it, to which what looks like a key may belong, unless the tool has it.
        """
        if key := _NEXT_KEY.match(self.text, at):
            name = key["bare"] if key["quoted"] is None else key["quoted"]
            unknown = self._keys is None or len(self._open) > 1
            return not words or (unknown and _PLAIN.fullmatch(name) is not None) or name in (self._keys or ())
        return self.text.startswith("}", _BLANKS.match(self.text, at).end())

    def _bare(self, start: int, end: int) -> Bare:
        raw, self.at = self.text[start:end], end
        word = raw.strip()
        if not word:
            raise Unreadable
        return Bare(raw.strip(" \t") if "\n" in word else word)  # lines of a text are those of a file

    def _blanks(self) -> None:
        self.at = _BLANKS.match(self.text, self.at).end()

    def _skip(self, character: str) -> bool:
        """Whether the character stands here; then it is passed, with the white space after it."""
        if not self.text.startswith(character, self.at):
            return False
        self.at += len(character)
        self._blanks()
        return True

    def _note(self, what: str) -> None:
        self.notes.append(what)
