"""The cost model: parameters and bytes by hand, and what it says of published measurements."""

import json
import re
from dataclasses import replace

import pytest

from benchmarks import moe_cost
from benchmarks.cost_model import ACCEPTANCE, CHIPS, FORMATS, STACK, STOCK, Model, bytes_per_weight, emitted, wide_ops
from mlx_gemma_mtp.checks.overlap import uniform

LAYERS, HIDDEN, VOCAB = 30, 2816, 262144
STEPS = dict(zip(("stock", "4bit", "32k", "cached", "grouped", "tuned"), STACK.values(), strict=True))
STEPS["tile"] = replace(STEPS["grouped"], dense_tile=True)


@pytest.fixture(scope="module")
def model() -> Model:
    shape = moe_cost.published()
    return Model(shape, moe_cost.by_gamma(shape.target.moe, 0.77))


def test_parameters_by_hand(model):
    """25.23 B in all, 3.82 B for a token; the drafter's 420 M, of which 268 M are its head."""
    shape = model.shape
    assert shape.slot == LAYERS * 3 * HIDDEN * 704
    assert shape.dense["head"] == VOCAB * HIDDEN
    assert shape.dense["large"] == 5 * 2 * HIDDEN * 16 * 512  # queries and outputs of the global layers
    sliding = 25 * HIDDEN * (2 * 16 * 256 + 2 * 8 * 256)
    shared_and_router = LAYERS * HIDDEN * (3 * 2112 + 128)
    assert shape.dense["middle"] == sliding + 5 * HIDDEN * 2 * 512 + shared_and_router  # global layers: V is K
    assert round(shape.total / 1e9, 2) == 25.23 and round(shape.active / 1e9, 2) == 3.82
    assert round(shape.draft_body / 1e6) == 151
    assert shape.draft_body == 4 * 3 * 1024 * 8192 + 1024 * 2 * (3 * 16 * 256 + 16 * 512) + 3 * HIDDEN * 1024


def test_bytes_by_hand():
    assert FORMATS == {"bf16": 2, "8bit": 1.0625, "5bit": 0.6875, "4bit": 0.5625, "nvfp4": 0.5625}
    assert bytes_per_weight(4, 32, 32) == 0.625


def test_distinct_experts(model):
    """8 M^0.77, at most uniform; rows as independent: B = 1, 2, 4, 8 of four tokens."""
    assert [round(model.run(m), 1) for m in (1, 2, 3, 4, 5, 8)] == [8, 13.6, 18.6, 23.3, 27.6, 39.7]
    assert [round(model.distinct(4, rows)) for rows in (1, 2, 4, 8)] == [23, 42, 71, 102]
    assert moe_cost.by_gamma(model.shape.target.moe, 1.0)(4) == pytest.approx(uniform(128, 8, 4))


def test_rounds_by_hand(model):
    assert emitted((0.8, 0.5), 2) == pytest.approx(1 + 0.8 + 0.4) and emitted((0.8,), 0) == 1
    assert wide_ops(1) == 3 and wide_ops(3) == pytest.approx(2.5)
    bandwidth = 546e9 * 0.85  # M4 Max; one row is bound by bytes: 2.146 GB of weights, 117 MB of K/V
    kv = 2 * 2 * 512 * (25 * 8 * 256 + 5 * 2 * 512)
    expected = 8.5e-3 + (model.shape.active * 0.5625 + kv) / bandwidth
    assert model.forward("M4 Max", STOCK, 1) == pytest.approx(expected)
    draft = 1e-3 + (model.shape.draft_body + VOCAB * 1024) * 2 / bandwidth
    assert model.draft("M4 Max", STOCK) == pytest.approx(draft)
    round_of_two = model.forward("M4 Max", STOCK, 3) + 2 * draft + 0.6e-3
    assert model.round("M4 Max", STOCK, 2) == pytest.approx(round_of_two)
    assert model.round("M4 Max", STOCK, 0) == model.forward("M4 Max", STOCK, 1)


# As published with the model: chip, predicted and measured speedup.
PUBLISHED = [
    ("M5", 1.23, 1.215), ("M5", 0.96, 0.994), ("M4 Max", 1.38, 1.53), ("M4 Max", 0.89, 0.95), ("M4 Max", 0.69, 0.50),
    ("M1 Max", 1.06, 1.13), ("M5 Max", 1.49, 1.42), ("M2 Pro", 0.94, 0.88), ("M2 Max", 1.46, 1.21),
    ("M1 Pro", 1.35, 0.92), ("M5 Pro", 1.08, 0.88),
]  # fmt: skip


