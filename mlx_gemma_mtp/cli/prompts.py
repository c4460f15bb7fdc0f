"""Prompts and other texts from arguments, files and standard input."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from ..errors import UserError, clipped, shown
from ..text.messages import normalised

PROMPTS = (
    "Write a Python function that reads a CSV file and returns the column means.",
    "def fibonacci(n):",
    "Explain in three sentences why the sky is blue.",
    "What does the method `str.partition` do?",
    "Translate to German: The meeting has been moved to Thursday.",
    'Return a JSON object with the keys "name", "age" and "city" for a fictional person.',
    "List the planets of the solar system by size.",
    "Write a haiku about compilers.",
)


def read_prompts(args: argparse.Namespace, needed: bool = True) -> list[str]:
    """Returns the prompts of --prompt, standard input and --prompt-file, in this order. Raises UserError.

    needed: whether there must be one.
    """
    prompts = [_standard_input("--prompt") if p == "-" else p for p in args.prompt]
    if args.prompt_file is not None:
        prompts += read_lines(args.prompt_file)
    if not prompts and needed:
        raise UserError("there is no prompt; give --prompt TEXT, --prompt - for standard input, or --prompt-file FILE")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError(f"the prompt {shown(prompt)} is empty; expected some text")
    return prompts


def read_lines(path: str) -> list[str]:
    """Returns the prompts of a --prompt-file: its lines, without empty ones. Raises UserError."""
    lines = re.split(r"\r\n|\n|\r", _read("--prompt-file", path, "a text file, a prompt a line"))
    return [line for line in lines if line.strip()]


def read_schema(source: str | None) -> str | None:
    """Returns the JSON text of --json-schema, which names a file or is the text itself. Raises UserError."""
    return None if source is None else _json("--json-schema", source, "a JSON schema")[0]


def read_tools(source: str | None) -> Any:
    """Returns what --tools says in JSON: in a file, in standard input ('-'), or as text. Raises UserError."""
    return None if source is None else _json("--tools", source, "a JSON list of tools")[1]


def read_messages(source: str) -> list[Any]:
    """Returns the chat messages of --messages, a JSON list in a file, in standard input ('-'), or as text.

    Raises UserError for what is no list, and for what is no message.
    """
    messages = _json("--messages", source, "a JSON list of chat messages")[1]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise UserError(f"--messages has {shown(messages)}, expected a JSON list of chat messages")
    normalised(messages)
    return messages


def read_choice(source: str | None) -> Any:
    """Returns what --tool-choice says: a word, or OpenAI's object in JSON. Raises UserError."""
    if source is None or not source.lstrip().startswith("{"):
        return source
    return _json("--tool-choice", source, "OpenAI's object, auto, none, required, or a tool's name")[1]


def _json(flag: str, source: str, what: str) -> tuple[str, Any]:
    """The JSON text that an argument is, or whose file it names ('-' is standard input), and its value. Raises
    UserError.
    """
    if source == "-":
        text = _standard_input(flag)
    else:
        text = read_source(flag, source, lambda text: text.lstrip().startswith(("{", "[")))
    try:
        return text, json.loads(text)
    except (ValueError, RecursionError) as error:
        where = "" if text is source else f" {clipped(source)}"
        raise UserError(f"{flag}{where} is no JSON: {error}; give {what}, or a file of one") from None


def read_source(flag: str, source: str | None, is_text: Callable[[str], bool]) -> str | None:
    """Returns the text of the file that `source` names, or `source` itself where there is no such file.

    is_text: says whether `source` can be a text of that kind. Raises UserError where it is neither.
    """
    if source is None:
        return None
    if os.path.exists(os.path.expanduser(source)):
        return _read(flag, source, "a text file")
    if is_text(source):
        return source
    name = clipped(source) or repr(source)
    raise UserError(f"{flag} {name}: there is no such file, and it is no text of that kind; check the name")


def _read(flag: str, path: str, expected: str) -> str:
    """Returns the text of a file that the user named. Raises UserError."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{flag} {clipped(path)}: {error.strerror}; expected {expected}") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"{flag} {shown(path)} is no name of a file; expected {expected}") from None
    return _decode(data, f"{flag} {path}")


def _standard_input(flag: str) -> str:
    if sys.stdin is None:
        raise UserError(f"{flag} - reads standard input, which is closed; expected a file or a pipe there")
    return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it to UTF-8"
        ) from None
