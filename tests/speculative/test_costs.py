"""The table of costs: what is interpolated, what is refused, what is kept."""

import json
import os

import pytest

from mlx_gemma_mtp.speculative.costs import (
    CONTEXTS,
    ROWS,
    UNKNOWN,
    WIDEST,
    Attention,
    CostFile,
    CostTable,
    distance,
    nearest,
    rising,
    updated,
)

VERIFIED = {(rows, 100, width): 1.0 + rows * (width + 1) for rows in ROWS for width in range(WIDEST + 1)}
DRAFTED = {(1, 100): 0.1, (8, 100): 0.8}
KEY = {"pair": "a", "chip": "b"}
TABLE = {"format": 3, "key": KEY, "verify": [[1, 0, 0, 0.1]], "draft": [[1, 0, 0.1]], "learned": []}


def table(verify, draft):
    return json.dumps(TABLE | {"verify": verify, "draft": draft})


# Cells and drafts of no table. json writes and reads Infinity and NaN.
HUGE, INF = 10**400, float("inf")
DRAFTS = [
    [INF, 0, 0.1], [HUGE, 0, 0.1], [True, 0, 0.1], [0, 0, 0.1], [1, -1, 0.1], [1, INF, 0.1], [1, 0, INF],
    [1, 0, 1e-320], [1, 0, 1e300], [1, 0, 1],
]  # fmt: skip
CELLS = [
    [INF, 1, 0, 0.1], [HUGE, 1, 0, 0.1], [1, INF, 0, 0.1], [1, HUGE, 0, 0.1], [1, 1, INF, 0.1], [1, 1, HUGE, 0.1],
    [float("nan"), 1, 0, 0.1], [1.5, 1, 0, 0.1], ["1", 1, 0, 0.1], [True, 1, 0, 0.1], [None, 1, 0, 0.1],
    [1, -1, 0, 0.1], [1, 1, -1, 0.1], [1, 1, 0, INF], [1, 1, 0, float("nan")], [1, 1, 0, 1e-320], [1, 1, 0, 1e300],
    [1, 1, 0, True],
]  # fmt: skip


def test_what_was_measured_comes_back():
    table = CostTable.of(VERIFIED, DRAFTED)
    for rows in ROWS:
        assert table.verify_at(rows, 100) == pytest.approx([1 + rows * (w + 1) for w in range(WIDEST + 1)])
    assert table.draft_at(1, 100) == 0.1 and table.draft_at(8, 100) == 0.8
    assert table.rounds_at(1, 100)[3] == pytest.approx(5.0 + 0.3)


def test_between_grid_points_it_is_linear():
    later = {(rows, 300, width): 3.0 + rows * (width + 1) for rows, _, width in VERIFIED}
    table = CostTable.of(VERIFIED | later, DRAFTED)
    assert table.verify_at(3, 100)[2] == pytest.approx(1 + 3 * 3)
    assert table.verify_at(2, 200)[0] == pytest.approx(1 + 2 + 1)
    assert table.verify_at(2, 500)[0] == pytest.approx(1 + 2 + 4)  # the slope goes on
    assert table.verify_at(2, 10)[0] == pytest.approx(1 + 2)  # but not below the first
    assert table.verify_at(12, 100)[0] == pytest.approx(1 + 12)
    assert table.draft_at(4, 100) == pytest.approx(0.4)
    falling = CostTable.of(VERIFIED, {(1, 100): 0.8, (8, 100): 0.1})
    assert falling.draft_at(16, 100) == pytest.approx(0.1)  # such a slope does not go on


def test_a_longer_text_costs_what_attention_adds():
    """One row was measured at some widths; others are between them, more rows in proportion, and so are drafts."""
    later = {(1, 4096, width): VERIFIED[1, 100, width] + 0.5 * (width + 1) for width in (0, 3, 15)}
    table = CostTable.of(VERIFIED | later, DRAFTED | {(1, 4096): 0.3})
    for rows in ROWS:
        more = [a - b for a, b in zip(table.verify_at(rows, 4096), table.verify_at(rows, 100), strict=True)]
        assert more == pytest.approx([0.5 * rows * (width + 1) for width in range(WIDEST + 1)])
        assert table.draft_at(rows, 4096) == pytest.approx(table.draft_at(rows, 100) + 0.2 * rows)
    assert table.draft_at(1, 2098) == pytest.approx(0.2)  # half way
    own = {(4, 4096, 0): VERIFIED[4, 100, 0] + 7, (4, 4096, 15): VERIFIED[4, 100, 15] + 7}
    table = CostTable.of(VERIFIED | later | own, DRAFTED)
    assert table.verify_at(4, 4096)[5] == pytest.approx(VERIFIED[4, 100, 5] + 7)  # what was measured goes first
    cheaper = CostTable.of(VERIFIED | {(1, 4096, 0): 0.1, (1, 4096, 15): 9.0}, DRAFTED)
    assert cheaper.verify_at(1, 4096) == cheaper.verify_at(1, 100)  # noise