@pytest.mark.parametrize(
    "report, published", list(zip(moe_cost.REPORTS, PUBLISHED, strict=True)), ids=lambda case: str(case)[:40]
)
def test_published_measurements(model, report, published):
    """The prediction to its two printed digits; the four rows that assume nothing are at most 10 % off."""
    _, predicted = moe_cost.compared(model, report)
    assert (report.chip, round(predicted, 2), report.measured) == published
    if not report.assumed:
        assert abs(predicted / report.measured - 1) < 0.105


def test_the_fitted_fixed_time_gives_the_reported_speed(model):
    fixed, _ = moe_cost.compared(model, moe_cost.REPORTS[0])
    setup = replace(moe_cost.REPORTS[0].setup, fixed=fixed)
    assert 1 / model.forward("M5", setup, 1) == pytest.approx(38.8)


@pytest.mark.parametrize(
    "chip, step, kind, rows, speedup",
    [
        ("M1 Max", "stock", "general", 1, 1.11), ("M1 Max", "tuned", "code", 1, 1.31),
        ("M4 Max", "4bit", "general", 1, 1.50), ("M4 Max", "cached", "code", 1, 2.06),
        ("M5", "grouped", "code", 1, 1.76), ("M5 Max", "32k", "code", 1, 1.88),
        ("M2 Max", "grouped", "general", 8, 1.91), ("M4 Max", "grouped", "general", 4, 1.28),
        ("M5", "4bit", "general", 4, 1.00), ("M5 Max", "grouped", "general", 16, 1.70),
        ("M4 Max", "tile", "general", 4, 1.44), ("M5", "tile", "general", 8, 1.47),
        ("M5 Max", "tile", "general", 16, 1.60),
    ],
)  # fmt: skip
def test_ceilings(model, chip, step, kind, rows, speedup):
    assert model.best(chip, STEPS[step], ACCEPTANCE[kind], rows)[0] == pytest.approx(speedup, abs=0.006)


def test_what_bytes_alone_allow(model):
    limits = {chance: model.limit(chance, STEPS["grouped"]) for chance in (0.7, 0.8, 0.85, 0.9)}
    assert {c: (round(x, 2), k) for c, (x, k) in limits.items()} == {
        0.7: (1.37, 2), 0.8: (1.59, 4), 0.85: (1.77, 5), 0.9: (2.02, 7),
    }  # fmt: skip


def trace_file(folder, experts: int, top_k: int, distinct: dict[int, float]):
    path = folder / "routing.json"
    runs = [{"tokens": m, "measured": u} for m, u in distinct.items()]
    path.write_text(json.dumps({"experts": experts, "top_k": top_k, "runs": runs}))
    return path


def test_a_trace_is_carried_over(model, tmp_path):
    """Of as many experts: as it is. Of another: a uniform router stays uniform, one that repeats itself repeats."""
    moe = model.shape.target.moe
    measured = {m: 8 * m**0.7 for m in range(1, 9)}
    same = moe_cost.by_trace(moe, trace_file(tmp_path, 128, 8, measured))
    assert [same(m) for m in measured] == pytest.approx(list(measured.values()))
    even = moe_cost.by_trace(moe, trace_file(tmp_path, 24, 4, {m: uniform(24, 4, m) for m in range(1, 9)}))
    assert [even(m) for m in range(1, 9)] == pytest.approx([uniform(128, 8, m) for m in range(1, 9)])
    stuck = moe_cost.by_trace(moe, trace_file(tmp_path, 24, 4, dict.fromkeys(range(1, 9), 4.0)))
    assert stuck(8) == pytest.approx(8)


def test_the_command(capsys, tmp_path):
    path = trace_file(tmp_path, 24, 4, {m: uniform(24, 4, m) for m in range(1, 9)})
    assert moe_cost.main(["--routing", str(path), "--chips", "M5", "M4 Max"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTED, not measured" in out and f"measured, {path}" in out and "| 4 | 32 | 29.1 | 29.1 |" in out
    assert moe_cost.main([]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^\| {chip} \| {CHIPS[chip].bandwidth:g} \|", out, re.M) for chip in CHIPS)
    assert "| 1.23x | 1.22x | +1% | performance.md" in out and "mean 5%, largest 10%" in out


def test_bad_input(capsys, tmp_path):
    short = trace_file(tmp_path, 24, 4, {1: 4.0, 2: 7.0})
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    for argv, message in (
        (["--gamma", "2"], "--gamma is 2.0"),
        (["--routing", str(short)], "has no U(3)"),
        (["--routing", str(broken)], "expected a --json file"),
        (["--routing", "nothing-here"], "nothing-here"),
    ):
        code, (out, err) = moe_cost.main(argv), capsys.readouterr()
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err
