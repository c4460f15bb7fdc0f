"""The draft length in the loop of the bundled pair, and the costs that it goes by: measured, kept and shown."""

import json

import mlx.core as mx
import pytest
from cost_tables import random_table, table

from mlx_gemma_mtp import SamplingParams, calibrate, load
from mlx_gemma_mtp.cache.spec import with_bits
from mlx_gemma_mtp.checks import speedup
from mlx_gemma_mtp.engine import calibration
from mlx_gemma_mtp.engine.calibration import KINDS, Costs
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading
from mlx_gemma_mtp.ops import expert_paths, kernels
from mlx_gemma_mtp.speculative.auto import Auto
from mlx_gemma_mtp.speculative.choice import (
    GRAMMAR,
    LIMIT,
    OFF,
    REASONS,
)
from mlx_gemma_mtp.speculative.costs import MAX_DRAFTS, ROWS, WIDEST, Attention, CostFile, CostTable

SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True, seed=3)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, seed=0)
PROMPTS = ["def fibonacci(n):", "What is a list?", "import os", "Write a class.", "x = 1", "Why?", "for i in", "return"]


@pytest.fixture(scope="module")
def engine():
    return load(dtype="float32")


def with_table(engine, costs: CostTable):
    """The engine, its controllers new; no clock reaches them."""
    engine.depth.autos |= {kind: Auto(costs, frozen=True) for kind in KINDS}
    return engine


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 8])
def test_tokens_never_depend_on_it(engine, params, rows):
    """Equal to plain decoding, alone, in float32, whatever the table says."""
    plain = [engine.generate(prompt, params, num_draft_tokens=0).tokens for prompt in PROMPTS[:rows]]
    lengths = set()
    for seed in range(4):
        results = with_table(engine, random_table(seed)).generate(PROMPTS[:rows], params)
        assert [result.tokens for result in results] == plain
        lengths |= {length for result in results for length in result.stats.depths}
    assert len(lengths) >= 4


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 8])
def test_same_table_same_choices(engine, params, rows):
    ragged = [SamplingParams(**{**vars(params), "max_tokens": 12 + 5 * i}) for i in range(rows)]
    first, second = (
        [r.stats.depths for r in with_table(engine, table(0.1, 0.1)).generate(PROMPTS[:rows], ragged)] for _ in range(2)
    )
    assert first == second and sum(sum(r.values()) for d in first for r in d.values()) > rows


def test_mtp_that_cannot_pay_is_off_and_says_so(engine):
    result = with_table(engine, table(1.0, 0.5)).generate(
        PROMPTS[0], SamplingParams(**{**vars(GREEDY), "max_tokens": 8})
    )
    assert not result.stats.mtp and result.stats.mtp_reason == REASONS[OFF]
    assert result.stats.depths == {0: {OFF: 6, LIMIT: 1}}


def test_without_learning_equal_calls_get_equal_lengths(engine, monkeypatch):
    """Also after other calls; without them the second call knows more than the first."""
    monkeypatch.setattr(engine.depth, "frozen", True)
    depths = [with_table(engine, table(0.1, 0.1)).generate(PROMPTS[0], GREEDY).stats.depths]
    engine.generate(PROMPTS[1:3], SAMPLED)
    depths += [engine.generate(PROMPTS[0], GREEDY).stats.depths for _ in range(2)]
    assert depths[0] == depths[1] == depths[2]
    assert all(auto.frozen for auto in engine.depth.autos.values())


def test_no_learning_from_load_and_from_the_command_line(monkeypatch):
    from mlx_gemma_mtp import generate

    frozen, usual = load(dtype="float32", learning=False), load(dtype="float32")
    assert not frozen.settings.learning and frozen.depth.frozen and not usual.depth.frozen
    asked = []
    monkeypatch.setattr("mlx_gemma_mtp.engine.load.load", lambda *a, **options: asked.append(options["learning"]))
    for flags in ([], ["--no-learning"]):
        generate.load_engine(generate.parser().parse_args(["--prompt", "x", *flags]), 1)
    assert asked == [True, False]


