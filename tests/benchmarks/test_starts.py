"""Cold starts on recorded texts: what earlier starts left brings most of the best length at once, and costs nothing."""

import numpy as np
import pytest

from benchmarks import replay, starts
from mlx_gemma_mtp.engine import calibration
from mlx_gemma_mtp.speculative.costs import ROWS

TEXTS = starts.read_texts(replay.DATA / "traces.npz")
TABLES = {path.stem: replay.read_table(path) for path in sorted((replay.DATA / "costs").glob("*.json"))}


def test_a_short_measurement_without_noise_is_the_machines():
    table = TABLES["m4max-26b"]
    for rows in ROWS:
        verified, drafted = starts.quick(table, rows, replay.EXACT, np.random.default_rng(0))
        [(place, widths)] = calibration.quick(rows)
        assert place == (rows, 0) and set(verified) == {(rows, 0, width) for width in widths}
        assert [verified[rows, 0, width] for width in widths] == pytest.approx(
            [table.verify_at(rows, 0)[width] for width in widths]
        )
        assert drafted == {(rows, 0): pytest.approx(table.draft_at(rows, 0))}


@pytest.mark.parametrize("machine", ["cpu-openblas", "m2pro-26b"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_start_that_knows_is_near_the_best_length(machine, text):
    """One row, the half of the texts that no constant was chosen on: at least 0.97 of plain decoding by every kind of
    start, at least 0.9 of the best length over 128 tokens where costs were calibrated.
    """
    found = starts.line(TABLES[machine], TEXTS[text][2:], TEXTS[text][:2], 1, 4)
    for kind in ("first", "second", "calibrated"):
        assert found[kind][1] >= 0.97, kind
    assert found["calibrated"][0] >= 0.9
