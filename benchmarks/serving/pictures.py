"""Pictures of what is measured over time, through matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.serving.arrival import LONG, SHORT
from mlx_gemma_mtp.cli.plots import SMALL, dress, heading, panels


def draw(name: str, found: dict[str, Any], folder: Path, blas: str, title: str) -> list[Path]:
    """Writes the pictures of a part, if it has any; returns the files."""
    if name == "arrival":
        return _draw_arrival(found, folder, blas, title)
    return _draw_slope(found, folder, blas, title) if name == "slope" else []


def _draw_arrival(found: dict[str, Any], folder: Path, blas: str, title: str) -> list[Path]:
    """The gaps of the running streams over time, a panel for each draft length; the last of the runs."""
    figure, axes = panels(len(found), 1, 9.0, 1.0 + 3.2 * len(found))
    for (drafts, runs), (panel,) in zip(found.items(), axes, strict=True):
        _gaps(panel, runs[-1])
        panel.set_title(f"{drafts} drafts", fontsize=SMALL + 1)
    heading(figure, "Gaps between a stream's tokens while a prompt of 4,000 tokens and a short one arrive", title)
    path = folder / f"arrival-{blas}.png"
    figure.savefig(path)
    return [path]


def _gaps(axes: Axes, run: dict[str, Any]) -> None:
    seconds, gaps, summary = run["seconds"], run["summary"]["gaps"], run["summary"]
    axes.plot([seconds[gap["round"]] for gap in gaps], [gap["ms"] for gap in gaps], ".", label="a gap of a stream")
    marks = {
        "the long prompt arrives": run["arrivals"][LONG] - 1,
        "the short one arrives": run["arrivals"][SHORT] - 1,
        "its first token": run["arrivals"][SHORT] + summary["rounds_to_first_token"] - 1,
        "the long prompt's first token": run["arrivals"][LONG] + summary["long_prompt_rounds"] - 1,
    }
    for (what, place), stroke in zip(marks.items(), ("-", "--", ":", "-."), strict=True):
        axes.axvline(seconds[place], color="grey", linestyle=stroke, linewidth=1, label=what)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="time (s)", ylabel="gap (ms)")
    dress(axes)


def _draw_slope(found: dict[str, Any], folder: Path, blas: str, title: str) -> list[Path]:
    """Memory over requests."""
    figure, ((axes,),) = panels(1, 1, 8.0, 4.5)
    count = [found["every"] * (i + 1) for i in range(len(found["sizes"]))]
    for key, label in (("arrays", "MLX's arrays"), ("cached", "MLX's buffer cache"), ("process", "the process")):
        axes.plot(count, [each[key] / 1e6 for each in found["sizes"]], label=label)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests", ylabel="memory (MB)")
    dress(axes)
    heading(figure, "Memory over requests", title)
    path = folder / f"slope-{blas}.png"
    figure.savefig(path)
    return [path]
