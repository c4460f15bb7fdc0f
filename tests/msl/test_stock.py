"""The grouped kernels give a row the bits that MLX's own kernel text gives it, one pair at a time. Emulated.

Which equality holds in which arithmetic, on any x86-64 and with any compiler (elsewhere the emulator does not run, and
this file skips):
- as written, every product and every sum rounded: bit for bit, in every format and type;
- products fused into sums within an expression, as C's FP_CONTRACT ON: bit for bit, in float32 too;
- a compiler that fuses across statements as it likes: as close as roundings are, no more. What GCC picks at 8 bits
  hangs on -march and on its version.
On a Mac the third may be the case; `python -m mlx_gemma_mtp.doctor` says whether bits agree there.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import stock
from cases import Format, coded, normal, recorded, routes, uniform, weights
from emulator import AT_WILL

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import Kernel, down, gate_up
from mlx_gemma_mtp.ops.kernels.grouping import ROWS, group_reference
from mlx_gemma_mtp.ops.kernels.products import Weights

pytestmark = pytest.mark.skipif(stock.missing() is not None, reason=str(stock.missing()))

EXPERTS = 24
FORMATS = (  # gate and up have twice the outputs of down here
    Format(mx.float32, 4, 64),
    Format(mx.float32, 8, 64),
    Format(mx.float32, 0, inputs=75),
    Format(mx.bfloat16, 4, 32, inputs=512, outputs=8),  # the fast forms
    Format(mx.bfloat16, 8, 32, inputs=256, outputs=8),
    Format(mx.bfloat16, 4, 64, inputs=704, outputs=8),  # K of the real down: no multiple of a block
    Format(mx.bfloat16, 0),
    Format(mx.float16, 8, 64, inputs=64, outputs=5),  # fewer outputs than a threadgroup of gather_qmv takes
    Format(mx.float16, 4, 32, inputs=96),
    Format(mx.float16, 0, inputs=130, outputs=9),
)
FEW_ROUNDINGS = 2e-6  # of the largest value, a sum of 320 products in float32
GEGLU = "static_cast<T>(gate * up / (1.0f + metal::precise::exp(-turn)))"
PLACE = "inner[size_t(pairs[r]) * SIZE + first + c] =\n                        "


def taken(kind: str) -> mx.array:
    """uint32 [N, k] of EXPERTS: full groups of 8 and short ones."""
    if kind == "random":
        return routes(8)
    return mx.array(next(one for one in recorded(16) if np.bincount(one.reshape(-1)).max() > ROWS).astype(np.uint32))


def bare(kernel: Kernel) -> Kernel:
    """gate_up without its GeGLU: the products of gate and up, side by side as gather_qmm gives them."""
    one = "inner[size_t(pairs[r]) * 2 * SIZE + {}first + c] = static_cast<T>({});"
    stores = f"{one.format('', 'gate')}\n{one.format('SIZE + ', 'up')}"
    source = kernel.source.replace(f"{PLACE}{GEGLU};", stores)
    assert source != kernel.source, "the text to replace is not there"
    return replace(kernel, source=source)


def products(monkeypatch, emulator, x: mx.array, both: Weights, experts: mx.array, rows: int) -> mx.array:
    """gate and up of every pair by our kernel: [P, 2 size]."""

    def build(kernel: Kernel):
        launch = emulator.build(bare(kernel))
        return lambda **given: launch(**given | {"output_shapes": [(experts.size, both.outputs)]})

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "build", build)
        return gate_up.gate_up_metal(x, both, experts, group_reference(experts.reshape(-1), both.weight.shape[0], rows))


def gate_up_agrees(monkeypatch, emulator, x: mx.array, both: Weights, experts: mx.array, rows: int) -> bool:
    """Whether gate and up have MLX's bits at every pair."""
    chosen = experts.reshape(-1)
    theirs = stock.gather(x, both, mx.arange(chosen.size, dtype=mx.uint32) // experts.shape[1], chosen)
    return mx.array_equal(products(monkeypatch, emulator, x, both, experts, rows), theirs).item()


def by_down(inner: mx.array, single: Weights, experts: mx.array, rows: int) -> tuple[mx.array, mx.array]:
    """Every pair's product by our down (as a token of one slot and weight 1) and by MLX's text."""
    chosen = experts.reshape(-1)
    groups = group_reference(chosen, single.weight.shape[0], rows)
    ours = down.down_metal(inner, single, chosen[:, None], mx.ones((chosen.size, 1)), groups)
    return ours, stock.gather(inner, single, mx.arange(chosen.size, dtype=mx.uint32), chosen)


def down_agrees(inner: mx.array, single: Weights, experts: mx.array, rows: int) -> bool:
    """Whether down has MLX's bits at every pair."""
    return mx.array_equal(*by_down(inner, single, experts, rows)).item()


def of_down(form: Format, experts: mx.array) -> tuple[mx.array, Weights, mx.array]:
    """Inputs of `down_agrees`."""
    return normal(form, experts.size, form.inputs, seed=3), weights(form, form.outputs, EXPERTS), experts


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_have_the_bits_of_gather_qmv_and_gemv(monkeypatch, emulator, form):
    """Whatever the rows of a group, on recorded routes of the bundled target and on random ones."""
    both = weights(form, 2 * form.outputs, EXPERTS)
    for kind, rows in (("recorded", ROWS), ("random", ROWS), ("random", 1)):
        experts = taken(kind)
        x = normal(form, experts.shape[0], form.inputs, seed=1)
        assert gate_up_agrees(monkeypatch, emulator, x, both, experts, rows)
        assert down_agrees(*of_down(form, experts), rows)


@pytest.mark.slow
def test_the_real_26b_layer_has_them(monkeypatch, emulator):
    """2816 inputs, 704 inner, 128 experts, 8 of them, 4 bits in groups of 64, bfloat16, 4 tokens."""
    experts, form = mx.array(uniform(4).astype(np.uint32)), Format(mx.bfloat16, 4, 64)
    both, single = coded(128, 1408, 2816, mx.bfloat16), coded(128, 2816, 704, mx.bfloat16)
    assert gate_up_agrees(monkeypatch, emulator, normal(form, 4, 2816), both, experts, ROWS)
    assert down_agrees(normal(form, 32, 704), single, experts, ROWS)


@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_they_keep_them_where_products_are_fused_into_sums(monkeypatch, emulator, form):
    """As a GPU does; in float32, where a product is not exact. The same expressions leave the same choice."""
    inner, single, experts = of_down(form, taken("random"))
    pairs = mx.arange(8, dtype=mx.uint32)
    rounded = stock.gather(inner, single, pairs, pairs)
    emulator.fused = True
    assert down_agrees(inner, single, experts, ROWS)
    x, both = normal(form, experts.shape[0], form.inputs, seed=1), weights(form, 2 * form.outputs, EXPERTS)
    assert gate_up_agrees(monkeypatch, emulator, x, both, experts, ROWS)
    assert not mx.array_equal(rounded, stock.gather(inner, single, pairs, pairs))  # it is another arithmetic


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
def test_they_stay_close_where_a_compiler_fuses_at_will(emulator, form):
    inner, single, experts = of_down(form, taken("random"))
    emulator.flags = AT_WILL
    ours, theirs = by_down(inner, single, experts, ROWS)
    assert kernels.difference(ours, theirs, FEW_ROUNDINGS) is None


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("start + lane * VALUES", "start + (31 - lane) * VALUES"),
        (
            "sums[c * R + r] += scale[c] * dot + total * bias[c]",
            "sums[c * R + r] += scale[c] * dot; sums[c * R + r] += total * bias[c]",
        ),
        ("dot += value[i] * digit<BITS>(word, 0)", "dot = dot + value[i] * digit<BITS>(word, 0)"),
    ],
)
def test_another_order_of_addition_is_noticed(monkeypatch, emulator, text, broken):
    def build(kernel: Kernel):
        return emulator.build(replace(kernel, header=kernel.header.replace(text, broken)))

    monkeypatch.setattr(kernels, "build", build)
    assert not down_agrees(*of_down(FORMATS[0], taken("random")), ROWS)