def test_where_nothing_is_drafted_noise_is_no_speedup(engine):
    off = speedup.measure(with_table(engine, table(1.0, 0.5)), PROMPTS[:1], GREEDY)
    assert off.drafted == 0 and off.tokens == 40
    assert str(off).startswith("MTP: off, drafts do not pay") and "x)" not in str(off)
    on = speedup.measure(with_table(engine, table(0.01, 0.01)), PROMPTS[:1], GREEDY)
    assert on.drafted > 0 and f"({on.ratio:.2f}x) over 40 tokens, the same text" in str(on)


def test_drafting_follows_a_schema(engine):
    """JSON by the bundled pair, which drafts Python: most drafts are refused, and soon few are made."""
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    params = SamplingParams(max_tokens=60, temperature=0.0, json_schema=json.dumps(schema), seed=0)
    auto = with_table(engine, table(0.1, 0.1)).depth.autos["greedy"]
    made, choose = [], auto.choose
    auto.choose = lambda *about: made.append(choose(*about)) or made[-1]
    drafted, lengths = [], []
    for _ in range(3):
        made.clear()
        stats = engine.generate("Invent a user.", params).stats
        drafted.append((sum(each.drafts for each in made), stats.drafted))
        lengths.append(stats.depths)
    assert GRAMMAR in {reason for each in lengths for reasons in each.values() for reason in reasons}
    assert drafted[2][0] <= 2 * drafted[2][1] + 8, drafted


def test_a_number_pins_it(engine):
    result = engine.generate(PROMPTS[0], GREEDY, num_draft_tokens=2)
    assert {length: set(why) for length, why in result.stats.depths.items() if length == 2} == {2: {"fixed"}}


def test_costs_are_measured_kept_and_moved_by_use(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(calibration, "SLOW", 1e9)  # on a busy machine a notice would come
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path), notices.append, seconds=1e9)
    prompt = engine.text.encode("def f(x):\n    return x\n")
    first = costs.table(engine.target, engine.drafter, prompt)
    assert costs.file.path.exists() and costs.table(engine.target, engine.drafter, prompt) == first
    assert notices == []
    costs.learn({(1, 0, 0): 1.0, (1, 0, 5): 2.5}, {(1, 0): 0.25})  # overwrites, whatever there was
    verified, drafted, learned = costs.file.read()
    assert (verified[1, 0, 0], verified[1, 0, 5], drafted[1, 0]) == (1.0, 2.5, 0.25)
    assert (1, 0, 4) in verified and learned == {(1, 0, 5)}  # what was not met stays
    costs.learn({(1, 4096, 0): 2.0, (1, 4096, 5): 9.0}, {(1, 4096): 0.5})  # after a long text
    assert costs.file.read()[0][1, 0, 5] == 2.5 and costs.kept().verify_at(1, 4096)[5] == pytest.approx(9.0)
    costs.file.path.unlink()
    costs.learn({}, {})
    assert not costs.file.path.exists()
    costs.learn({(2, 0, 0): 1.0, (2, 0, 1): 1.5}, {(2, 0): 0.25})  # starts a file
    assert costs.kept().rounds_at(2, 0)[:2] == pytest.approx([1.0, 1.75]) and notices == []


class StubBench:
    """A machine whose plain step takes `step` seconds, half as much again for each further token of a verify."""

    step = 0.0
    clock = 0.0

    def __init__(self, target, drafter, prompt, params, rows, context, drafting, specs):
        self.rows, self.context, self.widths = rows, context, []

    def rounds(self, width):
        self.widths.append(width)
        verify = self.step * self.rows * (1 + width / 2)
        StubBench.clock += 4 * verify
        return [verify + width * self.step / 10] * (2 if width <= MAX_DRAFTS else 1), [verify]


