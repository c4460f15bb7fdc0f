"""Chats in files: JSON, written whole or not at all, and checked when they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..files.files import no_file, whole
from ..sampling.params import check_unicode
from ..text.messages import normalised

FORMAT, VERSION = "mlx_gemma_mtp chat", 1
LARGEST = 2**28  # bytes; a context of a million tokens takes a fiftieth of them


@dataclass(frozen=True)
class Transcript:
    """A chat as it lies in a file.

    messages: in OpenAI's form, without the system prompt. model: what replied, for people.
    """

    messages: Sequence[Mapping[str, Any]]
    system_prompt: str | None = None
    model: str | None = None


def named(name: str) -> Path:
    """Returns the file that a user names; `~` is the home folder. Raises UserError for what is no name."""
    if not name or "\0" in name:
        raise UserError(f"{shown(name)} is no name of a file; expected one such as chat.json")
    return Path(os.path.expanduser(name))


def save(path: Path, transcript: Transcript) -> None:
    """Writes a chat; of what the file held before, only a chat is replaced. Raises UserError."""
    if os.path.lexists(path):
        try:
            load(path)
        except UserError as error:
            raise UserError(f"{error}; it stays as it is: save to another file") from None
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": transcript.model,
        "system_prompt": transcript.system_prompt,
        "messages": list(transcript.messages),
    }
    try:
        with whole(path) as part:
            part.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from None


def load(path: Path) -> Transcript:
    """Reads a chat. Raises UserError for a file that is none, or is damaged."""
    record = _record(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no chat of this program, expected a file that /save wrote")
    if record.get("version") != VERSION:
        raise UserError(f"{path} has version {shown(record.get('version'))}, expected {VERSION}: another release's")
    messages, system_prompt, model = (record.get(name) for name in ("messages", "system_prompt", "model"))
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise UserError(f"{path} is damaged: messages is {shown(messages)}, expected a list of messages")
    for name, value in (("system_prompt", system_prompt), ("model", model)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path} is damaged: {name} is {shown(value)}, expected text or null")
    try:
        check_unicode("system_prompt", system_prompt or "")
        roles = [message["role"] for message in normalised(messages)]
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if roles and roles[0] != "user":
        raise UserError(f"{path} is damaged: its first message is the {roles[0]}'s, expected the user's")
    return Transcript(messages, system_prompt, model)


def _record(path: Path) -> Any:
    """The JSON of a file. Raises UserError."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: there is no such file; check the name")
    if other := no_file(path):  # what would block or not end is not read
        raise UserError(f"{path} {other}, expected a file that /save wrote")
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected a file that /save wrote")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    except (ValueError, RecursionError):  # no UTF-8, or no JSON
        raise UserError(f"{path} is no chat of this program, expected a file that /save wrote") from None
