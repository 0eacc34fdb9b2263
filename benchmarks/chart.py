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
INCHES_AROUND = 1.2
DOTS_PER_INCH = 120
COLOURS = {True: "#3a7d5c", False: "#c8553d", None: "#9aa0a8"}
"""Of a bar whose target is reached, missed, not set."""
MARK = "#1d2a3a"
ROOM_BESIDE = 2.0
"""How much further than the longest bar the axis goes, so that its figure has room (a factor)."""
LEFT_END = 0.3
"""Where the axis begins, unless a ratio is smaller."""


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(lines: Sequence[Line], caption: str, path: Path) -> None:
    """Write the comparisons that have a ratio to a PNG file."""
    from matplotlib.figure import Figure

    shown = [line for line in lines if line.ratio is not None]
    height = INCHES_AROUND + INCHES_PER_BAR * len(shown)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, shown)
    _draw_axis(axes, shown)
    axes.set_title("How many times as good bulkhead is", loc="left", fontweight="bold")
    axes.set_xlabel(caption, fontsize=8, color=MARK)
    if axes.collections:
        axes.legend(loc="lower right", fontsize=8, framealpha=1)
    figure.savefig(path)


def _draw_bars(axes: Any, shown: Sequence[Line]) -> None:
    # Why from 1: a bar to the right is better, one to the left worse, as on any scale of ratios.
    for at, line in enumerate(shown):
        assert line.ratio is not None
        axes.barh(at, line.ratio - 1, left=1, height=0.62, color=COLOURS[line.is_reached])
        axes.annotate(
            f"{line.ratio:.3g}",
            (max(line.ratio, line.target or 0, 1), at),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    targets = [(line.target, at) for at, line in enumerate(shown) if line.target is not None]
    if targets:
        marks = zip(*targets, strict=True)
        axes.scatter(*marks, marker="|", s=110, color=MARK, linewidths=2, zorder=3, label="target")


def _draw_axis(axes: Any, shown: Sequence[Line]) -> None:
    ends = [end for line in shown for end in (line.ratio, line.target) if end is not None]
    axes.set_xscale("log")
    axes.set_xlim(min([LEFT_END, *(end / ROOM_BESIDE for end in ends)]), max([1, *ends]) * ROOM_BESIDE)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color=MARK, linewidth=1)
    axes.set_yticks(range(len(shown)), [f"{line.question} — {line.peer}" for line in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
