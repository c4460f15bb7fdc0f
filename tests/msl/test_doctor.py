"""The doctor and what a load takes up of it: with the kernels emulated, and without any Metal."""

import json
import math

import mlx.core as mx
import pytest

from mlx_gemma_mtp import doctor
from mlx_gemma_mtp.checks import invariance
from mlx_gemma_mtp.checks.race import race
from mlx_gemma_mtp.models import moe
from mlx_gemma_mtp.ops import bandwidth, expert_paths, kernel_report, kernels
from mlx_gemma_mtp.ops.expert_paths import VERIFY, ExpertPath, ProductPath
from mlx_gemma_mtp.ops.kernels import gate_up

M, F = ProductPath.STOCK, ProductPath.FEW_ROWS
P, S, G = ExpertPath.PAIRS, ExpertPath.SORTED, ExpertPath.GROUPED
EQUAL = frozenset((P, S))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "SIZE", 1 << 16)


@pytest.fixture
def metal(monkeypatch, emulator, tmp_path):
    """A machine whose Metal is the emulator; nothing of it is left behind."""
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "_failed", {})
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    yield tmp_path
    expert_paths.adopt(())


def times(pairs, ordered, grouped) -> dict:
    return {path: dict(zip((1, 4, 16), each, strict=True)) for path, each in ((P, pairs), (S, ordered), (G, grouped))}


@pytest.mark.parametrize(
    "seconds, equal, steps",
    [
        (times([1, 4, 9], [2, 3, 5], [3, 6, 9]), EQUAL, ((1, P), (32, S))),  # each at its best: they agree in bits
        (times([1, 4, 9], [2, 3, 5], [3, 6, 9]), frozenset((P,)), ((1, S),)),  # one for all: they do not
        (times([1, 4, 9], [2, 3, 5], [1, 2, 3]), EQUAL, ((1, G), (VERIFY + 1, S))),
        (
            times([1, 2, 3], [2, 3, 5], [3, 6, 9]),
            EQUAL,
            ((1, P), (VERIFY + 1, S)),
        ),  # prefill is not plain pairs' ground
        (times([1, 4, 9], [2, 3, 5], [1.5, 2, 3]), frozenset(ExpertPath), ((1, P), (32, G), (VERIFY + 1, S))),
    ],
    ids=["two ways", "one way", "grouped", "pairs", "all equal"],
)
def test_the_rule_that_follows(seconds, equal, steps):
    rule = doctor.rule("M9", "bfloat16", "affine4", seconds, equal, 8)
    assert (
        rule.steps == steps and rule.covers("M9 Max", "bfloat16", "affine4") and not rule.covers("M8", "bfloat16", "")
    )


@pytest.mark.parametrize(
    ("rows", "off", "steady", "equal"),
    [
        ([1, 2], lambda pairs: False, {P, S}, {P, S}),
        ([1, 2], lambda pairs: True, {P, S}, {P}),
        ([1, 2], lambda pairs: pairs == VERIFY, {P}, {P}),  # wider than what is timed
        ([VERIFY // 2 + 1], lambda pairs: pairs > VERIFY, {P, S}, {P, S}),  # a prefill
    ],
    ids=["alike", "other bits", "other bits in a wide verify", "other bits in prefill"],
)
def test_which_paths_a_rule_may_take(monkeypatch, rows, off, steady, equal):
    """Where sorted pairs are off for some numbers of pairs."""
    along = moe.Experts.run

    def changed(self, path, x, experts, weights):
        return along(self, path, x, experts, weights) + (path == S and off(experts.size))

    monkeypatch.setattr(moe.Experts, "run", changed)
    layer = doctor.layer((64, 64, 4, 2), 4)
    times, *found = doctor.measure(layer, (64, 64, 4, 2), rows, 1)
    assert {path: list(each) for path, each in times.items()} == {P: rows, S: rows}
    assert found == [steady, equal]


def test_where_no_bits_are_steady_plain_pairs_stay(monkeypatch):
    """A device whose sums come in another order each time, or that gives what is no number, still gets a rule."""
    along, calls = moe.Experts.run, []

    def changed(self, path, x, experts, weights):
        calls.append(path)
        return along(self, path, x, experts, weights) + len(calls)

    monkeypatch.setattr(moe.Experts, "run", changed)
    times, *found = doctor.measure(doctor.layer((64, 64, 4, 2), 4), (64, 64, 4, 2), [1, 2], 1)
    assert found == [{P}, {P}] and set(times) == {P, S}
    able = {path: each for path, each in times.items() if path in found[0]}
    assert doctor.rule("M9", "bfloat16", "affine4", able, found[1], 2).path(1) == P


@pytest.mark.parametrize(
    ("stock", "ours", "steps"),
    [
        ([1, 2, 3, 4, 5], [2, 1, 2, 3, 6], ((1, M), (2, F), (16, M))),
        ([2, 2, 2, 2, 2], [1, 1, 1, 1, 1], ((1, F), (17, M))),
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2], ((1, M),)),
    ],
)
def test_the_rule_of_products_that_follows(stock, ours, steps):
    """The faster path at every number of rows that was raced, and MLX's own beyond."""
    times = {path: dict(zip(doctor.PRODUCT_ROWS, each, strict=True)) for path, each in ((M, stock), (F, ours))}
    rule = doctor.product_rule("M9", "bfloat16", "affine4", times, 2048)
    assert rule.steps == steps and rule.kind is ProductPath and rule.side == 2048
    expert_paths.adopt((rule,))
    try:
        found = expert_paths.product_rule("M9 Max", mx.bfloat16, "affine4", 64, True, False)
    finally:
        expert_paths.adopt(())
    assert found == rule


