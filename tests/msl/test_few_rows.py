"""Products of few rows: a row has the bits of MLX's own product of it alone, and weights are read once. Emulated; what
needs no more than closeness runs on a Mac, too.
"""

from dataclasses import replace

import mlx.core as mx
import pytest
import stock
from cases import AFFINE, FLOAT, Format, coded, normal, weights
from emulator import AT_WILL, CLANG, ORDERS, SANITIZED, Emulator, KernelFault, typecheck
from signature import printed_parameters, signature

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel, few_rows
from mlx_gemma_mtp.ops.kernels.products import Weights, flat

SPLIT = Format(mx.float32, 0, inputs=2100, outputs=18)  # K >= 16 N: a row is split over SIMD-groups
QUAD = Format(mx.float32, 4, 128, inputs=128, outputs=70)  # qmv_quad
FEW = Format(mx.float32, 8, 32, inputs=64, outputs=5)
EVEN = replace(AFFINE, outputs=20)  # the second SIMD-group of the last threadgroup begins where the outputs end
FORMATS = (  # MLX's kernel of one row
    AFFINE,  # qmv
    Format(mx.bfloat16, 0),  # gemv
    SPLIT,
    QUAD,
    Format(mx.bfloat16, 4, 32, inputs=512),  # qmv_fast, outputs no multiple of 8
    Format(mx.float16, 8, 128, inputs=384),
    Format(mx.float16, 8, 64, inputs=512, outputs=16),
    Format(mx.float16, 0, inputs=50, outputs=3),  # a row in four lanes
    FEW,
    FLOAT,
)
MOST_FORMATS = [*FORMATS[:6], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMATS[6:])]
FEW_ROUNDINGS = 2e-6  # of the largest value, a sum of 320 products in float32
WIDTHS = range(1, 17)
needs_stock = pytest.mark.skipif(stock.missing() is not None, reason=str(stock.missing()))


def inputs(form: Format, rows: int = 16) -> tuple[mx.array, Weights]:
    return normal(form, rows, form.inputs, seed=1), flat(weights(form, form.outputs, experts=1))


def agrees(form: Format, widths=WIDTHS) -> bool:
    """Whether every row has MLX's bits at every width."""
    x, table = inputs(form)
    alone = stock.one_by_one(x, table)
    return all(mx.array_equal(few_rows.few_rows_metal(x[:m], table), alone[:m]).item() for m in widths)


@needs_stock
@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
def test_a_row_has_the_bits_of_the_row_alone_in_mlx(emulator, form):
    assert agrees(form)


@needs_stock
@pytest.mark.parametrize("form", MOST_FORMATS[2:], ids=str)
def test_it_has_them_by_every_kernel_that_mlx_takes(emulator, form):
    assert agrees(form, (3, 16))


@pytest.mark.slow
@needs_stock
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_it_has_them_at_every_width(emulator, form):
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        assert agrees(replace(form, dtype=dtype))


@pytest.mark.slow
@needs_stock
@pytest.mark.parametrize(
    ("inputs", "outputs", "bits"),
    [(2816, 96, 4), (2112, 96, 4), (4096, 96, 4), (2816, 96, 8), (2816, 128, 0), (8192, 96, 0), (1536, 256, 0)],
)
def test_the_inputs_of_real_models(emulator, inputs, outputs, bits):
    """K of 26B's projections, of its router (split), and of E2B's per-layer input, whose N is real as well."""
    assert agrees(Format(mx.bfloat16, bits, 64 if bits else 0, inputs, outputs), (1, 2, 5, 16))


@needs_stock
@pytest.mark.parametrize("form", (AFFINE, SPLIT), ids=str)
def test_they_keep_them_where_products_are_fused_into_sums(emulator, form):
    """As a GPU does; in float32, where a product is not exact."""
    x, table = inputs(form, 1)
    rounded = stock.one_row(x, table)
    emulator.fused = True
    assert agrees(form, (3, 16))
    assert not mx.array_equal(rounded, stock.one_row(x, table))  # it is another arithmetic


@needs_stock
def test_they_stay_close_where_a_compiler_fuses_at_will(emulator):
    x, table = inputs(AFFINE, 3)
    emulator.flags = AT_WILL
    assert kernels.difference(few_rows.few_rows_metal(x, table), stock.one_by_one(x, table), FEW_ROUNDINGS) is None


@pytest.mark.parametrize("form", MOST_FORMATS, ids=str)
def test_it_is_the_product(kernel_backend, form):
    x, table = inputs(form)
    for width in (3, 16):
        ours, reference = few_rows.few_rows_metal(x[:width], table), few_rows.few_rows_reference(x[:width], table)
        assert ours.dtype == reference.dtype and ours.shape == reference.shape
        assert kernels.difference(ours, reference, form.tolerance) is None


