"""The bundled pair through the kernels, in the emulator: the text of plain decoding, whatever is drafted."""

import pytest

from mlx_gemma_mtp import SamplingParams, kernels, load, moe

PROMPT = "def fibonacci(n):"


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mtp_through_the_kernels_is_plain_decoding(monkeypatch, emulator, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=14, seed=3)
    by_references = load().generate(PROMPT, params).text
    monkeypatch.setattr(kernels, "metal_available", lambda: True)
    monkeypatch.setattr(moe, "chip", lambda: "Apple M4")
    emulator.counting = True
    texts = {drafts: load(num_draft_tokens=drafts).generate(PROMPT, params).text for drafts in (0, 3)}
    assert {"expert_groups", "expert_gate_up", "expert_down"} <= set(emulator.reads)
    assert ("head_argmax" in emulator.reads) == (temperature == 0)
    assert set(texts.values()) == {by_references}
