"""Responses that can be gone on with by their ids: in memory alone, under a bound, and each for its own key."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Item = Mapping[str, Any]
BYTES, COUNT = 64 << 20, 4096  # of all responses that are kept


@dataclass(frozen=True)
class Saved:
    """A response that is kept.

    answer: its object. given: the items that its request brought. previous: the id of the response before it. bytes:
    what it takes, as JSON.
    """

    answer: dict[str, Any]
    given: Sequence[Item]
    previous: str | None
    bytes: int


class Kept:
    """The newest responses, up to a number of bytes and of responses; those that were used last stay longest.

    A response holds its own items alone and names the one before it, so a long conversation is kept once. Whoever is
    gone on with counts as used together with all before it, and later than they do: so the end of a conversation goes
    before its beginning does.
    """

    def __init__(self, bytes: int = BYTES, count: int = COUNT):
        self._most, self._count, self.bytes = bytes, count, 0
        self._saved: OrderedDict[tuple[str, str], Saved] = OrderedDict()

    def __len__(self) -> int:
        return len(self._saved)

    def put(self, owner: str, answer: dict[str, Any], given: Sequence[Item], previous: str | None) -> None:
        """Keeps a response of an owner. One that is larger than the bound is not kept."""
        size = len(json.dumps([answer, given], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        if size > self._most:
            return
        self._saved[owner, answer["id"]] = Saved(answer, given, previous, size)
        self.bytes += size
        while self.bytes > self._most or len(self._saved) > self._count:
            _, gone = self._saved.popitem(last=False)
            self.bytes -= gone.bytes

    def get(self, owner: str, id: str) -> Saved | None:
        """Returns a response of an owner, None where there is none, or none any more."""
        return self._saved.get((owner, id))

    def drop(self, owner: str, id: str) -> bool:
        """Forgets a response of an owner. Returns whether there was one."""
        found = self._saved.pop((owner, id), None)
        self.bytes -= found.bytes if found is not None else 0
        return found is not None

    def conversation(self, owner: str, id: str) -> list[Item] | None:
        """Returns all items up to the end of a response, oldest first; None where one of its beginning is missing."""
        chain: list[Saved] = []
        at: str | None = id
        while at is not None:
            found = self.get(owner, at)
            if found is None:
                return None
            self._saved.move_to_end((owner, at))  # the beginning last
            chain.append(found)
            at = found.previous
        return [item for saved in reversed(chain) for item in (*saved.given, *saved.answer["output"])]
