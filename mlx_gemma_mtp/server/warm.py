"""The first texts of a server, before it listens: what they need for the first time nobody else waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sampling.params import SamplingParams

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Result

PROMPT = "def f(x):"
# Settings whose kernels differ: likeliest tokens, drawn ones, those of a nucleus, scores that are told.
KINDS = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 1})


def warm_up(engine: Engine) -> Result:
    """Generates a short text of each kind, alone and beside another. Returns the first."""
    first = engine.generate(PROMPT, SamplingParams(max_tokens=16, temperature=0.0))
    for kind in KINDS:
        params = SamplingParams(max_tokens=8, ignore_eos=True, **kind)
        for rows in (1, 2)[: engine.max_rows]:
            engine.generate([PROMPT] * rows, params)
    return first
