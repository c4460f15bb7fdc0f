"""The file of what a pair's drafts had kept in earlier starts, by kind of text: the next start begins with it.

It depends on the pair and on how drafts are made and accepted, not on the machine. So a pair may ship one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import kept
from ..files.kept import KeptFile
from .costs import MAX_DRAFTS
from .history import BINS, Acceptance, History, Trust

FORMAT = 1
MOST = 1e6  # rounds in a file
SHIPPED = "acceptance.json"  # in the drafter's folder


class AcceptanceFile(KeptFile):
    """The file of one pair. key: what acceptance depends on. A file with another key is not read."""

    def __init__(self, key: Mapping[str, Any], folder: Path | None = None):
        super().__init__("acceptance", FORMAT, key, folder)

    def read(self) -> dict[str, Acceptance]:
        """Returns what was kept, by kind of text; nothing where there is no file. Raises ValueError for a file that is
        not of this key.
        """
        return _parsed(self.load())

    def write(self, known: Mapping[str, Acceptance]) -> None:
        """Writes what was kept by kind of text, whole or not at all. Raises OSError."""
        self.save(_data(known))


def read_shipped(folder: Path, key: Mapping[str, Any]) -> dict[str, Acceptance]:
    """Returns what a drafter's folder says of its pair; nothing where it has no such file. Raises ValueError for a file
    that is not of this key.
    """
    return _parsed(kept.load(folder / SHIPPED, FORMAT, key))


def shipped(known: Mapping[str, Acceptance], key: Mapping[str, Any]) -> str:
    """Returns the text of the file for a drafter's folder."""
    return kept.dumped(_data(known), FORMAT, key)


def _data(known: Mapping[str, Acceptance]) -> dict[str, Any]:
    counts = lambda each: {"tried": _rounded(each.tried), "kept": _rounded(each.kept)}  # noqa: E731
    texts = {kind: {"positions": counts(a.history), "confidences": counts(a.trust)} for kind, a in known.items()}
    return {"texts": texts}


def _parsed(data: Mapping[str, Any] | None) -> dict[str, Acceptance]:
    if data is None:
        return {}
    try:
        return {
            kind: Acceptance(
                History(*_counts(each["positions"], MAX_DRAFTS)), Trust(*_counts(each["confidences"], BINS))
            )
            for kind, each in data["texts"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it says nothing of acceptance ({type(error).__name__}: {error})") from None


def _counts(data: Mapping[str, Any], length: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The counts tried and kept. Raises ValueError where they are impossible."""
    tried, stayed = data["tried"], data["kept"]
    sane = len(tried) == len(stayed) == length and all(type(each) is float for each in (*tried, *stayed))
    if not sane or not all(0 <= k <= t <= MOST and math.isfinite(t) for t, k in zip(tried, stayed, strict=True)):
        raise ValueError("it has no or impossible counts")
    return tuple(tried), tuple(stayed)


def _rounded(counts: tuple[float, ...]) -> list[float]:
    return [round(float(count), 3) for count in counts]
