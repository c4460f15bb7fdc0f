"""The dense drafter head and its argmax in one pass."""

from dataclasses import replace

import mlx.core as mx
import pytest
import tiny
from cases import AFFINE, FLOAT, Format, normal, weights
from emulator import ORDERS, SANITIZED

from mlx_gemma_mtp.ops import kernels
from mlx_gemma_mtp.ops.kernels import head_argmax
from mlx_gemma_mtp.ops.kernels.products import Weights, flat
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.speculative.drafting import pick

VOCAB, PARTS = 203, 16  # the last parts are short and empty
FORMATS = (AFFINE, FLOAT, Format(mx.bfloat16, 8, 64), Format(mx.float16, 0, inputs=256))


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def head(request):
    return request.param, flat(weights(request.param, VOCAB, experts=1))


@pytest.mark.parametrize("rows", [1, 8, 11])
@pytest.mark.parametrize("suppressed", [False, True])
def test_the_token_is_that_of_the_whole_product(kernel_backend, head, rows, suppressed):
    """Bit-equal logits are not asked for: the token found must have the largest logit but for rounding."""
    form, table = head
    y, bias = normal(form, rows, form.inputs, seed=5), None
    if suppressed:
        best, _ = head_argmax.best_token_reference(y, table, None)
        bias = mx.where((mx.arange(VOCAB)[None] == best[:, None]).any(axis=0), -mx.inf, 0.0)
    found, sure = head_argmax.best_token_metal(y, table, bias, PARTS)
    logits = head_argmax.logits_reference(y, table, bias)
    assert found.dtype == mx.int32 and found.shape == (rows,)
    missed = logits.max(axis=-1) - mx.take_along_axis(logits, found[:, None], axis=-1)[:, 0]
    expected = mx.softmax(logits, axis=-1, precise=True).max(axis=-1)
    assert (mx.abs(sure - expected) / expected).max().item() <= max(1e-5, 8 * form.tolerance)
    assert missed.max().item() <= 2 * form.tolerance * mx.where(mx.isinf(logits), 0, mx.abs(logits)).max().item()


def test_of_equal_logits_the_lower_token_is_drafted(kernel_backend):
    rows = mx.repeat(weights(FLOAT, 60, experts=1).weight[0], 2, axis=0)
    head = Weights(mx.concatenate([rows, rows]))  # every logit beside itself, in one part, and again in another
    y = normal(FLOAT, 8, FLOAT.inputs, seed=6)
    found, sure = head_argmax.best_token_metal(y, head, None, PARTS)
    tokens, chances = head_argmax.best_token_reference(y, head, None)
    assert found.tolist() == tokens.tolist() and mx.allclose(sure, chances, rtol=1e-5, atol=0)
    assert all(token < 120 and token % 2 == 0 for token in found.tolist())


@pytest.mark.parametrize("form", [AFFINE, FLOAT], ids=str)
def test_neither_order_of_threads_nor_undefined_behaviour(emulator, form):
    y, table = normal(form, 3, form.inputs, seed=5), flat(weights(form, VOCAB, experts=1))
    results = []
    for emulator.order in ORDERS:
        results.append(head_argmax.best_token_metal(y, table, None, PARTS))
    emulator.flags = SANITIZED
    results.append(head_argmax.best_token_metal(y, table, None, PARTS))
    tokens, sure = head_argmax.best_token_reference(y, table, None)
    for found, chance in results:
        assert found.tolist() == tokens.tolist() and mx.allclose(chance, sure, rtol=1e-5, atol=0)
    assert len({tuple(chance.tolist()) for _, chance in results[:3]}) == 1


def test_the_vocabulary_is_read_once_for_eight_rows(emulator):
    emulator.counting = True
    table = flat(weights(AFFINE, VOCAB, experts=1))
    for rows in (1, 8):
        head_argmax.best_token_metal(normal(AFFINE, rows, AFFINE.inputs), table, None, PARTS)
        reads = emulator.reads["head_argmax"]["weight"]
        assert reads.total == reads.distinct == table.weight.nbytes


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("logit > best[r]", "logit >= best[r]"),
        ("(part + 1) * LENGTH", "(part + 1) * LENGTH - 4"),
        ("first + c;", "first;"),
        ("mass[r] * metal::precise::exp(best[r] - logit) + 1.0f", "mass[r] + 1.0f"),
        ("mass[r] += metal", "mass[r] = metal"),
    ],
)
def test_a_small_break_is_noticed(monkeypatch, emulator, text, broken):
    def build(kernel):
        assert text in kernel.source
        return emulator.build(replace(kernel, source=kernel.source.replace(text, broken)))

    monkeypatch.setattr(kernels, "build", build)
    with pytest.raises(AssertionError):
        test_of_equal_logits_the_lower_token_is_drafted("emulated")


def test_a_greedy_drafter_asks_the_kernel_and_drafts_the_same(monkeypatch, emulator):
    """Of tokens that may be said. Sampled drafts still go through the head."""
    model = tiny.target("dense")
    drafter = tiny.drafter(model, "dense")
    y, positions = mx.random.normal((3, drafter.config.hidden_size)), mx.zeros((3, 1), mx.int32)
    rules = Rules.of([tiny.GREEDY] * 3, drafter.config.vocab_size, suppress=[5, 9])
    by_head, *_ = pick(drafter, y, rules, positions, None, False)
    monkeypatch.setattr(kernels, "available", lambda: True)
    emulator.counting = True
    by_kernel, *_ = pick(drafter, y, rules, positions, None, True)
    assert by_kernel.dtype == by_head.dtype == mx.int32 and by_kernel.tolist() == by_head.tolist()
    assert set(emulator.reads) == {"head_argmax"}
    emulator.reads.clear()
    sampled = Rules.of([replace(tiny.GREEDY, temperature=1.0)] * 3, drafter.config.vocab_size)
    pick(drafter, y, sampled, positions, None, False)
    assert not emulator.reads
