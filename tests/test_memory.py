"""What a run needs: checked before anything is read; bytes of a cache, of a step."""

import json
import shutil
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from tiny import target_dict

from mlx_gemma_mtp import gemma4, hub, memory
from mlx_gemma_mtp.config import DrafterConfig, KVSpec, TargetConfig
from mlx_gemma_mtp.drafter import Drafter
from mlx_gemma_mtp.engine import load
from mlx_gemma_mtp.errors import UserError

CONFIGS = Path(__file__).parent / "data" / "configs"


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(hub.DEMO / "target", folder)
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs 0\.\d GB, this machine has 0\.0 GB for it; convert it with -q"):
        load(str(folder))


def test_cache_bytes():
    """Rings hold window + block - 1 positions at most, full layers all of them."""
    config = TargetConfig.from_dict(target_dict("moe"))
    rows, tokens, block = 2, 1000, 16
    rings = 4 * 2 * (8 + block - 1) * 2 * 8
    full = 2 * 2 * tokens * 1 * 16
    assert memory.kv_bytes(config, tokens, rows, block, 4) == rows * (rings + full) * 4
    assert config.kv[0] == KVSpec(2, 8, 8)


def published(size: str) -> tuple[TargetConfig, DrafterConfig]:
    raw = [json.loads((CONFIGS / f"gemma-4-{size}-it{end}.json").read_text()) for end in ("", "-assistant")]
    target = TargetConfig.from_dict(raw[0])
    return target, DrafterConfig.from_dict(raw[1], target)


def test_a_step_of_the_26b_reads_its_chosen_experts_alone():
    """Lazily built, in float32 as MLX makes it. 25.2e9 parameters, of which 8 of 128 experts are read."""
    target, _ = published("26B-A4B")
    unread = 30 * 120 * 3 * 2816 * 704
    assert memory.step_bytes(gemma4.build(target)) == pytest.approx(4 * (25_233_141_760 - unread), rel=1e-3)


def test_a_step_of_e2b_reads_a_row_of_its_table_and_its_drafter_the_best_centroids():
    target, drafter = published("E2B")
    table = 262144 * 35 * 256
    assert memory.step_bytes(gemma4.build(target)) == pytest.approx(4 * (4_628_569_344 - table), rel=1e-3)
    head = 262144 * 256
    parameters = sum(value.size for _, value in tree_flatten(Drafter(drafter).parameters()))
    assert memory.step_bytes(Drafter(drafter)) == pytest.approx(4 * (parameters - (head + 262144) * 63 / 64), rel=1e-3)
