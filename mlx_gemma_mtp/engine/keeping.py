"""What is kept of requests for others, and what is found for them: where prefixes are cut, and what they may take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cache.spec import KVSpec
from ..machine.pressure import CRITICAL, NORMAL
from ..models.config import TargetConfig
from ..speculative.loop import Speculation
from .admission import Memory
from .held import Held
from .plan import Known, Piece
from .prefix import Kind, Prefixes
from .request import Request

LONG = 32768  # tokens of the text that the default share leaves room for
SPELT = 16  # tokens at a reply's end that may come back as others: a model need not say a text as it is encoded
STOPPED = {"stop", "length", "repetition", "tool_calls", "cancelled", "timeout"}  # after these a conversation may go on


def share(memory: Memory, config: TargetConfig, chunk: int, block: int) -> int:
    """Returns the bytes that prefixes may take where nobody says so: of what the limit leaves beside the model and one
    long text a quarter, or half where a quarter would not hold four prefixes. Nothing else ever waits for these bytes.

    chunk, block: as of Memory.alone.
    """
    long = min(config.context, LONG)
    left = max(0, memory.limit - memory.alone(long - memory.advance, memory.advance, chunk, block))
    return left // 4 if left // 4 >= 4 * memory.saved(min(long, 4096)) else left // 2


class Keeping:
    """Keeps what requests compute, and finds it for others. Its methods are the worker's thread's.

    Kept are of a prompt the system message and tools, the place where it parts from another prompt, and its end, all
    rounded down to the grid; and a reply with its prompt, to its last token that has K/V. A copy of these is a window
    of each sliding layer, however short the prefix; so what lies in one piece is one copy, which may be begun with.

    limit: bytes, 0 keeps nothing. specs, lookback: of the caches. memory: where the bytes of the run go. worth, grid:
    of the scheduler; nothing shorter than `worth` is kept.
    """

    def __init__(self, limit: int, specs: Sequence[KVSpec], lookback: int, memory: Memory, worth: int, grid: int):
        windows = [None if spec.window is None else spec.window - 1 + lookback for spec in specs]
        self.prefixes = Prefixes(limit, grid, windows)
        self.memory, self.worth, self.grid = memory, worth, grid

    def keys(self, request: Request) -> tuple[int, ...]:
        """Returns what stands for the beginnings of a prompt (see Job). Those of two salts differ."""
        if not self.prefixes.limit:
            return ()
        tokens, key, keys = np.asarray(request.prompt[:-1], np.int32), hash(request.salt), []
        for start in range(0, len(tokens) - self.grid + 1, self.grid):
            key = hash((key, tokens[start : start + self.grid].tobytes()))
            keys.append(key)
        return tuple(keys)

    def cached(self, request: Request) -> int:
        """Returns how many tokens of a prompt are kept now."""
        known = self.prefixes.known(request.prompt, request.salt)
        return max(known, request.restored.tokens if request.restored else 0)

    def find(self, held: Held) -> Known:
        """Returns what is kept for a request that is staged now, and what is to be kept of it. It holds what was found
        from now on, whatever becomes of the prefix.
        """
        request, tokens = held.request, held.tokens
        found, restored = self.prefixes.find(tokens, request.salt), request.restored
        request.restored = None  # what fails with it fails once
        if restored is not None and restored.tokens > (found.tokens if found else 0):
            found = restored.saved()
            self.prefixes.keep(tokens[: found.tokens], found, request.salt, told=False)
        held.found = found
        held.kept = found.tokens if found else 0
        if not request.tokens:
            request.stats.cached_tokens, request.stats.kept_tokens = held.kept, 0
        return Known(held.kept, self._borders(held))

    def _borders(self, held: Held) -> tuple[int, ...]:
        """Returns what is to be kept of a prompt: numbers of tokens on the grid, what is worth it."""
        request, cut = held.request, self.grid
        if request.tokens or not self.prefixes.limit:
            return ()
        end, parting = (len(request.prompt) - 1) // cut * cut, self.prefixes.common(request.prompt, request.salt)
        lasting = {parting} if parting > held.kept + self.worth else set()
        ends = {end}
        if len(request.borders) > 2:  # more than one turn and the head of the reply
            lasting.add(request.borders[1] // cut * cut)
            turn = request.borders[-2] // cut * cut  # the last one, which may be said anew
            if end - turn < self.worth:  # else it would be a copy of its own
                ends.add(turn)
        held.ends = ends - lasting
        return tuple(sorted(each for each in ends | lasting if each > held.kept and each >= self.worth))

    def prompt(self, held: Held, piece: Piece) -> None:
        """Keeps what the plan wants of a prompt whose piece was prefilled and read: the longest beginning, with what
        the shorter ones need.
        """
        if not piece.keep:
            return
        first, last = piece.keep[0], piece.keep[-1]
        kind = Kind.PROMPT if held.ends.issuperset(piece.keep) else Kind.BORDER
        tokens, salt = held.tokens[:last], held.request.salt
        if self.prefixes.makes_room(tokens, salt, self.memory.saved(last, last - first), kind):
            self.prefixes.keep(tokens, held.staged.save(0, last - first, last), salt, kind)
            held.kept = last
            held.request.stats.kept_tokens = last - held.request.stats.cached_tokens

    def reply(self, held: Held, loop: Speculation, row: int) -> None:
        """Keeps a reply that ended with its prompt: between a round and the next launch. What a verify accepted after
        its end is left out. One that spares the next turn less than a quarter of a step of the grid is not kept. Of its
        last tokens some may be left out by whoever goes on from it, as far as sliding layers still hold their windows.
        """
        request = held.request
        if not self.prefixes.limit or request.finish_reason not in STOPPED:
            return
        tokens = min(loop.cache.length_bound[row], held.context)
        if tokens < max(self.worth, held.kept + self.grid // 4):
            return
        whole = (request.prompt + request.tokens)[:tokens]
        slack = min(SPELT, len(request.tokens))
        if self.prefixes.makes_room(whole, request.salt, self.memory.saved(tokens, slack), Kind.REPLY):
            saved = loop.save(row, slack, tokens)
            self.prefixes.keep(whole, saved, request.salt, Kind.REPLY, prefilled=len(request.prompt))

    def give_back(self, spare: int, pressure: int) -> None:
        """Gives prefixes back as far as memory is needed.

        spare: bytes beside all else. pressure: the system's level; from its warning on no more are kept, and none once
        it is critical.
        """
        room = spare if pressure == NORMAL else min(spare, self.prefixes.bytes)
        self.prefixes.resize(0 if pressure >= CRITICAL else room)
