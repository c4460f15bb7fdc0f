"""Drafts of another source teach the draft length nothing of the drafter's."""

from cost_tables import table

from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow


def depth() -> Depth:
    return Depth(lambda kind, rows: table(0.02, 0.1), frozen=True)


ROWS = [DraftRow(1, AUTO, 50, False), DraftRow(2, AUTO, 50, False)]


def test_nothing_is_learned_of_a_row_that_gives_way():
    """Neither from what it keeps, nor from what the round takes."""
    chooser = depth()
    assert min(chooser.draft(ROWS, 100)) > 0
    chooser.give_way([1, 2])
    assert chooser.verify(ROWS, 100, [[], []], [0, 0]) == 0
    auto = chooser.autos["greedy"]
    pool, purse = auto.pool, auto.purse
    chooser.observe({1: 0, 2: 0})
    assert auto.pool == pool and auto.purse == purse


def test_the_others_teach_as_before():
    alone, mixed = depth(), depth()
    for chooser in alone, mixed:
        chooser.draft(ROWS, 100)
    counts = mixed.draft(ROWS, 100)
    mixed.give_way([1])
    sure = [[0.9] * counts[1]]
    mixed.verify(ROWS, 100, [[], *sure], [0, counts[1]])
    mixed.observe({1: 0, 2: 1})
    assert sum(mixed.autos["greedy"].pool.tried) > 0 and 1 not in mixed._own and 2 in mixed._own


def test_drafts_that_are_not_made_are_not_paid():
    chooser = depth()
    chooser.draft(ROWS, 100)
    assert chooser.prices(2, 100)[1] > 0
    chooser.give_way([1, 2], made=False)
    assert chooser.prices(2, 100)[1] == 0
    chooser.verify(ROWS, 100, [[], []], [0, 0])
    chooser.observe({1: 0, 2: 0})


def test_without_a_choice_there_are_no_prices():
    chooser = depth()
    assert chooser.draft([DraftRow(1, 3, 50, False)], 100) == [3] and chooser.prices(1, 100) is None


def test_what_wider_copies_let_in_counts_up_to_the_chosen_width():
    chooser = depth()
    counts = chooser.draft(ROWS[:1], 100)
    chooser.verify(ROWS[:1], 100, [[0.9, *[0.0] * (counts[0] - 1)]], counts)
    chooser.observe({1: counts[0]})
    tried = chooser.autos["greedy"].pool.tried
    assert sum(tried) <= counts[0]


def test_drafts_in_the_place_of_forced_ones_teach_their_row_alone():
    chooser = depth()
    counts = chooser.draft(ROWS[:1], 100)
    chooser.verify(ROWS[:1], 100, [[]], [0], [1])
    pool = chooser.autos["greedy"].pool
    chooser.observe({1: 0})
    assert counts[0] and chooser.autos["greedy"].pool == pool and sum(chooser._own[1].tried) > 0
