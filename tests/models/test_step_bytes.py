"""The bytes of weights that a step reads."""

import json
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from mlx_gemma_mtp.models import gemma4
from mlx_gemma_mtp.models.config import DrafterConfig, TargetConfig
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.loading import step_bytes

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


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
