"""benchmarks.gpu without a GPU: which step begins when, what a summary says, what counts as a near-tie."""

import json
import os
import sys
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.gpu import compiled, kernels, run, texts
from benchmarks.gpu.pairs import FORMATS, loaded
from benchmarks.gpu.run import Run, Step, chosen, following, kept, of_texts, short, steps, timetable
from mlx_gemma_mtp.checks.equality import Divergence, divergence
from mlx_gemma_mtp.cli.prompts import PROMPTS

SECONDS = 350.0  # of the 360 that README.md names, less unpacking and the first facts


def step(name: str, limit: float = 30.0, after: tuple[str, ...] = (), code: str = "") -> Step:
    return Step(name, lambda out, seconds: [sys.executable, "-c", code, str(out)], limit, after=after)


# ---------------------------------------------------------------------------------------------- plan and budget


@pytest.mark.parametrize("plan", run.KEPT)
def test_every_step_gets_its_limit_even_if_all_take_it(tmp_path, plan):
    beside, alone = steps(tmp_path, plan)
    reserve = kept(alone, SECONDS, plan)
    for some, at_once, seconds in ((beside, run.BESIDE, SECONDS - reserve), (alone, 1, reserve)):
        table = timetable(some, at_once, seconds)
        for each in some:
            begin, end = table[each.name]
            assert end - begin == each.limit + run.GRACE, (each.name, begin, end)
            assert end <= seconds
            assert all(table[name][1] <= begin for name in each.after if name in table), each.name
            assert sum(first <= begin < last for first, last in table.values()) <= at_once


def test_what_matters_is_there(tmp_path):
    beside, alone = steps(tmp_path)
    assert {each.name for each in beside} == set(run.MATTER)
    assert [each.name for each in alone] == [each.name for each in steps(tmp_path, "size")[1]]


@pytest.mark.parametrize("plan", run.KEPT)
def test_names_are_unique_and_what_comes_before_exists(tmp_path, plan):
    beside, alone = steps(tmp_path, plan)
    names = [each.name for each in (*beside, *alone)]
    assert len(set(names)) == len(names)
    assert {name for each in (*beside, *alone) for name in each.after} <= set(names)
    files = {"".join(c if c.isalnum() else "_" for c in name) for name in names}
    assert len(files) == len(names), "each has files of its own"


def test_a_choice_of_steps_brings_what_they_come_after(tmp_path):
    beside, alone = steps(tmp_path, "checks")
    names = [each.name for each in chosen([*beside, *alone], "4bit")]
    assert names[:2] == ["compile bundled", "quantise"] and "texts e2b 4bit" in names
    assert "doctor" not in names and "memcheck" not in names
    assert [each.name for each in chosen(alone + beside, "doctor")] == ["doctor", "compile bundled", "compile 26B"]


def test_no_seconds_are_kept_for_steps_that_nobody_asked_for(tmp_path):
    _, alone = steps(tmp_path, "checks")
    assert kept([], 200.0) == 0
    assert kept(alone, 1000.0) == sum(each.limit + run.GRACE for each in alone)
    assert kept(alone, 100.0) == run.KEPT["checks"] * 100, "a short run asks first whether results are right"


def test_what_never_runs_holds_nothing_up():
    first, second = step("first"), step("second", after=("first",))
    assert following([second], [], set(), 100) is not None, "first is no part of this run"
    assert following([second], [first], set(), 100) is None
    assert following([first, second], [], set(), 100).name == "first"
    assert following([second], [], {"first"}, 100).name == "second"


def test_a_step_is_cut_to_what_is_left_or_not_begun():
    assert following([step("a", 30)], [], set(), 30).limit == 30 - run.GRACE
    assert following([step("a", 30)], [], set(), run.LEAST + run.GRACE - 1) is None


def test_steps_that_fail_or_hang_end_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0.2)
    monkeypatch.setattr(run, "LEAST", 0.0)
    finding = "import sys; open(sys.argv[1], 'a').write('{\"what\": 1}\\n')"
    some = [
        step("hangs", 0.5, code="import time; time.sleep(600)"),
        step("fails", 20, code="raise SystemExit(3)"),
        step("finds", 20, code=finding),
        step("later", 20, after=("hangs", "fails"), code=finding),
        step("absent", 20, after=("of another run",), code=finding),
    ]
    about = Run(tmp_path / "out", tmp_path / "work", 120)
    about.take(some, 2, 0.0)
    states = json.loads((tmp_path / "out/gpu_summary.json").read_text())["steps"]
    assert {name: each["state"] for name, each in states.items()} == {
        "hangs": "stopped at its limit", "fails": "ended with 3", "finds": "ended with 0", "later": "ended with 0",
        "absent": "ended with 0",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out/gpu_results.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines) == ["absent", "finds", "later"]


