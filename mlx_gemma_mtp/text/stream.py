"""Tokens in, text out: whole characters, and stop strings held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import StreamingDetokenizer


class TextStream:
    """The text of one request, released as its tokens come: whole characters, and nothing that may begin a stop string.

    known: how many tokens the tokenizer has. Ids beyond it, which a model can emit, give no text.
    """

    def __init__(self, detokenizer: StreamingDetokenizer, stop: Sequence[str], known: int):
        self._detokenizer, self._stop, self._known = detokenizer, tuple(stop), known
        self._longest_stop = max(map(len, self._stop), default=0)
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Returns the text that `token` releases. Sets `stopped` when a stop string is complete; the text ends before
        it.
        """
        if token < self._known:
            self._detokenizer.add_token(token)
        return self._release(final=False)

    def finish(self) -> str:
        """Returns the text that was held back, now that no token follows."""
        if self.stopped:
            return ""
        self._detokenizer.finalize()
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        text = self._detokenizer.text
        # A stop string that is only now complete starts after what was given.
        found = [at for at in (text.find(stop, self._given) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(text) if final else len(text) - self._held(text)
        piece, self._given = text[self._given : end], max(self._given, end)
        return piece

    def _held(self, text: str) -> int:
        """How many characters at the end could begin a stop string."""
        for size in range(min(self._longest_stop - 1, len(text) - self._given), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
