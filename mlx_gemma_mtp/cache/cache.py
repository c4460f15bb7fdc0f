"""The KV cache: rows of keys and values, and how many tokens of each row count.

Token j past the committed ones of row b is written to slot (lengths[b] + j) % slots of each layer. Writing does not
change `lengths`; `commit` does, and nothing else. There is no rollback: a rejected token is a slot that no query may
see and that the next write covers.

Sliding layers keep a ring for every row. Full layers keep each row in the buffers of its capacity class, so that a long
row does not make the others long. While all rows are of one class, a forward gathers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from ..machine import device
from ..ops.fused import number, numbers
from .kv import Arrays, LayerKV
from .saved import Saved
from .shelf import Shelf
from .spec import KVSpec, capacity, ring_slots
from .view import View


class Cache:
    """Keys and values of the rows of a batch. It begins with no rows: `arrange` brings them, or `open`.

    specs: one entry for each layer that owns K/V. block: the longest write, which with the window sets the size of the
    rings. lookback: how far before the newest token's index a drafter's query may sit; its window begins so much
    earlier. lengths: int32 [rows], tokens committed. length_bound: for each row a number that the host knows its length
    not to exceed. classes: each row's capacity class, the one that holds its length and two blocks: a round's and that
    of the next verify, which is built before the round is read. layers: for each layer its LayerKVs, one in sliding
    layers, one for each class in full layers.
    """

    def __init__(self, specs: Sequence[KVSpec], block: int, dtype: mx.Dtype, lookback: int = 0):
        self.specs, self.block, self.dtype, self.lookback = tuple(specs), block, dtype, lookback
        self.lengths = mx.zeros((0,), mx.int32)
        self.length_bound: list[int] = []
        self.classes: list[int] = []
        self._known: list[int] = []  # each row's length when the host last read it: classes follow from nothing else
        sliding = [spec for spec in specs if spec.window is not None]
        self._full = [spec for spec in specs if spec.window is None]
        self.rings = Shelf(sliding, [ring_slots(spec.window, block, lookback) for spec in sliding], dtype)
        self._shelves: dict[int, Shelf] = {}  # by class, rising; those without rows wait for some
        self._room: int | None = None  # tokens that an opened cache has room for
        self._written: list[int] = []  # for each row a position that no write went beyond
        self._settled: list[int] = []  # and the same without the forward that was built after the last commit
        kinds = [spec.window is not None for spec in specs]
        self.homes = [(sliding, kinds[:i].count(sliding)) for i, sliding in enumerate(kinds)]
        self._seat()

    @property
    def rows(self) -> int:
        return len(self.length_bound)

    @property
    def bytes(self) -> int:
        """The bytes of all buffers, unused places included."""
        return self.rings.bytes + sum(shelf.bytes for shelf in self._shelves.values())

    @property
    def outgrown(self) -> bool:
        """Whether the next `span` moves a row to another class. A verify that was built before is to be dropped, so
        that a row's class, and with it the number of its slots, follows from its length and not from its drafts.
        """
        return self._room is None and any(
            max(self._needed(row) for row in shelf.rows) > slots for slots, shelf in self._live
        )

    @property
    def buffers(self) -> list[Arrays]:
        """The arrays of all layers, in their order. A write copies a buffer while its handle is kept; assigning the
        handles that were there before drops a write that was only built.
        """
        return [kv.arrays for layer in self.layers for kv in layer]

    @buffers.setter
    def buffers(self, buffers: Sequence[Arrays]) -> None:
        for kv, arrays in zip([kv for layer in self.layers for kv in layer], buffers, strict=True):
            kv.arrays = arrays
        self._written = self._settled

    def open(self, tokens: int, saved: Saved | None = None) -> Cache:
        """Returns this cache with one row, which holds `tokens` tokens and never more: an empty one, or one that goes
        on from `saved`, whose copies are on their way. Its buffers never grow, and its rings are no larger than these
        tokens need.
        """
        assert not self._shelves, "a cache is opened once, before anything else"
        full, sliding = capacity(tokens), [layer.spec for layer in self.rings.layers]
        slots = [min(full, layer.slots) for layer in self.rings.layers]
        self._room, self.rings = tokens, Shelf(sliding, slots, self.dtype)
        self.arrange([Saved.empty(self.specs, self.dtype) if saved is None else saved])
        if saved is not None:
            mx.async_eval(self.buffers, self.lengths)
        return self

    def arrange(self, places: Sequence[int | Saved]) -> None:
        """Goes on with these rows in this order: an int is a row as it was, a Saved comes into the batch in that place.

        It is called between a readback and the next launch, and no verify may be built. Rows that change their place
        are copied out and evaluated. What is written into the batch's buffers is not: it is the first link of the next
        write's own chain, so that no buffer is copied. Buffers grow to the rows there are, one layer after the other.
        """
        assert self._room is None or len(places) <= 1, "a cache that was opened is of one row"
        stay = [source for source in places if not isinstance(source, Saved)]
        assert len(set(stay)) == len(stay), "a row has one place"
        classes, bounds, written, index, known = [], [], [], [], []
        for source in places:
            if isinstance(source, Saved):
                self._check(source)
                classes.append(capacity(source.tokens + 2 * self.block if self._room is None else self._room))
                bounds.append(source.tokens)
                written.append(source.tokens)
                index.append(self.rows + len(known))
                known.append(source.tokens)
            else:
                classes.append(self.classes[source])
                bounds.append(self.length_bound[source])
                written.append(self._written[source])
                index.append(source)
        if index != list(range(self.rows)):
            lengths = mx.concatenate([self.lengths, mx.array(known, mx.int32)]) if known else self.lengths
            self.lengths = mx.take(lengths, mx.array(index, mx.int32))
        self._place(places, classes)
        self.length_bound, self._written, self._settled = bounds, written, written
        self._known = list(bounds)

    def save(self, row: int, slack: int = 0, tokens: int | None = None) -> Saved:
        """Returns copies of a row's committed tokens, on their way. No verify may be built, and the row's length bound
        is its length, as it is once the host has read the round.

        slack: how many positions before the window sliding layers save besides, as far as they still hold them, so that
        a beginning that is so many tokens shorter can be restored (`Saved.first`). tokens: of the first ones alone, so
        far back as sliding layers still hold their window; None for all.
        """
        length = self.length_bound[row]
        tokens = length if tokens is None else tokens
        layers = []
        for sliding, kv, place in self._places_of(row):
            first = tokens - self._held(kv, row, tokens, slack) if sliding else 0
            held = tokens == length or first >= self._written[row] - kv.slots  # of all tokens the ring law says so
            assert held, f"the window of {tokens} tokens is written over"
            layers.append(kv.saved(place, first, tokens))
        mx.async_eval(layers)
        return Saved(tokens, tuple(layers))

    def leave(self) -> Saved:
        """Returns what `save(0)` does, of a cache of one row that is never used again: nothing is copied that lies in
        order, and nothing evaluated.
        """
        assert self.rows == 1, "others would be left"
        tokens, layers = self.length_bound[0], []
        for sliding, kv, place in self._places_of(0):
            layers.append(kv.lying(place, tokens - self._held(kv, 0, tokens, 0) if sliding else 0, tokens))
        return Saved(tokens, tuple(layers))

    def span(self, tokens: int, known: bool = False) -> Span:
        """Returns the view of one forward that writes `tokens` tokens past the committed ones of all rows. Rows that
        have outgrown their class move to the next one, for which it waits for the device. known: the length bound of
        the one row is its length, as in a prefill.
        """
        assert tokens <= self.block, f"a write of {tokens} tokens into a cache made for blocks of {self.block}"
        opened = self._room is not None and self.rows > 0
        assert not opened or self.length_bound[0] + tokens <= self.classes[0], f"a row opened for {self._room} tokens"
        if self.outgrown:
            self._grow()
        self._written = [max(old, new + tokens) for old, new in zip(self._written, self.length_bound, strict=True)]
        return Span(self, tokens, known=known)

    def trim(self) -> None:
        """Gives back the memory of unused places and of classes without rows."""
        self._shelves = {each: shelf for each, shelf in self._shelves.items() if shelf.rows}
        for shelf in (self.rings, *self._shelves.values()):
            if len(shelf.rows) < shelf.places:
                shelf.resize(len(shelf.rows))
        self._seat()

    def commit(self, n: mx.array, bound: Sequence[int]) -> None:
        """Commits n tokens of each row: lengths += n. Nothing else adds to `lengths`.

        n: int32 [B]. bound: for each row a number that the host knows n not to exceed.
        """
        self.lengths = self.lengths + n
        self.length_bound = [old + more for old, more in zip(self.length_bound, bound, strict=True)]
        self._settled = self._written

    def tighten_length_bound(self, fewer: Sequence[int]) -> None:
        """Lowers the length bounds: the host has read that so many fewer tokens of each row were committed than the
        bound given to `commit`.
        """
        self.length_bound = [bound - less for bound, less in zip(self.length_bound, fewer, strict=True)]
        built = zip(self._settled, self._written, fewer, strict=True)  # after the bound that is lowered
        self._written = [max(settled, written - less) for settled, written, less in built]
        self._known = list(self.length_bound)

    def _needed(self, row: int) -> int:
        """Returns how many slots a row's class must hold: those of its length as it was read last and of two blocks. A
        bound that was set by hand, or is not tightened in every round, may ask for more.
        """
        return max(self._known[row] + 2 * self.block, self.length_bound[row] + self.block)

    def _extended(self, classes: Sequence[int]) -> dict[int, int]:
        """Returns the classes whose rows all go to one class where there are none yet: their buffers become its."""
        found: dict[int, int] = {}
        for old, shelf in self._shelves.items():
            new = {classes[row] for row in shelf.rows} - {old, *found.values()}
            new -= {each for each, other in self._shelves.items() if other.rows}
            if new and len({classes[row] for row in shelf.rows}) == 1:
                found[old] = new.pop()
        return found

    def _grow(self) -> None:
        """Moves rows that have outgrown their class to the next one."""
        classes = [max(old, capacity(self._needed(row))) for row, old in enumerate(self.classes)]
        for old, new in self._extended(classes).items():
            shelf = self._shelves.pop(old)
            shelf.resize(len(shelf.rows), new)
            self._shelves[new] = shelf
        before = [each for each, shelf in self._shelves.items() if shelf.rows]
        self._place(range(self.rows), classes)
        for each in before:
            if not self._shelves[each].rows:
                del self._shelves[each]
        self._seat()

    def _place(self, places: Sequence[int | Saved], classes: Sequence[int]) -> None:
        """Puts the K/V of the rows where they belong. places: as of `arrange`; classes: each row's from now on."""
        seats = {row: (shelf, at) for shelf in self._shelves.values() for at, row in enumerate(shelf.rows)}
        for each in classes:
            if each not in self._shelves:
                self._shelves[each] = Shelf(self._full, [each] * len(self._full), self.dtype)
        orders = [(self.rings, list(range(len(places))))]
        for each, shelf in self._shelves.items():
            members = [row for row, own in enumerate(classes) if own == each]
            there = {row: seats[places[row]] for row in members if not isinstance(places[row], Saved)}
            stay = {row: at for row, (old, at) in there.items() if old is shelf}
            orders.append((shelf, members if len(members) == len(places) else _settled(members, stay)))
        moved: list[tuple[Shelf, int, list[Arrays]]] = []
        for shelf, order in orders:
            for at, row in enumerate(order):
                if not isinstance(source := places[row], Saved):
                    old = (shelf, source) if shelf is self.rings else seats[source]
                    if old != (shelf, at):
                        moved.append((shelf, at, [layer.copied(old[1]) for layer in old[0].layers]))
        mx.eval([copies for _, _, copies in moved])
        for shelf, order in orders:
            if len(order) > shelf.places:
                shelf.resize(len(order))
            shelf.rows = order
        for shelf, at, copies in moved:
            for layer, arrays in zip(shelf.layers, copies, strict=True):
                layer.assign(at, arrays)
        for row, source in enumerate(places):
            if isinstance(source, Saved):
                self._restore(row, self._shelves[classes[row]], source)
        self.classes = list(classes)
        self._seat()

    def _restore(self, row: int, shelf: Shelf, saved: Saved) -> None:
        """Writes a sequence over all that is in a row's places."""
        at = shelf.rows.index(row)
        for (sliding, i), arrays in zip(self.homes, saved.layers, strict=True):
            layer, place = (self.rings.layers[i], row) if sliding else (shelf.layers[i], at)
            count = arrays[0].shape[2]
            held = min(count, layer.slots)
            layer.assign(place, tuple(each[:, :, count - held :] for each in arrays), saved.tokens - held)

    def _check(self, saved: Saved) -> None:
        """Asserts that a sequence holds all that its next token may see, and fits."""
        for spec, (first, *_) in zip(self.specs, saved.layers, strict=True):
            seen = saved.tokens if spec.window is None else min(saved.tokens, spec.window - 1 + self.lookback)
            assert first.shape[2] >= seen, f"{first.shape[2]} positions of {saved.tokens} tokens, expected {seen}"
        assert self._room is None or saved.tokens <= self._room, f"{saved.tokens} tokens where {self._room} have room"

    def _places_of(self, row: int) -> Iterator[tuple[bool, LayerKV, int]]:
        """Yields for each layer whether it slides, its K/V, and a row's place there."""
        shelf = self._shelves[self.classes[row]]
        place = shelf.rows.index(row)
        for sliding, i in self.homes:
            yield (True, self.rings.layers[i], row) if sliding else (False, shelf.layers[i], place)

    def _held(self, kv: LayerKV, row: int, tokens: int, slack: int) -> int:
        """Returns how many of a row's last positions are saved of a ring. What was written last may lie in the slots of
        those before the window.
        """
        window = kv.spec.window - 1 + self.lookback
        return min(tokens, window + max(min(slack, kv.slots - (self._written[row] - tokens) - window), 0))

    def _seat(self) -> None:
        """Lists rows and buffers anew, after these have changed."""
        self._shelves = dict(sorted(self._shelves.items()))
        for shelf in (self.rings, *self._shelves.values()):
            shelf.seat(len(self.classes))
        self._live = [(slots, shelf) for slots, shelf in self._shelves.items() if shelf.rows]
        self.shelves = [shelf for _, shelf in self._live]
        self.layers = [
            [shelf.layers[i] for shelf in ([self.rings] if sliding else self._shelves.values())]
            for sliding, i in self.homes
        ]
        self.gather = None
        if any(shelf.gather is not None for shelf in self.shelves):
            places = {row: at for at, row in enumerate(row for shelf in self.shelves for row in shelf.rows)}
            self.gather = mx.array([places[row] for row in range(len(places))], mx.int32)


