"""The live comparison with toy sizes: which ways are compared in which classes, and what is written."""

import json

import pytest

pytest.importorskip("llguidance")

from benchmarks import live

SMALL = ["--pairs", "1", "--texts", "1", "--max-tokens", "8"]


def lines(tmp_path, *options: str) -> list[dict]:
    file = tmp_path / "live.jsonl"
    assert live.main([*SMALL, "--json", str(file), *options]) in (0, 1)  # a pair of some tokens says nothing of speed
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sources_are_compared_with_plain_decoding_and_with_the_drafter_alone(tmp_path, capsys):
    """An edit is never forced: its grammar would know the text."""
    found = lines(tmp_path, "--draft-sources", "mtp,copy,forced", "--classes", "json,edit")
    ways = [(line["text"], *line["ways"]) for line in found]
    others = (live.PLAIN, live.ALONE)
    assert ways == [("json", each, "mtp,copy,forced") for each in others] + [
        ("edit", each, "mtp,copy") for each in others
    ]
    assert all(line["ratio"] > 0 and line["interval"][0] <= line["ratio"] <= line["interval"][1] for line in found)
    assert "forced" not in found[-1]["drafted"] and found[0]["drafted"].keys() <= {"mtp", "copy", "forced"}
    told = capsys.readouterr().out
    assert "of the drafter alone" in told and "kept" in told


def test_the_automatic_length_is_compared_with_plain_decoding(tmp_path):
    found = lines(tmp_path, "--classes", "code")
    assert [(line["text"], line["ways"]) for line in found] == [("code", [live.PLAIN, live.AUTO])]


@pytest.mark.parametrize("options", [["--classes", "edit"], ["--draft-sources", "mtp", "--classes", "poems"]], ids=str)
def test_a_class_that_is_not_known_is_one_line(options, capsys):
    assert live.main([*SMALL, *options]) == 2
    assert capsys.readouterr().err.startswith("error: --classes names ")


def test_sources_that_are_not_known_are_one_line(capsys):
    assert live.main([*SMALL, "--draft-sources", "mtp,crystal", "--classes", "json"]) == 2
    assert "draft_sources is" in capsys.readouterr().err


def test_each_way_goes_first_in_turn():
    """Whatever a machine does to the first call of a pair, it does to each way."""
    order = []

    class Way:
        def __init__(self, name):
            self.name = name

        def seconds(self, *args):
            order.append(self.name)
            return {"a": 2.0, "b": 3.0, "c": 1.0}[self.name]

    class Args:
        pairs, rows, max_tokens = 3, 1, 8

    found = live.compared({name: Way(name) for name in "abc"}, [], Args, "x")
    assert found == [[2.0] * 3, [3.0] * 3] and order[::3] == ["a", "b", "c", "a"]
