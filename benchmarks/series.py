"""What the plots show, as numbers: series of (x, y) from the records of one machine, model and BLAS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]
Series = dict[str, dict[Any, float]]  # label -> x -> y


def speedups(records: Iterable[Record]) -> list[tuple[Record, float]]:
    """Cases with drafts, with their tokens a second over the same system's plain decoding of the same calls."""
    measured = [record for record in records if "failed" not in record]
    plain = {_place(record): record["tokens_per_s"] for record in measured if record["drafts"] == 0}
    drafted = [record for record in measured if record["drafts"] != 0 and _place(record) in plain]
    return [(record, record["tokens_per_s"] / plain[_place(record)]) for record in drafted]


def _place(record: Record) -> tuple:
    return tuple(record[key] for key in ("system", "batch", "temperature", "text"))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def collected(
    points: Iterable[tuple[str, Any, float]], mean: Callable[[list[float]], float] = geometric_mean
) -> Series:
    """(label, x, y) -> series, with the mean where several fall on one x; numbers ascend, words stay as they come."""
    gathered: dict[str, dict[Any, list[float]]] = {}
    for label, x, y in points:
        gathered.setdefault(label, {}).setdefault(x, []).append(y)
    order = lambda item: (1, 0) if isinstance(item[0], str) else (0, item[0])  # noqa: E731
    return {label: {x: mean(ys) for x, ys in sorted(line.items(), key=order)} for label, line in gathered.items()}


def counted(count: int | str, noun: str) -> str:
    """'1 row', '2 rows', 'auto drafts'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def fixed(records: Iterable[Record]) -> list[Record]:
    """Those whose rounds are all alike: a chosen draft length has other rounds at each position."""
    return [r for r in records if r["drafts"] != "auto"]


def by_batch(records: Sequence[Record]) -> Series:
    """Mean speed-up over the classes, greedy: a line for each system and draft length."""
    return collected(
        (f"{r['system']}, {counted(r['drafts'], 'draft')}", r["batch"], y)
        for r, y in speedups(records)
        if not r["temperature"]
    )


def by_drafts(records: Sequence[Record]) -> Series:
    """Mean speed-up over the classes, greedy: a line for each system and batch."""
    return collected(
        (f"{r['system']}, {counted(r['batch'], 'row')}", r["drafts"], y)
        for r, y in speedups(records) if not r["temperature"]
    )  # fmt: skip


def by_class(records: Sequence[Record]) -> Series:
    """Speed-up in the fewest rows measured: bars for each system and temperature, each class's best draft length."""
    found = speedups(records)
    fewest = min((r["batch"] for r, _ in found), default=0)
    points = ((f"{r['system']}, T {r['temperature']:g}", r["text"], y) for r, y in found if r["batch"] == fewest)
    return collected(points, mean=max)


def acceptance(records: Sequence[Record]) -> Series:
    """Share of rounds that kept a draft's position, this package: a line for each class and temperature, from the
    longest drafts in the fewest rows.
    """
    ours = [r for r in fixed(records) if r["system"] == "mlx_gemma_mtp"]
    able = [r for r in ours if r.get("acceptance_by_position")]
    if not able:
        return {}
    rows = min(r["batch"] for r in able)
    longest = max(len(r["acceptance_by_position"]) for r in able)
    chosen = [r for r in able if r["batch"] == rows and len(r["acceptance_by_position"]) == longest]
    return collected(
        ((f"T {r['temperature']:g}, {r['text']}", i, y) for r in chosen
         for i, y in enumerate(r["acceptance_by_position"], 1)),
        mean=lambda values: sum(values) / len(values),
    )  # fmt: skip


def round_cost(records: Sequence[Record]) -> Series:
    """Milliseconds of a round, greedy, over rows x (drafts + 1): a line for each system and batch, from plain on."""
    able = [r for r in fixed(records) if {"ms_per_round", "positions_per_round"} <= r.keys() and not r["temperature"]]
    return collected(
        (f"{r['system']}, {counted(r['batch'], 'row')}", round(r["positions_per_round"]), r["ms_per_round"])
        for r in able
    )


def rates(records: Sequence[Record]) -> Series:
    """Tokens a second in the fewest rows, greedy, the mean over the classes that all systems have: plain, and MTP with
    the best mean.
    """
    able = [r for r in records if "failed" not in r and not r["temperature"]]
    fewest = min((r["batch"] for r in able), default=0)
    texts: dict[str, set[str]] = {}
    for r in able:
        texts.setdefault(r["system"], set()).add(r["text"])
    common = set.intersection(*texts.values()) if texts else set()
    few = collected(
        (str(r["drafts"]), r["system"], r["tokens_per_s"]) for r in able if r["batch"] == fewest and r["text"] in common
    )  # draft length -> system -> rate
    best: dict[str, float] = {}
    for drafts, line in few.items():
        for system, rate in line.items() if drafts != "0" else ():
            best[system] = max(rate, best.get(system, 0.0))
    named = {"plain": few.get("0", {}), "MTP, best draft length": best}
    return {label: line for label, line in named.items() if line}
