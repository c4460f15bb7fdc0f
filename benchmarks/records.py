"""A measured case as one flat record: the line of JSON that the reports are made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from benchmarks.cases import Case, Job, Tokens, first_difference, median, reference_of, texts_of


def record(case: Case, cases: Sequence[Case], job: Job, about: dict[str, Any], bandwidth: float | None) -> dict:
    """about: what our system says of its weights (systems/ours.py); bandwidth: GB/s. Figures that cannot be had are
    absent. Rates are medians over the repeats, with all of them beside.
    """
    fields: dict[str, Any] = {
        "system": case.setup.system,
        "drafts": case.drafts,
        "batch": case.batch,
        "temperature": case.temperature,
        "text": case.text,
        "blas": case.setup.blas,
        "prompts": len(job.prompts[case.text]),
        "max_tokens": job.max_tokens,
    }
    if case.failed or not any(case.timings):
        return fields | {"failed": case.failed or "nothing was measured"}
    end = set(about.get("end_tokens", ()))
    texts = texts_of(case, end)
    fields |= speeds(case, texts) | drafting(case)
    fields |= case.traced | case.sensed
    peaks = [call["peak_bytes"] for repeat in case.timings for call in repeat if call["peak_bytes"]]
    if peaks:
        fields["peak_memory_gb"] = round(max(peaks) / 1e9, 4)
    if case.setup.system == "mlx_gemma_mtp":
        fields |= traffic(case, fields, about, bandwidth)
    return fields | equality(case, cases, texts, end, len(job.prompts[case.text]))


def speeds(case: Case, texts: list[Tokens]) -> dict[str, Any]:
    """Tokens a second of whole calls and of decoding alone (after every row had its first token)."""
    sums = [
        {key: sum(call[key] for call in repeat) for key in ("seconds", "prefill_seconds", "passes")}
        for repeat in case.timings
    ]
    counts = [sum(map(len, rows)) for rows in texts]
    decoded = [max(0, count - len(rows)) for count, rows in zip(counts, texts, strict=True)]
    seconds = [max(each["seconds"] - each["prefill_seconds"], 1e-9) for each in sums]
    whole = [count / each["seconds"] for count, each in zip(counts, sums, strict=True)]
    rates = [count / each for count, each in zip(decoded, seconds, strict=True)]
    first = [call["first_seconds"] for repeat in case.timings for call in repeat]
    fields = {
        "repeats": len(texts),
        "tokens": counts[0],
        "tokens_per_s": round(median(whole), 2),
        "tokens_per_s_all": [round(rate, 2) for rate in whole],
        "decode_tokens_per_s": round(median(rates), 2),
        "decode_tokens_per_s_all": [round(rate, 2) for rate in rates],
        "first_token_ms": round(1000 * median(first), 1),
    }
    if median(rates):
        fields["ms_per_token"] = round(1000 * case.batch / median(rates), 2)  # of one row
    passes = [each["passes"] for each in sums]
    if min(passes) > 0:
        fields["ms_per_round"] = round(1000 * median([s / n for s, n in zip(seconds, passes, strict=True)]), 3)
        fields["target_forwards_per_token"] = round(sum(passes) / max(1, sum(decoded)), 4)
    return fields


def drafting(case: Case) -> dict[str, Any]:
    """Tokens a round and row, acceptance by position, and rows x (drafts + 1) that a pass verifies on average."""
    calls = [call for repeat in case.timings for call in repeat]
    rounds = sum(call["rounds"] for call in calls)
    if not rounds:
        return {}
    drafted, accepted = (sum(call[key] for call in calls) for key in ("drafted", "accepted"))
    fields: dict[str, Any] = {
        "tokens_per_round": round(1 + accepted / rounds, 3),
        "positions_per_round": round(case.batch * (1 + drafted / rounds), 2),
    }
    longest = max(len(call["offered"]) for call in calls)
    if longest:
        offered, kept = (
            [sum(call[key][i] for call in calls if i < len(call[key])) for i in range(longest)]
            for key in ("offered", "kept")
        )
        fields["acceptance_by_position"] = [round(k / n, 4) for k, n in zip(kept, offered, strict=True)]
    return fields


def traffic(case: Case, fields: dict, about: dict[str, Any], bandwidth: float | None) -> dict[str, float]:
    """Bytes of weights for one emitted token: of a pass that reads each distinct expert once, with routing as if by
    chance, and of the drafts; a kernel may read more. Their share of the memory's bandwidth, where that is known.
    """
    if "positions_per_round" not in fields or not fields["target_forwards_per_token"]:
        return {}
    positions = fields["positions_per_round"]
    experts = about["expert_bytes"] * (1 - (1 - about["expert_share"]) ** positions)
    drafts = (positions / case.batch - 1) * about["draft_bytes"]
    bytes_a_token = (about["dense_bytes"] + experts + drafts) * fields["target_forwards_per_token"]
    found = {"weight_bytes_per_token": round(bytes_a_token)}
    if bandwidth:
        found["bandwidth_share"] = round(bytes_a_token * fields["decode_tokens_per_s"] / bandwidth / 1e9, 3)
    return found


def equality(case: Case, cases: Sequence[Case], texts: list[Tokens], end: set[int], prompts: int) -> dict[str, Any]:
    """How many texts of every repeat are the reference's, and where the first one parts from it. prompts: how many
    there are, before the first ones come again to fill a batch.
    """
    reference = reference_of(case, cases)
    if reference is None:
        return {}
    expected = list(islice(cycle(texts_of(reference, end)[0][:prompts]), len(texts[0])))
    same = sum(all(repeat[i] == row for repeat in texts) for i, row in enumerate(expected))
    fields: dict[str, Any] = {"equal": same, "compared": len(expected), "reference": reference.setup.system}
    parted = [found for repeat in texts if (found := first_difference(expected, repeat))]
    return fields | ({"first_difference": parted[0]} if parted else {})