def _settled(rows: Sequence[int], stay: Mapping[int, int]) -> list[int]:
    """Returns which row lies in each place of a shelf: rows that are there keep their places, others come into the
    holes, those from beyond the last place at last. stay: the places of the rows that are there.
    """
    kept = {at: row for row, at in stay.items() if at < len(rows)}
    others = sorted((row for row in rows if row not in kept.values()), key=lambda row: row in stay)
    return [kept[at] if at in kept else others.pop(0) for at in range(len(rows))]


class Span:
    """One forward's view of the cache: `tokens` new positions T of all B rows.

    With tokens == 0 (a drafter) nothing is written, and the one query sits `query_offset` from the newest token's
    index. last: the last of the new positions alone has a query. positions: int32 [B, T], absolute, of the queries.
    """

    is_prefill = False

    def __init__(self, cache: Cache, tokens: int, query_offset: int = 0, last: bool = False, known: bool = False):
        assert -cache.lookback <= query_offset <= 0, "the rings hold the window of no query before that"
        self.cache, self.tokens, self.lengths = cache, tokens, cache.lengths
        self._start = cache.length_bound[0] if known and not device.traits().fused_attention else None
        steps = number(tokens - 1 if last else query_offset) if last or not tokens else numbers(tokens)
        self.positions = self.lengths[:, None] + steps  # [B, T]
        self._rings = [self._view(cache.rings)]
        self._full = [self._view(shelf) for shelf in cache.shelves]

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Writes a layer's K/V of the new positions. layer: the index among those that own K/V; keys, values: [B,
        kv_heads, T, head_dim].
        """
        sliding, i = self.cache.homes[layer]
        for view in self._rings if sliding else self._full:
            view.write(i, keys, values)

    def attend(self, layer: int, queries: mx.array) -> mx.array:
        """Returns the attention of queries at `positions` over a layer's K/V: [B, heads, T, head_dim], as `queries`
        are.
        """
        sliding, i = self.cache.homes[layer]
        if sliding:
            return self._rings[0].attend(i, queries)
        if self.cache.gather is None:  # all rows are of one class
            return self._full[0].attend(i, queries)
        attended = mx.concatenate([view.attend(i, queries) for view in self._full], axis=0)
        return mx.take(attended, self.cache.gather, axis=0)

    def _view(self, shelf: Shelf) -> View:
        used = shelf.longest(self.cache.length_bound) + self.tokens
        return View(shelf, self.lengths, self.positions, self.tokens, used, self._start)
