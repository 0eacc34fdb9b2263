"""Does the memory in use grow with the number of items of a map?

A caller in a process of its own (`probe.py stream`) maps a no-op over a generator and drops every result. On the way
it adds up the resident memory of all its processes, ten times. After a tenth of the items everything has its size;
what is more at any later point has grown. It also notes how far the generator was ever read ahead of the results.
"""

from __future__ import annotations

from typing import Any

from mappers import BULKHEAD_MAP
from probing import ask
from report import Line, Report
from settings import WORKERS, Settings
from tables import ABSENT, print_table

__all__ = ["measure_memory"]

ITEMS = 10_000_000
MOST_GROWTH = 1.05
"""What counts as flat: the allocator's own coming and going is about a megabyte."""
MEGABYTE = 1e6


def measure_memory(settings: Settings) -> Report:
    """Measure once and print the table."""
    n_items = settings.scaled(ITEMS)
    question = f"map of {n_items:,} items: memory"
    if not BULKHEAD_MAP.is_installed():
        print(f"\n{question}: {BULKHEAD_MAP.name} {ABSENT}")
        return Report({}, [Line(question, "", "", "", None)])
    found = ask("stream", BULKHEAD_MAP.name, WORKERS, settings.start_method, n_items)
    samples = found["samples"]
    print_table(
        f"Resident memory while {BULKHEAD_MAP.name} goes over a generator, {WORKERS} workers "
        f"({settings.start_method}; MB)",
        ("items done", "caller", "its other processes", "together"),
        [_row(sample) for sample in samples],
        flush_left=(),
    )
    print(f"  the generator was read at most {found['furthest_ahead']:,} items ahead of the results")
    return Report(found, [_line(question, samples)])


def _row(sample: dict[str, Any]) -> tuple[str, ...]:
    sizes = (sample["caller_rss_bytes"], sample["others_rss_bytes"], _together(sample))
    return (f"{sample['items']:,}", *(f"{size / MEGABYTE:.1f}" for size in sizes))


def _line(question: str, samples: list[dict[str, Any]]) -> Line:
    early, most = _together(samples[0]), max(map(_together, samples[1:]))
    return Line(
        question,
        f"{most / MEGABYTE:.1f} MB",
        f"itself after {samples[0]['items']:,}",
        f"{early / MEGABYTE:.1f} MB",
        early / most,
        1 / MOST_GROWTH,
    )


def _together(sample: dict[str, Any]) -> int:
    return int(sample["caller_rss_bytes"] + sample["others_rss_bytes"])
