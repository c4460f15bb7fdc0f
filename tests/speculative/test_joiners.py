"""Rows join and leave between any two rounds: every text is the row's own, whoever shares the batch, and a round reads
back once.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from batches import KINDS, Alone, Row, settings, take

from mlx_gemma_mtp.cache import spec
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.ops import topk as topk_module
from mlx_gemma_mtp.sampling import drawing
from mlx_gemma_mtp.sampling.params import REJECTION
from mlx_gemma_mtp.speculative.drafting import DEFAULT_DRAFTING, Drafting
from mlx_gemma_mtp.speculative.loop import Firsts, Joiner, Speculation
from mlx_gemma_mtp.speculative.prefill import chunk, prefill

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
        self.rounds = self.most_classes = 0

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
        if self.rng.random() < 0.3 and not loop.drafting.rejection:  # whose drafts are not cut
            loop.launch(int(self.rng.integers(0, MOST + 1)))
        complete, hidden, states = self.pieces()
        rows = [row for row, _ in complete]
        firsts = None
        if complete:
            firsts = Firsts(hidden, [len(row.prompt) for row in rows], *settings(loop.target, rows))
        waiting, counts, syncs = loop.waiting, self.rng.integers(0, MOST + 1, len(self.live)).tolist(), loop.host_syncs
        done = loop.step(counts, firsts, states)
        assert loop.host_syncs - syncs in ((1, 2) if loop.inputs.rules.open is not None or complete else (1,))
        assert done.drafted == ([None] * len(counts) if begins else waiting)
        for row, tokens in enumerate(done.tokens):
            assert len(tokens) <= 1 + waiting[row] and loop.waiting[row] <= counts[row]
            assert len(loop.confidences[row]) == (loop.chains[row].own if loop.confident else 0)
        take(self.live, done)
        self.rounds += 1
        self.most_classes = max(self.most_classes, len(set(loop.cache.classes)))
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


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 4, 7))])
def test_every_row_says_what_it_says_alone(pair, alone, seed, monkeypatch):
    """With drafts that say how sure they are and without; also where full layers have small buffers, so that rows of
    several capacity classes meet and outgrow them.
    """
    if seed >= 2:
        monkeypatch.setattr(spec, "SMALLEST", 16)
    work, rows = traffic(seed, *pair, list(KINDS), confident=seed % 2 == 0)
    for row, kind in rows:
        assert row.text == alone.text(kind, row.prompt, len(row.text)), (row.name, kind)
    assert {frozenset({"firsts", "uneven"}), frozenset({"begins"})} <= work.met
    assert work.most_classes >= (3 if seed >= 2 else 1)


def test_greedy_rows_beside_others_that_rejection_accepts(pair, alone):
    """They say what they say alone, whoever comes: also where no row was sampled until then, or where the last one that
    was leaves.
    """
    for seed in (1, 2):
        work, rows = traffic(seed, *pair, ["free", "stairs", "sampled"], Drafting(accept=REJECTION))
        for row, kind in rows:
            if kind != "sampled":
                assert row.text == alone.text(kind, row.prompt, len(row.text)), (row.name, kind)
        assert frozenset({"firsts", "uneven"}) in work.met


@pytest.mark.parametrize("extra", [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logprobs": 2}])
def test_open_places_are_settled_for_all_at_once(extra, monkeypatch):
    """Of rows, joiners and first tokens: with one readback more, and the text is the one of a full look."""
    model = tiny.target("moe")
    monkeypatch.setitem(KINDS, "open", (replace(tiny.SAMPLED, top_k=-1, top_p=0.9, **extra), lambda: None))
    alone = Alone(model, 40)
    with monkeypatch.context() as short:
        for module, name, value in ((drawing, "FEW", 0), (drawing, "REACH", 8), (topk_module, "SMALL", 0)):
            short.setattr(module, name, value)
        work, rows = traffic(3, model, tiny.drafter(model), ["open", "open", "stairs"])
    assert work.loop.host_syncs > work.rounds + 5
    for row, kind in rows:
        assert row.text == alone.text(kind, row.prompt, len(row.text)), (row.name, kind)


def test_the_report_of_a_row_is_its_own(pair):
    """Log-probabilities come with first tokens, and in whatever place the row lies."""
    model, drafter = pair
    _, rows = traffic(5, model, drafter, ["reported", "free"])
    for row, kind in rows:
        if kind == "reported":
            loop = tiny.begun(model, None, [row.prompt], row.params)
            want = [tiny.round_of(loop, 0).logprobs[0][0] for _ in row.text]
            assert [each.token for each in row.reports] == [each.token for each in want] == row.text
            ours, theirs = ([each.logprob for each in reports] for reports in (row.reports, want))
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_who_comes_back_goes_on(pair, alone):
    """Saved with its drafts unverified, and restored into an empty batch, with rows of its own kind or without."""
    model, drafter = pair
    prompts = tiny.prompts(2)
    loop = tiny.begun(model, drafter, prompts, tiny.PENALISED)
    assert loop.save(1).tokens == len(prompts[1])  # before its first token, which comes all the same
    texts = [list(tokens) for tokens in tiny.round_of(loop, 4).tokens]
    saved = [loop.save(row) for row in range(2)]
    loop.arrange([])
    assert (loop.cache.rows, loop.waiting, loop.confidences) == (0, [], [])
    joiners = [Joiner(saved[row], texts[row][-1]) for row in (0, 1)]
    for places, rows in (([joiners[1]], [1]), ([joiners[0], 0], [0, 1])):
        parts = [[each[row] for row in rows] for each in ([tiny.PENALISED] * 2, prompts, texts)]
        loop.arrange(places, *tiny.settings(model, *parts))
        done = tiny.round_of(loop, 3)
        assert done.drafted == ([0] if len(rows) == 1 else [0, 3])
        for row, tokens in zip(rows, done.tokens, strict=True):
            texts[row] += tokens
    for row in (0, 1):
        assert texts[row] == alone.text("penalised", prompts[row], len(texts[row]))


def test_a_prompts_chunk_is_not_waited_for(pair):
    """What is dispatched behind the drafts is not read, unless it carries first tokens."""
    model, drafter = pair
    loop = tiny.begun(model, drafter, tiny.prompts(2))
    tiny.round_of(loop, 2)
    seen, read = [], loop._readback
    loop._readback = lambda *arrays: seen.append(len(arrays)) or read(*arrays)
    loop.step([2, 2], extra=[mx.zeros((4,)) + 1])
    caches, hidden = prefill(model, tiny.prompts(3)[2:], CHUNK)
    loop.step([2, 2], Firsts(hidden, [caches[0].length_bound[0]], *tiny.settings(model, [tiny.GREEDY], [[1]])))
    assert seen == [5, 8]  # tokens, kept, sums, drafts, confidences; and of the first token three more


def test_a_joiner_without_its_first_token_is_refused_beside_others(pair):
    model, drafter = pair
    loop = tiny.begun(model, drafter, tiny.prompts(1))
    tiny.round_of(loop, 2)
    with pytest.raises(AssertionError, match="has its first token"):
        loop.arrange([0, Joiner(loop.save(0), None, mx.zeros((32,)))], loop.inputs.rules)
