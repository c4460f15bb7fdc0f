"""Pictures: whatever the names in them, no words run into each other or out of the picture."""

import itertools

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `bench`)")

from matplotlib.figure import Figure
from matplotlib.legend import Legend

from benchmarks import plots, replay
from mlx_gemma_mtp import calibrate, trace_routing
from mlx_gemma_mtp.cli.plots import fitted
from mlx_gemma_mtp.speculative.costs import ROWS, CostTable

CHIP = "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (Sapphire Rapids, virtualised)"
SHORT = "the bundled pair, Apple M4, Accelerate BLAS, 2026-11-22T09:15:02+00:00 a1b2c3"
LONG = f"/Users/somebody/models/gemma-4-26B-A4B-it-4bit-qat-group64, {CHIP}, OpenBLAS BLAS, {SHORT}, {'x' * 140}"


def words(figure: Figure) -> dict[str, object]:
    """What can be read, by name -> its box in pixels, as it is drawn: headings, titles, legends, labels, ticks."""
    figure.draw_without_rendering()
    found = {"heading": figure._suptitle} if figure._suptitle else {}
    for number, axes in enumerate(figure.axes):
        legend = axes.get_legend()
        found |= {f"{number} title": axes.title, f"{number} x": axes.xaxis.label, f"{number} y": axes.yaxis.label}
        found |= {f"{number} legend": legend} if legend else {}
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found |= {f"{number} {axis.axis_name} tick {i}": label for i, label in enumerate(shown)}
    return {
        name: word.get_window_extent() for name, word in found.items() if isinstance(word, Legend) or word.get_text()
    }


def collisions(figure: Figure) -> list[str]:
    """Turned labels are left out among themselves: their boxes overlap where their letters do not."""
    boxes, turned = words(figure), any(label.get_rotation() for axes in figure.axes for label in axes.get_xticklabels())
    edges = figure.bbox.padded(1)
    outside = [name for name, box in boxes.items() if not all(map(edges.contains, *zip(box.min, box.max, strict=True)))]
    pairs = itertools.combinations(boxes, 2)
    both = [(a, b) for a, b in pairs if boxes[a].overlaps(boxes[b])]
    return outside + [f"{a} and {b}" for a, b in both if not (turned and " x tick " in a and " x tick " in b)]


def series_of(name: str, count: int, long: bool) -> dict:
    """Lines or bars as the pictures of a report have them."""
    systems = [
        f"{'mlx_gemma_mtp on a long branch name ' if long else 'system '}{i}, {i + 1} drafts" for i in range(count)
    ]
    if name in ("tokens_per_second", "speed-up_by_class"):
        groups = [f"{'a class of prompts, no. ' if long else 'class '}{i}" for i in range(6)]
        return {system: {group: 1.5 + i for group in groups} for i, system in enumerate(systems[:4])}
    xs = [1, 2, 4, 8, *(["auto"] if name == "speed-up_by_draft_length" else [])]
    scale = 0.1 if name == "acceptance_by_position" else 1
    return {system: {x: scale * (i % 5 + 1) for x in xs} for i, system in enumerate(systems)}


@pytest.mark.parametrize(("title", "count", "long"), [(SHORT, 3, False), (LONG, 5, True), (LONG, 40, False)])
@pytest.mark.parametrize("name", plots.PICTURES)
def test_a_report(name, title, count, long):
    _, paint = plots.PICTURES[name]
    figure = plots.picture(paint, series_of(name, count, long), title)
    assert collisions(figure) == []
    assert title.replace(" ", "") in "".join(figure._suptitle.get_text().split()), "all of it is there"


def drawn(monkeypatch, draw) -> Figure:
    """The figure that a function saves."""
    kept = []

    def save(figure, path, format=None):
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    draw()
    return kept[0]


def table(contexts: int) -> CostTable:
    places = [(rows, 1000 * context, width) for context in range(contexts) for rows in ROWS for width in range(8)]
    cells = {place: 1 + 0.1 * place[0] * (place[2] + 1) for place in places}
    return CostTable.of(cells, {(rows, 0): 0.1 for rows in ROWS})


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("contexts", [1, 3])
def test_calibrate(monkeypatch, tmp_path, tables, contexts):
    made = {kind: table(contexts) for kind in ("greedy", "sampled")[:tables]}
    figure = drawn(monkeypatch, lambda: calibrate.plot(made, LONG, tmp_path / "x.png"))
    assert collisions(figure) == []


def routing(model: str) -> dict:
    point = lambda tokens, rows=1: {  # noqa: E731
        "tokens": tokens, "rows": rows, "uniform": 3.0 * tokens, "measured": 2.5 * tokens,
        "by_layer": [2.0 * tokens] * 6,
    }  # fmt: skip
    shares = [
        {"kind": kind, "measured": 0.4, "by_layer": [0.4] * 6} for kind in ("neighbours", "rows", "rejected draft")
    ]
    return {
        "model": model, "experts": 24, "top_k": 4, "tokens": 1000, "num_draft_tokens": 3, "batch": 4, "gamma": 0.8,
        "gamma_uniform": 0.9, "runs": [point(m) for m in (1, 2, 4, 8)], "shares": shares,
        "verifies": [point(4, rows) for rows in (1, 2, 3, 4)],
    }  # fmt: skip


@pytest.mark.parametrize("model", ["the bundled pair", LONG])
def test_trace_routing(monkeypatch, tmp_path, model):
    figure = drawn(monkeypatch, lambda: trace_routing.plot(routing(model), tmp_path / "x.png", "png"))
    assert collisions(figure) == []


def test_replay(monkeypatch, tmp_path):
    lines = [
        {"table": f"{LONG[:90]} {i}", "text": text, "fixed": [1.0] * 8, "auto": 1.1, "oracle": 1.2}
        for i in range(6) for text in ("code", "prose")
    ]  # fmt: skip
    assert collisions(drawn(monkeypatch, lambda: replay.plot(lines, tmp_path / "x.png"))) == []


def test_a_text_is_broken_where_it_must_be():
    figure = Figure(figsize=(4, 3))
    assert fitted(figure, "short", 8) == "short" and fitted(figure, "", 8) == ""
    broken = fitted(figure, LONG, 8)
    assert broken.count("\n") >= 3 and "".join(broken.split()) == LONG.replace(" ", "")
    assert fitted(figure, LONG, 8, share=0.5).count("\n") > broken.count("\n")
