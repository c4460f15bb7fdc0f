"""Which prefix is found for a prompt, and which goes: numbers of the host; the arrays are only carried."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec, saved_bytes
from mlx_gemma_mtp.engine.prefix import MOST, Kind, Prefixes

GRID, WINDOW = 4, 8
SPECS = [KVSpec(1, 2, WINDOW + 1), KVSpec(1, 2, None)]
PLENTY = 1 << 30


def size(tokens: int, slack: int = 0) -> int:
    return saved_bytes(SPECS, tokens, 4, slack)


def saved_of(tokens: list[int], slack: int = 0) -> Saved:
    """Layers that hold the tokens themselves: of the sliding one the window and the slack."""
    held = np.array(tokens, np.float32)[None, None, :, None].repeat(2, axis=3)
    short = held[:, :, max(len(tokens) - WINDOW - slack, 0) :]
    return Saved(len(tokens), tuple((mx.array(each), mx.array(each)) for each in (short, held)))


def prefixes(limit: int = PLENTY, **options) -> Prefixes:
    return Prefixes(limit, GRID, [WINDOW, None], **options)


def text(length: int, which: int = 0) -> list[int]:
    return [1000 * which + i for i in range(length)]


def kept(
    made: Prefixes,
    tokens: list[int],
    salt: str | None = None,
    kind: Kind = Kind.BORDER,
    slack: int = 0,
    prefilled: int | None = None,
) -> bool:
    return made.keep(tokens, saved_of(tokens, slack), salt, kind, prefilled=prefilled)


@pytest.mark.parametrize(
    ("held", "slack", "common", "found"),
    [
        (20, 0, 40, 20),  # all of it
        (20, 0, 20, 20),  # and one more token
        (20, 0, 19, 0),  # its window begins after what is common
        (20, 4, 19, 16),  # with slack it is rounded down to the grid
        (20, 4, 16, 16),
        (20, 4, 15, 0),
        (20, 12, 3, 0),
        (20, 12, 5, 4),  # all of the first tokens is there
        (8, 0, 7, 4),  # shorter than a window
        (19, 0, 40, 19),  # the end of a reply may lie anywhere
    ],
)
def test_the_longest_usable_prefix_is_found(held, slack, common, found):
    made = prefixes()
    kept(made, text(held), slack=slack)
    prompt = text(common) + text(5, 1)
    assert made.known(prompt) == found
    got = made.find(prompt)
    if not found:
        assert got is None and (made.counts.hits, made.counts.misses) == (0, 1)
        return
    assert got.tokens == found and made.counts.tokens == found
    for (keys, _), window in zip(got.layers, (WINDOW, None), strict=True):
        assert keys[0, 0, :, 0].tolist()[-found if window is None else -min(found, window) :] == (
            text(found) if window is None else text(found)[-WINDOW:]
        )


@pytest.mark.parametrize(
    ("prefilled", "slack", "common", "found"),
    [
        (13, 4, 20, 20),
        (13, 4, 19, 19),  # what was decoded has no grid
        (13, 4, 17, 17),
        (13, 4, 15, 0),  # no slack goes so far
        (18, 4, 17, 16),  # within the prompt it is rounded down
        (13, 0, 19, 0),
    ],
)
def test_a_reply_that_comes_back_in_another_spelling_is_found_up_to_it(prefilled, slack, common, found):
    made = prefixes()
    kept(made, text(20), kind=Kind.REPLY, slack=slack, prefilled=prefilled)
    prompt = text(common) + text(5, 1)
    assert made.known(prompt) == found
    got = made.find(prompt)
    assert (got.tokens if got else 0) == found


def test_a_turn_that_spells_a_reply_otherwise_lets_it_go_first():
    made = prefixes(2 * size(40) + size(20, 4))
    kept(made, text(24, 7))
    kept(made, text(20), kind=Kind.REPLY, slack=4, prefilled=13)
    kept(made, text(18) + text(14, 1), kind=Kind.PROMPT)  # goes on from 18 of its tokens
    kept(made, text(40, 5))
    assert made.known([*text(24, 7), 1]) == 24 and made.known([*text(20), 1]) == 0


def test_a_token_is_left_to_be_computed():
    """Of the same prompt once more, whatever is kept."""
    made = prefixes()
    kept(made, text(20), slack=8)
    assert made.find(text(20)).tokens == 16
    assert made.find(text(21)).tokens == 20
    assert made.find(text(1)) is None


def test_salts_know_nothing_of_each_other():
    made = prefixes()
    kept(made, text(20), "mine")
    for salt in (None, "yours", ""):
        assert (
            made.known(text(30), salt) == 0 and made.find(text(30), salt) is None and made.common(text(30), salt) == 0
        )
    assert made.find(text(30), "mine").tokens == 20
    assert kept(made, text(20), "yours") and not kept(made, text(20), "mine")


def test_the_least_recently_used_goes_first():
    made = prefixes(3 * size(20))
    for which in range(3):
        assert kept(made, text(20, which))
    made.find(text(30, 0))
    assert kept(made, text(20, 3))
    assert [made.known(text(30, which)) for which in range(4)] == [20, 0, 20, 20]
    assert made.counts.evicted == 1 and made.bytes == 3 * size(20)


def test_a_turn_that_goes_on_lets_the_one_before_go_first():
    """But not what others begin with, too."""
    made = prefixes(5 * size(40))
    kept(made, text(8), kind=Kind.BORDER)
    kept(made, text(20), kind=Kind.PROMPT)
    kept(made, text(27), kind=Kind.REPLY)
    kept(made, text(40, 1), kind=Kind.PROMPT)
    kept(made, text(40), kind=Kind.PROMPT)
    made.resize(made.bytes - 1)
    assert made.known(text(20) + text(9, 5)) == 8
    made.resize(made.bytes - 1)
    assert made.known(text(27) + text(9, 5)) == 8
    assert made.known(text(50)) == 40 and made.known(text(50, 1)) == 40


def test_a_reply_does_not_drive_out_its_prompt():
    """There is room for one. The next turn may leave out the reply's thoughts, and then goes on from the prompt."""
    made = prefixes(size(30))
    kept(made, text(20), kind=Kind.PROMPT)
    assert not kept(made, text(25), kind=Kind.REPLY) and made.known(text(24)) == 20
    assert kept(made, text(25, 1), kind=Kind.REPLY) and made.known(text(24)) == 0


