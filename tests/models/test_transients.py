"""What a forward holds beside weights and K/V: the formula against MLX's own count, and its terms."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.cache.kv import layout
from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.cache.spec import KVSpec, with_bits
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.machine.device import TABLE, Kind
from mlx_gemma_mtp.models import gemma4, loading
from mlx_gemma_mtp.models.config import TargetConfig
from mlx_gemma_mtp.models.gemma4 import Gemma4
from mlx_gemma_mtp.models.linear import finish_loading
from mlx_gemma_mtp.models.transients import Transients
from mlx_gemma_mtp.sampling.distribution import Rules
from mlx_gemma_mtp.sampling.drawing import draw
from mlx_gemma_mtp.speculative import prefill

Specs = tuple[KVSpec, ...]
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size": 8192,
    "vocab_size_per_layer_input": 8192,
    "sliding_window": 128,
}


def wide(kind: str, **more: int) -> Gemma4:
    """A model whose parts are to one another about as in published ones."""
    raw = tiny.target_dict(kind)
    raw["text_config"] |= WIDE | more
    model = gemma4.build(TargetConfig.from_dict(raw))
    finish_loading(model)
    return model


def bundled() -> Gemma4:
    model = loading.open_target(hub.DEMO / "target", mx.float32)
    loading.prepare(model, lambda done, total: None)
    return model


MODELS: dict[str, Callable[[], Gemma4]] = {
    "tiny moe": lambda: tiny.target("moe"),
    "tiny dense": lambda: tiny.target("dense"),
    "tiny e2b": lambda: tiny.target("e2b"),
    "tiny e4b": lambda: tiny.target("e4b"),
    "bundled": bundled,
    "wide moe": lambda: wide("moe", num_experts=16, top_k_experts=4, moe_intermediate_size=96),
    "wide e2b": lambda: wide("e2b", hidden_size_per_layer_input=32),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


FEW_BITS = {
    "bundled": [(8, False), (4, True)],
    "wide moe": [(8, True), (4, False)],
    "wide e2b": [(4, True)],
}


def ids(count: int) -> list[int]:
    return [2 + i % 90 for i in range(count)]


def forward(model: Gemma4, specs: Specs, rows: int, tokens: int, context: int) -> Callable[[], None]:
    """A chunk of `tokens` tokens of one prompt, which end at `context`."""
    cache = Cache(specs, tokens, model.dtype).open(context)
    cache.commit(mx.array([context - tokens]), [context - tokens])
    mx.eval(cache.buffers, cache.lengths)
    return lambda: mx.eval(prefill.chunk(model, [cache], [ids(tokens)]), cache.buffers)


def verify(model: Gemma4, specs: Specs, rows: int, width: int, context: int) -> Callable[[], None]:
    """A verify with its logits and draws, of the settings that look at most."""
    before, cache = context - width, Cache(specs, width, model.dtype)
    kept = [before if spec.window is None else min(before, spec.window - 1) for spec in specs]
    layers = [
        tuple(part.zeros(1, n) for part in layout(spec, model.dtype)) for n, spec in zip(kept, specs, strict=True)
    ]
    cache.arrange([Saved(before, tuple(layers))] * rows)
    tokens, rules = mx.array([ids(width)] * rows), Rules.of([tiny.SAMPLED] * rows, model.config.vocab_size)
    mx.eval(cache.buffers, cache.lengths, tokens)

    def run() -> None:
        span = cache.span(width)
        drawn = draw(model.logits(model(tokens, span)), rules, span.positions, model.config.softcap)
        mx.eval(drawn.tokens, cache.buffers)

    return run


def peak(
    made: Callable[..., Callable[[], None]], model: Gemma4, specs: Specs, rows: int, count: int, context: int
) -> int:
    """Bytes that MLX held at most beyond what was there, of two runs that end at `context` tokens."""
    most = 0
    for _ in range(2):
        run = made(model, specs, rows, count, context)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        mx.synchronize()
        most = max(most, mx.get_peak_memory() - before)
    return most


@pytest.mark.parametrize(("count", "context"), [(64, 256), (256, 512), (256, 2048)])
def test_a_chunk_holds_no_more_than_was_said(model, count, context):
    check_chunk(model, model.config.kv, count, context)


def check_chunk(model: Gemma4, specs: Specs, count: int, context: int) -> None:
    held = peak(forward, model, specs, 1, count, context)
    said = Transients(model.config, specs, 4, count, TABLE[Kind.CPU]).chunk(count, context)
    assert held <= said <= 3 * held


@pytest.mark.parametrize(("rows", "width", "context"), [(1, 8, 1024), (4, 8, 1024), (8, 4, 512)])
def test_a_verify_holds_no_more_than_was_said(model, rows, width, context):
    check_verify(model, model.config.kv, rows, width, context)


def check_verify(model: Gemma4, specs: Specs, rows: int, width: int, context: int) -> None:
    held = peak(verify, model, specs, rows, width, context)
    said = Transients(model.config, specs, 4, width, TABLE[Kind.CPU]).verify(rows, width, context)
    assert held <= said <= 3 * held


@pytest.mark.parametrize(("name", "bits", "rings"), [(n, *each) for n, every in FEW_BITS.items() for each in every])
def test_the_same_over_kv_in_few_bits(name, bits, rings):
    """Products with packed K/V take copies of what is read on a CPU, as many as there are rows."""
    model = MODELS[name]()
    specs = with_bits(model.config.kv, bits, rings)
    check_chunk(model, specs, 64, 256)
    check_chunk(model, specs, 256, 2048)
    check_verify(model, specs, 1, 8, 1024)
    check_verify(model, specs, 8, 1, 4096)


def published(size: str) -> TargetConfig:
    return TargetConfig.from_dict(json.loads((CONFIGS / f"gemma-4-{size}-it.json").read_text()))


def transients(config: TargetConfig, item_size: int, block: int, kind: Kind) -> Transients:
    return Transients(config, config.kv, item_size, block, TABLE[kind])


def test_scores_of_wide_heads_are_most_of_a_long_chunk():
    """26B on a Mac: 16 heads, 256 tokens and 32,768 slots in 16 bits, once as scores and once as their softmax."""
    said = transients(published("26B-A4B"), 2, 256, Kind.METAL)
    scores = 2 * 16 * 256 * 32768 * 2
    assert scores < said.chunk(256, 32768) < 2 * scores
    assert said.chunk(256, 65536) - said.chunk(256, 32768) == pytest.approx(1.5 * scores, rel=0.05)


def test_fused_attention_has_no_scores():
    """With heads of 128 everywhere the context adds the mask alone: of the chunk, and of the token that goes on."""
    config = published("26B-A4B")
    narrow = tuple(replace(layer, kv=replace(layer.kv, head_dim=128)) for layer in config.layers)
    said = transients(replace(config, layers=narrow), 2, 256, Kind.METAL)
    assert said.chunk(256, 65536) - said.chunk(256, 32768) == 1.5 * 257 * 32768


def test_logits_of_a_verify_are_counted():
    """262,144 scores a token: in 16 bits, and three times in 32."""
    said = transients(published("31B"), 2, 256, Kind.METAL)
    assert said.logits(8 * 5) == 40 * 262144 * 14
    assert said.verify(8, 5, 4096) > 1.5 * said.logits(40)


def test_layers_that_share_kv_see_one_token_of_a_chunk():
    """In the small E2B the only full layer that owns K/V is the last one that does: no scores of a whole chunk, which
    stand in memory on Metal for heads of such a width.
    """
    config = TargetConfig.from_dict(tiny.target_dict("e2b"))
    whole = replace(config, kv=tuple(layer.kv for layer in config.layers))
    few, all_layers = (transients(each, 4, 256, Kind.METAL).chunk(256, 4096) for each in (config, whole))
    assert 5 * few < all_layers
