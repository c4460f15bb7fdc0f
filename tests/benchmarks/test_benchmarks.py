"""benchmarks/: what is counted and compared, by literals; two commands from end to end on tiny work."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from benchmarks import claim, decode, folders, machine, prompts, records, report, series, workers
from benchmarks.cases import Axes, Case, Ended, Job, first_difference, reference_of
from benchmarks.systems import call, ours
from benchmarks.systems.__main__ import answer
from benchmarks.trace import Trace, primitives
from benchmarks.workers import OURS, Failed, Gone, Setup
from mlx_gemma_mtp import UserError
from mlx_gemma_mtp.cli.plots import panels
from mlx_gemma_mtp.engine.stats import Stats
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.hub import Pair

END = 1
ABOUT = {
    "end_tokens": [END], "dense_bytes": 100, "expert_bytes": 800, "expert_share": 0.25,
    "draft_bytes": 10,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- counting


def test_each_primitive_is_counted_once_and_waits_are_those_that_wait():
    a = mx.array([1.0, 2.0])
    with Trace() as trace:
        b = mx.exp(a)
        mx.async_eval(b)
        assert (trace.primitives, trace.syncs) == (1, 0)
        c = mx.sin(b)
        mx.eval(c, [c, {"again": b}])
        assert (trace.primitives, trace.syncs) == (2, 1)
        assert c.tolist()
        assert trace.syncs == 1, "it was there"
        total = mx.cos(a).sum()
        nodes = primitives(total)
        assert float(total) and float(total)
        assert (trace.primitives, trace.syncs) == (2 + nodes, 2)
    mx.eval(mx.exp(a))
    assert trace.syncs == 2, "the functions are MLX's own again"


def test_rounds_of_a_chosen_draft_length_are_counted_as_they_were(monkeypatch):
    """Three rounds of one row, one of another, no two alike: counts by position are of those that verified so many."""
    rounds = [[(3, 1), (1, 1), (0, 0)], [(2, 2)]]
    results = []
    for row in rounds:
        stats = Stats(ttft_s=0.5)
        for drafted, accepted in row:
            stats.count_round(drafted, accepted)
        results.append(SimpleNamespace(tokens=[5], stats=stats))
    chunks = [SimpleNamespace(index=index, result=result) for index, result in enumerate(results)]
    engine = SimpleNamespace(stream=lambda prompts, params, num_draft_tokens: iter(chunks))
    monkeypatch.setattr(ours, "load", lambda **options: engine)
    timing = ours.Ours("target", "drafter").measured(call.Request([[1], [2]], "auto", 8))
    assert (timing.rounds, timing.passes, timing.drafted, timing.accepted) == (4, 3, 6, 4)
    assert timing.offered == [3, 2, 1] and timing.kept == [3, 1, 0]


# ---------------------------------------------------------------------------------- what runs, in which order


def setup_of(system: str, drafter: bool = True) -> Setup:
    return Setup(system, Pair(None, "drafter" if drafter else None, None), "stock")


def test_only_cases_that_a_system_can_do():
    axes = Axes([0, 2, "auto"], [1, 4], [0.0], ["code"])
    made = {
        (case.setup.system, case.drafts, case.batch) for case in axes.cases(list(map(setup_of, (OURS, *workers.PEERS))))
    }
    assert {drafts for system, drafts, _ in made if system == "mlx-lm"} == {0}
    assert {drafts for system, drafts, _ in made if system == "mlx-vlm"} == {0, 2}
    assert {(d, b) for system, d, b in made if system == "transformers"} == {(0, 1), (2, 1)}
    assert {(d, b) for system, d, b in made if system == OURS} == {(d, b) for d in (0, 2, "auto") for b in (1, 4)}
    assert [case.drafts for case in axes.cases([setup_of(OURS, drafter=False)])] == [0, 0]


def timing(tokens: list[list[int]], **other) -> dict:
    plain = {
        "tokens": tokens, "seconds": 2.0, "first_seconds": 0.5, "prefill_seconds": 1.0, "passes": 2, "rounds": 2,
        "drafted": 0, "accepted": 0, "offered": [], "kept": [], "peak_bytes": None,
    }  # fmt: skip
    return plain | other


class Fake:
    """A worker whose answers are made up; `fails` maps a draft length to what is raised for it."""

    about = ABOUT

    def __init__(self, fails=None):
        self.fails, self.asked, self.closed = fails or {}, [], 0

    def ask(self, method: str, drafts: int, **request):
        if drafts in self.fails:
            raise self.fails[drafts]
        self.asked.append((method, drafts, request.get("seed")))
        return {"primitives_per_round": 7} if method == "trace" else timing([[3, 4, END]] * len(request["prompts"]))

    def close(self) -> None:
        self.closed += 1


def run(monkeypatch, crew: dict[str, Fake], run_alone: bool = False) -> tuple[list[Case], list[str]]:
    monkeypatch.setattr(Setup, "start", lambda self: crew[self.system])
    cases = Axes([0, 2], [1], [0.0], ["code"]).cases([setup_of(system) for system in crew])
    notes: list[str] = []
    job = Job({"code": [[5], [6]]}, 16, 2, lambda case: None, notes.append)
    (job.one_at_a_time if run_alone else job.together)(cases)
    return cases, notes


@pytest.mark.parametrize("alone", [False, True])
def test_calls_go_round_the_cases_and_turn(monkeypatch, alone):
    ours = Fake()
    cases, _ = run(monkeypatch, {OURS: ours}, alone)
    calls = [(drafts, seed) for method, drafts, seed in ours.asked if method == "call" and seed is not None]
    assert calls == [(0, 0), (2, 0), (0, 0), (2, 0), (2, 1), (0, 1), (2, 1), (0, 1)]
    assert all(len(repeat) == 2 for case in cases for repeat in case.timings)
    assert all(case.traced == {"primitives_per_round": 7} for case in cases)


@pytest.mark.parametrize("alone", [False, True])
def test_a_case_that_fails_is_reported_and_the_rest_goes_on(monkeypatch, alone):
    cases, notes = run(monkeypatch, {OURS: Fake(), "mlx-vlm": Fake({2: Failed("ValueError: no")})}, alone)
    job = Job({"code": [[5], [6]]}, 16, 2, print, print)
    lines = [records.record(case, cases, job, ABOUT, None) for case in cases]
    assert {(r["system"], r["drafts"]): r.get("failed") for r in lines} == {
        (OURS, 0): None, (OURS, 2): None, ("mlx-vlm", 0): None, ("mlx-vlm", 2): "ValueError: no",
    }  # fmt: skip
    assert notes == ["mlx-vlm, 2 drafts, 1 rows, T 0, code failed: ValueError: no"]


def test_a_process_that_ends_takes_only_its_own_cases_with_it(monkeypatch):
    lost = Fake({2: Gone("killed")})
    cases, _ = run(monkeypatch, {OURS: Fake(), "mlx-vlm": lost})
    assert lost.closed == 1
    assert [case.failed for case in cases] == [None, None, "killed", "killed"]


def test_a_system_that_cannot_be_loaded_fails_alone(monkeypatch):
    monkeypatch.setattr(Fake, "__init__", lambda self: (_ for _ in ()).throw(Failed("no file")))
    cases = [Case(setup_of("mlx-lm"), 0, 1, 0.0, "code")]
    monkeypatch.setattr(Setup, "start", lambda self: Fake())
    job = Job({"code": [[5]]}, 16, 1, lambda case: None, lambda line: None)
    assert job.together(cases) == {"mlx-lm": {}} and cases[0].failed == "not loaded: no file"
    assert isinstance(Ended("gone").about, dict)


def test_what_a_library_raises_is_an_answer():
    def broken(**arguments):
        raise ValueError("two\nlines")

    assert answer({"call": broken}, '{"call": {"drafts": 2}}') == {"error": "ValueError: two lines"}
    assert answer({"call": lambda drafts: drafts}, '{"call": {"drafts": 2}}') == {"result": 2}


def test_prompts_fill_a_wide_batch():
    job = Job({"code": [[1], [2], [3]]}, 16, 1, print, print)
    assert job.calls(2, "code") == [[[1], [2]], [[3], [1]]]
    assert job.calls(4, "code") == [[[1], [2], [3], [1]]]


def test_every_class_has_its_prompts():
    for name in prompts.CLASSES:
        texts = prompts.of(name)
        assert len(texts) == len(set(texts)) == prompts.EACH and all(text.strip() for text in texts)
    assert all(len(text) > 4000 for text in prompts.of("long"))


# ---------------------------------------------------------------------------------------------- figures


def measured(system=OURS, drafts=0, batch=2, text="code", **calls) -> Case:
    case = Case(setup_of(system), drafts, batch, 0.0, text)
    case.timings = [[timing([[3, 4, 5, END], [3, 4, END]], **calls)]]
    return case


def test_a_record_counts_text_and_decoding_time():
    job = Job({"code": [[5], [6]]}, 16, 1, print, print)
    plain = measured()
    drafted = measured(drafts=3, passes=2, rounds=4, drafted=12, accepted=3, offered=[4, 4, 4], kept=[2, 1, 0])
    found = records.record(drafted, [plain, drafted], job, ABOUT, bandwidth=1e-6)
    assert (found["tokens"], found["tokens_per_s"], found["decode_tokens_per_s"]) == (5, 2.5, 3.0)
    assert (found["ms_per_token"], found["ms_per_round"], found["first_token_ms"]) == (666.67, 500.0, 500.0)
    assert (found["tokens_per_round"], found["acceptance_by_position"]) == (1.75, [0.5, 0.25, 0.0])
    assert (found["positions_per_round"], found["target_forwards_per_token"]) == (8.0, 0.6667)
    bytes_a_token = (100 + 800 * (1 - 0.75**8) + 30) * 0.6667
    assert found["weight_bytes_per_token"] == round(bytes_a_token)
    assert found["bandwidth_share"] == pytest.approx(bytes_a_token * 3 / 1e3, abs=1e-3)
    assert (found["equal"], found["compared"], found["reference"]) == (2, 2, OURS)
    assert "gpu_utilisation" not in found and "peak_memory_gb" not in found
    assert "bandwidth_share" not in records.record(drafted, [plain, drafted], job, ABOUT, None)


def test_texts_are_compared_with_mlx_lm_and_the_place_is_told():
    ours, theirs, wide = measured(), measured("mlx-lm"), measured("mlx-lm", batch=4)
    assert reference_of(ours, [ours, wide, theirs]) is theirs
    assert reference_of(theirs, [ours, theirs]) is None
    ours.timings[0][0]["tokens"][1] = [3, 9, END]
    found = records.equality(ours, [ours, theirs], [[[3, 4, 5], [3, 9], [3, 4, 5]]], {END}, prompts=2)
    assert (found["equal"], found["compared"]) == (2, 3)
    assert found["first_difference"] == {"prompt": 1, "position": 1, "token": 9, "reference": 4}
    assert first_difference([[1, 2]], [[1]]) == {"prompt": 0, "position": 1, "token": None, "reference": 2}
    assert first_difference([[1, 2]], [[1, 2]]) is None


def line(system=OURS, drafts=0, batch=1, text="code", rate=10.0, **other) -> dict:
    return {
        "kind": "decode", "run": "2026-11-22T10:00:00+00:00", "model": "m", "system": system, "drafts": drafts,
        "batch": batch, "temperature": 0.0, "text": text, "blas": "stock", "machine": {"cpu": "c"},
        "versions": {"mlx": "1"}, "tokens_per_s": rate, "tokens_per_s_all": [rate], "decode_tokens_per_s": rate,
        "ms_per_round": 5.0, "positions_per_round": 1.0,
    } | other  # fmt: skip


LINES = [
    line(), line(drafts=2, rate=20.0, acceptance_by_position=[0.8, 0.6], positions_per_round=3.0),
    line(text="prose", rate=10.0), line(text="prose", drafts=2, rate=5.0, acceptance_by_position=[0.4, 0.1]),
    line(batch=4, rate=30.0), line(batch=4, drafts=2, rate=60.0), line("mlx-lm", rate=8.0),
    line("mlx-vlm", failed="ValueError: no"),
]  # fmt: skip


def test_series():
    assert series.by_batch(LINES) == {f"{OURS}, 2 drafts": {1: pytest.approx(1.0), 4: pytest.approx(2.0)}}
    worse = line(drafts=4, rate=5.0)
    assert series.by_class([*LINES, worse]) == {f"{OURS}, T 0": {"code": 2.0, "prose": 0.5}}
    chosen = line(drafts="auto", acceptance_by_position=[0.5, 1.0, 1.0])
    assert series.acceptance([*LINES, chosen])["T 0, code"] == {1: 0.8, 2: 0.6}
    assert series.round_cost(LINES)[f"{OURS}, 1 row"] == {1: pytest.approx(5.0), 3: pytest.approx(5.0)}
    assert series.rates(LINES)["plain"] == {OURS: pytest.approx(10.0), "mlx-lm": pytest.approx(8.0)}
    assert series.rates(LINES)["MTP, best draft length"] == {OURS: pytest.approx(20.0)}  # of code, which mlx-lm has too


def test_runs_are_not_compared_with_each_other():
    later = line(rate=1.0, run="2026-11-22T11:00:00+00:00")
    assert [len(records) for _, records in report.parts([*LINES, later])] == [len(LINES), 1]


# ------------------------------------------------------------------------------------------- the claim


def claimed(plain8=70.0, mtp8=100.0, step8=20.0) -> list[dict]:
    made = []
    for batch, rate, step in ((1, 10.0, 10.0), (4, 30.0, 14.0), (8, plain8, step8)):
        made += [
            line(batch=batch, rate=rate, ms_per_round=step),
            line("mlx-vlm", batch=batch, rate=2 * rate, ms_per_round=step),
        ]
    return [
        *made,
        line(batch=4, drafts=2, rate=90.0),
        line(batch=8, drafts=2, rate=mtp8),
        line(batch=8, drafts=4, rate=1.0),
    ]


def test_the_verdict_is_over_the_better_baseline_at_the_same_batch():
    lines = claim.verdict(claimed(mtp8=280.0), True)
    assert (
        f"8 rows: {OURS} with 2 drafts over the better plain decoding: 2.00x (code 2.00x; whole calls 2.00x)" in lines
    )
    assert lines[-1] == "verdict: 2.2x at 4 or 8 rows is not reached by this package: 2.00x"
    assert claim.verdict(claimed(mtp8=310.0), True)[-1].startswith("verdict: 2.2x at 4 or 8 rows is reached")
    rehearsal = claim.verdict(claimed(), False)
    assert rehearsal[0].startswith("A rehearsal") and rehearsal[-1].startswith("of the rehearsal: ")


def test_a_baseline_that_is_not_sane_gives_no_verdict():
    """184 ms for 4 rows and 75 for 8, as in a published table."""
    assert claim.verdict(claimed(mtp8=310.0, step8=7.0), True)[-1] == "verdict: none; run again on a quiet machine"
    assert claim.insane([line(ms_per_round=10.0), line(batch=4, ms_per_round=50.0)], OURS)


def test_no_repeat_begins_that_would_end_too_late():
    times = iter([0.0, 6.0, 12.0, 18.0])
    budget = claim.Budget(20.0, lambda: next(times))
    assert [budget(), budget(), budget()] == [False, False, True]


def test_a_result_is_whole_or_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError):
        claim.save(tmp_path / "folder", {"claim": "text"})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    claim.save(tmp_path / "a.json", {"claim": "text", "records": LINES})
    assert report.read([tmp_path / "a.json"]) == LINES


# -------------------------------------------------------------------------------------------- machine


def test_what_macos_prints_is_read_and_what_is_not_there_is_absent():
    gpu = '"PerformanceStatistics" = {"Device Utilization %"=87,"Renderer Utilization %"=3} "gpu-core-count" = 40'
    assert machine.read_sensors(gpu, '"PowerTelemetryData" = {"SystemLoad"=31500}') == {
        "gpu_utilisation": 87.0, "system_power_w": 31.5,
    }  # fmt: skip
    assert machine.read_sensors("", "") == {}
    assert machine.bandwidth({"cpu": "Apple M4 Max", "gpu_cores": 40}) == 546
    assert machine.bandwidth({"cpu": "Apple M4 Max"}) is None and machine.bandwidth({"cpu": "AMD EPYC"}) is None
    assert machine.bandwidth({"cpu": "Apple M1"}) == 68


# ------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--against", "ollama"], "--against has 'ollama', expected of mlx-lm, mlx-vlm, transformers"),
        (["--classes", "poems"], "--classes has 'poems'"),
        (["--num-draft-tokens", "0-9"], "expected 0 to 8, or auto"),
        (["--batch", "0"], "--batch is [0], expected 1 or more"),
        (["--hf-path", "/nowhere", "--batch", "1"], "/nowhere has no config.json"),
        (["--json", "/nowhere/at/all.jsonl"], "create /nowhere/at"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, expected):
    pytest.importorskip("rich")
    assert decode.main(flags) == 2
    assert expected in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_lists():
    assert decode.draft_lengths("0,2-4,auto") == [0, 2, 3, 4, "auto"]
    assert decode.draft_lengths("auto") == ["auto"] and decode.numbers("1,4,4") == [1, 4]
    with pytest.raises(UserError):
        decode.parser().parse_args(["--batch", "many"])


def test_a_peer_that_is_not_installed_is_skipped_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    notes: list[str] = []
    args = argparse.Namespace(against=["mlx-vlm"], model=None, hf_path=None, draft_model="auto")
    assert [setup.system for setup in decode.setups(args, tmp_path, notes.append)] == [OURS]
    assert notes == ["mlx-vlm is skipped: mlx_vlm is not installed; pip install 'mlx-gemma-mtp[bench]'"]


def test_the_bundled_pair_in_hugging_face_layout_converts_to_itself(tmp_path):
    """Bit for bit, in float32 as in the direct copy."""
    bundled = hub.find_pair(None, "auto")
    back = folders.converted(folders.hugging_face(bundled, tmp_path / "hf"), tmp_path / "mlx")
    copy = folders.float32(bundled, tmp_path / "copy")
    for made, expected in ((back.target, copy.target), (back.drafter, copy.drafter)):
        left, right = (mx.load(str(folder / "model.safetensors")) for folder in (made, expected))
        assert left.keys() == right.keys() and all(mx.array_equal(left[name], right[name]) for name in left)
    assert folders.hashes(back).keys() == {"target", "drafter"} and len(set(folders.hashes(back).values())) == 2


def test_the_report_names_its_axes_and_replaces_only_reports(tmp_path, capsys):
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib is not installed (extra `bench`)")
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("an older one")
    assert report.main([str(file), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"1-{name}.png" for name in plots.PICTURES} and all(name in page for name in pictures)
    assert "failed: mlx-vlm, plain, 1 rows, T 0, code: ValueError: no" in page
    capsys.readouterr()
    assert report.main([str(file), "--out", str(tmp_path)]) == 2
    assert "holds something that is no report" in capsys.readouterr().err and file.exists()
    for numbers, paint in plots.PICTURES.values():
        _, ((axes,),) = panels(1, 1, 6, 4)
        paint(axes, numbers(LINES))
        assert all("(" in label or "second" in label or label in ("system", "class of prompts") for label in
                   (axes.get_xlabel(), axes.get_ylabel()))  # fmt: skip
    (tmp_path / "bad").write_text("[1]\n")
    assert report.main([str(tmp_path / "bad"), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_decode_end_to_end_with_a_peer_that_cannot_load(tmp_path, monkeypatch, capsys):
    """Ours in a process of its own, on the bundled pair; the other's process ends before it has loaded."""
    pytest.importorskip("rich")
    real = decode.setups
    monkeypatch.setattr(decode, "encoded", lambda *a: {"code": [[2, 105, 2364, 107, 10, 20, 30]]})  # seconds of imports
    monkeypatch.setattr(
        decode,
        "setups",
        lambda *a: [*(ours := real(*a)), replace(ours[0], system="lost", pair=Pair(ours[0].pair.target, None, None))],
    )
    flags = ["--batch", "1", "--num-draft-tokens", "0,2", "--classes", "code", "--prompts", "1", "--repeats", "1"]
    assert decode.main([*flags, "--max-tokens", "6", "--json", str(tmp_path / "out.jsonl")]) == 0
    made = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    plain, drafted, peer = made
    assert plain["tokens"] == drafted["tokens"] == 6 and drafted["equal"] == 1 and drafted["tokens_per_round"] > 1
    assert plain["host_syncs_per_round"] == 1 and plain["primitives_per_round"] > 100
    assert plain["versions"]["mlx"] and plain["machine"]["cpu"] and len(plain["folders"][OURS]["target"]) == 64
    assert peer["failed"].startswith("not loaded: ") and "invalid choice: 'lost'" in peer["failed"]
    assert "lost failed to load" in capsys.readouterr().err