def test_more_rows_are_more_launches(kernel_backend):
    """Of any leading axes; a row has the same bits in each of them."""
    x, table = inputs(AFFINE, 37)
    y = few_rows.few_rows_metal(x, table)
    assert mx.array_equal(y[20:23], few_rows.few_rows_metal(x[20:23], table))
    assert mx.array_equal(y[36:], few_rows.few_rows_metal(x[36:], table))


@pytest.mark.parametrize("form", (AFFINE, SPLIT), ids=str)
def test_neither_order_of_threads_nor_undefined_behaviour(emulator, form):
    x, table = inputs(form, 3)
    results = []
    for emulator.order in ORDERS:
        results.append(few_rows.few_rows_metal(x, table))
    emulator.flags = SANITIZED
    results.append(few_rows.few_rows_metal(x, table))
    assert all(mx.array_equal(results[0], other) for other in results[1:])


@needs_stock
@pytest.mark.parametrize("bits", (4, 8, 0))
def test_every_weight_is_read_once_for_all_rows(emulator, bits):
    """Where stock MLX reads it for every row. Scales are read by the lanes that share them."""
    form = Format(mx.bfloat16, bits, 64 if bits else 0)
    x, table = inputs(form)
    emulator.counting = True
    for width in (1, 16) if bits != 4 else (1, 2, 3, 7, 8, 9, 16):
        few_rows.few_rows_metal(x[:width], table)
        reads = emulator.reads["few_rows"]
        assert reads["weight"].total == reads["weight"].distinct == table.weight.nbytes
        if bits:
            lanes = 64 // (32 // bits)
            for name, array in (("scales", table.scales), ("biases", table.biases)):
                assert (reads[name].total, reads[name].distinct) == (array.nbytes * lanes, array.nbytes)
    few_rows.few_rows_metal(mx.concatenate([x, x[:1]]), table)  # the 17th row is a launch of its own
    assert emulator.reads["few_rows"]["weight"].total == table.weight.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("width", (1, 5, 16))
def test_the_bytes_of_a_real_projection(emulator, width):
    """gate and up of the 26B's dense MLP: 2816 inputs, 4224 outputs, 4 bits in groups of 64, bfloat16."""
    table = flat(coded(1, 4224, 2816, mx.bfloat16))
    x = normal(Format(mx.bfloat16, 4, 64), width, 2816)
    emulator.counting = True
    y = few_rows.few_rows_metal(x, table)
    assert emulator.reads["few_rows"]["weight"].total == table.weight.nbytes == 4224 * 2816 // 2
    assert kernels.difference(y, few_rows.few_rows_reference(x, table), 2**-7) is None


def launches(monkeypatch) -> list[tuple[Kernel, dict]]:
    """(kernel, arguments) of a launch in every format."""
    seen = []

    def build(kernel: Kernel):
        def launch(**arguments):
            seen.append((kernel, arguments))
            return [mx.zeros(*one) for one in zip(arguments["output_shapes"], arguments["output_dtypes"], strict=True)]

        return launch

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "build", build)
        for form in FORMATS:
            few_rows.few_rows_metal(*inputs(form))
    return seen


@pytest.mark.skipif(CLANG is None, reason="no clang++: address spaces are not checked")
def test_address_spaces(monkeypatch):
    for kernel, launch in launches(monkeypatch):
        assert typecheck(kernel, launch["inputs"], launch["output_dtypes"], launch["template"]) == ""


def test_the_signature_is_the_one_that_mlx_writes(monkeypatch, tmp_path, capfd):
    for kernel, launch in launches(monkeypatch)[:3]:
        rest = {name: value for name, value in launch.items() if name != "inputs"}

        def call(*inputs, kernel=kernel, rest=rest):
            return kernels.build(kernel)(inputs=list(inputs), verbose=True, **rest)

        mx.export_function(str(tmp_path / "few_rows.mlxfn"), call, *launch["inputs"])
        ours = signature(kernel, launch["inputs"], launch["output_dtypes"], launch["template"]).parameters
        assert printed_parameters(capfd.readouterr().out, kernel.name) == ours


