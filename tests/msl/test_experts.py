"""The expert kernels against float32 references, and what must not change their bits. Emulated; on a Mac, real."""

import mlx.core as mx
import numpy as np
import pytest
from cases import AFFINE, EXPERTS, FLOAT, FORMATS, TOP_K, Layer, normal, routes, weights
from emulator import CLANG, ORDERS, SANITIZED, Emulator, typecheck
from signature import printed_parameters, signature

from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.models import moe
from mlx_gemma_mtp.models.config import MoESpec
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.ops import expert_paths, kernels
from mlx_gemma_mtp.ops.kernels import Kernel, down, gate_up, grouping, head_argmax
from mlx_gemma_mtp.ops.kernels.products import flat

layer = pytest.fixture(scope="module", params=FORMATS, ids=str)(lambda request: Layer(request.param))
affine = pytest.fixture(scope="module")(lambda: Layer(AFFINE))


def close(ours: mx.array, reference: mx.array, tolerance: float) -> None:
    assert ours.dtype == reference.dtype and ours.shape == reference.shape
    assert kernels.difference(ours, reference, tolerance) is None


def same(ours: tuple[mx.array, ...], others: tuple[mx.array, ...]) -> None:
    for a, b in zip(ours, others, strict=True):
        assert mx.array_equal(a, b)  # NaN, which an output that nobody wrote holds, is unequal