def test_ways_take_turns_for_seconds():
    """The first turns, in which kernels are compiled, do not count; of the others the median does."""
    now, called = [0.0], []

    def way(name, *seconds):
        costs = iter(seconds)

        def call():
            now[0] += next(costs)
            called.append(name)

        return call

    ways = {"a": way("a", 5.0, 0.25, 0.5, 0.25), "b": way("b", 1.0, *[0.0625] * 6)}
    assert race(ways, 0.3, lambda: now[0]) == pytest.approx({"a": 0.25, "b": 0.0625})
    assert called == ["a", "b", "a", "b", "b", "a", "b", "b", "a", "b", "b"]


def test_a_rule_outlives_its_file(tmp_path):
    report = kernel_report.Report(tmp_path)
    checked = dict.fromkeys(kernels.KERNELS) | {"down": "off by 2"}
    rules = (
        doctor.rule("M9", "bfloat16", "float", times([1, 4, 9], [2, 3, 5], [3, 6, 9]), EQUAL, 8),
        expert_paths.Rule("M9", "bfloat16", "affine4", ((1, M), (2, F)), expert_paths.ANY_PRODUCT, 4096),
    )
    assert report.read() is None
    report.write(checked, rules)
    assert report.read() == (checked, rules) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 1, "machine": {}, "checked": {}, "rules": []}']
)
def test_a_file_that_is_none_is_written_anew(tmp_path, text):
    report = kernel_report.Report(tmp_path)
    report.path.write_text(text)
    assert report.read() is None


def test_the_first_load_checks_and_the_second_knows(metal, monkeypatch):
    notices = []
    monkeypatch.setattr(gate_up, "self_check", lambda: "off by 3")
    kernel_report.ensure(notices.append)
    assert len(notices) == 1 and "gate_up is off" in notices[0] and "off by 3" in notices[0]
    monkeypatch.setattr(kernels, "_failed", {})
    monkeypatch.setattr(kernel_report, "check", lambda: pytest.fail("checked again"))
    kernel_report.ensure(notices.append)
    assert kernels.why_off("gate_up") == "self-check failed: off by 3" and kernels.why_off("down") is None
    assert len(notices) == 2 and "gate_up off (self-check failed: off by 3)" in kernels.summary()


def test_a_load_without_metal_asks_nothing(monkeypatch):
    monkeypatch.setattr(kernel_report, "check", lambda: pytest.fail("nothing to check"))
    kernel_report.ensure(lambda notice: pytest.fail(notice))


def test_an_unwritable_folder_is_a_notice(metal, monkeypatch):
    (metal / "file").write_text("")
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(metal / "file"))
    notices = []
    kernel_report.ensure(notices.append)
    assert len(notices) == 1 and "cannot be kept" in notices[0]