@pytest.mark.parametrize("milliseconds", [1, 30, 150, 300, 1000, 30000])
def test_a_slow_machine_is_measured_too(tmp_path, monkeypatch, milliseconds):
    """One pass over two widths is enough."""
    monkeypatch.setattr(calibration, "Bench", StubBench)
    monkeypatch.setattr("time.perf_counter", lambda: StubBench.clock)
    monkeypatch.setattr(StubBench, "step", milliseconds / 1000)
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path), notices.append)
    table = costs.table(None, None, [5, 6, 7])
    assert len(notices) == (milliseconds > 75)  # what takes over a second says what it does
    verified, drafted, _ = costs.file.read()
    assert {(1, 0, 0), (1, 0, 1)} <= set(verified) and set(drafted) == {(1, 0)}
    assert not notices or "calibrate" in notices[0]  # of long texts, which are estimated
    assert [each / table.verify_at(1, 3)[0] for each in table.rounds_at(1, 3)[:5]] == pytest.approx(
        [1, 1.6, 2.2, 2.8, 3.4]
    )
    assert costs.table(None, None, [5, 6, 7]) == table  # from the file
    assert len(verified) == (4 if milliseconds <= 30 else 3 if milliseconds <= 150 else 2)


@pytest.mark.parametrize("writable", [True, False])
def test_rows_are_timed_when_they_come_first(tmp_path, monkeypatch, writable):
    """Each number of rows once, whatever was known of others; where no file can be written, in every process."""
    made = []

    class Counted(StubBench):
        def __init__(self, *about):
            super().__init__(*about)
            made.append(self.rows)

    monkeypatch.setattr(calibration, "Bench", Counted)
    monkeypatch.setattr(StubBench, "step", 0.001)
    if not writable:
        (tmp_path / "costs").write_text("a file where the folder should be")
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path / "costs"), notices.append)
    for rows in (1, 4, 3, 1, 5, 8, 7, 4):
        table = costs.table(None, None, [5], rows)
        assert table.knows(rows) and table.verify_at(rows, 0)[4] >= table.verify_at(rows, 0)[0] > 0
    assert made == [1, 4, 8]
    assert bool(notices) is not writable
    assert costs.kept() == table and {place[:2] for place in table.timed} == {(1, 0), (4, 0), (8, 0)}
    again = Costs("greedy", costs.file).kept()
    assert again == table if writable else again is None
    costs.learn({(1, 0, 0): 0.001, (1, 0, 5): 0.004}, {(1, 0): 0.0002})
    assert costs.kept().knows(8) and costs.kept().learned_at((1, 0)) == 5


def test_on_a_slow_machine_one_number_of_rows_must_do(tmp_path, monkeypatch):
    """The first is measured whatever it takes; a second is estimated where it would take twice the budget."""
    monkeypatch.setattr(calibration, "Bench", StubBench)
    for name, milliseconds, known in (("fast", 100, True), ("slow", 400, False)):
        monkeypatch.setattr(StubBench, "step", milliseconds / 1000)
        costs = Costs("greedy", CostFile({"a": 1}, tmp_path / name))
        assert costs.table(None, None, [5]).knows(1)
        assert costs.table(None, None, [5], 2).knows(2) is known
        assert costs.table(None, None, [5], 2) == costs.kept()


def test_what_is_far_off_does_not_count(monkeypatch):
    """The first pass is slow, as where kernels are compiled; of a single one the faster of two rounds counts."""

    class Cold(StubBench):
        def rounds(self, width):
            chained, alone = super().rounds(width)
            if self.widths.count(width) == 1:
                chained[0] *= 10
            return chained, alone

    monkeypatch.setattr(calibration, "Bench", Cold)
    monkeypatch.setattr(StubBench, "step", 0.001)
    once = (((1, 0), (0, 1, 4)),)
    for repeats, seconds in ((4, 1e9), (1, 1e9), (4, 0.0)):
        verified, drafted = calibration.measure(None, None, [5], KINDS["greedy"], once, repeats, seconds).parts()
        assert drafted == {(1, 0): pytest.approx(0.0001)}
        assert [verified[1, 0, width] for width in (0, 1)] == pytest.approx([0.001, 0.0015])
    assert len(verified) == 2


