"""What pieces of text are encoded as, kept for a while: a conversation comes again with every turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np


class Spelt:
    """The ids of the texts that were asked for last. It is not for several threads at once.

    most: characters of all texts together.
    """

    def __init__(self, most: int = 1 << 22):
        self.most, self.characters = most, 0
        self._ids: OrderedDict[str, np.ndarray] = OrderedDict()  # the first to go first

    def of(self, texts: Sequence[str], encode: Callable[[list[str]], Sequence[list[int]]]) -> list[list[int]]:
        """Returns the ids of each text. encode: is asked for those of texts that are not known."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        for text, ids in zip(new, encode(new) if new else (), strict=True):
            self._ids[text] = np.asarray(ids, np.int32)
            self.characters += len(text)
        found = [self._ids[text].tolist() for text in texts]
        for text in texts:
            self._ids.move_to_end(text)
        while self.characters > self.most:
            text, _ = self._ids.popitem(last=False)
            self.characters -= len(text)
        return found