def test_the_command_times_keeps_and_reports(metal, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "FORMATS", {"4-bit": 4})
    monkeypatch.setattr(doctor, "time_drafts", lambda model: {})
    monkeypatch.setattr(doctor, "PRODUCTS", (((64, 32), (64, 24)), ((64, 32),), ((64, 32),), ((64, 40),)))
    monkeypatch.setattr(doctor, "PASS", 1)
    monkeypatch.setattr(doctor, "PRODUCT_ROWS", (1, 2))
    monkeypatch.setattr(invariance, "WIDTHS", (1, 2))
    monkeypatch.setattr(invariance, "INPUTS", 1)
    argv = ["--layer", "64", "64", "4", "2", "--rows", "1", "2", "--repeats", "1", "--json", str(metal / "r.json")]
    assert doctor.main([*argv, "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert all(f"kernel {name}: on" in out for name in kernels.KERNELS) and "4-bit, microseconds" in out
    record = json.loads((metal / "r.json").read_text())
    assert record["memory_bytes_per_s"] == bandwidth.known(metal) > 0
    assert set(record["experts"]["4-bit"]) == set(map(str, expert_paths.ON_METAL)) and record["kernels"]["down"] == "on"
    assert all(t > 0 and math.isfinite(t) for each in record["experts"]["4-bit"].values() for t in each.values())
    checked, rules = kernel_report.Report().read()
    assert set(checked.values()) == {None} and {rule.weights for rule in rules} == {"affine4"}
    assert [rule.kind for rule in rules] == [ExpertPath, *[ProductPath] * len(expert_paths.SIDES)]
    assert [rule.side for rule in rules] == [0, *expert_paths.SIDES]
    assert out.count("a row has its own bits at 1 2 rows") == 2 * len(expert_paths.SIDES)
    sizes = [f"4-bit, {size}" for size in ("products to 2048", "products to 4096", "products to 65536", "the head")]
    assert {form: {path: set(each) for path, each in found.items()} for form, found in record["products"].items()} == {
        size: {"stock": {"1", "2"}, "few rows": {"1", "2"}} for size in sizes
    }


def test_what_is_raced_together_is_of_its_size():
    for least, side, shapes in zip((0, *expert_paths.SIDES), expert_paths.SIDES, doctor.PRODUCTS, strict=False):
        assert all(least < max(shape) <= (side or math.inf) for shape in shapes)
    assert len(doctor.PRODUCTS) == len(expert_paths.SIDES)


def test_a_stack_holds_what_no_cache_does(monkeypatch):
    monkeypatch.setattr(doctor, "PASS", 64 * 100)
    linears = doctor.stack(4, ((64, 32), (128, 16)))
    assert [(each.weights.inputs, each.weights.outputs, each.form) for each in linears] == [
        (64, 32, "affine4"), (128, 16, "affine4"),
    ] * 2  # fmt: skip


def test_checks_alone_keep_the_rules_that_were_measured(metal, monkeypatch, capsys):
    rules = (doctor.rule("M9", "bfloat16", "float", times([1, 4, 9], [2, 3, 5], [3, 6, 9]), EQUAL, 8),)
    passed = dict.fromkeys(kernels.KERNELS)
    kernel_report.Report().write(passed, rules)
    monkeypatch.setattr(kernel_report, "check", lambda: passed)
    assert doctor.main(["--no-times"]) == 0
    assert "kept in" in capsys.readouterr().out and kernel_report.Report().read() == (passed, rules)


def test_a_kernel_that_was_mended_counts_as_such_in_the_same_run(metal, monkeypatch, capsys):
    """The load that times drafts must not take up what an earlier run kept."""
    kernel_report.Report().write(dict.fromkeys(kernels.KERNELS) | {"down": "off by 2"}, ())
    monkeypatch.setattr(doctor, "time_experts", lambda args, chip: ((), {}))
    monkeypatch.setattr(doctor, "time_products", lambda args, chip: ((), {}))
    monkeypatch.setattr(doctor, "time_drafts", lambda model: kernel_report.ensure(pytest.fail) or {})
    assert doctor.main(["--json", str(metal / "r.json")]) == 0
    assert json.loads((metal / "r.json").read_text())["kernels"]["down"] == "on"


def test_the_command_without_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    if kernels.available():
        pytest.skip("there is a GPU here")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "kernel down: no GPU" in out and "nothing is timed but the memory" in out
    assert [path.name for path in tmp_path.iterdir()] == ["bandwidth.json"] and bandwidth.known(tmp_path) > 0
    assert f"memory: {bandwidth.known(tmp_path) / 1e9:.1f} GB/s" in out


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "null"])
def test_a_bandwidth_that_was_not_measured_here_is_not_known(tmp_path, text):
    path = bandwidth.keep(2e9, tmp_path)
    assert bandwidth.known(tmp_path) == 2e9
    path.write_text(path.read_text().replace('"mlx": "', '"mlx": "older '))
    assert bandwidth.known(tmp_path) is None
    for odd in ("NaN", "0", "-1", '"x"', "null"):
        bandwidth.keep(2e9, tmp_path).write_text(path.read_text().replace("2000000000.0", odd))
        assert bandwidth.known(tmp_path) is None
    path.write_text(text)
    assert bandwidth.known(tmp_path) is None and bandwidth.known(tmp_path / "nowhere") is None


def test_a_bandwidth_that_cannot_be_kept_is_a_note(metal, monkeypatch, capsys):
    (metal / "file").write_text("")
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(metal / "file"))
    assert doctor._bandwidth() > 0 and "cannot be kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--layer", "60", "64", "4", "2"], "--layer is 60 64 4 2"),
        (["--layer", "64", "64", "4", "5"], "--layer is 64 64 4 5"),
        (["--rows", "0"], "--rows"),
        (["--seconds", "-1"], "--seconds is -1"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json"),
    ],
)
def test_bad_input(capsys, argv, message):
    assert doctor.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err
