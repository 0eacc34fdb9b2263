"""Plain-text tables and the few statistics that the benchmarks share."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

__all__ = ["ABSENT", "duration", "median", "per_second", "percentile", "print_table"]

ABSENT = "not installed"

median = statistics.median


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value with at least `percent` of the others at or below it (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def duration(seconds: float) -> str:
    """Return seconds with three digits, in the unit that suits them."""
    factor, unit = next(
        ((factor, unit) for least, factor, unit in ((1, 1, "s"), (1e-3, 1e3, "ms")) if seconds >= least),
        (1e6, "us"),
    )
    return f"{seconds * factor:.3g} {unit}"


def per_second(seconds: float) -> str:
    """Return how many of `seconds` go into one."""
    return f"{1 / seconds:,.0f}/s"


def print_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    flush_left: Collection[int] = (0,),
) -> None:
    """Print with the columns `flush_left` to the left and the others to the right."""
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]
    print(f"\n{title}\n")
    for line in (headers, ["-" * width for width in widths], *rows):
        cells = (
            f"{cell:<{width}}" if i in flush_left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(["", *cells]).rstrip())
