"""The figures of bench_queue.py as a picture: a bar of jobs per second for each queue, those on Redis and on SQLite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chart import BAR_HEIGHT, DOTS_PER_INCH, FONT_SIZE, GRID, INCHES_AROUND, INCHES_PER_BAR, INK, WIDTH_INCHES

__all__ = ["draw"]

OURS, OTHERS = "#3a7d5c", "#9aa0a8"

ROOM_BESIDE = 1.25
"""How much further than the longest bar the axis goes, so that its figures have room (a factor)."""


def draw(figures: Mapping[str, Mapping[str, float]], caption: str, path: Path) -> None:
    """Write the queues and their figures to a PNG file, in the order given."""
    from matplotlib.figure import Figure

    height = INCHES_AROUND + INCHES_PER_BAR * len(figures)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for at, (name, one) in enumerate(figures.items()):
        _draw_bar(axes, at, name, one)
    _draw_axes(axes, figures)
    figure.suptitle("No-op jobs per second, end to end", x=0.01, ha="left", fontweight="bold", color=INK)
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=FONT_SIZE, color=INK)
    figure.savefig(path)


def _draw_bar(axes: Any, at: int, name: str, one: Mapping[str, float]) -> None:
    axes.barh(at, one["end_to_end"], BAR_HEIGHT, color=OURS if name.startswith("bulkhead") else OTHERS)
    text = f"{one['end_to_end']:,.0f}   starts after {one['latency_p50'] * 1000:.1f} ms"
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (one["end_to_end"], at), fontsize=FONT_SIZE, color=INK, **beside)


def _draw_axes(axes: Any, figures: Mapping[str, Mapping[str, float]]) -> None:
    axes.set_xlim(0, max(one["end_to_end"] for one in figures.values()) * ROOM_BESIDE)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(range(len(figures)), list(figures))
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=FONT_SIZE, colors=INK)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
