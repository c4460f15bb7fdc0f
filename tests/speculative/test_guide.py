"""Constraints mask the target at every draft position, cut refused drafts, and advance by emitted tokens alone."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from constraints import CLOSE, END, OPEN, VOCAB, Stairs, thinking

from mlx_gemma_mtp.ops.bits import expand
from mlx_gemma_mtp.speculative.guide import allows, guide, only


def unpacked(bits: mx.array) -> np.ndarray:
    return np.array(expand(bits, VOCAB))


def test_bits_become_a_mask():
    bits = only([0, 31, 32, 96], VOCAB)
    assert [t for t in range(VOCAB) if allows(bits, t)] == [0, 31, 32, 96] and allows(None, 5)
    mask = np.array(expand(mx.array(bits)[None, None], VOCAB))
    assert mask.shape == (1, 1, VOCAB) and np.flatnonzero(mask[0, 0] == 0).tolist() == [0, 31, 32, 96]
    assert (mask[0, 0][1:31] == -np.inf).all()


def test_drafts_are_walked_on_a_copy_up_to_the_first_that_is_refused():
    stairs, free = Stairs(), None
    found = guide([stairs, free], VOCAB)
    counts, mask, failures = found.look([[7, 15, 3, 4], [1, 2, 3, 4]])  # 7 % 7 = 0, 15 % 7 = 1, 3 is refused
    mask = unpacked(mask)
    assert counts == [2, 4] and mask.shape == (2, 5, VOCAB) and not failures  # the free row keeps its drafts
    allowed = [np.flatnonzero(row == 0) % 7 for row in mask[0]]
    assert [set(a.tolist()) for a in allowed[:3]] == [{0}, {1}, {2}] and (mask[1] == 0).all()
    assert (stairs.step, stairs.advanced) == (0, 0)
    assert guide([stairs], VOCAB).look([[7, 15, 3, 4]]).mask.shape[1] == 3
    counts, mask, _ = guide([stairs], VOCAB).look([[7, 15, 3, 4]], cut=False)
    mask = unpacked(mask)
    assert counts == [4] and (mask[0, 3:] == 0).all() and np.isinf(mask[0, 2]).any()
    assert found.advance([[14, 8], [5, 6]]) == {}
    assert (stairs.step, stairs.advanced) == (2, 2)
    assert found.of_rows([1]) is None and found.of_rows([0]).constraints == [stairs]
    assert guide([None, None], VOCAB) is None


class Fragile(Stairs):
    """Stairs whose mask raises, or whose copies raise when they advance."""

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def copy(self):
        return Fragile("copy")

    def mask(self):
        if self.where == "mask":
            raise KeyError("a step is missing")
        return super().mask()

    def advance(self, token):
        raise KeyError("a step is missing")


def test_rows_have_drafts_of_their_own_number():
    """A row without drafts, and one with fewer than its partner."""
    counts, mask, _ = guide([Stairs(), Stairs(1), None], VOCAB).look([[], [8, 3], [1, 2, 3]])
    mask = unpacked(mask)
    assert counts == [0, 1, 3] and mask.shape == (3, 4, VOCAB)
    assert [set((np.flatnonzero(row == 0) % 7).tolist()) for row in mask[:2, 0]] == [{0}, {1}]
    assert set((np.flatnonzero(mask[1, 1] == 0) % 7).tolist()) == {2} and (mask[0, 1:] == 0).all()


def test_after_drafts_that_cannot_be_walked_nothing_is_allowed():
    """Not everything: a partner has drafts left, so that the row's later positions are verified, too."""
    counts, mask, failures = guide([Fragile("nowhere"), None], VOCAB).look([[7, 15, 3], [1, 2, 3]])
    assert counts == [1, 3] and failures == {}
    mask = unpacked(mask)
    assert set((np.flatnonzero(mask[0, 0] == 0) % 7).tolist()) == {0} and (mask[0, 1] == -np.inf).all()
    assert (mask[1] == 0).all()


def test_a_row_whose_mask_raises_may_say_nothing():
    counts, mask, failures = guide([Fragile("mask"), Stairs()], VOCAB).look([[], []])
    assert counts == [0, 0] and failures == {0: "KeyError: 'a step is missing'"}
    mask = unpacked(mask)
    assert (mask[0] == -np.inf).all() and (mask[1] == 0).any()


@pytest.mark.parametrize("params", [tiny.GREEDY, tiny.SAMPLED, tiny.PENALISED], ids=["greedy", "sampled", "penalised"])
def test_constrained_text_is_the_same_with_and_without_drafts(params):
    """Free and constrained rows in one batch; every token is allowed; the drafter knows nothing of it."""
    model = tiny.target("moe")
    drafter, batch = tiny.drafter(model), tiny.prompts(4)
    build = lambda: [Stairs(), None, Stairs(3), None]  # noqa: E731
    plain, _ = tiny.decode(model, None, batch, 0, 30, params, constraints=build())
    for row, start in ((0, 0), (2, 3)):
        assert [t % 7 for t in plain[row]] == [(start + i) % 7 for i in range(30)]
    free, _ = tiny.decode(model, None, batch, 0, 30, params)
    assert plain[1] == free[1] and plain[3] == free[3]
    for num_draft in (1, 4):
        assert tiny.decode(model, drafter, batch, num_draft, 30, params, constraints=build())[0] == plain, num_draft
    assert tiny.decode(model, drafter, [batch[2]], 3, 30, params, constraints=[Stairs(3)])[0] == [plain[2]]


