"""Classes of text for the draft length: code that the drafter knows, prose at temperature 1, words without order.

Imports no MLX, so that a BLAS can still be put before it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from mlx_gemma_mtp import SamplingParams

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "prompts.json"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
SAMPLED = SamplingParams(temperature=1.0, top_k=64, top_p=0.95, ignore_eos=True, seed=3)
WILD = SamplingParams(temperature=1.5, top_k=-1, top_p=1.0, ignore_eos=True, seed=3)


def texts(count: int) -> dict[str, list[tuple[str, bool, SamplingParams]]]:
    """Prompts of each class: the text, whether the chat template goes round it, and how its answer is sampled."""
    prompts = [each["prompt"] for each in json.loads(PROMPTS.read_text())]
    code = [p for p in prompts if p.startswith("Write") or p.startswith("def ")][:count]
    prose = [p for p in prompts if p.startswith("What") or p.startswith("Explain")][:count]
    words = " ".join(prompts).split()
    random.Random(0).shuffle(words)
    shuffled = [" ".join(words[i * 40 : (i + 1) * 40]) for i in range(count)]
    return {
        "code": [(p, True, GREEDY) for p in code],
        "prose": [(p, True, SAMPLED) for p in prose],
        "shuffled": [(p, False, WILD) for p in shuffled],
    }