def test_a_wide_pass_that_was_measured_says_what_rows_cost():
    """Times between one row's first tokens and its sixteenth stand between them for more rows, too."""
    quick = {(1, 0, 0): 1.0, (1, 0, 1): 1.3, (1, 0, 4): 2.6, (1, 0, 15): 4.8}
    table = CostTable.of(quick, {(1, 0): 0.2})
    assert table.verify_at(4, 0)[3] == pytest.approx(4.8) and table.verify_at(2, 0)[7] == pytest.approx(4.8)
    assert table.verify_at(4, 0)[1] == pytest.approx(2.6 + 3 * 0.2)
    short = CostTable.of({cell: seconds for cell, seconds in quick.items() if cell[2] < 15}, {(1, 0): 0.2})
    assert short.verify_at(4, 0)[3] > 1.4 * 4.8


def test_a_long_context_is_estimated_until_it_is_measured():
    short = {(1, 0, 0): 2.0, (1, 0, 1): 2.5}
    table = CostTable.of(short, {(1, 0): 0.2}, attention=Attention(0.5, 0.1, 32768))
    assert table.estimated and table.contexts == (0, 32768)
    assert table.verify_at(1, 32768)[:2] == pytest.approx([2.0 + 1.0, 2.5 + 2.0])  # each query, half a plain step
    assert table.verify_at(4, 16384)[0] - table.verify_at(4, 0)[0] == pytest.approx(4 * 0.5)
    assert table.draft_at(1, 32768) == pytest.approx(0.2 + 0.2)
    some = short | {(1, 4096, 0): 2.1, (1, 4096, 1): 2.9}
    assert CostTable.of(some, {(1, 0): 0.2}, attention=Attention(0.5, 0.1, 32768)).contexts == (0, 4096, 32768)
    dear = CostTable.of(some | {(1, 4096, 0): 9.0, (1, 4096, 1): 12.0}, {(1, 0): 0.2}, (), Attention(0.5, 0.1, 32768))
    assert dear.verify_at(1, 32768)[:2] == dear.verify_at(1, 4096)[:2] == pytest.approx([9.0, 12.0])
    known = CostTable.of(some, {(1, 0): 0.2}, attention=Attention(0.5, 0.1, 4096))
    assert not known.estimated and known.contexts == (0, 4096)


def test_a_context_stands_for_those_around_it():
    assert [nearest(each) for each in (0, 2000, 2100, 10000, 11000, 30000, 10**6)] == [
        0, 0, 4096, 4096, 16384, 32768, 32768,
    ]  # fmt: skip
    assert {nearest(each) for each in CONTEXTS} == set(CONTEXTS)
    assert distance((1, 0), (4, 0)) == 2 and distance((2, 0), (1, 16384)) == 3 and distance((1, 300), (1, 0)) == 0


def test_what_was_learned_counts_where_it_was():
    learned = CostTable.of(VERIFIED, DRAFTED, [(1, 0, 2), (1, 32768, 5)])
    assert [learned.learned_at((1, context)) for context in CONTEXTS] == [2, 2, 5, 5]
    assert learned.learned_at((8, 0)) == 0 and not learned.knows(8) and learned.knows(1) and learned.knows(2)


def test_what_was_timed_counts_in_its_own_place():
    """Three rows and six are near enough to four; a guess was timed nowhere."""
    timed = CostTable.of(VERIFIED, DRAFTED, timed=[(1, 0, 0), (1, 0, 4), (4, 0, 0), (4, 0, 1), (4, 4096, 7)])
    assert [timed.timed_at((rows, 0)) for rows in (1, 2, 3, 4, 6, 8)] == [4, None, 1, 1, 1, None]
    assert timed.timed_at((4, 4096)) == 7 and timed.timed_at((1, 4096)) is None
    assert [timed.knows(rows) for rows in (1, 2, 3, 8)] == [True, False, True, False]
    assert not any(CostTable.of(VERIFIED, DRAFTED).knows(rows) or UNKNOWN.knows(rows) for rows in ROWS)


def test_what_is_missing_follows_from_the_number_of_tokens():
    """One row at a few widths, as a first start measures it: other rows and widths by rows * (width + 1)."""
    some = {(1, 64, width): 10.0 + 2 * (width + 1) for width in (0, 1, 4, 7)}
    table = CostTable.of(some, {(1, 64): 0.5})
    assert table.verify_at(1, 64)[2] == pytest.approx(16.0)
    assert table.verify_at(4, 64)[1] == pytest.approx(10 + 2 * 8)
    assert table.verify_at(8, 64)[7] == pytest.approx(10 + 2 * 64)
    assert table.verify_at(1, 64)[15] == pytest.approx(10 + 2 * 16)
    assert table.draft_at(1, 64) == 0.5
    assert table.draft_at(8, 64) == pytest.approx(0.5 * (26 / 12) ** 0.5)  # half as a plain step grows


def test_a_number_of_rows_is_off_beside_as_it_was_measured():
    """Two widths of two rows say how far the others are from what one row says of their tokens."""
    one = {(1, 64, width): 10.0 + 2 * (width + 1) for width in (0, 1, 4)}
    two = CostTable.of(one | {(2, 64, 0): 28.0, (2, 64, 3): 39.0}, {(1, 64): 0.5}).verify_at(2, 64)
    assert two[0] == pytest.approx(28.0) and two[3] == pytest.approx(39.0)  # 2 and 1.5 times 10 + 2 * tokens
    assert two[7] == pytest.approx(1.5 * 42) and two[1] == pytest.approx(18 * 2 * 0.75 ** (1 / 3))