def test_overhead(tmp_path, capsys):
    """Parts of a round on the bundled pair; one line of JSON."""
    pytest.importorskip("rich")
    from benchmarks import overhead

    flags = ["--max-tokens", "8", "--num-draft-tokens", "2", "--repeats", "1", "--top", "3"]
    assert overhead.main([*flags, "--json", str(tmp_path / "o.jsonl")]) == 0
    found = json.loads((tmp_path / "o.jsonl").read_text())
    assert found["host_syncs_per_round"] == 1 and len(found["profile"]) == 3
    assert found["loop_ms"].keys() >= {"draft", "verify", "logits", "accept", "dispatch", "readback", "rest"}
    assert found["primitives"]["verify"] > 100 and found["primitives"]["draft"] > 0
    assert "readback" in capsys.readouterr().out
    (ids,) = decode.encoded(hub.DEMO / "target", ["code"], 1)["code"]
    assert ids[0] == 2 and len(ids) > 20, "a chat turn; here, because the imports that it takes are done"


def test_vocabulary(tmp_path, capsys):
    """Every setting, of a place and of a round, on a toy vocabulary, whose ratios are nobody's limit."""
    pytest.importorskip("rich")
    from benchmarks import vocabulary

    file = tmp_path / "v.jsonl"
    assert vocabulary.main(["sampling", "--entries", "10000", "--repeats", "1", "--json", str(file)]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {each["path"] for each in found} >= {*vocabulary.PLACE, *vocabulary.ROUND, "log-probabilities"}
    limits = {(each["part"], each["path"]): (each["over"], each["limit"]) for each in found}
    assert limits["one place", "top-p 0.95"] == ("argmax", 6) and limits["one place", "no filter"] == ("softmax", 2)
    assert limits["a round of 8 x 5", "default"] == ("argmax", 45)
    assert all(each["wall_ms"] > 0 and len(each["wall_ratio"]) == 3 for each in found)
    assert "a vocabulary of 10,000" in capsys.readouterr().out
    over = {"cpu_ratio": (1, 7, 8), "wall_ratio": (1, 7, 8), "limit": 6}
    assert (
        not vocabulary.within(over)
        and vocabulary.within(over | {"limit": 7})
        and vocabulary.within(over | {"limit": None})
    )
    assert vocabulary.main(["--entries", "10"]) == 2
    assert "--entries is 10, expected at least 1024" in capsys.readouterr().err
