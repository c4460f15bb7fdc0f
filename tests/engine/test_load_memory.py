"""What cannot fit is refused before it is read, and nothing else is."""

import shutil

import pytest

from mlx_gemma_mtp.engine.load import load
from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.folder import weight_bytes
from mlx_gemma_mtp.machine import memory


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(hub.DEMO / "target", folder)
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs 0\.\d GB, this machine has 0\.0 GB for it; convert it with -q"):
        load(str(folder))


def test_a_model_is_refused_only_where_not_even_a_short_text_fits(monkeypatch):
    weights = sum(weight_bytes(hub.DEMO / each, widened=True) for each in ("target", "drafter"))
    monkeypatch.setattr(memory, "total_bytes", lambda: weights)
    with pytest.raises(UserError, match="this machine has"):
        load()
    monkeypatch.setattr(memory, "total_bytes", lambda: weights + 20_000_000)
    load()
