"""Rows join and leave between any two rounds: every text is the row's own, whoever shares the batch, and a round reads
back once.
"""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from batches import KINDS, Alone, Row, settings, take

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.speculative.drafting import DEFAULT_DRAFTING, Drafting
from mlx_gemma_mtp.speculative.loop import Firsts, Joiner, Speculation
from mlx_gemma_mtp.speculative.prefill import chunk

CHUNK, MOST = 16, 5  # tokens of a prompt at once; drafts


class Traffic:
    """A batch whose rows come and go by chance, driven as an engine drives it.

    Prompts are prefilled chunk by chunk behind the drafts of rounds. The first token of each comes with the round that
    carries its last chunk, and then it waits for a place; where nobody decodes, the batch begins with it.
    """

    def __init__(self, loop: Speculation, rows: list[Row], rng: np.random.Generator, places: int):
        self.loop, self.rng, self.places = loop, rng, places
        self.new = list(rows)
        self.staged: dict[int, tuple[Row, Cache, int]] = {}  # by name, with the tokens that are done
        self.ready: list[tuple[Row, Joiner]] = []
        self.live: list[Row] = []
        self.met: set[frozenset[str]] = set()  # what rounds had at once

    def run(self) -> None:
        while self.new or self.staged or self.ready or self.live:
            self.arrange()
            if not self.live:
                self.begin()
            if self.live:
                self.round()

    def arrange(self) -> None:
        """Rows that are done leave, and now and then another, to come back; those that are ready come into the holes,
        which then the last rows fill.
        """
        places: list[int | Joiner | None] = [None if row.done else at for at, row in enumerate(self.live)]
        rows = list(self.live)
        for at, row in enumerate(rows):
            if places[at] is not None and self.rng.random() < 0.08:
                places[at] = None
                self.ready.append((row, Joiner(self.loop.save(at), row.text[-1])))
        while self.ready and len(places) - places.count(None) < self.places:
            if places.count(None) < len(places) and self.rng.random() < 0.4:
                break
            at = places.index(None) if None in places else len(places)
            row, joiner = self.ready.pop(int(self.rng.integers(len(self.ready))))
            places[at : at + 1], rows[at : at + 1] = [joiner], [row]
        while None in places:
            at, place, row = places.index(None), places.pop(), rows.pop()
            if at < len(places):
                places[at], rows[at] = place, row
        self.live = rows
        if places != list(range(self.loop.cache.rows)):
            self.loop.arrange(places, *(settings(self.loop.target, rows) if rows else ()))

    def begin(self) -> None:
        """Nobody decodes: prompts go on, and the batch begins with those that are complete."""
        complete, hidden, states = self.pieces()
        mx.eval(states)
        if complete:
            joiners = [Joiner(cache.save(0), None, hidden[i]) for i, (_, cache) in enumerate(complete)]
            self.live = [row for row, _ in complete]
            self.loop.arrange(joiners, *settings(self.loop.target, self.live))

    def round(self) -> None:
        loop, begins = self.loop, self.loop.inputs.newest is None
        if self.rng.random() < 0.3:
            loop.launch(int(self.rng.integers(0, MOST + 1)))
        complete, hidden, states = self.pieces()
        rows = [row for row, _ in complete]
        firsts = None
        if complete:
            firsts = Firsts(hidden, [len(row.prompt) for row in rows], *settings(loop.target, rows))
        waiting, counts, syncs = loop.waiting, self.rng.integers(0, MOST + 1, len(self.live)).tolist(), loop.host_syncs
        done = loop.step(counts, firsts, states)
        assert loop.host_syncs == syncs + 1
        assert done.drafted == ([None] * len(counts) if begins else waiting)
        for row, tokens in enumerate(done.tokens):
            assert len(tokens) <= 1 + waiting[row] and loop.waiting[row] <= counts[row]
            assert len(loop.confidences[row]) == (loop.waiting[row] if loop.confident else 0)
        take(self.live, done)
        self.met.add(frozenset(name for name in ("begins", "firsts", "uneven") if {
            "begins": begins, "firsts": bool(complete), "uneven": len(set(waiting)) > 1}[name]))  # fmt: skip
        if complete:
            take(rows, done.firsts)
            assert done.firsts.drafted == [None] * len(rows)
            self.ready += [(row, Joiner(cache.save(0), row.text[-1])) for row, cache in complete]
        else:
            assert done.firsts is None

    def pieces(self) -> tuple[list[tuple[Row, Cache]], mx.array | None, tuple[mx.array, ...]]:
        """Some prompts are fed a piece each. Returns those that are complete with it, the hidden states of their last
        tokens, and what there is to be evaluated.
        """
        if self.new and len(self.staged) < self.places and self.rng.random() < 0.5:
            row = self.new.pop(0)
            cache = Cache(self.loop.target.config.kv, CHUNK, mx.float32, self.loop.drafting.lookback)
            cache.open(len(row.prompt))
            self.staged[row.name] = row, cache, 0
        fed = [each for each in self.staged.values() if self.rng.random() < 0.6]
        if not fed:
            return [], None, ()
        pieces = [row.prompt[done : done + CHUNK] for row, _, done in fed]
        states = chunk(self.loop.target, [cache for _, cache, _ in fed], pieces)
        for (row, cache, done), piece in zip(fed, pieces, strict=True):
            self.staged[row.name] = row, cache, done + len(piece)
        ended = [at for at, (row, _, _) in enumerate(fed) if self.staged[row.name][2] == len(row.prompt)]
        complete = [self.staged.pop(fed[at][0].name)[:2] for at in ended]
        return complete, states[mx.array(ended)] if ended else None, (states,)


def traffic(
    seed: int, model, drafter, kinds: list[str], drafting: Drafting = DEFAULT_DRAFTING, confident: bool = False
) -> tuple[Traffic, list[tuple[Row, str]]]:
    """A batch of at most four rows with some of each kind, to its end."""
    rng, prompts = np.random.default_rng(seed), tiny.prompts(8, seed)
    names = rng.permutation(kinds * 2).tolist()
    rows = [Row.of(kind, i, prompts[i % 8], int(rng.integers(1, 24))) for i, kind in enumerate(names)]
    cache = Cache(model.config.kv, MOST + 1, mx.float32, drafting.lookback)
    work = Traffic(Speculation(model, drafter, cache, drafting, confident), rows, rng, 4)
    work.run()
    for row, kind in zip(rows, names, strict=True):
        assert row.error is None and len(row.text) >= row.count, kind
    return work, list(zip(rows, names, strict=True))


@pytest.fixture(scope="module", params=["moe", "e2b"])
def pair(request):
    model = tiny.target(request.param)
    return model, tiny.drafter(model, request.param, centroids=request.param == "e2b")


@pytest.fixture(scope="module")
def alone(pair):
    return Alone(pair[0], 40)


@pytest.mark.parametrize("seed", range(4))
def test_every_row_says_what_it_says_alone(pair, alone, seed):
    work, rows = traffic(seed, *pair, list(KINDS), confident=seed % 2 == 0)
    for row, kind in rows:
        assert row.text == alone.text(kind, row.prompt, len(row.text)), (row.name, kind)
    assert {frozenset({"firsts", "uneven"}), frozenset({"begins"})} <= work.met
