"""What pictures share: panels of one look, a heading that fits, and words that do not run into each other.

Needs matplotlib when called.
"""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL = 8  # points: legends, and the lines below a title
EDGE = 0.97  # of a width that a line may fill
DPI = 120


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure without a window, and its axes as an array [rows, columns]. width, height: in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def dress(axes: Axes, legend: str = "best", **grid: Any) -> None:
    """Gives axes a faint grid, and a legend at a place of matplotlib's ('' for none). grid: options of Axes.grid."""
    axes.grid(alpha=0.3, **grid)
    if legend:
        axes.legend(fontsize=SMALL, loc=legend)


def heading(figure: Figure, title: str, details: str) -> None:
    """Sets a title over the whole figure, and below it details of any length, broken into lines that fit.

    Chips, folders and time stamps are as long as they are. The figure needs the constrained layout, which keeps the
    room.
    """
    size = SMALL + 1 if title else SMALL
    figure.suptitle("\n".join(fitted(figure, part, size) for part in (title, details) if part), fontsize=size)


def fitted(figure: Figure, text: str, size: float, share: float = 1.0) -> str:
    """Returns a text broken into lines that fill at most `share` of the figure's width.

    size: of the letters, in points.
    """
    columns, room = max(1, len(text)), share * EDGE * figure.bbox.width
    while True:
        broken = textwrap.fill(text, columns)
        width = _width(figure, broken, size)
        if width <= room or columns == 1:
            return broken
        columns = max(1, min(columns - 1, int(columns * room / width)))


def _width(figure: Figure, text: str, size: float) -> float:
    """Pixels of the widest line."""
    probe = figure.text(0, 0, text, fontsize=size)
    try:
        return probe.get_window_extent().width
    finally:
        probe.remove()


def spread(axes: Axes) -> None:
    """Turns the words below the x axis where they would run into each other. Call it last."""
    figure = axes.get_figure()
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    if any(left.padded(2).overlaps(right) for left, right in pairwise(boxes)):
        for label in axes.get_xticklabels():
            label.set(rotation=25, ha="right", rotation_mode="anchor")
