"""Acceptance that is kept between starts: its file, and how it is overruled."""

import json

import pytest
from cost_tables import table

from mlx_gemma_mtp.speculative.acceptance import SHIPPED, AcceptanceFile, read_shipped, shipped
from mlx_gemma_mtp.speculative.auto import LEARN, Auto, Part
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS
from mlx_gemma_mtp.speculative.depth import AUTO, Depth, DraftRow
from mlx_gemma_mtp.speculative.history import BINS, KNOWN, Acceptance, History, Trust

KEY = {"target": "a", "drafter": "b"}
COUNTS = [4.0] * MAX_DRAFTS
GOOD = Acceptance(History((100.0,) * MAX_DRAFTS, (97.0,) * MAX_DRAFTS), Trust((50.0,) * BINS, (45.0,) * BINS))
BAD = Acceptance(History((100.0,) * MAX_DRAFTS, (2.0,) * MAX_DRAFTS), Trust((50.0,) * BINS, (5.0,) * BINS))


def text(positions=None, confidences=None, key=KEY, **more):
    counts = {"tried": COUNTS, "kept": COUNTS}
    bins = {"tried": [2.0] * BINS, "kept": [1.0] * BINS}
    kinds = {"greedy": {"positions": counts | (positions or {}), "confidences": bins | (confidences or {})}}
    return json.dumps({"format": 1, "key": key, "texts": kinds} | more)


def test_what_was_kept_comes_back(tmp_path):
    file = AcceptanceFile(KEY, tmp_path / "new")
    assert file.read() == {}
    file.write({"greedy": GOOD, "sampled": BAD})
    assert file.read() == {"greedy": GOOD, "sampled": BAD}
    assert [each.name for each in file.path.parent.iterdir()] == [file.path.name]
    assert AcceptanceFile(KEY | {"target": "c"}, tmp_path / "new").read() == {}


def test_a_drafters_folder_ships_it(tmp_path):
    assert read_shipped(tmp_path, KEY) == {}
    (tmp_path / SHIPPED).write_text(shipped({"greedy": GOOD}, KEY))
    assert read_shipped(tmp_path, KEY) == {"greedy": GOOD}
    with pytest.raises(ValueError, match="another pair's"):
        read_shipped(tmp_path, KEY | {"target": "c"})


def test_the_texts_of_these_tests_are_good(tmp_path):
    file = AcceptanceFile(KEY, tmp_path)
    file.path.write_text(text())
    assert file.read()["greedy"].history.tried == tuple(COUNTS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("{", "cannot be read"),
        ("[]", "nothing that was kept"),
        ("{}", "another"),
        (text(format=2), "another"),
        (text(key={}), "another"),
        (text(texts=None), "says nothing"),
        (text(texts={"greedy": {}}), "says nothing"),
        (text(texts={"greedy": None}), "says nothing"),
        (text({"tried": None}), "says nothing"),
        (text({"tried": COUNTS[1:]}), "impossible"),
        (text({"kept": [5.0] * MAX_DRAFTS}), "impossible"),
        (text({"kept": [-1.0] * MAX_DRAFTS}), "impossible"),
        (text({"tried": [float("inf")] * MAX_DRAFTS}), "impossible"),
        (text({"tried": [float("nan")] * MAX_DRAFTS}), "impossible"),
        (text({"tried": ["4"] * MAX_DRAFTS}), "impossible"),
        (text({"tried": [True] * MAX_DRAFTS}), "impossible"),
        (text(confidences={"kept": [3.0] * BINS}), "impossible"),
        ("[" * 100_000, "too deeply"),
        ("\x00\xff", "cannot be read"),
    ],
    ids=lambda text: text[:60],
)
def test_a_file_that_is_none(tmp_path, wrong, message):
    file = AcceptanceFile(KEY, tmp_path)
    file.path.write_bytes(wrong.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        file.read()


def test_it_weighs_as_much_as_some_rounds():
    """The same rates, however many rounds they come from; few rounds stay few."""
    some = GOOD.at_most(KNOWN)
    assert some.rounds == pytest.approx(KNOWN) and GOOD.rounds == 100
    assert some.history.kept[3] / some.history.tried[3] == pytest.approx(0.97)
    assert some.trust.kept[3] / some.trust.tried[3] == pytest.approx(0.9)
    assert some.at_most(1000.0) == some
    assert GOOD.plus(BAD).history.kept[0] == 99


def chosen(prior, accepted, rounds):
    """The draft lengths of a row whose drafts are kept up to `accepted`."""
    depth = Depth(lambda kind, rows: table(0.02, 0.1), frozen=True, priors={"greedy": prior} if prior else {})
    row, found = DraftRow(0, AUTO, 10**6, False), depth.draft([DraftRow(0, AUTO, 10**6, False)], 64)
    for _ in range(rounds):
        made = found[-1]
        sure = [[0.95] * made]
        width = depth.verify([row], 64, sure, [made])
        found += depth.draft([row], 64)
        depth.observe({0: min(accepted, made if width is None else width)})
    return found


def test_a_start_begins_with_it():
    """Where drafts were kept, many at once; where they were not, none; and neither needs a round to know."""
    assert chosen(GOOD, MAX_DRAFTS, 1)[0] > chosen(None, MAX_DRAFTS, 1)[0]
    assert chosen(BAD, 0, 1)[0] == 0


def test_it_is_overruled_by_some_dozens_of_rounds():
    """Whatever it says, after four dozens of rounds drafts are made where they are kept, and not where they are not."""
    assert sum(chosen(GOOD, 0, 60)[48:]) <= 2
    assert sum(chosen(BAD, MAX_DRAFTS, 60)[48:]) > 12


def test_what_is_left_for_the_next_start():
    """Nothing after few rounds, nothing a second time, nothing where nothing is to be learned."""
    for frozen in (False, True):
        auto = Auto(table(0.1, 0.1), frozen=frozen)
        for i in range(LEARN):
            assert auto.accepted() is None or i == 0
            auto.observe(Part(2, 2, 2, [0.9, 0.9]), 1, History())
        found = auto.accepted()
        assert (found is None) == frozen and auto.accepted() is None
        if not frozen:
            assert found.rounds > LEARN / 2 and found.history.kept[1] == 0 and found.trust.tried[BINS - 1] > 0