BREAKS = [
    (AFFINE, "first / GS]);\n            bias", "first / GS + 1]);\n            bias"),
    (
        AFFINE,
        "sums[c * R + r] += scale[c] * dot + total * bias[c]",
        "sums[c * R + r] += total * bias[c] + scale[c] * dot",
    ),
    (QUAD, "first_row += part * COLUMNS;", "first_row += part;"),
    (AFFINE, "outputs - first_row", "outputs"),
    (SPLIT, "threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    (FLOAT, "inputs - first)", "inputs - first - 1)"),
]
SLOW = [
    (SPLIT, "int g = 1; g < SPLIT", "int g = 1; g < SPLIT - 1"),
    (AFFINE, "dot += value[i] * own[i] + value", "dot = dot + value[i] * own[i] + value"),
    (AFFINE, "(1u << BITS) - 1u", "(1u << BITS) - 2u"),
    (AFFINE, "size_t(r) * inputs + first", "size_t(first)"),
    (AFFINE, "first < inputs; first += BLOCK", "first < inputs - BLOCK; first += BLOCK"),
    (EVEN, "first_row >= outputs", "first_row > outputs"),
    (AFFINE, "return simd_sum(part);", "return part;"),
    (SPLIT, "group * COLUMNS * ROWS + i] = sums[i]", "COLUMNS * ROWS + i] = sums[i]"),
    (SPLIT, "(SPLIT > 1 ? group * LANES : 0) + lane", "lane"),
    (FLOAT, "step = LANES / 2; step > 0", "step = LANES / 2; step > 1"),
    (FEW, "simd_shuffle_xor(part, 2)", "simd_shuffle_xor(part, 4)"),
]


def noticed(form: Format) -> bool:
    """Whether a fault, another value or another rounding shows, in an arithmetic that fuses products into sums."""
    try:
        return not agrees(form, (3,))
    except KernelFault:
        return True


@needs_stock
@pytest.mark.parametrize(
    ("form", "text", "broken"), [*BREAKS, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_a_small_break_is_noticed(monkeypatch, emulator, form, text, broken):
    whole, emulator.fused = kernels.build, True
    assert not noticed(form)

    def build(one: Kernel):
        if one.name != "few_rows":
            return whole(one)
        header, source = one.header.replace(text, broken), one.source.replace(text, broken)
        assert (header, source) != (one.header, one.source), "the text to break is not there"
        return whole(Kernel(one.name, one.inputs, one.outputs, source, header))

    monkeypatch.setattr(kernels, "build", build)
    assert noticed(form)


@pytest.mark.slow
def test_the_self_check_of_every_order_and_width(monkeypatch, kernel_backend):
    monkeypatch.undo()  # what the fixture leaves out, but not the emulator
    if kernel_backend == "emulated":
        monkeypatch.setattr(kernels, "build", Emulator().build)
    assert len(few_rows.CHECKED) > 3 and few_rows.self_check() is None


def test_the_self_check_finds_company_that_changes_bits(monkeypatch, emulator):
    assert few_rows.self_check() is None
    launch = few_rows._launch

    def changed(x, table):
        return launch(x, table) * (1 + 2**-7 * (x.shape[0] == 13))  # within the tolerance

    monkeypatch.setattr(few_rows, "_launch", changed)
    assert few_rows.self_check() == "4-bit weights: a row of 13 has other bits than alone"
    monkeypatch.setattr(few_rows, "_launch", lambda x, table: launch(x, table) + 1)
    assert "off by" in few_rows.self_check()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (Weights(*mx.quantize(mx.ones((8, 64)), 64, 3), 64, 3), "3 bits"),
        (Weights(*mx.quantize(mx.ones((8, 64)), mode="mxfp4"), None, 32, 4, "mxfp4"), "another mode"),
        (Weights(*mx.quantize(mx.ones((4, 64)), 64, 4), 64, 4), "so few scales that MLX hands them over otherwise"),
        (Weights(mx.ones((8, 64), mx.bfloat16)), "another type than the input's"),
    ],
)
def test_what_the_kernel_does_not_take(monkeypatch, emulator, table, why):
    monkeypatch.setattr(few_rows, "why_off", lambda name: None)
    assert few_rows.usable(inputs(AFFINE)[1], mx.float32)
    assert not few_rows.usable(table, mx.float32), why


def test_where_the_kernel_is_off_the_reference_runs(monkeypatch, emulator):
    monkeypatch.setattr(few_rows, "why_off", {"few_rows": "off by 2"}.get)
    monkeypatch.setattr(few_rows, "few_rows_metal", lambda *_: pytest.fail("it is off"))
    x, table = inputs(AFFINE, 6)
    y = few_rows.few_rows(x.reshape(2, 3, -1), table)
    assert y.shape == (2, 3, AFFINE.outputs) and mx.array_equal(y.reshape(6, -1), few_rows.few_rows_reference(x, table))


def test_what_a_thread_holds_fits_its_registers():
    for values in (4, 8, 16):
        for rows in few_rows.ROWS:
            columns = few_rows.columns_of(values, rows)
            assert columns * (values + rows) + values <= few_rows.BUDGET
