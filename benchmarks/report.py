"""What a benchmark gives back: its figures, and the lines that it adds to the summary.

Every ratio says how many times as good bulkhead is as the peer, so that more is better and 1 is a draw, whether
jobs per second, seconds or bytes were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tables import ABSENT, print_table

__all__ = ["Line", "Report", "as_json", "print_summary", "worded"]


@dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        question: What was compared, in a few words.
        bulkhead: What bulkhead was found to need or do, with its unit.
        peer: The other library, and how it was used.
        found: The same of the peer.
        ratio: None if one of the two is not installed.
        target: What the ratio is to be at least; None for what is only shown.
    """

    question: str
    bulkhead: str
    peer: str
    found: str
    ratio: float | None
    target: float | None = None

    @property
    def is_reached(self) -> bool | None:
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target


@dataclass(frozen=True)
class Report:
    """What goes into the JSON file, and into the summary."""

    figures: dict[str, object]
    lines: list[Line] = field(default_factory=list)


def worded(is_reached: bool | None) -> str:
    return {True: "yes", False: "NO", None: ""}[is_reached]


def as_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    return [asdict(line) | {"is_reached": line.is_reached} for line in lines]


def print_summary(lines: Sequence[Line]) -> None:
    """Print one table of all comparisons of the run."""
    print_table(
        "Summary: how many times as good bulkhead is; medians of ratios formed within a round of this run",
        ("question", "bulkhead", "peer", "its figure", "ratio", "target", "reached"),
        [_row(line) for line in lines],
        flush_left=(0, 2),
    )


def _row(line: Line) -> tuple[str, ...]:
    return (
        line.question,
        line.bulkhead,
        line.peer,
        line.found,
        ABSENT if line.ratio is None else f"{line.ratio:.2f}",
        "" if line.target is None else f"{line.target:.2f}",
        worded(line.is_reached),
    )