def test_a_draft_that_is_cheaper_than_it_was_leaves_rounds_as_they_were():
    verified = {(1, 64, 0): 1.0, (1, 64, 1): 1.1, (1, 64, 4): 1.4, (2, 64, 1): 3.0}
    drafts = {(1, 64): 0.2, (2, 64): 0.3}
    cells, drafted = updated(verified, drafts, {(1, 64, 0): 1.0, (1, 64, 1): 1.2}, {(1, 64): 0.1})
    assert cells == pytest.approx({(1, 64, 0): 1.0, (1, 64, 1): 1.2, (1, 64, 4): 1.8, (2, 64, 1): 3.0})
    assert drafted == {(1, 64): 0.1, (2, 64): 0.3}
    elsewhere, _ = updated(verified, drafts, {(1, 4096, 0): 1.0}, {(1, 4096): 0.1})
    assert elsewhere == verified | {(1, 4096, 0): 1.0}  # another place's drafts
    dearer, _ = updated(verified, {(1, 64): 0.1}, {(1, 64, 0): 1.0}, {(1, 64): 0.4})
    assert dearer[1, 64, 4] == 1.0  # no less than a plain round


def test_more_work_never_looks_cheaper():
    assert rising([1.0, 3.0, 2.0, 4.0, 3.0, 3.5]) == [1.0, 2.5, 2.5, 3.5, 3.5, 3.5]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]  # blocks count by what they hold
    noisy = {(1, 64, w): s for w, s in enumerate([5.0, 9.0, 4.0, 6.0, 7.0, 8.0, 8.0, 7.0])}
    line = CostTable.of(noisy, {(1, 64): 0.1}).verify_at(1, 64)
    assert line == sorted(line) and sum(line[:8]) == pytest.approx(sum(noisy.values()))


def test_before_anything_is_known_drafts_pay_only_where_they_are_kept():
    rounds = UNKNOWN.rounds_at(1, 64)
    assert rounds[0] == pytest.approx(1.0, rel=0.01) and 1.2 < rounds[1] < 1.5 and rounds[4] < 3
    later = UNKNOWN.rounds_at(1, 32768)
    assert later[1] - rounds[1] > 1.5 * (later[0] - rounds[0]) > 0.3


def test_a_file_keeps_it(tmp_path):
    file = CostFile(KEY, tmp_path / "new")
    assert file.read() is None
    file.write(VERIFIED, DRAFTED, [(1, 100, 2)])
    assert file.read() == (VERIFIED, DRAFTED, {(1, 100, 2)})
    assert CostTable.of(*file.read()).learned == {(1, 100, 2)}
    assert [each.name for each in file.path.parent.iterdir()] == [file.path.name]
    assert CostFile({**KEY, "chip": "c"}, tmp_path / "new").read() is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "nothing that was kept"),
        ("{}", "another"),
        ('{"format": 9}', "another"),
        (json.dumps(TABLE | {"format": 2, "draft": [[1, 0.1]]}), "another version's"),
        (json.dumps(TABLE | {"key": {"pair": "x"}}), "another"),
        (
            table([[1, 64, 0]], [[1, 0, 0.1]]),
            "no table|not enough",
        ),
        (
            table([[1, 64, 0, -1.0]], [[1, 0, 0.1]]),
            "impossible",
        ),
        (
            table([[0, 64, 0, 1.0]], [[1, 0, 0.1]]),
            "impossible",
        ),
        (
            table([[1, 64, 0, "1"]], [[1, 0, 0.1]]),
            "impossible",
        ),
        (table([[1, 64, 0, 1.0]], []), "impossible"),
        (
            table([["x", 64, 0, 1.0]], [[1, 0, 0.1]]),
            "impossible",
        ),
        (json.dumps(TABLE | {"learned": [[1, 1, 1]]}), "impossible"),
        (json.dumps(TABLE | {"learned": [[1, 1]]}), "no table"),
        (json.dumps({key: TABLE[key] for key in TABLE if key != "learned"}), "no table"),
        ("[" * 100_000, "too deeply"),
        *[(table([cell], [[1, 0, 0.1]]), "impossible") for cell in CELLS],
        *[
            (
                table([[1, 1, 0, 0.1]], [d]),
                "impossible",
            )
            for d in DRAFTS
        ],
        ("\x00\xff", "cannot be read"),
    ],
    ids=lambda text: text[:80],
)
def test_a_file_that_is_none(tmp_path, text, message):
    file = CostFile(KEY, tmp_path)
    file.path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        file.read()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)], ids=["fifo", "folder", "device"]
)
def test_a_file_that_would_not_end_is_not_read(tmp_path, make):
    file = CostFile(KEY, tmp_path)
    make(file.path)
    with pytest.raises(ValueError, match="no regular file"):
        file.read()
