"""The prompts of each class of text. The bundled pair has seen Python code, docstrings and short English alone."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
MARKED = Path(__file__).parent.parent / "tests" / "data" / "prompts.json"
CLASSES = ("code", "prose", "json", "translation", "long")
EACH = 8  # prompts a class


def of(name: str) -> list[str]:
    """EACH prompts of a class. code: of functions that the bundled pair was not trained on; long: a module and a
    question about it, about 1,200 tokens.
    """
    if name == "code":
        marked = [entry["prompt"] for entry in json.loads(MARKED.read_text()) if entry["acceptance"]]
        return marked[:EACH]
    if name == "long":
        document = (FOLDER / "long.txt").read_text(encoding="utf-8")
        return [f"{document}\n{question}" for question in _lines("long_questions")]
    return _lines(name)


def _lines(name: str) -> list[str]:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
