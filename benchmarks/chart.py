"""The summary as a picture: a bar for each ratio on a logarithmic axis, with a mark at each target."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Line

__all__ = ["can_draw", "draw"]

WIDTH_INCHES = 10.0
INCHES_PER_BAR = 0.27
INCHES_AROUND = 1.3
DOTS_PER_INCH = 120
FONT_SIZE = 8.5

COLOURS = {
    True: ("target reached", "#3a7d5c"),
    False: ("target missed", "#c8553d"),
    None: ("no target", "#9aa0a8"),
}
INK, GRID = "#1d2a3a", "#e4e6ea"
MARK: dict[str, Any] = {
    "marker": "|",
    "markersize": 11,
    "markeredgewidth": 2,
    "linestyle": "",
    "color": INK,
}
BAR_HEIGHT = 0.62
ROOM_BESIDE = 2.5
"""How much further than the longest bar the axis goes, so that its figure has room (a factor)."""


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(lines: Sequence[Line], caption: str, path: Path) -> None:
    """Write the comparisons that have a ratio to a PNG file."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if line.ratio is not None]
    height = INCHES_AROUND + INCHES_PER_BAR * len(shown)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for at, line in enumerate(shown):
        _draw_bar(axes, at, line)
    _draw_axes(axes, shown)
    figure.suptitle("How many times as good bulkhead is", x=0.01, ha="left", fontweight="bold", color=INK)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=FONT_SIZE, color=INK)
    figure.legend(handles=_legend(), loc="outside upper right", ncols=4, fontsize=FONT_SIZE, frameon=False)
    figure.savefig(path)


def _draw_bar(axes: Any, at: int, line: Line) -> None:
    assert line.ratio is not None
    # Why from 1: a bar to the right is better than the peer, one to the left worse.
    axes.barh(at, line.ratio - 1, BAR_HEIGHT, left=1, color=COLOURS[line.is_reached][1])
    if line.target is not None:
        axes.plot(line.target, at, **MARK)
    right = max(line.ratio, line.target or 0, 1)
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{line.ratio:.3g}", (right, at), fontsize=FONT_SIZE, color=INK, **beside)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=label) for label, colour in COLOURS.values()]
    return [Line2D([], [], label="target", **MARK), *patches]


def _draw_axes(axes: Any, shown: Sequence[Line]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ends = [1.0, *(end for line in shown for end in (line.ratio, line.target) if end is not None)]
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / ROOM_BESIDE, max(ends) * ROOM_BESIDE)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{line.question} · {line.peer}" for line in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=FONT_SIZE, colors=INK)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
