"""JSON schemas of tools: references written out, what a chat template would drop, and arguments that should fit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bare:
    """A value that was written without quotes."""

    word: str


@dataclass(frozen=True)
class Notes:
    """What is to be said of a call: what was mended, and what does not fit and was left."""

    repaired: list[str]
    faults: list[str]


_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


def settled(value: Any, schema: Any, notes: Notes) -> Any:
    """Returns the value with JSON values for its bare words."""
    if isinstance(value, Bare):
        return _constant(value.word)
    if isinstance(value, dict):
        return {key: settled(each, {}, notes) for key, each in value.items()}
    if isinstance(value, list):
        return [settled(each, {}, notes) for each in value]
    return value


def _constant(word: str) -> Any:
    """The JSON value of a word; the word itself where it is none."""
    if word in ("true", "false", "null") or _NUMBER.fullmatch(word):
        try:
            value = json.loads(word)
        except ValueError:  # an integer of thousands of digits
            return word
        return word if isinstance(value, float) and not math.isfinite(value) else value
    return word