def test_each_place_has_its_own_times_and_a_wide_verify_is_of_copies():
    """The drafter's time counts in rounds of its drafts alone: nobody makes copies."""
    timings = calibration.Timings()
    for context, step in ((0, 1.0), (4096, 2.0)):
        for width in (0, 4, 15):
            alone = step * (1 + 0.1 * width)
            timings.add((1, context, width), [alone + width * step / 4], [alone])
    verified, drafted = timings.parts()
    assert drafted == pytest.approx({(1, 0): 0.25, (1, 4096): 0.5})
    assert verified[1, 4096, 4] == pytest.approx(2.8) and verified[1, 4096, 15] == pytest.approx(5.0)
    timings.alone[1, 0, 15] = [0.4]  # the drafter was slow for once
    assert timings.parts()[0][1, 0, 15] == pytest.approx(0.4)


def test_the_grid_reaches_as_far_as_the_model_and_its_memory(engine, monkeypatch):
    """By default one row stands for more after long texts; a wide verify is measured everywhere."""
    parts = engine.target, engine.drafter, engine.target.config.kv
    usual, full = dict(calibration.grid_of(*parts)), dict(calibration.grid_of(*parts, full=True))
    assert [*usual] == [*((rows, 0) for rows in ROWS), (1, 4096)]  # its context is 8192
    assert [*full] == [(rows, context) for context in (0, 4096) for rows in ROWS]
    assert all(widths[0] == 0 and widths[-1] == WIDEST and {7, 8} <= {*widths} for widths in usual.values())
    assert usual[1, 4096] == calibration.LONG_WIDTHS and full[8, 4096] == full[1, 0]
    monkeypatch.setattr(calibration.memory, "total_bytes", lambda: 0)
    assert [*dict(calibration.grid_of(*parts))] == [(rows, 0) for rows in ROWS]


def test_attention_is_estimated_by_the_bytes_that_it_reads(engine, monkeypatch):
    """A plain step of the target reads its weights; a query all K/V of the full layers; a draft those of its own."""
    found = calibration.attention(engine.target, engine.drafter)
    config, step = engine.target.config, loading.step_bytes(engine.target)
    full = [layer for layer in config.layers if layer.kv.window is None]
    assert found.context == 4096 and found.drafter > 0
    assert found.target == pytest.approx(4096 * sum(layer.kv.slot_bytes(4) for layer in full) / step)
    less = calibration.attention(engine.target, engine.drafter, with_bits(config.kv, 8))
    assert less.target < 0.5 * found.target
    monkeypatch.setattr(calibration, "CONTEXTS", (0,))
    assert calibration.attention(engine.target, engine.drafter) is None


def test_a_table_is_of_the_kernels_that_run(engine, monkeypatch):
    """A switch, a failed check, the doctor's rules, another BLAS: other costs, so another file."""
    pair = hub.find_pair(None, "auto", None)
    key = lambda: json.dumps(calibration._key(pair, engine.target, engine.drafter))  # noqa: E731
    keys = [key()]
    try:
        kernels.switch_off("grouping", "a finding")
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: True)
            keys.append(key())
            patch.setenv(kernels.SWITCH, "0")
            keys.append(key())
        steps = ((1, expert_paths.ExpertPath.PAIRS), (48, expert_paths.ExpertPath.SORTED))
        expert_paths.adopt((expert_paths.Rule("", "", "", steps, expert_paths.EQUAL),))
        keys.append(key())
    finally:
        kernels.forget_failures()
        expert_paths.adopt(())
    with monkeypatch.context() as patch:
        patch.setattr(calibration.blas, "name", lambda: "another")
        keys.append(key())
        patch.setenv("OPENBLAS_NUM_THREADS", "17")
        keys.append(key())
        patch.setattr(calibration, "format_of", lambda model: "affine4")
        keys.append(key())
        patch.setattr(mx, "__version__", "99")
        keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[0]


