"""How many prompt tokens a round may prefill: by what rounds and chunks took."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.speculative.budget import GAP, KEEP, Budget

CHUNK, GRID = 256, 32


class Machine:
    """Seconds of rounds and chunks: a round takes `round`, and a tenth of it more for each row; a chunk takes `first`,
    and `each` for every token. noise: the largest factor; late: the share of times that are 20 times too long.
    """

    def __init__(self, round: float, first: float, each: float, noise: float = 1.0, late: float = 0.0, seed: int = 0):
        self.round, self.first, self.each, self.noise, self.late = round, first, each, noise, late
        self.draws = Random(seed)

    def seconds(self, rows: int, tokens: int) -> float:
        return (self.round * (1 + 0.1 * rows) if rows else 0.0) + (self.first + self.each * tokens if tokens else 0.0)

    def observed(self, rows: int, tokens: int) -> float:
        late = 20.0 if self.draws.random() < self.late else 1.0
        return self.seconds(rows, tokens) * late * self.draws.uniform(1, self.noise)


def serve(budget: Budget, machine: Machine, rows: int, rounds: int) -> list[int]:
    """The tokens of some rounds of these rows while a prompt without end is prefilled; each chunk falls into the round
    after its own.
    """
    found, queued = [], 0
    for _ in range(rounds):
        tokens = budget.tokens(rows)
        found.append(tokens)
        waited = rows == 0
        inside = queued + (found[-1] if waited else 0)
        budget.took(rows, machine.observed(rows, inside), found[-1], waited)
        queued = 0 if waited else found[-1]
    return found


def strict() -> Budget:
    """A budget by which a chunk takes no longer than a round, however short that is."""
    return Budget(CHUNK, GRID, gap=0.0)


def known(machine: Machine, rows: int = 2) -> Budget:
    """A budget after a prompt that was prefilled alone, and some rounds without any."""
    budget = strict()
    serve(budget, machine, 0, 5)
    for _ in range(5):
        budget.took(rows, machine.observed(rows, 0), 0, False)
    return budget


def test_without_rows_it_is_a_chunk():
    assert strict().tokens(0) == Budget(CHUNK, GRID, fixed=64).tokens(0) == CHUNK


def test_before_anything_is_known_it_is_the_least():
    budget = strict()
    assert budget.tokens(1) == GRID
    budget.took(0, 1.0, CHUNK, True)
    assert budget.tokens(1) == GRID  # what a round takes is not known


@pytest.mark.parametrize("noise, late", [(1.0, 0.0), (1.3, 0.1)])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("first, each", [(0.0, 1e-4), (4e-3, 1e-4), (9e-3, 2e-5), (0.0, 1e-5)])
def test_a_chunk_takes_about_as_long_as_a_round(rows, first, each, noise, late):
    """Also where a chunk's first token costs as much as many others, and where times are noisy or far too long."""
    machine = Machine(10e-3, first, each, noise, late)
    tokens = serve(known(machine, rows), machine, rows, 60)[20:]
    best = min(CHUNK, (machine.seconds(rows, 0) - first) / each)
    typical = sorted(tokens)[len(tokens) // 2]
    assert best / (1.6 if noise > 1 else 1.01) - GRID < typical <= best * (1.6 if noise > 1 else 1.01), (typical, best)
    longest = max(machine.seconds(rows, each) for each in tokens)
    assert longest <= (2.8 if noise > 1 else 2.0) * machine.seconds(rows, 0)


@pytest.mark.parametrize("round, best", [(10e-3, 96), (150e-3, 192)])  # 11 and 165 ms
def test_what_a_reader_does_not_notice_may_always_be_taken(round, best):
    machine = Machine(round, 0.0, 8e-4)
    budget = Budget(CHUNK, GRID, gap=0.1)
    assert budget.gap == GAP
    serve(budget, machine, 0, 5)
    assert set(serve(budget, machine, 1, 40)[20:]) == {best}


def test_where_even_the_least_takes_longer_it_stays_the_least():
    machine = Machine(10e-3, 30e-3, 1e-4)
    assert set(serve(known(machine), machine, 2, 40)[2:]) == {GRID}


def test_one_late_round_changes_nothing():
    machine = Machine(10e-3, 2e-3, 1e-4)
    budget = known(machine)
    serve(budget, machine, 2, 20)
    usual = budget.tokens(2)
    assert GRID < usual < CHUNK
    budget.took(2, 1.0, usual, False)
    assert budget.tokens(2) == usual
    budget.took(2, 1.0, 0, False)
    assert budget.tokens(2) == usual


def test_a_machine_that_got_slower_or_faster_is_followed():
    """Chunks five times as long, and back."""
    usual, slow = Machine(10e-3, 1e-3, 5e-5), Machine(10e-3, 1e-3, 25e-5)
    budget = known(usual)
    before = serve(budget, usual, 2, 20)[-1]
    assert serve(budget, slow, 2, 2 * KEEP)[-1] <= before / 3
    assert serve(budget, usual, 2, 4 * KEEP)[-1] == before


def test_a_round_is_known_from_rounds_with_chunks():
    """Rows join while prompts are prefilled without a break: their round is what the chunk leaves of the time."""
    machine = Machine(10e-3, 0.0, 1e-4)
    budget = strict()
    serve(budget, machine, 0, 4)
    assert serve(budget, machine, 1, 12)[-1] == 96  # of 11 ms
    budget.took(5, machine.seconds(5, 96), 96, False)
    assert serve(budget, machine, 5, 12)[-1] == 128  # of 15 ms


def test_rows_that_were_not_seen_are_like_the_nearest():
    budget = strict()
    budget.took(0, 25.6e-3, CHUNK, True)
    for _ in range(3):
        budget.took(1, 5e-3, 0, False)
        budget.took(8, 20e-3, 0, False)
    assert [budget.tokens(rows) for rows in (1, 2, 7, 8, 30)] == [32, 32, 192, 192, 192]


def test_a_chunk_falls_into_the_round_that_waits_for_it():
    """The next one, unless the readback waited; then that round's time is no draft length's business."""
    budget = strict()
    assert budget.took(1, 1.0, 0, False)
    assert budget.took(1, 1.0, 64, False)  # queued behind its readback
    assert not budget.took(1, 1.5, 0, False)
    assert budget.took(1, 1.0, 0, False)
    assert not budget.took(1, 1.5, 64, True)
    assert budget.took(1, 1.0, 0, False)
    assert list(budget._chunks) == [(64, 0.5)] * 2 and list(budget._rounds) == [(1, 1.0)] * 4


def test_a_fixed_one_hears_no_clock():
    budget = Budget(CHUNK, GRID, fixed=64)
    machine = Machine(10e-3, 0.0, 1e-5, 2.0, 0.2)
    assert serve(budget, machine, 3, 40) == [64] * 40
    assert not budget.took(3, 1.0, 0, False) and budget.took(3, 1.0, 0, False)


def test_a_round_that_took_less_than_its_chunk_says_nothing():
    """Of rows that were not seen; and a time without rows and prompts is nobody's."""
    budget = strict()
    budget.took(0, 1.0, 64, True)
    budget.took(3, 0.5, 64, True)
    budget.took(0, 1.0, 0, False)
    assert not budget._rounds and len(budget._chunks) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.floats(0, 1e3, allow_subnormal=True), st.integers(0, CHUNK), st.booleans()),
        max_size=40,
    ),
    st.sampled_from([(256, 32), (100, 32), (32, 32), (512, 1)]),
)
def test_whatever_times_come_it_stays_within_its_bounds(times, shape):
    chunk, grid = shape
    budget = Budget(chunk, grid)
    for time in times:
        budget.took(*time)
        for rows in (1, 5):
            tokens = budget.tokens(rows)
            assert grid <= tokens <= chunk and tokens % grid == 0
    assert len(budget._rounds) <= KEEP and len(budget._chunks) <= KEEP
