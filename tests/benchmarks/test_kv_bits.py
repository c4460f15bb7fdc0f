"""benchmarks.kv_bits: divergence by literals; two ways of keeping K/V from end to end on a short text."""

import json
import math

import numpy as np
import pytest

from benchmarks import kv_bits
from mlx_gemma_mtp.cache.spec import row_bytes, with_bits
from mlx_gemma_mtp.engine.settings import PREFILL_CHUNK
from mlx_gemma_mtp.files import hub
from mlx_gemma_mtp.models import loading


def test_divergence_by_hand():
    """Nothing from itself; log 2 where a certainty becomes a coin; a flip where the likeliest changes."""
    exact = np.log(np.array([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1], [1.0, 1e-300, 1e-300]]))
    exact[2, 1:] = -np.inf
    other = np.log(np.array([[0.5, 0.25, 0.25], [0.3, 0.6, 0.1], [0.5, 0.25, 0.25]]))
    gaps, flips = kv_bits.divergences(exact, other)
    np.testing.assert_allclose(gaps, [0, 0.3 * math.log(2), math.log(2)], atol=1e-12)
    assert flips.tolist() == [False, True, False]


def test_float_and_four_bits(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(kv_bits, "WAYS", ((None, False), (4, True)))
    file = tmp_path / "rows.json"
    argv = ["--texts", "1", "--context", "300", "--tokens", "6", "--drafts", "2", "--json", str(file)]
    assert kv_bits.main(argv) == 0
    exact, few = json.loads(file.read_text())
    assert exact["mean"] == exact["p99"] == exact["flips"] == 0
    assert 0 < few["mean"] < few["p99"] < 3 and 0 <= few["flips"] < 0.5
    assert all(1 <= rate <= 3 for row in (exact, few) for rate in row["tokens_per_round"].values())
    specs = loading.open_target(hub.DEMO / "target").config.kv
    assert exact["here"] == row_bytes(specs, 300, PREFILL_CHUNK, 4)
    assert exact["on_metal"] == row_bytes(specs, 300, PREFILL_CHUNK, 2)
    assert few["on_metal"] == row_bytes(with_bits(specs, 4, True), 300, PREFILL_CHUNK, 2)
    assert "| 4 bits, all layers |" in capsys.readouterr().out


def test_texts_are_long_enough_or_refused():
    encode = lambda text, chat_template: text.split()  # noqa: E731
    assert [len(text) for text in kv_bits.modules(encode, 2, 50)] == [50, 50]
    with pytest.raises(kv_bits.UserError, match="held-out modules have 10000000 tokens, expected 2; ask for fewer"):
        kv_bits.modules(encode, 2, 10_000_000)