@pytest.mark.parametrize(
    "experts",
    [[3], [2, 2, 2, 0, 4], [4] * 30, list(range(5)) * 9, [0] * 8 + [4] * 9, [5, 3, 3, 1] * 64],
    ids=["one pair", "some empty", "all on the last", "even", "full groups", "many"],
)
def test_grouping_is_a_stable_counting_sort(kernel_backend, experts):
    count, pairs = 6, np.array(experts)
    for groups in (grouping.group_reference, grouping.group_metal):
        order, table, rows = groups(mx.array(experts, dtype=mx.uint32), count)
        assert order.tolist() == np.argsort(pairs, kind="stable").tolist()
        real = [row for row in table.tolist() if row[2]]
        assert table.tolist() == real + [[0, 0, 0]] * (table.shape[0] - len(real))
        assert [expert for expert, _, _ in real] == sorted(
            expert for expert in range(count) for _ in range(-(-int((pairs == expert).sum()) // rows))
        )
        for expert, start, held in real:
            assert held <= rows and (pairs[np.array(order)[start : start + held]] == expert).all()
        assert sum(held for _, _, held in real) == len(experts)


@pytest.mark.parametrize("kind", ["mixed", "one"])
def test_kernels_match_their_references(kernel_backend, layer, kind):
    arrays, experts = layer.inputs(8), routes(8, kind)
    for ours, reference in zip(layer.run(experts, arrays), layer.reference(experts, arrays), strict=True):
        close(ours, reference, layer.form.tolerance)


@pytest.mark.parametrize("tokens", [1, 3, 32, 128])
def test_any_number_of_tokens(kernel_backend, affine, tokens):
    arrays, experts = affine.inputs(tokens), routes(tokens)
    for ours, reference in zip(affine.run(experts, arrays), affine.reference(experts, arrays), strict=True):
        close(ours, reference, 1e-5)


def test_a_row_has_the_same_bits_alone_and_in_company(kernel_backend, layer):
    """What makes a verify of many tokens and a step of one the same function."""
    (x, inner, scale), experts = layer.inputs(8), routes(8)
    hidden, combined = layer.run(experts, (x, inner, scale))
    for t in (0, 5):
        pairs = slice(t * TOP_K, (t + 1) * TOP_K)
        alone = layer.run(experts[t : t + 1], (x[t : t + 1], inner[pairs], scale[t : t + 1]))
        same((hidden[pairs], combined[t : t + 1]), alone)


def test_bits_depend_neither_on_the_rows_of_a_group_nor_on_the_capacity(kernel_backend, affine):
    (x, inner, scale), experts = affine.inputs(32), routes(32)
    hidden, combined = affine.run(experts, (x, inner, scale))
    few = slice(0, 8 * TOP_K)
    for rows in (1, 8) if kernel_backend == "emulated" else (8,):  # Apple's compiler may contract instances unlike
        same((hidden[few], combined[:8]), affine.run(experts[:8], (x[:8], inner[few], scale[:8]), rows))


def test_bits_do_not_depend_on_the_order_of_threads(emulator, layer):
    arrays, experts = layer.inputs(8), routes(8)
    results = []
    for emulator.order in ORDERS:
        results.append(layer.run(experts, arrays))
        groups = grouping.group_metal(experts.reshape(-1), EXPERTS)
        same(groups[:2], grouping.group_reference(experts.reshape(-1), EXPERTS)[:2])
    same(results[0], results[1])
    same(results[0], results[2])


@pytest.mark.parametrize("form", [AFFINE, FLOAT], ids=str)
def test_no_undefined_behaviour(monkeypatch, emulator, form):
    emulator.flags = SANITIZED
    layer, experts = Layer(form), routes(8)
    arrays = layer.inputs(8)
    for ours, reference in zip(layer.run(experts, arrays), layer.reference(experts, arrays), strict=True):
        close(ours, reference, 1e-5)
    grouping.group_metal(experts.reshape(-1), EXPERTS)


def launches(monkeypatch, form) -> list[tuple[Kernel, dict]]:
    """(kernel, arguments) of every launch of a layer, and of a head with and without tokens that nobody may say."""
    seen = []

    def build(kernel: Kernel):
        def launch(**arguments):
            seen.append((kernel, arguments))
            return [mx.zeros(*one) for one in zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)]

        return launch

    monkeypatch.setattr(kernels, "build", build)
    layer, experts = Layer(form), routes(8)
    layer.run(experts, layer.inputs(8))
    grouping.group_metal(experts.reshape(-1), EXPERTS)
    vocabulary = flat(weights(form, 203, experts=1))
    for bias in (None, mx.zeros((203,))):
        head_argmax.best_token_metal(normal(form, 3, form.inputs), vocabulary, bias)
    monkeypatch.undo()
    return seen


@pytest.mark.skipif(CLANG is None, reason="no clang++: address spaces are not checked")
@pytest.mark.parametrize("form", [AFFINE, FLOAT], ids=str)
def test_address_spaces(monkeypatch, form):
    seen = launches(monkeypatch, form)
    assert {kernel.name for kernel, _ in seen} == {"expert_groups", "expert_gate_up", "expert_down", "head_argmax"}
    for kernel, launch in seen:
        assert typecheck(kernel, launch["inputs"], launch["output_dtypes"], launch["template"]) == ""


@pytest.mark.parametrize("form", [AFFINE, FLOAT], ids=str)
def test_the_signature_is_the_one_that_mlx_writes(monkeypatch, tmp_path, capfd, form):
    for kernel, launch in launches(monkeypatch, form):
        rest = {name: value for name, value in launch.items() if name != "inputs"}

        def call(*inputs, kernel=kernel, rest=rest):
            return kernels.build(kernel)(inputs=list(inputs), verbose=True, **rest)

        mx.export_function(str(tmp_path / f"{kernel.name}.mlxfn"), call, *launch["inputs"])
        ours = signature(kernel, launch["inputs"], launch["output_dtypes"], launch["template"]).parameters
        assert printed_parameters(capfd.readouterr().out, kernel.name) == ours


@pytest.fixture
def grouped(monkeypatch, emulator) -> Emulator:
    """Experts choose as on a Mac whose kernels run."""
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(device, "name", lambda: "Apple M4")
    return emulator


@pytest.mark.parametrize("bits", [0, 4])
def test_experts_are_the_same_by_every_path(monkeypatch, grouped, bits):
    """The module: route weights included, 9 tokens, as plain pairs, sorted, in tiles and grouped."""
    experts = moe.Experts(64, MoESpec(8, 3, 32))
    if bits:
        moe.nn.quantize(experts, 32, bits)
    finish_loading(experts)
    x = mx.random.normal((9, 64), key=mx.random.key(0))
    routed = moe.route(mx.random.normal((9, 8), key=mx.random.key(1)), 3, mx.ones(8))
    outputs = {experts.path(x.dtype, 27): experts(x, *routed)}
    monkeypatch.setenv(kernels.SWITCH, "0")
    for path in (expert_paths.ExpertPath.PAIRS, expert_paths.ExpertPath.SORTED, expert_paths.ExpertPath.TILED):
        monkeypatch.setattr(expert_paths, "choose", lambda *_, path=path: path)
        outputs[path] = experts(x, *routed)
    assert set(outputs) == set(expert_paths.ExpertPath)
    same((outputs[expert_paths.ExpertPath.PAIRS],), (outputs[expert_paths.ExpertPath.SORTED],))
    for path in (expert_paths.ExpertPath.GROUPED, expert_paths.ExpertPath.TILED):
        close(outputs[path], outputs[expert_paths.ExpertPath.PAIRS], 1e-5)


def test_other_formats_fall_to_the_reference(grouped):
    x, experts = mx.random.normal((4, 64)), routes(4)
    both = kernels.products.Weights(*mx.quantize(mx.random.normal((EXPERTS, 8, 64)), 64, 3), group_size=64, bits=3)
    assert not gate_up.usable(both, x.dtype) and not down.usable(both, x.dtype, 32)
    groups = grouping.group(experts.reshape(-1), EXPERTS)
    same((gate_up.gate_up(x, both, experts, groups),), (gate_up.gate_up_reference(x, both, experts),))


def test_every_kernel_says_whether_it_runs(monkeypatch, grouped):
    assert set(kernels.self_check().values()) == {"on"}
    monkeypatch.setattr(gate_up, "self_check", lambda: "off by 3 where the largest value is 1")
    monkeypatch.setattr(kernels, "_failed", {})
    assert kernels.self_check()["gate_up"] == "self-check failed: off by 3 where the largest value is 1"
    assert kernels.status()["down"] == "on"
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert set(kernels.status().values()) == {"switched off by MLX_GEMMA_MTP_METAL=0"}
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert set(kernels.status().values()) == {"no GPU"}


def test_a_self_check_reports_what_the_compiler_says(monkeypatch, grouped):
    broken = Kernel("expert_groups", ("experts",), ("order", "table"), "nonsense;")
    monkeypatch.setattr(grouping, "KERNEL", broken)
    assert "does not compile" in grouping.self_check()
