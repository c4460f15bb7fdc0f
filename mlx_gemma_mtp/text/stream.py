"""Tokens in, text out: whole characters, and stop strings held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import StreamingDetokenizer


class Characters:
    """The text of a run of tokens, as it comes: whole characters.

    detokenizer: makes a new one of mlx-lm's. known: how many tokens the tokenizer has. Ids beyond it, which a model can
    emit, give no text.
    """

    def __init__(self, detokenizer: Callable[[], StreamingDetokenizer], known: int):
        self._detokenizer, self._known = detokenizer(), known

    def push(self, token: int) -> str:
        """Returns the characters that `token` completes."""
        if token >= self._known:
            return ""
        self._detokenizer.add_token(token)
        return self._detokenizer.last_segment

    def end(self) -> str:
        """Returns what was held back of a character, and begins a new run."""
        self._detokenizer.finalize()
        rest = self._detokenizer.last_segment
        self._detokenizer.reset()
        return rest


class Stops:
    """A text that ends before the first of some strings; nothing that may begin one of them is given away."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Returns the text that may be shown. Sets `stopped` when a stop string is complete; the text ends before
        it.
        """
        if not self._stop:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - self._begun(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """Returns what was held back, now that no text follows."""
        held, self._held = self._held, ""
        return held

    def _begun(self, text: str) -> int:
        """How many characters at the end could begin a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
