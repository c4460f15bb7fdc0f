"""Which calls a reply may hold: none, any, one at least; beside free text, bound text and thoughts; with drafts."""

from dataclasses import replace

import pytest
import tiny
from constraints import CALL, CALL_END, CLOSE, END, ONE_CALL, OPEN, OTHER_END, VOCAB, Steps, calling, thinking

from mlx_gemma_mtp.speculative.guide import allows

EVERY, ENDS = set(range(VOCAB)), {END, OTHER_END}
A_CALL = (CALL, 10, 30, CALL_END)
TEXT = Steps(((70, 71), (72,)))


def said(constraint, *tokens) -> set[int]:
    """What may follow, once these tokens were said, each of which was allowed."""
    for token in tokens:
        assert allows(constraint.mask(), token), token
        constraint.advance(token)
    return {t for t in EVERY if allows(constraint.mask(), t)}


def test_without_a_call_to_make_none_is_opened():
    none = calling(None)
    assert said(none) == said(none, 5, CALL_END) == EVERY - {CALL}
    assert said(calling(None, text=TEXT.copy())) == {70, 71}


def test_a_call_is_bound_from_its_opening_to_its_closing_token():
    auto = calling()
    assert said(auto, 5, 6) == EVERY
    assert said(auto, CALL) == {10, 11} and said(auto, 11, 33) == {CALL_END}
    assert said(auto, CALL_END) == EVERY and auto.calls == 1
    assert said(auto, 5, CALL) == {10, 11}
    assert ONE_CALL.at == 0


def test_a_forced_reply_is_calls_alone():
    forced = calling(forced=True)
    assert said(forced) == {CALL} and said(forced, *A_CALL) == ENDS | {CALL}
    assert said(forced, *A_CALL) == ENDS | {CALL}
    assert said(calling(forced=True, several=False), *A_CALL) == ENDS


def test_where_one_call_is_wanted_the_text_ends_behind_it():
    assert said(calling(several=False), 5, *A_CALL) == ENDS


def test_calls_come_in_the_place_of_bound_text():
    assert said(calling(text=TEXT.copy())) == {70, 71, CALL}
    assert said(calling(text=TEXT.copy()), 70) == {72}
    assert said(calling(text=TEXT.copy()), 70, 72) == ENDS
    assert said(calling(text=TEXT.copy()), *A_CALL) == ENDS | {CALL}
    assert said(calling(text=TEXT.copy(), several=False), *A_CALL) == ENDS


def test_a_thought_comes_before_a_forced_call_and_holds_none():
    t = replace(thinking(2, calling(forced=True)), barred=(END, OTHER_END, CALL))
    assert said(t) == {OPEN, CALL}
    assert said(t, OPEN) == EVERY - ENDS - {CALL}
    assert said(t, 5, 5) == {CLOSE} and said(t, CLOSE) == {CALL}
    assert said(t, *A_CALL) == ENDS | {CALL}


def test_a_copy_advances_by_itself():
    one = calling(text=TEXT.copy())
    two = one.copy()
    assert said(two, CALL, 10) == set(range(20, 60)) and said(one) == {70, 71, CALL}
    three = two.copy()
    assert said(three, 20, CALL_END) == ENDS | {CALL} and said(two) == set(range(20, 60))


@pytest.mark.parametrize("params", [tiny.GREEDY, tiny.SAMPLED, tiny.PENALISED], ids=["greedy", "sampled", "penalised"])
def test_calls_are_the_same_with_and_without_drafts(params):
    """Forced calls, calls within free text, none, and calls behind a thought that the prompt opened, in one batch."""
    model = tiny.target("moe")
    drafter, batch = tiny.drafter(model), tiny.prompts(5)
    params = replace(params, logit_bias={CALL: 9.0, CLOSE: 4.0, END: -1e9, OTHER_END: -1e9})

    def build():
        late = replace(thinking(4, calling(forced=True), inside=True), barred=(END, OTHER_END, CALL))
        return [calling(forced=True), calling(), calling(None), late, None]

    plain, _ = tiny.decode(model, None, batch, 0, 24, params, constraints=build())
    assert [plain[0][i] for i in range(0, 24, 4)] == [CALL] * 6 and plain[0][3::4] == [CALL_END] * 6
    assert CALL in plain[1] and CALL not in plain[2] and CALL in plain[3][:6]
    for num_draft in (1, 4):
        assert tiny.decode(model, drafter, batch, num_draft, 24, params, constraints=build())[0] == plain, num_draft
