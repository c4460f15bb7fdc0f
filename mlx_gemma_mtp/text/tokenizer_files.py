"""A folder's tokenizer, by its files alone: checked without the tokenizer's libraries, which take seconds to import."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..files.folder import LARGE, TOKENIZER_EXTRAS, check_text_files
from ..files.safetensors import read_object

TOKENIZER = "tokenizer.json"
OLD_TEMPLATE = "chat_template.json"  # where processors kept theirs
# All that a tokenizer is made of. config.json is not: transformers would refuse a folder for keys that nobody uses.
FILES = (TOKENIZER, *TOKENIZER_EXTRAS, "chat_template.jinja", "additional_chat_templates")
CLOSERS = {"eot_token": "<turn|>", "str_token": "<|tool_response>"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def check_tokenizer(folder: Path) -> None:
    """Raises UserError, naming the file and the key, for a tokenizer that cannot be loaded. Takes milliseconds: a large
    vocabulary is looked at when it is loaded.
    """
    check_text_files(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if os.path.lexists(folder / name):
            _check_settings(folder / name)
    if os.path.lexists(folder / OLD_TEMPLATE):
        template = read_object(folder / OLD_TEMPLATE).get("chat_template")
        if template is not None and not isinstance(template, str):
            raise UserError(
                f"{folder / OLD_TEMPLATE}: chat_template is {shown(template)}, expected a template's text; correct it"
            )
    added = folder / "added_tokens.json"
    if os.path.lexists(added):
        _check_ids(added, read_object(added).items())
    if (folder / TOKENIZER).stat().st_size <= LARGE:
        check_vocabulary(folder)


def turn_closers(folder: Path) -> list[str]:
    """Returns the tokens that end the model's turn: of a reply, and before the result of a tool's call.

    tokenizer_config.json names them, where it was not saved anew without.
    """
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if os.path.lexists(path) else {}
    named = [settings.get(key) or usual for key, usual in CLOSERS.items()]
    return [token["content"] if isinstance(token, dict) else token for token in named]


def check_vocabulary(folder: Path) -> None:
    """Raises UserError for token ids that are no ids, occur twice or leave a gap. Parses tokenizer.json."""
    path = folder / TOKENIZER
    data = read_object(path)
    model, added = data.get("model"), data.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return  # of another kind of tokenizer, which numbers its tokens itself
    if not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        raise UserError(f"{path}: added_tokens is {shown(added)}, expected a list of objects; download it again")
    _check_ids(path, vocabulary.items())
    more = [(each.get("content"), each.get("id")) for each in added if each.get("content") not in vocabulary]
    _check_ids(path, more)
    owners: dict[int, Any] = {}
    for token, id in vocabulary.items():
        if owners.setdefault(id, token) != token:
            raise UserError(f"{path}: {shown(owners[id])} and {shown(token)} both have the id {id}; download it again")
    ids = owners.keys() | {id for _, id in more}
    gap = next((id for id in range(len(ids)) if id not in ids), None)
    if gap is not None:
        raise UserError(
            f"{path} has {len(ids)} tokens and the id {max(ids)}, but none with the id {gap}; expected ids without "
            "gaps: download it again"
        )


LISTED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')  # as a token of the vocabulary it would be followed by its id


def listed_tokens(data: bytes) -> list[tuple[str, int]]:
    """Returns (token, id) of the added tokens in a tokenizer.json that can be loaded. Parses nothing else of it."""
    found = LISTED.search(data)
    size, start = 2**16, found.end() if found else len(data)
    while start < len(data):
        text = data[start : start + size].decode("utf-8", "ignore")  # may end within a character
        try:
            return [(each["content"], each["id"]) for each in json.JSONDecoder().raw_decode(text)[0]]
        except json.JSONDecodeError:
            if start + size >= len(data):
                raise
            size *= 8
    return []


def _check_ids(path: Path, tokens: Iterable[tuple[Any, Any]]) -> None:
    for token, id in tokens:
        if type(id) is not int or id < 0:
            raise UserError(f"{path}: {shown(token)} has the id {shown(id)}, expected 0 or more; download it again")


def _check_settings(path: Path) -> None:
    """Raises UserError for a setting of another type. Checks those that decide how a tokenizer is made."""
    settings = read_object(path)
    for key, (good, expected) in SETTINGS.items():
        if (value := settings.get(key)) is not None and not good(value):
            raise UserError(f"{path}: {key} is {shown(value)}, expected {expected}; correct the JSON file")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    listed = value.values() if isinstance(value, dict) else value
    return isinstance(value, (list, dict)) and all(map(_is_token, listed))


def _are_numbered(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() for key in value) and all(map(_is_token, value.values()))


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        texts = [each.get(key) for each in value if isinstance(each, dict) for key in ("name", "template")]
        return len(texts) == 2 * len(value) and all(isinstance(text, str) for text in texts)
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(text, str) for text in value.values()))


def _is_side(value: Any) -> bool:
    return value in ("left", "right")


Check = tuple[Callable[[Any], bool], str]
SETTINGS: dict[str, Check] = {
    **dict.fromkeys((*SPECIAL, *CLOSERS), (_is_token, "a token's text, or an object with its content")),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), (_are_tokens, "a list of tokens")),
    **dict.fromkeys(("padding_side", "truncation_side"), (_is_side, "'left' or 'right'")),
    "model_specific_special_tokens": (_are_tokens, "an object of names and tokens"),
    "added_tokens_decoder": (_are_numbered, "an object of token ids and tokens"),
    "tokenizer_class": (lambda value: isinstance(value, str), "the name of a class"),
    "chat_template": (_are_templates, "a template's text, or a list of names and templates"),
}