@pytest.mark.parametrize("broken", ["corrupt", "foreign", "unwritable"])
def test_a_file_that_is_no_use_is_measured_anew(tmp_path, engine, broken):
    notices = []
    costs = Costs("greedy", CostFile({"a": 1}, tmp_path / "costs"), notices.append, seconds=1e9)
    prompt = engine.text.encode("def f(x):\n    return x\n")
    if broken == "unwritable":
        (tmp_path / "costs").write_text("a file where the folder should be")
    else:
        costs.file.path.parent.mkdir()
        costs.file.path.write_text("{" if broken == "corrupt" else json.dumps({"format": 1, "key": {"a": 2}}))
    assert len(costs.table(engine.target, engine.drafter, prompt).verify_at(1, 50)) == WIDEST + 1
    assert any(str(costs.file.path) in notice for notice in notices)  # another says where measuring takes long
    assert (costs.file.read() is not None) if broken != "unwritable" else not costs.file.path.exists()


def test_the_command(tmp_path, capsys, monkeypatch):
    """On a small grid: measured, kept, shown again without measuring."""
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "ROWS", (1,))
    monkeypatch.setattr(calibration, "CONTEXTS", (0, 4096))
    monkeypatch.setattr(calibration, "LONG_WIDTHS", (0, 8))
    monkeypatch.setattr(calibration, "WIDE", (WIDEST,))
    assert calibrate.main(["--show"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: nothing was measured before")
    assert calibrate.main(["--repeats", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for kind in KINDS:
        assert [each["rows"] for each in shown[kind]][: len(ROWS)] == list(ROWS)
        assert all(len(each["break_even"]) == MAX_DRAFTS for each in shown[kind])
        assert all(len(each["seconds"]) == MAX_DRAFTS + 1 and min(each["seconds"]) > 0 for each in shown[kind])
        assert all(len(each["verify"]) == WIDEST + 1 and not each["estimated"] for each in shown[kind])
        assert {each["context"] for each in shown[kind]} == {0, 4096}
    assert mx.metal.is_available() or "CPU" in shown["measured"]
    assert calibrate.main(["--show"]) == 0
    text = capsys.readouterr().out
    assert "greedy text" in text and "sampled text" in text and f"{1e3 * shown['greedy'][0]['seconds'][0]:8.2f}" in text


def test_what_was_not_measured_is_marked():
    cells = {(1, 0, width): 1 + 0.1 * width for width in (0, 1, 4)}
    quick = CostTable.of(cells, {(1, 0): 0.1}, attention=Attention(0.25, 0.02, 32768))
    lines = calibrate.text(quick).splitlines()
    assert [line.split()[0] for line in lines[1::2]] == ["0"] * len(ROWS) + ["~32768"] * len(ROWS)
    assert lines[0].split()[-3:] == ["+8", "+11", "+15"] and lines[1].split()[-1] == f"{2500:.2f}"
    assert [each["estimated"] for each in calibrate.record(quick)] == [False] * len(ROWS) + [True] * len(ROWS)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats", "0"], "--repeats is 0"),
        (["--draft-model", "none"], "it is drafts whose cost is measured"),
        (["--plot", "nowhere/x.png"], "--plot"),
        (["--plot", "x.jpg"], "--plot"),
        (["--model", "nowhere"], "there is no model"),
    ],
)
def test_bad_input(capsys, argv, message):
    assert calibrate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    calibrate.plot({"greedy": table(0.1, 0.1)}, "a machine", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
