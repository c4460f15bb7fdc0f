"""What an engine's pair had kept of its drafts in earlier starts: read once, written back when the engine rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files.hub import Pair
from ..speculative.acceptance import SHIPPED, AcceptanceFile, read_shipped
from ..speculative.drafting import DEFAULT_DRAFTING, MTP, Drafting
from ..speculative.history import Acceptance
from .calibration import fingerprint

LASTS = 0.75  # what is kept weighs so much of itself when more comes


class Priors:
    """Acceptance by kind of text, as it was known when the engine was made.

    file: None keeps nothing. folder: of a drafter that may ship what is known of its pair. key: of what it ships.
    notice: called with a sentence that the user should know.
    """

    def __init__(
        self,
        file: AcceptanceFile | None = None,
        folder: Path | None = None,
        key: Mapping[str, Any] | None = None,
        notice: Callable[[str], None] = lambda message: None,
    ):
        self.file, self.notice = file, notice
        self.known: dict[str, Acceptance] = {}
        if folder is not None and key is not None:
            self.known |= self._read(lambda: read_shipped(folder, key), folder / SHIPPED)
        if file is not None:
            self.known |= self._read(file.read, file.path)

    @classmethod
    def of_pair(cls, pair: Pair, drafting: Drafting, notice: Callable[[str], None]) -> Priors:
        """Returns what is known of a pair, by default settings from what it ships. Without a drafter it is nothing."""
        if pair.drafter is None:
            return cls()
        key, usual = key_of(pair, drafting), _way(drafting) == _way(DEFAULT_DRAFTING)
        return cls(AcceptanceFile(key), pair.drafter if usual else None, key, notice)

    def learn(self, accepted: Mapping[str, Acceptance]) -> None:
        """Takes in what was kept since, by kind of text (`Depth.accepted`), and writes it for the next start."""
        if not accepted or self.file is None:
            return
        old = self._read(self.file.read, self.file.path)
        for kind, each in accepted.items():
            before = old.get(kind, self.known.get(kind, Acceptance()))
            old[kind] = before.at_most(LASTS * before.rounds).plus(each)
        try:
            self.file.write(old)
        except OSError as error:
            self.notice(f"what drafts had kept cannot be kept in {self.file.path} ({error.strerror})")
            self.file = None  # said once

    def _read(self, read: Callable[[], dict[str, Acceptance]], path: Path) -> dict[str, Acceptance]:
        try:
            return read()
        except ValueError as error:
            self.notice(f"what drafts had kept, in {path}, is ignored: {error}")
            return {}


def key_of(pair: Pair, drafting: Drafting) -> dict[str, Any]:
    """Returns what acceptance depends on."""
    return {"target": fingerprint(pair.target), "drafter": fingerprint(pair.drafter), **_way(drafting)}


def _way(drafting: Drafting) -> dict[str, Any]:
    """Returns how drafts are made and accepted."""
    return {
        "source": drafting.source or MTP,
        "draft_position": drafting.position,
        "draft_temperature": drafting.temperature,
        "accept": drafting.accept,
    }
