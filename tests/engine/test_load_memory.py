"""What cannot fit is refused before it is read, and nothing else is."""

import shutil

import pytest

from mlx_gemma_mtp.engine.load import load
from mlx_gemma_mtp.errors import UserError, size
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.files.folder import weight_bytes
from mlx_gemma_mtp.machine import memory
from mlx_gemma_mtp.models import loading


def test_what_cannot_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(hub.DEMO / "target", folder)
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000_000)
    with pytest.raises(UserError, match=r"needs \d+ MB, this machine has 10 MB for it; convert it with -q"):
        load(str(folder))


def test_a_model_is_refused_only_where_not_even_a_short_text_fits(monkeypatch):
    weights = sum(weight_bytes(hub.DEMO / each, widened=True) for each in ("target", "drafter"))
    monkeypatch.setattr(memory, "total_bytes", lambda: weights)
    with pytest.raises(UserError, match="this machine has"):
        load()
    monkeypatch.setattr(memory, "total_bytes", lambda: weights + 20_000_000)
    load()


@pytest.mark.parametrize("limit", [1000, 10_000_000])
def test_a_limit_below_the_model_is_refused_before_it_is_read(limit, monkeypatch):
    """Else every request would be refused, one by one, however short it is."""
    monkeypatch.setattr(loading, "open_target", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UserError, match=rf"needs \d+ MB, memory_limit is {size(limit)}; raise it") as raised:
        load(memory_limit=limit)
    assert "\n" not in str(raised.value)


def test_a_size_is_told_in_the_unit_in_which_it_says_something():
    assert [size(each) for each in (1000, 10**6, 19_800_000, 10**9, 82_345_678_901)] == [
        "1000 bytes",
        "1 MB",
        "20 MB",
        "1.0 GB",
        "82.3 GB",
    ]
