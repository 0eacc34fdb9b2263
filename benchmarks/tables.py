"""Plain-text tables and the few statistics that the benchmarks share."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["ABSENT", "median", "percentile", "print_table", "verdict"]

ABSENT = "not installed"

median = statistics.median


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value with at least `percent` of the others at or below it (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print with the first column flush left and the others flush right."""
    widths = [max(len(line[i]) for line in (headers, *rows)) for i in range(len(headers))]
    print(f"\n{title}\n")
    for line in (headers, ["-" * width for width in widths], *rows):
        first, *rest = (
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(["", first, *rest]).rstrip())
