"""benchmarks.serving: what its figures are made of, by literals; a part from end to end on tiny work."""

import json

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving import arrival, throughput, work
from benchmarks.serving.intervals import Interval, of_median, of_slope
from benchmarks.serving.throughput import Backlog, Way
from benchmarks.workers import OURS, Failed

BACKLOG = Backlog([[1], [2]], [2, 3], 2)


def served(seconds: float, tokens=((5, 6), (7, 8, 9))) -> dict:
    return {"tokens": [list(row) for row in tokens], "seconds": seconds, "first_seconds": [0.1, 0.2]}


def test_an_interval_holds_its_median_and_narrows():
    few, many = of_median([1.0, 1.2, 1.1]), of_median([1.0, 1.2, 1.1] * 30)
    for each in (few, many):
        assert each.low <= each.middle == 1.1 <= each.high
    assert many.high - many.low < few.high - few.low
    assert of_median([2.0]) == Interval(2.0, 2.0, 2.0)


def test_a_slope_is_told_from_noise():
    noise = [7, 1, 5, 2, 6, 3, 4] * 6
    flat, rising = of_slope(noise), of_slope([value + 3 * i for i, value in enumerate(noise)])
    assert flat.low < 0 < flat.high
    assert 2.5 < rising.low < 3 < rising.high < 3.5


def test_lengths_are_drawn_once_and_within_their_bounds():
    limits = work.limits(48, 20, 300)
    assert limits == work.limits(48, 20, 300) and 20 <= min(limits) < 60 < 260 < max(limits) <= 300
    assert work.filled([[1, 2], [3]], 5) == [1, 2, 3, 1, 2]


def test_rows_count_while_somebody_waits():
    """Not before the first row is there, and not once nobody waits any more."""
    rounds = [(0, 9), (8, 5), (6, 5), (8, 1), (7, 0), (1, 0)]
    assert throughput.occupancy(rounds) == {"occupancy": 7.333, "rounds_with_a_queue": 3}


def test_the_better_peer_is_the_one_that_counts():
    """Ratios are of the same repeat; who is faster over all of them is compared with."""
    ours = Way(OURS, throughput.CONTINUOUS, "auto", 1, [served(1.0), served(2.0), served(1.0)])
    fixed = Way(OURS, throughput.FIXED, "auto", 2, [served(1.5), served(3.0), served(1.5)])
    plain = Way(throughput.VLM, throughput.PLAIN, 0, 1, [served(2.0), served(4.0), served(2.0)])
    mtp = Way(throughput.VLM, throughput.MTP, 1, 2, [served(9.0), served(9.0), served(1.0)])
    mtp.served[0]["tokens"][1] = [7, 8, 1]
    found = throughput.judged([ours, fixed, plain, mtp], BACKLOG)
    assert found["over_mlx_vlm"] == [2.0, 2.0, 2.0] and "plain" in found["better_of_mlx_vlm"]
    assert found["over_fixed_batches"] == [1.5, 1.5, 1.5]
    assert [way["equal"] for way in found["ways"]] == [2, 2, 2, 1]
    assert found["ways"][3]["first_difference"] == {"prompt": 1, "position": 2, "token": 1, "reference": 9}
    assert found["ways"][0]["tokens_per_s"][0] == 5.0


class Fake:
    def __init__(self, rates: dict):
        self.rates, self.asked = rates, []

    def ask(self, method: str, **request):
        key = request["drafts"], request["joining"]
        self.asked.append((*key, len(request["prompts"])))
        if key not in self.rates:
            raise Failed("no such way")
        return served(1 / self.rates[key])


def test_the_best_way_of_a_peer_is_found_by_trial():
    """One that fails is told and passed over."""
    notes, worker = [], Fake({(0, 1): 3.0, (0, 2): 5.0, (2, 2): 2.0})
    best = throughput.tried({throughput.VLM: worker}, BACKLOG, [1, 2], notes.append)
    assert [(way.drafts, way.joining) for way in best] == [(0, 2), (2, 2)]
    assert sum(note.startswith("failed") for note in notes) == 1


def test_texts_of_other_lengths_are_no_answer():
    worker = Fake({(0, 1): 1.0})
    with pytest.raises(Failed, match="other lengths"):
        Way(OURS, throughput.CONTINUOUS, 0, 1).ask({OURS: worker}, Backlog([[1], [2]], [2, 4], 2))


def rounds_of(*tokens: dict, prompt: int = 0) -> list[dict]:
    return [{"seconds": 0.01 * (i + 1), "tokens": each, "prompt": prompt} for i, each in enumerate(tokens)]


def test_an_arrival_is_counted_in_rounds():
    """Streams 1 and 2; the long prompt (8) comes in round 2, the short one (9) in round 3; stream 2 misses a round."""
    both = {1: 1, 2: 1}
    rounds = rounds_of(both, both, both, {1: 2}, both | {9: 1}, both | {9: 1}, both | {8: 1})
    arrivals = {arrival.LONG: 2, arrival.SHORT: 3, "ids": {arrival.LONG: 8, arrival.SHORT: 9}}
    found = arrival.summary(rounds, [1, 2], arrivals, chunks=1)
    assert found["rounds_to_first_token"] == 2 and found["rounds_allowed"] == 4
    assert found["longest_gap_rounds"] == 2 and found["longest_gap_ms"] == 20
    assert found["long_prompt_rounds"] == 5 and found["first_token_ms"] == 20


@pytest.mark.parametrize(
    "argv, said",
    [
        (["alone"], "--before"),
        (["alone", "--before", "/nowhere"], "/nowhere"),
        (["throughput", "--rows", "0"], "--rows is 0"),
        (["throughput", "--least", "9", "--most", "8"], "--most is 8"),
    ],
)
def test_bad_input_is_told_in_a_line(argv, said, capsys):
    assert serving.main(argv) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@pytest.mark.slow
def test_parts_from_end_to_end(tmp_path):
    """On little work: the line of JSON has what the table shows, and pictures are drawn."""
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    few = ["--requests", "4", "--rows", "2", "--least", "2", "--most", "6", "--repeats", "1", "--blas", "stock"]
    few += ["--json", str(out), "--plots", str(plots), "--without-mlx-vlm"]
    assert serving.main(["throughput", *few]) in (0, 1)
    assert serving.main(["arrival", *few, "--apart", "3", "--arrival-drafts", "0"]) in (0, 1)
    throughput_line, arrival_line = map(json.loads, out.read_text().splitlines())
    assert throughput_line["part"] == "throughput" and throughput_line["found"]["requests"] == 4
    assert arrival_line["found"]["0"][0]["summary"]["longest_gap_rounds"] >= 1
    assert [path.name for path in plots.iterdir()] == ["arrival-stock.png"]
