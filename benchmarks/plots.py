"""The pictures of a report, through matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import series
from benchmarks.series import Record, Series
from mlx_gemma_mtp.cli.plots import SMALL, dress, heading, panels, spread

SIZE = (8.5, 5.0)  # inches
LEGEND = 32  # letters in a line of the legend
MARKERS, STROKES = "os^DvP", ("-", "--", ":", "-.")


def draw(records: Sequence[Record], title: str, out: Path, number: str) -> list[Path]:
    """Writes out/NUMBER-NAME.png for each picture that these records have points for; returns the files."""
    made = []
    for name, (numbers, paint) in PICTURES.items():
        lines = numbers(records)
        if not lines:
            continue
        path = out / f"{number}-{name}.png"
        figure = picture(paint, lines, title)
        figure.savefig(path)
        made.append(path)
    return made


def picture(paint: Callable[[Axes, Series], None], lines: Series, title: str) -> Figure:
    """One picture: its name and the title above everything, the legend right of the axes, from their top downwards."""
    width, height = SIZE
    labels = [textwrap.fill(label, LEGEND) for label in lines]
    rows = sum(label.count("\n") + 1 for label in labels)
    height = max(height, 1.5 + 0.17 * rows)  # inches; a line of the legend is 0.17 high
    figure, ((axes,),) = panels(1, 1, width, height)
    paint(axes, lines)
    heading(figure, axes.get_title(), title)
    axes.set_title("")
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, fontsize=SMALL, frameon=False,
        handlelength=3.5,
    )  # fmt: skip
    spread(axes)
    return figure


def _lines(axes: Axes, lines: Series) -> None:
    """A line for each series; a word among the x (a draft length that is chosen) is a point right of the numbers."""
    numbers = sorted({x for line in lines.values() for x in line if not isinstance(x, str)})
    words = list(dict.fromkeys(x for line in lines.values() for x in line if isinstance(x, str)))
    places = {x: place for place, x in enumerate([*numbers, *words])}
    for label, line in lines.items():
        style = _style(label, list(lines))
        joined = {places[x]: y for x, y in line.items() if not isinstance(x, str)}
        axes.plot(joined.keys(), joined.values(), label=label, **style)
        apart = {places[x]: y for x, y in line.items() if isinstance(x, str)}
        axes.plot(apart.keys(), apart.values(), **(style | {"linestyle": "none"}))
    axes.set_xticks(range(len(places)), [str(x) for x in places])
    dress(axes, legend="")


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """A line's looks, by the two halves of its label: what comes first says the stroke, what comes last the colour."""
    firsts, lasts = (list(dict.fromkeys(each.split(", ")[i] for each in labels)) for i in (0, -1))
    first, last = (names.index(label.split(", ")[i]) for i, names in ((0, firsts), (-1, lasts)))
    colour = colormaps["turbo"](0.1 + 0.8 * last / max(1, len(lasts) - 1))
    return {"color": colour, "linestyle": STROKES[first % len(STROKES)], "marker": MARKERS[first % len(MARKERS)]}


def _even(axes: Axes) -> None:
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0)


def _bars(axes: Axes, bars: Series) -> None:
    groups = list(dict.fromkeys(x for bar in bars.values() for x in bar))
    width = 0.8 / len(bars)
    for i, (label, bar) in enumerate(bars.items()):
        places = [groups.index(x) + (i - (len(bars) - 1) / 2) * width for x in bar]
        drawn = axes.bar(places, list(bar.values()), width, label=label)
        axes.bar_label(
            drawn,
            fmt="%.2f" if max(bar.values()) < 10 else "%.0f",
            fontsize=7,
            padding=3,
            rotation=90 * (len(bars) > 2),
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},  # over lines
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.15)  # room for the labels
    dress(axes, legend="", axis="y")


def _by_batch(axes: Axes, lines: Series) -> None:
    _lines(axes, lines)
    _even(axes)
    axes.set(title="Speed-up of MTP by batch (greedy, mean of the classes)", xlabel="batch (rows)",
             ylabel="tokens/s over plain decoding in as many rows (ratio)")  # fmt: skip


def _by_drafts(axes: Axes, lines: Series) -> None:
    _lines(axes, lines)
    _even(axes)
    axes.set(title="Speed-up of MTP by draft length (greedy, mean of the classes)", xlabel="drafts a round (tokens)",
             ylabel="tokens/s over plain decoding in as many rows (ratio)")  # fmt: skip


def _by_class(axes: Axes, bars: Series) -> None:
    _bars(axes, bars)
    _even(axes)
    axes.set(title="Speed-up of MTP by class, with the best draft length of each", xlabel="class of prompts",
             ylabel="tokens/s over plain decoding (ratio)")  # fmt: skip


def _acceptance(axes: Axes, lines: Series) -> None:
    _lines(axes, lines)
    axes.set_ylim(0, 1)
    axes.set(title="Drafts kept by position", xlabel="position in the draft (token)",
             ylabel="rounds that kept it and all before it (share)")  # fmt: skip


def _round_cost(axes: Axes, lines: Series) -> None:
    for label, line in lines.items():
        axes.plot(line.keys(), line.values(), label=label, **_style(label, list(lines)))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    dress(axes, legend="")
    axes.set(title="Cost of a round (greedy, mean of the classes)", xlabel="rows x (drafts + 1) (tokens verified)",
             ylabel="time of a round (ms)")  # fmt: skip


def _rates(axes: Axes, bars: Series) -> None:
    _bars(axes, bars)
    axes.set(title="Speed in the fewest rows measured (greedy, mean of the classes)", xlabel="system",
             ylabel="tokens a second, prefill included")  # fmt: skip


PICTURES: dict[str, tuple[Callable[[Sequence[Record]], Series], Callable[[Axes, Series], None]]] = {
    "tokens_per_second": (series.rates, _rates),
    "speed-up_by_batch": (series.by_batch, _by_batch),
    "speed-up_by_draft_length": (series.by_drafts, _by_drafts),
    "speed-up_by_class": (series.by_class, _by_class),
    "acceptance_by_position": (series.acceptance, _acceptance),
    "cost_of_a_round": (series.round_cost, _round_cost),
}
