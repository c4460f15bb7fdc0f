"""What a run needs: checked before anything is read; bytes of a cache, of a step."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import target_dict

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.cache.cache import Cache
from mlx_gemma_mtp.cache.spec import KVSpec, kv_bytes
from mlx_gemma_mtp.engine import scheduler
from mlx_gemma_mtp.engine.load import load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.folder import weight_bytes
from mlx_gemma_mtp.machine import memory
from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.loading import step_bytes

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(hub.DEMO / "target", folder)
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs 0\.\d GB, this machine has 0\.0 GB for it; convert it with -q"):
        load(str(folder))


def test_cache_bytes():
    """Whole rings of window + block - 1 positions; full layers in steps of 256."""
    config = TargetConfig.from_dict(target_dict("moe"))
    rows, tokens, block = 2, 1000, 16
    rings = 4 * 2 * (8 + block - 1) * 2 * 8
    full = 2 * 2 * 1024 * 1 * 16
    assert kv_bytes(config.kv, tokens, rows, block, 4) == rows * (rings + full) * 4
    assert config.kv[0] == KVSpec(2, 8, 8)


@pytest.mark.parametrize("kind", ["moe", "e2b"])
@pytest.mark.parametrize("tokens", [1, 5, 256, 257, 1000])
def test_cache_bytes_are_those_of_a_cache(kind, tokens):
    config = TargetConfig.from_dict(target_dict(kind))
    cache = Cache(config.kv, 3, tokens, 16, mx.float16)
    held = sum(array.nbytes for buffers in cache.buffers for array in buffers)
    assert kv_bytes(config.kv, tokens, 3, 16, 2) == held


@pytest.fixture(scope="module")
def engine():
    return load(num_draft_tokens=2)


def test_a_batch_takes_no_more_than_was_said(engine, monkeypatch):
    """Texts that grow to their limits, from ragged prompts: the cache of each batch ends within what was counted."""
    said, caches, batch = [], [], engine._batch
    needed = engine._needed

    def counted(some, drafts):
        said.append(needed(some, drafts))
        return batch(some, drafts)

    def kept(*args, **options):
        caches.append(Cache(*args, **options))
        return caches[-1]

    monkeypatch.setattr(engine, "_batch", counted)
    monkeypatch.setattr(scheduler, "Cache", kept)
    for lengths, limit in (((5, 300), 300), ((1,), 3), ((255, 257, 40), 1), ((200,), 57)):
        prompts = [[2 + i % 90 for i in range(length)] for length in lengths]
        engine.generate(prompts, SamplingParams(max_tokens=limit, ignore_eos=True))
        held = sum(array.nbytes for buffers in caches[-1].buffers for array in buffers)
        assert held <= said[-1] < held + 3 * len(lengths) * 256 * 2 * 4 * 1024


def test_rows_are_as_many_as_the_memory_holds(engine, monkeypatch):
    """Eight prompts where there is room for three: batches of three, three and two, and the same texts."""
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompts = [[2, 10 + i, 20, 30] for i in range(8)]
    usual = [result.tokens for result in engine.generate(prompts, params)]
    rows, batch = [], engine._batch
    monkeypatch.setattr(engine, "_batch", lambda some, drafts: rows.append(len(some)) or batch(some, drafts))
    one = kv_bytes(engine.target.config.kv, 256, 1, 4, 4)
    monkeypatch.setattr(memory, "total_bytes", lambda: engine._weight_bytes + int(3.5 * one))
    assert [result.tokens for result in engine.generate(prompts, params)] == usual
    assert rows == [3, 3, 2]


def test_what_one_row_cannot_hold_is_refused_with_numbers(engine, monkeypatch):
    """Before anything is generated; a shorter text still runs, and open streams count."""
    one = kv_bytes(engine.target.config.kv, 256, 1, 4, 4)
    monkeypatch.setattr(memory, "total_bytes", lambda: engine._weight_bytes + int(1.5 * one))
    short, long = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (6, 6000))
    with pytest.raises(UserError, match=r"max_tokens=6000 on .* needs .* GB, this machine has .* lower max_tokens"):
        engine.stream([2, 5, 7], long)
    stream = engine.stream([2, 5, 7], short)
    next(stream)
    with pytest.raises(UserError, match=r"open streams leave 0\.0 GB; finish or close"):
        engine.generate([2, 5, 7], short)
    list(stream)
    assert len(engine.generate([2, 5, 7], short).tokens) == 6 and engine._kv_bytes == 0


def test_a_model_is_refused_only_where_not_even_a_short_text_fits(monkeypatch):
    weights = sum(weight_bytes(hub.DEMO / each, widened=True) for each in ("target", "drafter"))
    monkeypatch.setattr(memory, "total_bytes", lambda: weights)
    with pytest.raises(UserError, match="this machine has"):
        load()
    monkeypatch.setattr(memory, "total_bytes", lambda: weights + 20_000_000)
    load()


def published(size: str) -> tuple[TargetConfig, DrafterConfig]:
    raw = [json.loads((CONFIGS / f"gemma-4-{size}-it{end}.json").read_text()) for end in ("", "-assistant")]
    target = TargetConfig.from_dict(raw[0])
    return target, DrafterConfig.from_dict(raw[1], target)


def test_a_step_of_the_26b_reads_its_chosen_experts_alone():
    """Lazily built, in float32 as MLX makes it. 25.2e9 parameters, of which 8 of 128 experts are read."""
    target, _ = published("26B-A4B")
    unread = 30 * 120 * 3 * 2816 * 704
    assert step_bytes(gemma4.build(target)) == pytest.approx(4 * (25_233_141_760 - unread), rel=1e-3)


def test_a_step_of_e2b_reads_a_row_of_its_table_and_its_drafter_the_best_centroids():
    target, drafter = published("E2B")
    table = 262144 * 35 * 256
    assert step_bytes(gemma4.build(target)) == pytest.approx(4 * (4_628_569_344 - table), rel=1e-3)
    head = 262144 * 256
    parameters = sum(value.size for _, value in tree_flatten(Drafter(drafter).parameters()))
    assert step_bytes(Drafter(drafter)) == pytest.approx(4 * (parameters - (head + 262144) * 63 / 64), rel=1e-3)
