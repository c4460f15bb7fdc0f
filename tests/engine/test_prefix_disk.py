"""Prefixes on disk, from the engine's side: what leaves the device comes back bit for bit, or not at all."""

import gc
import threading
import weakref

import mlx.core as mx
import pytest

from mlx_gemma_mtp.cache.saved import Saved
from mlx_gemma_mtp.engine import prefix_disk
from mlx_gemma_mtp.engine.prefix import Prefixes
from mlx_gemma_mtp.engine.prefix_disk import PrefixDisk, Shapes
from mlx_gemma_mtp.engine.settings import Settings
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.prefix_store import PrefixStore
from mlx_gemma_mtp.ops import expert_paths
from mlx_gemma_mtp.ops.expert_paths import ExpertPath, ProductPath, Rule
from mlx_gemma_mtp.speculative.prefill import prefill
from tests import tiny

TOKENS = [(7 * i) % tiny.VOCAB for i in range(40)]


def saved_of(model, tokens, lookback=0, slack=0) -> Saved:
    (cache,), _ = prefill(model, [tokens], 16, lookback)
    return cache.save(0, slack)


def disk_of(folder, model, lookback=0, told=None) -> PrefixDisk:
    fits = Shapes.of(model.config.kv, model.dtype, lookback).fit
    return PrefixDisk(PrefixStore(folder, "key", 10**9, notice=(told if told is not None else []).append, fits=fits))


def bits(saved: Saved) -> list:
    return [[(a.dtype, a.shape, memoryview(a).tobytes()) for a in layer] for layer in saved.layers]


@pytest.mark.parametrize("lookback, slack", [(0, 0), (1, 8)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", ["moe", "e2b"])
def test_kv_come_back_bit_for_bit(tmp_path, kind, dtype, lookback, slack):
    model, told = tiny.target(kind), []
    model.set_dtype(dtype)
    disk = disk_of(tmp_path, model, lookback)
    for length in (3, 40):
        saved = saved_of(model, TOKENS[:length], lookback, slack)
        disk.keep(TOKENS[:length], saved, "salt")
        disk.close() if length == 40 else disk.store.flush()
        found = disk_of(tmp_path, model, lookback, told).read([*TOKENS[:length], 5], "salt")
        assert found.tokens == length and found.bytes == saved.bytes
        assert bits(found.saved()) == bits(saved) and found.saved().layers[0][0].dtype == dtype
    assert told == [] and disk_of(tmp_path, model, lookback).read(TOKENS, None) is None


def test_at_least_one_token_is_left_and_memory_comes_first(tmp_path):
    model = tiny.target()
    disk = disk_of(tmp_path, model)
    for length in (20, 40):
        disk.keep(TOKENS[:length], saved_of(model, TOKENS[:length]), None)
    disk.store.flush()
    assert disk.read(TOKENS).tokens == 20 and disk.read([*TOKENS, 1]).tokens == 40
    memory = Prefixes(10**9, 4, Shapes.of(model.config.kv, model.dtype, 0).least)
    disk.join(memory)
    memory.keep(TOKENS[:19], saved_of(model, TOKENS[:19]))
    assert disk.read(TOKENS).tokens == 20
    memory.keep(TOKENS[:20], saved_of(model, TOKENS[:20]))
    assert disk.read(TOKENS) is None and disk.read([*TOKENS, 1]).tokens == 40
    disk.store.flush()
    assert disk.store.longest(TOKENS[:19]) == 19
    assert disk.read(TOKENS[:1]) is None


def test_who_waits_for_one_beginning_shares_what_was_read(tmp_path, monkeypatch):
    model = tiny.target()
    disk, reads = disk_of(tmp_path, model), []
    disk.keep(TOKENS, saved_of(model, TOKENS), None)
    disk.keep([1, 2], saved_of(model, [1, 2]), None)
    disk.store.flush()
    read = disk.store.read
    monkeypatch.setattr(disk.store, "read", lambda *asked: [reads.append(asked), read(*asked)][1])
    found, agents = [], [threading.Thread(target=lambda i=i: found.append(disk.read([*TOKENS, i]))) for i in range(8)]
    for each in agents:
        each.start()
    for each in agents:
        each.join()
    assert len(reads) == 1 and len({id(each) for each in found}) == 1
    monkeypatch.setattr(prefix_disk, "MOST_READ", found[0].bytes)
    assert disk.read([1, 2, 3]) is None  # so much waits already
    del found[:]
    assert disk.read([1, 2, 3]).tokens == 2 and disk.read([*TOKENS, 1]).tokens == 40


def test_who_begins_at_once_with_what_was_read_shares_its_arrays(tmp_path):
    """Several requests of a plan that go on from one file: its K/V are on the device once."""
    model = tiny.target()
    disk = disk_of(tmp_path, model)
    disk.keep(TOKENS, saved_of(model, TOKENS), None)
    disk.store.flush()
    restored = disk.read([*TOKENS, 1])
    one = restored.saved()
    assert restored.saved() is one and disk.read([*TOKENS, 2]).saved() is one
    gone, before = weakref.ref(one), bits(one)
    del one
    gc.collect()
    assert gone() is None and bits(restored.saved()) == before


def test_kv_of_other_shapes_are_removed(tmp_path):
    moe, other = tiny.target(), tiny.target("e2b")
    disk = disk_of(tmp_path, moe)
    disk.keep(TOKENS, saved_of(moe, TOKENS), None)
    disk.close()
    told = []
    assert disk_of(tmp_path, other, told=told).read([*TOKENS, 1]) is None
    assert len(told) == 1 and "other shapes" in told[0] and list(tmp_path.iterdir()) == []


def test_kv_without_a_whole_window_do_not_fit():
    model = tiny.target()
    shapes, saved = Shapes.of(model.config.kv, model.dtype, 0), saved_of(model, TOKENS)
    least = max(few for few in shapes.least if few is not None)
    assert least < len(TOKENS)

    def layers(keep: int) -> list:
        cut = [[array[:, :, -keep:] for array in layer] for layer in saved.layers]
        full = [few is None for few in shapes.least]
        chosen = [layer if all_ else part for layer, part, all_ in zip(saved.layers, cut, full, strict=True)]
        return [[prefix_disk._host(mx.contiguous(array)) for array in layer] for layer in chosen]

    assert shapes.fit(40, layers(least)) and not shapes.fit(40, layers(least - 1))
    assert not shapes.fit(41, layers(least)) and not shapes.fit(39, layers(least)) and not shapes.fit(40, [])


def test_kv_computed_by_other_rules_are_others(tmp_path):
    """What the doctor measured decides which kernels compute, and with them bits; but rules for weights that the model
    has not do not.
    """
    model, settings = tiny.target("moe"), Settings(prefix_cache=tmp_path)
    key = lambda: prefix_disk._key(hub.DEMO / "target", model, settings)  # noqa: E731
    products, experts = ((1, ProductPath.FEW_ROWS),), ((1, ExpertPath.SORTED),)
    rules = [
        (),
        (Rule("", "", "float", products),),
        (Rule("", "", "float", products, side=2048),),
        (Rule("", "", "float", products), Rule("", "", "float", experts)),
    ]
    try:
        before, keys = key(), set()
        for each in rules:
            expert_paths.adopt(each)
            keys.add(key())
        assert before in keys and len(keys) == len(rules)
        expert_paths.adopt((Rule("", "", "affine4", products),))
        assert key() == before
    finally:
        expert_paths.adopt(())
