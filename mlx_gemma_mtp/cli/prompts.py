"""Prompts and other texts from arguments, files and standard input."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable

from ..errors import UserError, clipped, shown

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


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts of --prompt, standard input and --prompt-file, in this order. Raises UserError."""
    prompts = [_standard_input() if p == "-" else p for p in args.prompt]
    if args.prompt_file is not None:
        prompts += read_lines(args.prompt_file)
    if not prompts:
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
    text = read_source("--json-schema", source, lambda text: text.lstrip().startswith(("{", "[")))
    if text is not None:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            where = "" if text is source else f" {clipped(source)}"
            raise UserError(f"--json-schema{where} is no JSON: {error}; give a JSON schema, or a file of one") from None
    return text


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
    raise UserError(f"{flag} {clipped(source)}: there is no such file, and it is no text of that kind; check the name")


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


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("--prompt - reads standard input, which is closed; expected a file or a pipe there")
    return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it to UTF-8"
        ) from None
