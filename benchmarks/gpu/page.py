"""A run's findings as a page: `python -m benchmarks.gpu.page OUT` makes it anew from `gpu_results.jsonl` there."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# GB/s of NVIDIA's data sheets, by what a device's name holds; the first that fits.
CARDS = {"H200": 4800, "H100 PCIe": 2039, "H100 NVL": 3938, "H100": 3350, "A100-SXM4-80GB": 2039, "A100": 1555}
MOST = 8  # names of kernels a round

Lines = Mapping[str, Sequence[Mapping[str, Any]]]


def page(states: Mapping[str, Mapping[str, Any]], found: Lines, facts: Mapping[str, str]) -> str:
    """Returns the page. states: of the steps; found: findings by step; facts: on the machine."""
    card = facts.get("card", "").splitlines()[-1:] or ["not known"]
    parts = [f"## On {card[0]}", "", *_steps(states), *_size(found, facts), *_experts(found), *_products(found)]
    return "\n".join([*parts, *_rounds(found)]) + "\n"


def bandwidth(facts: Mapping[str, str]) -> int | None:
    """Returns the card's GB/s by its name; None where it is not known."""
    return next((gbps for name, gbps in CARDS.items() if name in facts.get("card", "")), None)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """Yields the lines of a table; nothing without rows."""
    rows = list(rows)
    if rows:
        yield from (f"| {' | '.join(head)} |", f"|{'---|' * len(head)}")
        yield from (f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows)
        yield ""


def expected(rate: float, drafts: int) -> float:
    """Returns the tokens of a round whose drafts are right at a rate, each by itself."""
    return sum(rate**i for i in range(drafts + 1))


def _steps(states: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from table(("step", "how it ended", "s"), ((n, each["state"], each["seconds"]) for n, each in states.items()))


def _size(found: Lines, facts: Mapping[str, str]) -> Iterator[str]:
    """The 26B: plain decoding by everybody, then MTP against our plain."""
    cells = [line for step, lines in found.items() if step.startswith("size") for line in lines]
    yield from (f"- {each['system']}: {each['error']}" for each in cells if each["what"] == "raised")
    cells = [line for line in cells if line["what"] == "cell"]
    plain = {(c["system"], c["context"], c["rows"], c["temperature"]): c for c in cells if not c["drafts"]}
    greedy = sorted({key[1:3] for key in plain if not key[3]})
    systems = list(dict.fromkeys(key[0] for key in plain))
    card = bandwidth(facts)

    def tps(system: str, place: tuple[int, int]) -> Any:
        return plain.get((system, *place, 0.0), {}).get("tps")

    def share(place: tuple[int, int]) -> str | None:
        """Of the card's bandwidth that the weights of one row alone took; more rows wake more experts."""
        one = plain.get(("ours", *place, 0.0))
        if one is None or place[1] != 1 or card is None:
            return None
        return f"{one['tps'] * one['target_bytes'] / 1e9 / card:.0%}"

    head = ("context, rows", *(f"{system}, tokens/s" for system in systems), "ours: of the card's GB/s")
    yield from table(head, ((f"{p[0]}, {p[1]}", *(tps(s, p) for s in systems), share(p)) for p in greedy))
    yield from table(
        (
            "context, rows",
            "texts",
            "drafts",
            "stated",
            "kept",
            "tokens/s",
            "of plain",
            "ms a round",
            "by the round's time",
        ),
        (_mtp(c, plain) for c in cells if c["drafts"] and ("ours", c["context"], c["rows"], c["temperature"]) in plain),
    )


def _mtp(cell: Mapping[str, Any], every: Mapping[tuple, Mapping[str, Any]]) -> Sequence[Any]:
    """By the round's time: what the stated rate gives at such rounds, whatever came out."""
    plain = every["ours", cell["context"], cell["rows"], cell["temperature"]]
    by_time = cell["rows"] * expected(cell["rate"], cell["drafts"]) / cell["round_ms"] * 1e3 if cell["round_ms"] else 0
    ratios = (f"{each / plain['tps']:.2f}" if plain["tps"] else None for each in (cell["tps"], by_time))
    ratio, ratio_by_time = ratios
    texts = "sampled" if cell["temperature"] else "greedy"
    return (
        f"{cell['context']}, {cell['rows']}", texts, cell["drafts"], cell["rate"], cell["kept"], cell["tps"], ratio,
        cell["round_ms"], ratio_by_time,
    )  # fmt: skip


def _experts(found: Lines) -> Iterator[str]:
    """Paths through a layer of the 26B's experts."""
    by_place: dict[tuple, dict[str, Any]] = defaultdict(dict)
    for line in found.get("times", ()):
        if line["what"] == "experts":
            by_place[line["format"], line["tokens"]][line["path"]] = f"{line['each_us']} ({line['gbps']})"
    paths = ("pairs", "sorted", "grouped")
    head = ("experts: format, tokens", *(f"{path}, us (GB/s)" for path in paths))
    yield from table(head, ((f"{f}, {n}", *map(each.get, paths)) for (f, n), each in by_place.items()))


def _products(found: Lines) -> Iterator[str]:
    by_place: dict[tuple, dict[str, Any]] = defaultdict(dict)
    for line in found.get("products", ()):
        if "by" in line:
            place = line["model"], line["what"], line["format"], line["rows"]
            by_place[place][line["by"]] = f"{line['each_us']} ({line['gbps']}){'' if line['alone'] else ' *'}"
    names = list(dict.fromkeys(name for each in by_place.values() for name in each))
    head = ("product", *(f"{name}, us (GB/s)" for name in names))
    yield from table(head, ((", ".join(map(str, place)), *map(each.get, names)) for place, each in by_place.items()))
    if by_place:
        yield from ("\\*: a row has other bits than alone.", "")


def _rounds(found: Lines) -> Iterator[str]:
    """Where the time of a round goes."""
    for step in ("rounds", "rounds 26B"):
        for line in found.get(step, ()):
            if "by_name" not in line:
                continue
            gpu = line["gpu_us_a_round"]
            yield (
                f"{step}, {line['rows']} rows, {line['drafts']} drafts: {line['round_ms']} ms a round, of these "
                f"{gpu / 1e3:.2f} ms on the GPU in {line['kernels_a_round']} launches"
            )
            yield ""
            first = list(line["by_name"].items())[:MOST]
            yield from table(("kernel", "launches", "us"), ((f"`{name[:60]}`", *each) for name, each in first))


def main(out: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (out / "gpu_results.jsonl").read_text(encoding="utf-8").splitlines():
        each = json.loads(line)
        found[each.pop("step")].append(each)
    facts = {name: said for each in found.pop("facts", ()) for name, said in each.items()}
    states = json.loads((out / "gpu_summary.json").read_text(encoding="utf-8"))["steps"]
    (out / "gpu_page.md").write_text(page(states, found, facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
