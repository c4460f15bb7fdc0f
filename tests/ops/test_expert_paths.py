"""Which path the experts take, how ties are routed, and that paths which may alternate agree bit for bit."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_gemma_mtp.machine import blas, device
from mlx_gemma_mtp.machine.device import Kind, kind
from mlx_gemma_mtp.models import linear, moe
from mlx_gemma_mtp.models.config import MoESpec
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.ops import expert_paths
from mlx_gemma_mtp.ops.expert_paths import EQUAL, ExpertPath, ProductPath, Rule, choose, product_rule
from mlx_gemma_mtp.ops.kernels import SWITCH, few_rows
from mlx_gemma_mtp.ops.kernels.down import combine
from mlx_gemma_mtp.ops.kernels.grouping import tiles


def test_of_equal_logits_the_higher_expert_is_kept():
    """On every row and at every number of rows, best last."""
    logits = np.random.default_rng(0).integers(0, 3, (300, 16)).astype(np.float32)
    logits[0] = 1
    for rows in (1, 7, 300):
        experts, weights = moe.route(mx.array(logits[:rows]), 4, mx.ones(16))
        assert experts.tolist() == np.argsort(logits[:rows], axis=-1, kind="stable")[:, -4:].tolist()
        assert weights.dtype == mx.float32
    assert experts[0].tolist() == [12, 13, 14, 15] and weights[0].tolist() == [0.25] * 4


def test_route_is_a_softmax_over_the_chosen_in_float32():
    logits = mx.random.normal((5, 300), key=mx.random.key(0)).astype(mx.bfloat16)
    scale = mx.arange(1, 301).astype(mx.bfloat16)
    experts, weights = moe.route(logits, 270, scale)  # so many that a bfloat16 sum would stall at 256
    chosen = np.array(mx.take_along_axis(logits, experts, axis=-1).astype(mx.float32), np.float64)
    want = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    want *= np.array(scale[experts].astype(mx.float32))
    np.testing.assert_allclose(np.array(weights), want, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_slots_are_added_in_their_order(tokens):
    products, weights = mx.random.normal((tokens, 8, 37)), mx.random.uniform(shape=(tokens, 8))
    terms = np.array(products) * np.array(weights)[..., None]
    total = terms[:, 0]
    for slot in range(1, 8):
        total = total + terms[:, slot]
    if kind() is not Kind.CPU:
        np.testing.assert_allclose(np.array(combine(products, weights)), total, rtol=1e-5, atol=1e-6)
    else:
        assert np.array_equal(np.array(combine(products, weights)), total)


@pytest.mark.skipif(kind() is not Kind.CPU, reason="the CPU's rule")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_the_paths_are_bit_equal_on_a_cpu(monkeypatch, tokens, bits):
    """Tiles of floats, too, with MLX's own BLAS: another gives a row other bits in another width, wherever it comes."""
    experts = moe.Experts(64, MoESpec(8, 3, 32))
    nn.quantize(experts, 32, bits) if bits else None
    finish_loading(experts)
    x, routed = mx.random.normal((tokens, 64)), moe.route(mx.random.normal((tokens, 8)), 3, mx.ones(8))
    outputs = []
    for path in (*EQUAL, ExpertPath.TILED) if bits is None and blas.is_reference() else EQUAL:
        monkeypatch.setattr(expert_paths, "choose", lambda *_, path=path: path)
        outputs.append(experts(x, *routed))
    assert len(outputs) >= 2 and all(mx.array_equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("path", ExpertPath)
def test_every_path_computes_the_mixture(path, bits):
    """Whatever the table says; where kernels do not run, GROUPED is their references."""
    experts = moe.Experts(64, MoESpec(8, 3, 32))
    nn.quantize(experts, 32, bits) if bits else None
    finish_loading(experts)
    x, routed = mx.random.normal((9, 64)), moe.route(mx.random.normal((9, 8)), 3, mx.ones(8))
    want = np.array(experts.run(ExpertPath.PAIRS, x, *routed))
    np.testing.assert_allclose(np.array(experts.run(path, x, *routed)), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("pairs, count", [(1, 1), (5, 3), (64, 4), (100, 24)])
def test_tiles_hold_every_pair_once_beside_its_own_kind(pairs, count):
    experts = np.random.default_rng(pairs).integers(0, count, pairs)
    found = tiles(mx.array(experts.astype(np.uint32)), count, rows=8)
    slot, pair, expert = map(np.array, found)
    assert len(set(slot.tolist())) == pairs and slot.max() < len(pair) == 8 * len(expert)
    assert np.array_equal(expert[slot // 8], experts)
    assert np.array_equal(pair[slot], np.arange(pairs)) and not np.delete(pair, slot).any()
    for e in set(experts.tolist()):  # in order, and in no more tiles than it takes
        own = slot[experts == e]
        assert np.array_equal(own, own[0] + np.arange(len(own))) and own[0] % 8 == 0


@pytest.mark.parametrize(("tokens", "told"), [(expert_paths.VERIFY // 4, False), (expert_paths.VERIFY // 4 + 1, True)])
def test_tiles_of_sorted_pairs_are_for_prefill_alone(monkeypatch, tokens, told):
    """Of quantised weights: on Metal another kernel with other bits, which a verify must not meet at some widths."""
    experts = moe.Experts(64, MoESpec(8, 4, 32))
    nn.quantize(experts, 32, 4)
    finish_loading(experts)
    product, seen = mx.gather_qmm, []
    spy = lambda *args, **kwargs: seen.append(kwargs["sorted_indices"]) or product(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(mx, "gather_qmm", spy)
    experts.run(ExpertPath.SORTED, mx.zeros((tokens, 64)), *moe.route(mx.zeros((tokens, 8)), 4, mx.ones(8)))
    assert seen == [told, told]


@pytest.mark.parametrize(
    ("chip", "weights", "grouped", "pairs", "path"),
    [
        ("cpu", "float", False, 63, ExpertPath.PAIRS),
        ("cpu", "affine4", False, 64, ExpertPath.SORTED),
        ("cpu, fast BLAS", "float", False, 95, ExpertPath.PAIRS),
        ("cpu, fast BLAS", "float", False, 96, ExpertPath.TILED),
        ("cpu, fast BLAS", "affine4", False, 64, ExpertPath.SORTED),
        ("Apple M4 Max", "affine4", True, 8, ExpertPath.GROUPED),
        ("Apple M4 Max", "float", True, 1024, ExpertPath.GROUPED),
        ("Apple M4 Max", "affine4", True, 1025, ExpertPath.SORTED),
        ("Apple M4 Max", "affine4", False, 8, ExpertPath.PAIRS),
        ("Apple M4 Max", "mxfp4", False, 64, ExpertPath.SORTED),
        ("Apple M4 Max", "float", False, 8, ExpertPath.SORTED),
    ],
)
def test_the_table(chip, weights, grouped, pairs, path):
    assert choose(chip, mx.bfloat16, weights, pairs, grouped) == path


def test_a_rule_measured_on_a_chip_goes_first():
    rule = Rule(
        "Apple M4", "bfloat16", "affine4", ((1, ExpertPath.PAIRS), (16, ExpertPath.GROUPED)), frozenset(ExpertPath)
    )
    case = (mx.bfloat16, "affine4")
    assert choose("Apple M4 Max", *case, 15, True) == ExpertPath.GROUPED
    expert_paths.adopt((rule,))
    try:
        assert choose("Apple M4 Max", *case, 15, True) == ExpertPath.PAIRS
        assert choose("Apple M4 Max", *case, 16, True) == ExpertPath.GROUPED
        assert choose("Apple M4 Max", *case, 64, False) == ExpertPath.SORTED  # its kernels do not run
        assert choose("Apple M1", *case, 15, True) == ExpertPath.GROUPED
    finally:
        expert_paths.adopt(())
    assert choose("Apple M4 Max", *case, 15, True) == ExpertPath.GROUPED


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        (((1, ExpertPath.PAIRS), (64, ExpertPath.GROUPED)), "not known to be bit-equal"),
        (((8, ExpertPath.PAIRS),), "ascending"),
        (((1, ExpertPath.PAIRS), (1, ExpertPath.SORTED)), "ascending"),
        ((), "ascending"),
    ],
)
def test_a_rule_that_could_change_bits_within_a_verify_is_refused(steps, complaint):
    with pytest.raises(ValueError, match=complaint):
        Rule("", "", "", steps, EQUAL)
    Rule(
        "", "", "", ((1, ExpertPath.GROUPED), (1025, ExpertPath.SORTED))
    )  # prefill chunks are the same whatever is drafted


def product_path(rows: int, kernel: bool = True, invariant: bool = False, side: int = 2048) -> ProductPath:
    return product_rule("Apple M4", mx.bfloat16, "affine4", side, kernel, invariant).path(rows)


@pytest.mark.parametrize("invariant", [False, True])
def test_products_go_where_the_table_says(invariant):
    """MLX's own, unless few rows were measured to be faster or must keep their bits; wide passes are MLX's."""
    for kernel, rows, path in (
        (True, 1, ProductPath.FEW_ROWS if invariant else ProductPath.STOCK),
        (True, expert_paths.ROWS, ProductPath.FEW_ROWS if invariant else ProductPath.STOCK),
        (True, expert_paths.ROWS + 1, ProductPath.STOCK),
        (False, 1, ProductPath.STOCK),
    ):
        assert product_path(rows, kernel, invariant) == path
    faster = Rule("", "", "", ((1, ProductPath.STOCK), (2, ProductPath.FEW_ROWS)), expert_paths.ANY_PRODUCT)
    expert_paths.adopt((faster,))
    try:
        assert product_path(2) == ProductPath.FEW_ROWS
        assert product_path(2, kernel=False) == ProductPath.STOCK
        assert choose("Apple M4", mx.bfloat16, "affine4", 8, True) == ExpertPath.GROUPED
    finally:
        expert_paths.adopt(())


def test_a_measured_rule_holds_for_matrices_of_its_size():
    """The first whose side a matrix does not pass; of none, the built-in one. Experts have no part in it."""
    few = ((1, ProductPath.FEW_ROWS),)
    expert_paths.adopt((Rule("", "", "affine4", few, side=2048), Rule("", "", "affine4", few, side=65536)))
    try:
        assert product_path(4, side=2048) == ProductPath.FEW_ROWS
        expert_paths.adopt(expert_paths.measured()[:1])
        assert product_path(4, side=2048) == ProductPath.FEW_ROWS and product_path(4, side=2049) == ProductPath.STOCK
        expert_paths.adopt((Rule("", "", "affine4", few, side=0),))
        assert product_path(4, side=262144) == ProductPath.FEW_ROWS
        expert_paths.adopt((Rule("", "", "", ((1, ExpertPath.SORTED),), side=2048),))
        assert choose("Apple M4", mx.bfloat16, "affine4", 8, True) == ExpertPath.GROUPED
    finally:
        expert_paths.adopt(())


def test_a_rule_as_a_line_tells_all_that_decides():
    rules = [
        Rule(
            "Apple M4",
            "bfloat16",
            "affine4",
            ((1, ProductPath.STOCK), (2, ProductPath.FEW_ROWS)),
            expert_paths.ANY_PRODUCT,
            2048,
        ),
        Rule("", "", "", ((1, ExpertPath.SORTED),)),
    ]
    assert list(map(str, rules)) == [
        "Apple M4, bfloat16, affine4 to 2048: 1 stock, 2 few rows",
        "any chip, any dtype, any weights: 1 sorted",
    ]


@pytest.mark.parametrize("bits", [None, 4])
def test_linears_and_tables_ask_the_table(monkeypatch, bits):
    """Of any leading axes, once they are to keep rows; in the place of the kernel its reference."""
    model = nn.Module()
    model.linear, model.table = linear.Linear(64, 40), linear.Embedding(48, 64)
    nn.quantize(model, 32, bits) if bits else None
    finish_loading(model)
    x, seen = mx.random.normal((2, 3, 64), key=mx.random.key(0)), []
    products = {"linear": (model.linear, model.linear), "table": (model.table, model.table.as_linear)}
    own = {name: call(x) for name, (_, call) in products.items()}
    assert linear.keep_rows(model, mx.float32) == [model.linear.form]  # no GPU: nothing keeps them

    def few(x, weights):
        seen.append(weights.weight.shape)
        return few_rows.few_rows_reference(x, weights)

    monkeypatch.setattr(linear, "why_off", lambda name: None)
    monkeypatch.setattr(few_rows, "usable", lambda *_: True)
    monkeypatch.setattr(few_rows, "few_rows_metal", few)
    assert linear.keep_rows(model, mx.float32) == []
    for name, (module, call) in products.items():
        y = call(x)
        assert y.shape == own[name].shape and seen.pop() == module.weights.weight.shape
        np.testing.assert_allclose(np.array(y), np.array(own[name]), atol=1e-4)
        assert module.rule(mx.float32).paths(expert_paths.ROWS) == ["few rows"]
        assert module.rule(mx.float32).paths(expert_paths.ROWS + 1) == ["few rows", "stock"]


def test_a_product_asks_the_table_once_and_again_when_something_changed(monkeypatch):
    """Not at each call, and never with what held before: rules, the switch of a kernel, row_invariant, the type."""
    product, asked = linear.Linear(64, 40), []
    table = lambda *case: asked.append(case) or product_rule(*case)  # noqa: E731
    monkeypatch.setattr(expert_paths, "product_rule", table)
    monkeypatch.setattr(few_rows, "usable", lambda *_: True)
    off = {}
    monkeypatch.setattr(linear, "why_off", off.get)
    for rows in (1, 1, 2, 3, 1):
        product(mx.zeros((rows, 64)))
    assert asked == [(device.name(), mx.float32, "float", 64, True, False)]
    path = lambda: product.path(mx.float32, 4)  # noqa: E731
    rule = Rule("", "", "float", ((1, ProductPath.FEW_ROWS),), side=64)
    try:
        expert_paths.adopt((rule,))
        assert path() == ProductPath.FEW_ROWS and path() == ProductPath.FEW_ROWS and len(asked) == 2
        expert_paths.adopt((replace(rule, side=63),))
        assert path() == ProductPath.STOCK and len(asked) == 3
        product.row_invariant = True
        assert path() == ProductPath.FEW_ROWS and len(asked) == 4
        off["few_rows"] = "off by 2"
        monkeypatch.setattr(few_rows, "usable", lambda *_: False)
        assert path() == ProductPath.STOCK and len(asked) == 5
        assert product.path(mx.bfloat16, 4) == ProductPath.STOCK and asked[-1][1] == mx.bfloat16
    finally:
        expert_paths.adopt(())


def test_measured_rules_of_a_model_are_those_of_its_formats():
    model = nn.Module()
    model.experts, model.linear = moe.Experts(64, MoESpec(8, 3, 32)), linear.Linear(64, 40)
    model.linear = model.linear.to_quantized(32, 4)
    steps = ((1, ProductPath.FEW_ROWS),)
    rules = tuple(Rule("", "", weights, steps) for weights in ("", "affine4", "affine8", "float"))
    try:
        expert_paths.adopt(rules)
        assert linear.measured_rules(model) == [str(rule) for rule in rules if rule.weights != "affine8"]
        expert_paths.adopt(())
        assert linear.measured_rules(model) == []
    finally:
        expert_paths.adopt(())


def test_without_metal_or_with_the_switch_the_stock_paths_run(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    experts = moe.Experts(64, MoESpec(8, 3, 32))
    finish_loading(experts)
    assert experts.path(mx.float32, 8) in EQUAL and not experts.switch_glu.groupable(mx.float32, 8)
