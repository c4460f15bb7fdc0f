"""What a grammar forces is drafted, whoever else has drafted; what it refuses is cut and counted; no text changes."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import END, VOCAB, Stairs, Steps

from mlx_gemma_mtp.speculative.drafting import COPY, FORCED, MTP, Drafting
from mlx_gemma_mtp.speculative.guide import guide, only, sole

SPAN = Steps(((5,), (6,), (7,), (8, 9), (10,), (11,), (12,), tuple(range(20, 30)), (13,)))


def lead(constraint, tokens, reach=12, more=()):
    walks, look = guide([constraint], VOCAB).lead(
        [[(token, MTP, 0.5) for token in tokens]], [reach], lambda row: lambda drafts: list(more)
    )
    names = "".join(source[0] for _, source, _ in walks[0].drafts)
    return [token for token, _, _ in walks[0].drafts], names, walks[0].refused, look


def test_the_only_token_of_a_mask():
    assert [sole(only([t], VOCAB)) for t in (0, 31, 32, 96)] == [0, 31, 32, 96]
    assert [sole(mask) for mask in (None, only([], VOCAB), only([1, 2], VOCAB), only([1, 64], VOCAB))] == [None] * 4


def test_a_forced_span_takes_the_place_of_drafts():
    tokens, names, refused, look = lead(SPAN.copy(), [1, 2])
    assert (tokens, names, refused) == ([5, 6, 7], "fff", 2)  # then there is a choice
    assert look.counts == [3] and look.mask.shape[1] == 4 and look.failures == {}
    assert lead(SPAN.copy(), [1], reach=2)[:2] == ([5, 6], "ff")


def test_drafts_that_are_what_is_forced_stay_the_drafters():
    """Behind a choice that they make, the next span begins."""
    tokens, names, refused, _ = lead(SPAN.copy(), [5, 6, 7, 9])
    assert (tokens, names, refused) == ([5, 6, 7, 9, 10, 11, 12], "mmmmfff", 0)


def test_drafts_end_where_they_are_refused():
    tokens, names, refused, _ = lead(SPAN.copy(), [5, 6, 7, 1, 2])
    assert (tokens, names, refused) == ([5, 6, 7], "mmm", 2)


def test_copies_go_on_behind_a_forced_span():
    more = [(9, COPY, 0.5), (10, COPY, 0.5), (4, COPY, 0.5)]
    tokens, names, refused, _ = lead(SPAN.copy(), [], more=more)
    assert (tokens, names, refused) == ([5, 6, 7, 9, 10, 11, 12], "fffccff", 1)


def test_an_end_that_is_forced_again_and_again_is_drafted_once_more_at_most():
    class Ended(Steps):
        def mask(self):
            return only([5] if self.at == 0 else [END], VOCAB)

        def advance(self, token):
            self.at += 1

    assert lead(Ended(((5,),)), [])[0] == [5, END, END]


def test_a_free_row_keeps_its_drafts():
    walks, look = guide([SPAN.copy(), None], VOCAB).lead(
        [[], [(1, MTP, 0.5), (2, COPY, 0.5)]], [2, 2], lambda row: lambda drafts: []
    )
    assert [len(each.drafts) for each in walks] == look.counts == [2, 2]
    assert (np.array(look.mask)[1] == 0xFFFFFFFF).all()


def test_a_constraint_that_raises_fails_its_row_alone():
    class Broken(Stairs):
        def mask(self):
            raise KeyError("a step is missing")

    walks, look = guide([Broken(), SPAN.copy()], VOCAB).lead([[], []], [4, 4], lambda row: lambda drafts: [])
    assert look.counts == [0, 3] and list(look.failures) == [0] and walks[0].drafts == []


@pytest.mark.parametrize("params", [tiny.GREEDY, tiny.SAMPLED], ids=["greedy", "sampled"])
def test_a_forced_text_takes_few_passes(params):
    """Twelve tokens without a choice: one pass for all that a verify holds. A drafter that is wrong costs nothing."""
    model, prompt = tiny.target("moe"), tiny.prompts(1)
    steps = lambda: [Steps(tuple((20 + i,) for i in range(40)))]  # noqa: E731
    wrong = tiny.OracleDrafter(mx.zeros((1, 200), mx.int32), mx.zeros((1, 200), mx.bool_))
    loop = tiny.begun(model, wrong, prompt, params, constraints=steps(), drafting=Drafting(sources=(MTP, COPY, FORCED)))
    text, rounds = [], 0
    while len(text) < 36:
        done = loop.step([3], reach=[12])
        text, rounds = text + done.tokens[0], rounds + 1
        assert set(done.sources[0]) <= {FORCED}
    assert text == [20 + i for i in range(len(text))] and rounds == 4  # 1, and 13 each
    _, alone = tiny.decode(model, wrong, prompt, 3, 36, params, constraints=steps(), drafting=Drafting(sources=MTP))
    assert alone.host_syncs == 36


def test_what_a_grammar_refuses_is_counted():
    model, prompt = tiny.target("moe"), tiny.prompts(1)
    wrong = tiny.OracleDrafter(mx.zeros((1, 200), mx.int32), mx.zeros((1, 200), mx.bool_))
    loop = tiny.begun(model, wrong, prompt, constraints=[Stairs()], drafting=Drafting(sources=MTP))
    loop.step([3])
    done = loop.step([3])
    assert done.refused == (2,) and done.drafted == [1]  # of three drafts of token 1 the first is one that may come
