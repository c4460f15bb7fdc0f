"""What a request used: tokens, and what drafts did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.request import Result
    from .ask import Ask
    from .service import Served


def usage_of(served: Served, ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
    """Returns OpenAI's usage of all choices. results: in the order of the choices.

    accepted_prediction_tokens are drafts that were verified and kept, rejected_prediction_tokens those that were
    dropped; the latter are not among the completion_tokens. The prompt counts once, however many choices it has.
    """
    made = sum(len(result.tokens) for result in results)
    thoughts = sum(ask.channels(served.engine.text, i).thoughts(result.tokens) for i, result in enumerate(results))
    drafted, accepted = (
        sum(each) for each in zip(*((r.stats.drafted, r.stats.accepted) for r in results), strict=True)
    )
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": ask.prompt_tokens + made,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens(ask, results),
            "cache_write_tokens": kept_tokens(ask, results),
        },
        "completion_tokens_details": {
            "reasoning_tokens": thoughts,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def cached_tokens(ask: Ask, results: Sequence[Result]) -> int:
    """Returns how many tokens of the prompts were not computed. A prompt counts once, with its first choice."""
    return sum(result.stats.cached_tokens for result in results[:: ask.n])


def kept_tokens(ask: Ask, results: Sequence[Result]) -> int:
    """Returns how many tokens of the prompts were kept for prompts to come, and were not before."""
    return sum(result.stats.kept_tokens for result in results[:: ask.n])


def timings_of(result: Result) -> dict[str, Any]:
    """Returns figures of one choice under llama.cpp's names, and what drafts did."""
    stats = result.stats
    return {
        "prompt_n": stats.prompt_tokens,
        "prompt_ms": round(1e3 * stats.ttft_s, 3),
        "prompt_per_second": round(stats.prompt_tps, 3),
        "predicted_n": stats.generation_tokens,
        "predicted_per_second": round(stats.generation_tps, 3),
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
        "rounds": stats.rounds,
        "mtp": stats.mtp,
        "mtp_reason": stats.mtp_reason,
        "seed": stats.seed,
    }


def repairs_of(result: Result) -> list[str]:
    """Returns what was mended to read a result's calls, and what does not fit the tools' schemas, in words."""
    return [f"{call.name}: {what}" for call in result.tool_calls for what in (*call.repaired, *call.faults)]


def repairs_header(results: Sequence[Result]) -> dict[str, str]:
    """Returns the header that tells what was mended, in ASCII; none where nothing was."""
    said = "; ".join(what for result in results for what in repairs_of(result))
    return {"x-tool-calls-repaired": said.encode("ascii", "backslashreplace").decode()[:1000]} if said else {}
