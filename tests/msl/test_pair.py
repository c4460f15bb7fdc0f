"""The bundled pair through the kernels, in the emulator: the text of plain decoding, whatever is drafted."""

import pytest

from mlx_gemma_mtp import SamplingParams, load
from mlx_gemma_mtp.machine import device
from mlx_gemma_mtp.ops import kernels

PROMPT = "def fibonacci(n):"


@pytest.mark.skipif(kernels.available(), reason="begins as a CPU")
def test_the_log_says_which_way_the_experts_go(monkeypatch):
    engine = load(draft_model="none")
    assert "experts pairs then sorted" in engine.description
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(device, "name", lambda: "Apple M4")
    assert "experts grouped" in engine.description
    monkeypatch.setattr(kernels, "_failed", {"down": "off by 2"})
    assert "experts sorted" in engine.description
    monkeypatch.setattr(kernels, "_failed", {})
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert "experts sorted" in engine.description


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mtp_through_the_kernels_is_plain_decoding(monkeypatch, emulator, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=14, seed=3)
    by_references = load().generate(PROMPT, params).text
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(device, "name", lambda: "Apple M4")
    emulator.counting = True
    texts = {drafts: load(num_draft_tokens=drafts).generate(PROMPT, params).text for drafts in (0, 3)}
    assert {"expert_groups", "expert_gate_up", "expert_down"} <= set(emulator.reads)
    assert ("head_argmax" in emulator.reads) == (temperature == 0)
    assert set(texts.values()) == {by_references}
