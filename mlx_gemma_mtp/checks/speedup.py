"""What MTP is worth on a prompt, measured here and now: the same tokens with drafts and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from ..sampling.params import SamplingParams

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Result
    from ..text.encode import Prompt

TOKENS = 48  # a prompt
SECONDS = 1.5  # after which no other pair of runs begins
PAIRS = 5  # at most


@dataclass(frozen=True)
class Speedup:
    """What MTP is worth: medians over alternating runs.

    mtp_tps, plain_tps: tokens a second of all rows together, after the prefill; equal: whether the texts are; drafted:
    drafts that were verified in all runs. Where there are none, the ratio is noise.
    """

    tokens: int
    tokens_per_round: float
    mtp_tps: float
    plain_tps: float
    ratio: float
    equal: bool
    drafted: int
    by_rejection: bool  # the drafts of sampled text: then another text is no error

    def __str__(self) -> str:
        same = "the same text" if self.equal else "ANOTHER TEXT, please report it"
        if self.by_rejection and not self.equal:
            same = "another text of the same distribution"
        if not self.drafted:
            return (
                f"MTP: off, drafts do not pay for this text here at present; {self.plain_tps:.0f} tokens/s "
                f"over {self.tokens} tokens, {same}"
            )
        return (
            f"MTP: {self.tokens_per_round:.2f} tokens a pass of the target; {self.mtp_tps:.0f} tokens/s against "
            f"{self.plain_tps:.0f} without drafts ({self.ratio:.2f}x) over {self.tokens} tokens, {same}"
        )


def measure(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, **options: object) -> Speedup:
    """Measures up to TOKENS tokens of each prompt with the engine's drafts and plainly, in turn.

    There are at most PAIRS pairs of runs, and none begins after SECONDS. params: with a seed, so that both sides say
    the same; only a grammar, or a call of a tool, may end a text earlier. options: of `Engine.generate`.
    """
    endless = not params.grammars and options.get("tools") is None
    params = replace(params, max_tokens=min(params.max_tokens, TOKENS), ignore_eos=endless, stop=())

    def run(**drafts: int) -> list[Result]:
        return engine.generate(list(prompts), params, **options, **drafts)

    run(num_draft_tokens=0)  # what is met for the first time is not measured
    began, ratios, rates, drafted = time.perf_counter(), [], [], 0
    while not ratios or (len(ratios) < PAIRS and time.perf_counter() - began < SECONDS):
        plain, mtp = run(num_draft_tokens=0), run()
        rates.append([results[-1].stats.batch_generation_tps for results in (mtp, plain)])
        ratios.append(rates[-1][0] / rates[-1][1])
        drafted += sum(result.stats.drafted for result in mtp)
    rounds = sum(result.stats.rounds for result in mtp)
    return Speedup(
        tokens=sum(len(result.tokens) for result in mtp),
        tokens_per_round=1 + sum(result.stats.accepted for result in mtp) / max(rounds, 1),
        mtp_tps=median(rate for rate, _ in rates),
        plain_tps=median(rate for _, rate in rates),
        ratio=median(ratios),
        drafted=drafted,
        by_rejection=engine.drafting.rejection and params.resolved(engine.defaults).temperature > 0,
        equal=[result.tokens for result in mtp] == [result.tokens for result in plain],
    )