def test_a_reply_drives_out_the_turns_before_its_prompt():
    made = prefixes(size(60) + size(70))
    for length, kind in ((20, Kind.PROMPT), (25, Kind.REPLY), (60, Kind.PROMPT)):
        kept(made, text(length), kind=kind)
    assert kept(made, text(70), kind=Kind.REPLY)
    assert [len(entry.tokens) for entry in made._entries] == [60, 70]


def test_there_are_never_too_many():
    made = prefixes()
    for which in range(MOST + 5):
        kept(made, text(4, which))
    assert len(made._entries) == MOST and made.known(text(9, 4)) == 0 and made.known(text(9, 5)) == 4


def test_what_is_too_large_drives_nobody_out():
    made = prefixes(size(20))
    kept(made, text(20))
    assert not kept(made, text(21, 1)) and made.known(text(30)) == 20


def test_room_that_is_taken_away_and_given_back():
    made = prefixes(4 * size(20))
    for which in range(4):
        kept(made, text(20, which))
    made.resize(2 * size(20) + 1)
    assert made.bytes == 2 * size(20) and made.known(text(30, 3)) == 20
    assert kept(made, text(20, 4)) and made.bytes == 2 * size(20)
    made.resize(PLENTY)
    assert made.room == made.limit
    made.resize(-5)
    assert made.bytes == 0 and not kept(made, text(4))
    made.resize(PLENTY)
    assert kept(made, text(4))
    made.clear()
    assert made.bytes == 0 and made.find(text(9)) is None


def test_what_was_found_stays_whatever_goes():
    made = prefixes()
    kept(made, text(20))
    found = made.find(text(30))
    made.clear()
    assert found.layers[1][0][0, 0, :, 0].tolist() == text(20)


def test_where_prompts_part():
    """Replies do not count: their next turn parts from them anywhere."""
    made = prefixes()
    kept(made, text(40), kind=Kind.PROMPT)
    kept(made, text(30, 1), kind=Kind.REPLY)
    assert made.common(text(22) + text(9, 5)) == 20 and made.common(text(30, 1)) == 0


def test_whoever_hooks_in_is_told_once():
    told = []
    made = prefixes(on_keep=lambda tokens, saved, salt: told.append((list(tokens), saved.tokens, salt)))
    kept(made, text(20), "s")
    kept(made, text(20), "s")
    made.keep(text(24), saved_of(text(24)), "s", told=False)
    assert told == [(text(20), 20, "s")]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_random_prefixes_hold_what_they_say(seed):
    """Whatever is kept, found and taken away: bytes stay within the room, and what is found is the prompt's own."""
    r = random.Random(seed)
    made, alphabet = prefixes(r.choice([PLENTY, 6 * size(20), size(30)])), r.choice([2, 3])
    for _ in range(60):
        tokens = [r.randrange(alphabet) for _ in range(r.choice([3, 6, 12, 20]))]
        tokens = [0] * r.choice([0, 4, 9, 17]) + tokens
        salt, act = r.choice([None, "a"]), r.random()
        if act < 0.4:
            slack, prefilled = r.randrange(6), r.choice([None, r.randrange(20)])
            kept(made, tokens, salt, r.choice(list(Kind)), slack, prefilled)
        elif act < 0.5:
            made.resize(r.choice([0, size(20), 3 * size(20), PLENTY]))
        else:
            known, found = made.known(tokens, salt), made.find(tokens, salt)
            assert known == (found.tokens if found else 0) < max(len(tokens), 1)
            if found:
                ring, line = found.layers[0][0][0, 0, :, 0].tolist(), found.layers[1][0][0, 0, :, 0].tolist()
                assert line == tokens[:known] and ring[-WINDOW:] == tokens[:known][-WINDOW:]
        assert made.bytes <= made.room <= made.limit