def test_right_drafts_are_kept_under_a_constraint():
    """An oracle that knows the constrained text has all its drafts verified and kept: one round for 4 tokens."""
    model = tiny.target("moe")
    prompt = tiny.prompts(1)[0]
    text = tiny.decode(model, None, [prompt], 0, 40, constraints=[Stairs()])[0][0]
    known = mx.array([prompt + text + [0] * 16])
    oracle = tiny.OracleDrafter(known, mx.ones(known.shape, mx.bool_))
    drafted, loop = tiny.decode(model, oracle, [prompt], 3, 37, constraints=[Stairs()])
    assert drafted == [text[:37]] and loop.host_syncs == 1 + 9


def allowed(constraint) -> set[int]:
    return {t for t in range(VOCAB) if allows(constraint.mask(), t)}


def said(t, *tokens) -> set[int]:
    """What may follow, once these tokens were said, each of which was allowed."""
    for token in tokens:
        assert allows(t.mask(), token), token
        t.advance(token)
    return allowed(t)


def test_a_thought_is_closed_when_its_budget_is_spent():
    every = set(range(VOCAB))
    t = thinking(2)
    assert said(t) == every and said(t, OPEN, 5) == every
    assert said(t, 6) == {CLOSE} and said(t, CLOSE) == every - {OPEN}


def test_all_thoughts_of_a_text_have_one_budget():
    """A second thought takes what the first one left; once it is spent, no other is opened."""
    every = set(range(VOCAB))
    t = thinking(3)
    assert said(t, OPEN, 5, CLOSE, 8, 8, OPEN, 6) == every
    assert said(t, 6) == {CLOSE}
    assert said(t, CLOSE) == every - {OPEN} and said(t, 9, 9) == every - {OPEN}
    assert said(thinking(None), OPEN, *[7] * 50, CLOSE, OPEN, *[7] * 50) == every


def test_a_budget_of_zero_opens_no_thought_and_closes_that_of_the_prompt():
    every = set(range(VOCAB))
    assert allowed(thinking(0)) == every - {OPEN}
    assert allowed(thinking(0, inside=True)) == {CLOSE}
    assert said(thinking(0, inside=True), CLOSE) == every - {OPEN}
    stairs = {i for i in range(VOCAB) if i % 7 == 0}
    assert allowed(thinking(0, Stairs())) == stairs


def test_a_thought_that_the_prompt_opened_is_known_as_open():
    """The budget counts what is said in it; what binds the reply begins behind it."""
    stairs = {i for i in range(VOCAB) if i % 7 == 0}
    t = thinking(3, Stairs(), inside=True)
    assert allowed(t) == set(range(VOCAB)) - {END}
    assert said(t, 5, 5, 5) == {CLOSE}
    assert said(t, CLOSE) == stairs - {OPEN}
    assert said(t, 7) == {i for i in range(VOCAB) if i % 7 == 1}
    closed = thinking(None, Stairs(), inside=True)
    assert said(closed, 5, CLOSE) == stairs | {OPEN}  # another thought may come before the reply
    assert said(closed, OPEN, 5, CLOSE, 7) == {i for i in range(VOCAB) if i % 7 == 1}


def test_a_reply_is_constrained_from_the_border_on():
    """Also where the border lies among the drafts, and a thought cannot end the text."""
    t = thinking(3, Stairs())
    stairs = {i for i in range(VOCAB) if i % 7 == 0}
    assert allowed(t) == stairs | {OPEN}
    counts, mask, _ = guide([t], VOCAB).look([[OPEN, 50, CLOSE, 7, 7]])
    assert counts == [4]  # the second 7 is refused
    at = [set(np.flatnonzero(row == 0).tolist()) for row in unpacked(mask[0])]
    assert at[1] == at[2] == set(range(VOCAB)) - {END} and at[3] == stairs | {OPEN}
    assert at[4] == {i for i in range(VOCAB) if i % 7 == 1}
    assert (t.begun, t.inside, t.spent, t.reply.advanced) == (False, False, 0, 0)
    without = thinking(3, Stairs())
    without.advance(7)  # no thought: the reply at once
    assert allowed(without) == {i for i in range(VOCAB) if i % 7 == 1}


def test_budgets_hold_with_drafts():
    """In the loop: a text that begins with a thought is closed after 4 tokens, whatever is drafted."""
    model = tiny.target("moe")
    params = replace(tiny.GREEDY, logit_bias={CLOSE: -1e4})
    prompt = tiny.prompts(1)[0]
    forced = lambda: [thinking(4, None, inside=True)]  # noqa: E731
    plain = tiny.decode(model, None, [prompt], 0, 12, params, constraints=forced())[0]
    assert plain[0][4] == CLOSE and CLOSE not in plain[0][:4] + plain[0][5:]
    for num_draft in (1, 3, 6):
        assert (
            tiny.decode(model, tiny.drafter(model), [prompt], num_draft, 12, params, constraints=forced())[0] == plain
        )


@pytest.mark.parametrize("params", [tiny.GREEDY, tiny.SAMPLED], ids=["greedy", "sampled"])
def test_thoughts_with_budgets_and_bound_replies_are_the_same_with_and_without_drafts(params):
    """Thoughts that the prompt opened and second ones, free rows beside them; OPEN is likely, so that thoughts come."""
    model = tiny.target("moe")
    drafter, batch = tiny.drafter(model), tiny.prompts(4)
    params = replace(params, logit_bias={OPEN: 8.0, CLOSE: 4.0})
    build = lambda: [thinking(6), thinking(5, Stairs(), inside=True), None, thinking(3, Stairs())]  # noqa: E731
    plain = tiny.decode(model, None, batch, 0, 30, params, constraints=build())[0]
    assert plain[0].count(OPEN) > 1 and CLOSE in plain[1][:6] and plain[3][0] == OPEN
    for num_draft in (1, 4):
        assert tiny.decode(model, drafter, batch, num_draft, 30, params, constraints=build())[0] == plain, num_draft