def test_what_others_wait_for_goes_first(tmp_path):
    beside, alone = steps(tmp_path / "made")
    assert {each.name for each in beside if not each.nice} == {"compile bundled", "quantise"}
    assert not any(each.nice for each in alone)
    code = "import os, sys; open(sys.argv[1], 'a').write('{\"nice\": %d}\\n' % os.nice(0))"
    about, now = Run(tmp_path / "out", tmp_path / "work", 120), os.nice(0)
    about.take([step("first", code=code), replace(step("second", code=code), nice=3)], 2, 0.0)
    assert about.found["second"][0]["nice"] - about.found["first"][0]["nice"] == min(3, 19 - now)


def test_what_the_time_does_not_hold_is_skipped_and_said(tmp_path):
    about = Run(tmp_path / "out", tmp_path / "work", 120)
    about.take([step("a")], 2, 110.0)
    assert about.states == {"a": {"state": "skipped: no time left", "seconds": 0.0}}


def test_a_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    assert run.main([str(tmp_path / "out"), "--dry", "--seconds", "60"]) == 0
    said = capsys.readouterr().out
    assert "compile bundled" in said and "no time" in said and not (tmp_path / "out").exists()


def test_what_began_it_counts_where_an_end_is_given(tmp_path, capsys, monkeypatch):
    """At 1,300 an end at 1,360 leaves the 60 seconds that were asked for otherwise; one that is past leaves none."""
    monkeypatch.setattr(run.time, "time", lambda: 1300.0)
    said = []
    for flags in (["--seconds", "60"], ["--until", "1360"], ["--until", "1200"]):
        assert run.main([str(tmp_path / "out"), "--dry", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and all(line.endswith("no time") for line in said[2].splitlines())


# ------------------------------------------------------------------------------------------------- the summary


def test_a_skipped_line_is_no_case_and_errors_are_by_type():
    lines = [
        {"kernel": "grouping", "what": "self-check", "ok": True},
        {"kernel": "down", "dtype": "float32", "ok": True, "errors": {"float64": 2e-7}},
        {"kernel": "down", "dtype": "bfloat16", "ok": True, "errors": {"float64": 1e-3, "probability": 2e-3}},
        {"kernel": "down", "dtype": "float32", "ok": False, "errors": {"float64": 0.5}},
        {"what": "skipped"},
    ]
    found = short({"kernels bfloat16": lines})["kernels bfloat16"]
    assert (found["cases"], found["bad"], found["all"]) == (4, 1, False)
    assert found["largest error"] == {"float32": 0.5, "bfloat16": 2e-3} and found["first bad"] == [lines[3]]
    assert short({"memcheck": lines[:2]})["memcheck"]["all"]


def cell(margins, places, **more):
    about = {"what": "cell", "temperature": 1.0, "texts": 8, "differ": len(places), "errors": [], "far": 0}
    return about | {"margins": margins, "places": places} | more


def test_a_place_that_comes_up_again_is_one_place():
    lines = [
        {"what": "engine"}, {"what": "plain", "as_cpu": 7, "of": 8},
        cell([-0.05, 0.01], [[0, 16, 5, 6], [1, 3, 7, 8]]), cell([-0.05], [[0, 16, 5, 6]]),
        cell([2.0], [[0, 16, 5, 6]], temperature=0.0, far=1), {"what": "raised", "error": "out of memory"},
    ]  # fmt: skip
    found = short({"texts e2b 4bit": lines})["texts e2b 4bit"]
    assert (found["cells"], found["texts"], found["differ"], found["places"], found["far"]) == (3, 24, 4, 3, 1)
    assert found["largest margin"] == 2.0 and found["as_cpu"] == ["7/8"] and found["errors"] == ["out of memory"]
    assert short({"texts e2b 4bit": []})["texts e2b 4bit"]["largest margin"] is None


def test_a_device_that_is_not_free_is_seen_by_its_smallest_call():
    lines = [{"what": "smallest call", "alone_us": 2406.7}, {"what": "copy", "alone_us": 9.0}]
    assert short({"times": lines})["times"] == {"cases": 2, "smallest call, us": 2406.7}


# ------------------------------------------------------------------------------------------------ near-ties, cases


@cache
def engine():
    return loaded("e2b", "float32")


@pytest.mark.parametrize("temperature", texts.TEMPERATURES)
def test_the_margin_is_by_what_was_drawn(temperature):
    """Of a token that was drawn it is above 0 against any other, whatever the gap of their logits."""
    prompt, params = texts.prompts()[0], texts.settings()[temperature]
    first, *others = json.loads(texts.RECORD.read_text())["e2b"][str(temperature)]
    every = [
        divergence(engine(), 0, prompt, first, [*first[:at], other])
        for at in range(0, 12, 3)
        for other in {token for text in others for token in text[:8]} - {first[at]}
    ]
    margins = [texts.margin(each, params, len(engine().text.encode(prompt))) for each in every]
    gaps = [each.gap for each in every]
    assert min(margins) > 0 and len(margins) > 50
    assert min(gaps) < 0 if temperature else margins == gaps


def test_a_place_where_the_h100_parted_is_a_near_tie():
    """Its logits are 7.6 apart, and what the draw compares is not: texts.json's prompt 4 of the E2B kind, token 25."""
    prompt = len(engine().text.encode(texts.prompts()[3]))
    parted = Divergence(3, 24, 1923, 1561, 8.8674, 1.2211)
    assert abs(texts.margin(parted, texts.settings()[1.0], prompt)) < 0.01
    assert texts.margin(parted, texts.settings()[0.0], prompt) == pytest.approx(7.6463)


def test_a_wrong_token_is_found_and_is_no_near_tie(tmp_path, monkeypatch):
    right = engine().generate

    def wrong(prompt, params, num_draft_tokens=0):
        result = right(prompt, params, num_draft_tokens=num_draft_tokens)
        if num_draft_tokens:
            for each in result:
                each.tokens[2] += 1
        return result

    monkeypatch.setattr(texts, "TOKENS", 4)
    monkeypatch.setattr(texts, "loaded", lambda pair, form: engine())
    monkeypatch.setattr(texts, "prompts", lambda: PROMPTS[:2])
    monkeypatch.setattr(texts, "cells", lambda: [(0.0, 1, 0), (0.0, 2, 2), (1.0, 1, 2)])
    recorded = {"e2b": {str(t): [engine().generate(p, params).tokens for p in PROMPTS[:2]]
                        for t, params in texts.settings().items()}}  # fmt: skip
    (tmp_path / "texts.json").write_text(json.dumps(recorded))
    monkeypatch.setattr(texts, "RECORD", tmp_path / "texts.json")
    monkeypatch.setattr(engine(), "generate", wrong)
    texts.compare("e2b", "float32", tmp_path / "out", 60.0)
    found = of_texts([json.loads(line) for line in (tmp_path / "out").open()])
    assert (found["texts"], found["differ"], found["far"], found["places"]) == (6, 4, 4, 4)
    assert found["as_cpu"] == ["2/2", "2/2"] and not found["errors"]


def test_formats_have_a_tolerance():
    assert texts.NEAR.keys() == set(FORMATS)


def test_cells_are_all_there_once_and_the_first_are_first():
    every = texts.cells()
    assert len(set(every)) == len(every) == 2 * (len(texts.ROWS) * len(texts.DRAFTS) - 1)
    assert {cell[1:] for cell in every[:8]} == set(texts.FIRST)


def test_a_part_of_the_kernels_is_of_its_type():
    for part in ("float32", "bfloat16", "float16"):
        cases = kernels.planned(part)
        assert {kernels.named(dtype) for _, _, dtype in cases} == {part}
        assert {form for _, form, _ in cases} == set(kernels.FORMATS)
    assert kernels.planned("checks") == []


def test_small_cases_take_types_in_turn():
    """What the seconds cut off is not one type's: a sanitizer once saw float32 alone."""
    cases = kernels.planned("small")
    assert [kernels.named(dtype) for _, _, dtype in cases[:3]] == ["float32", "bfloat16", "float16"]
    assert len({(shape, form) for shape, form, _ in cases[:3]}) == 1
    assert not any(shape in (*kernels.LARGE, "26B", "E2B as if dense") for shape, _, _ in cases)


def test_products_end_with_their_seconds(tmp_path, monkeypatch):
    monkeypatch.setitem(compiled.CASES, "bundled", [("dense", 4, 12), ("dense", 8, 12)])
    begun = []

    def popen(command):
        begun.append(command[3:])
        return Product(ends="24" not in command)

    class Product:
        def __init__(self, ends):
            self.returncode = 0 if ends else None

        def poll(self):
            return self.returncode

        def kill(self):
            self.returncode = -9

    monkeypatch.setattr(compiled.subprocess, "Popen", popen)
    compiled.main("bundled", tmp_path / "a", 60.0)
    assert begun == [["bundled", "dense", "4", "12"], ["bundled", "dense", "8", "12"]]
    assert [json.loads(line)["ended with"] for line in (tmp_path / "a").open()] == [0, 0]
    monkeypatch.setitem(compiled.CASES, "bundled", [("dense", 4, 24)])
    compiled.main("bundled", tmp_path / "b", 0.2)
    assert [json.loads(line)["ended with"] for line in (tmp_path / "b").open()] == [-9]
