"""Requests of mixed lengths that all wait: this package, its own fixed batches, and mlx-vlm.

mlx-vlm is used as somebody who knows it would: its BatchGenerator with all requests inserted at once (what its server
does), plainly and with MTP. It takes requests in once `prefill_batch_size` rows are free, and a batch with drafts only
once all rows have ended; which setting is best on this machine is tried first, on the first of the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import first_difference
from benchmarks.serving.intervals import Interval, of_median
from benchmarks.workers import OURS, Failed, Worker

TRIED = 24  # requests of a trial
TRIALS = 3  # of each way, in turn; the fastest counts, since noise adds to a time
VLM = "mlx-vlm"
CONTINUOUS, FIXED, PLAIN, MTP = "rows filled at once", "batch after batch", "plain", "MTP"


@dataclass(frozen=True)
class Backlog:
    prompts: list[list[int]]
    limits: list[int]
    rows: int

    @property
    def tokens(self) -> int:
        return sum(self.limits)

    def first(self, count: int) -> Backlog:
        return Backlog(self.prompts[:count], self.limits[:count], self.rows)


@dataclass
class Way:
    """A system and how it is asked. served: what each repeat answered."""

    system: str
    name: str
    drafts: int | str
    joining: int
    served: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        drafts = f"{self.drafts} drafts" if self.drafts else "no drafts"
        return f"{self.system}, {self.name}, {drafts}, {self.joining} rows free to join"

    def ask(self, workers: dict[str, Worker], backlog: Backlog) -> dict[str, Any]:
        served = workers[self.system].ask(
            "serve", prompts=backlog.prompts, limits=backlog.limits, rows=backlog.rows, drafts=self.drafts,
            joining=self.joining,
        )  # fmt: skip
        if [len(tokens) for tokens in served["tokens"]] != backlog.limits:
            raise Failed(f"{self}: the texts have other lengths than asked for")
        return served

    def rates(self, tokens: int) -> list[float]:
        return [tokens / served["seconds"] for served in self.served]


def tried(
    workers: dict[str, Worker], backlog: Backlog, drafts: Sequence[int], note: Callable[[str], None]
) -> list[Way]:
    """mlx-vlm's best way without drafts and its best with them, by trials of each on the first requests."""
    some, rows = backlog.first(TRIED), backlog.rows
    joins = [count for count in (1, 2, 4, 8) if count <= rows]
    ways = {
        PLAIN: [Way(VLM, PLAIN, 0, joining) for joining in joins],
        MTP: [Way(VLM, MTP, count, rows) for count in drafts if count],
    }
    best = []
    for some_ways in ways.values():
        rates: dict[int, float] = {}
        failed: set[int] = set()
        for i, way in list(enumerate(some_ways)) * (TRIALS if len(some_ways) > 1 else 1):
            if i in failed:
                continue
            try:
                rate = some.tokens / way.ask(workers, some)["seconds"]
            except Failed as error:
                note(f"failed: {way}: {error}")
                failed.add(i)
                continue
            rates[i] = max(rate, rates.get(i, 0.0))
            note(f"trial: {way}: {rate:.0f} tokens/s")
        if rates:
            best.append(some_ways[max(rates, key=rates.__getitem__)])
    return best


def measure(
    workers: dict[str, Worker], backlog: Backlog, ways: list[Way], repeats: int, note: Callable[[str], None]
) -> None:
    """Every way in turn, `repeats` times, in an order that turns. The first round of all warms up."""
    for repeat in range(-1, repeats):
        start = repeat % len(ways)
        for way in ways[start:] + ways[:start]:
            if repeat < 0:
                way.ask(workers, backlog.first(2 * backlog.rows))
                continue
            served = way.ask(workers, backlog)
            way.served.append(served)
            note(f"{repeat + 1} of {repeats}: {way}: {backlog.tokens / served['seconds']:.0f} tokens/s")


def ratios(way: Way, other: Way) -> list[float]:
    """How much faster `way` was than `other` in each repeat."""
    return [b["seconds"] / a["seconds"] for a, b in zip(way.served, other.served, strict=True)]


def judged(ways: Sequence[Way], backlog: Backlog) -> dict[str, Any]:
    """The record of what was measured."""
    ours = next(way for way in ways if (way.system, way.name) == (OURS, CONTINUOUS))
    lines, compared = [], {}
    for way in ways:
        rates = of_median(way.rates(backlog.tokens))
        part = first_difference(ours.served[0]["tokens"], way.served[0]["tokens"])
        equal = sum(a == b for a, b in zip(ours.served[0]["tokens"], way.served[0]["tokens"], strict=True))
        firsts = sorted(second for served in way.served for second in served["first_seconds"])
        lines.append(
            {
                "system": way.system,
                "way": way.name,
                "drafts": way.drafts,
                "joining": way.joining,
                "tokens_per_s": rates.as_list(),
                "tokens_per_s_all": [round(rate, 1) for rate in way.rates(backlog.tokens)],
                "first_token_s": round(firsts[len(firsts) // 2], 3),
                "equal": equal,
                "first_difference": part,
            }
        )
        if way is not ours:
            compared[str(way)] = of_median(ratios(ours, way)).as_list()
    peers = [way for way in ways if way.system == VLM]
    others = [way for way in ways if (way.system, way.name) == (OURS, CONTINUOUS) and way is not ours]
    found: dict[str, Any] = {"requests": len(backlog.prompts), "rows": backlog.rows, "tokens": backlog.tokens}
    found |= {"ways": lines, "ratios": compared}
    if peers:
        best = min(peers, key=lambda way: of_median([served["seconds"] for served in way.served]).middle)
        found["over_mlx_vlm"] = of_median(ratios(ours, best)).as_list()
        found["better_of_mlx_vlm"] = str(best)
        found["others_over_mlx_vlm"] = {str(way): of_median(ratios(way, best)).as_list() for way in others}
    fixed = next((way for way in ways if (way.system, way.name) == (OURS, FIXED)), None)
    if fixed is not None:
        found["over_fixed_batches"] = of_median(ratios(ours, fixed)).as_list()
    return found


def occupancy(rounds: Sequence[Sequence[int]]) -> dict[str, float]:
    """Rows in use on average while somebody waits. rounds: (rows in use, requests that wait for one) of each."""
    began = next((i for i, (used, _) in enumerate(rounds) if used), len(rounds))
    used = [used for used, waiting in rounds[began:] if waiting]
    return {"occupancy": round(sum(used) / max(len(used), 1), 3), "rounds_with_a_queue": len(used)}


def interval_of(found: dict[str, Any], key: str) -> Interval | None:
    return Interval(*found[key]) if key in found else None
