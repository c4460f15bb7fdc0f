"""Sources of drafts on recorded texts: never far under the drafter alone, nor under plain decoding."""

import numpy as np
import pytest

from benchmarks import mixtures, replay
from benchmarks.mixtures import ALONE, COPIES

TEXTS = mixtures.read()
TABLES = {path.stem: replay.read_table(path) for path in sorted((replay.DATA / "costs").glob("*.json"))}


def test_a_text_is_emitted_whole_whoever_drafts():
    """A fixed length of the drafter's takes the rounds that counting by hand gives."""
    text, table = TEXTS["code"][0], TABLES["m4max-26b"]
    at = rounds = 0
    while at < len(text.drafts):
        agree = np.cumprod(text.drafts[at][:3] == text.tokens[at + 1 : at + 4])
        at, rounds = at + 1 + int(agree.sum()), rounds + 1
    done, ends = mixtures.run([text], table, ALONE, 3)
    assert done == [at] and ends[0] == pytest.approx(rounds * table.rounds_at(1, 512)[3], rel=0.05)
    for sources in (ALONE, COPIES):
        done, ends = mixtures.run([text] * 2, table, sources)
        assert min(done) >= len(text.drafts) and min(ends) > 0


@pytest.mark.parametrize("rows", [1, 4])
def test_after_a_long_text_copies_lose_nothing(rows):
    """Where each query reads all K/V anew, a wide verify is dear."""
    [(_, table), *_] = replay.after_long_texts({"m4max-26b": TABLES["m4max-26b"]}).items()
    for name, some in TEXTS.items():
        plain, alone, _ = mixtures.ratios(some, table, rows, replay.LONG)
        assert min(plain, alone) >= 0.97, name


@pytest.mark.parametrize("machine", ["cpu-openblas", "m4max-26b"])
@pytest.mark.parametrize("rows", [1, 4])
def test_copies_cost_nothing_where_there_are_none_and_pay_where_there_are(machine, rows):
    """Never far under plain decoding, nor under the drafter alone; an edit takes far less."""
    for name, some in TEXTS.items():
        plain, alone, _ = mixtures.ratios(some, TABLES[machine], rows)
        assert min(plain, alone) >= 0.97, name
        assert name != "edit" or min(plain, alone) > 1.4
