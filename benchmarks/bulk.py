"""How long does a map of very many no-ops take?

The pool is warm; each measurement is the middle of three calls, from the call to the last result. What each
library was asked stands in the table. bulkhead is given an iterator, so that it cannot know how much will come.
"""

from __future__ import annotations

from dataclasses import dataclass

from contestants import Contestant, installed
from mappers import (
    BULKHEAD_MAP,
    BULKHEAD_MAP_UNORDERED,
    JOBLIB,
    MPIRE_MAP,
    POOL_IMAP_UNORDERED,
    POOL_MAP,
    Map,
    timed,
)
from report import Report
from rounds import Rounds, measure_in_rounds
from settings import WORKERS, Settings, StartMethod
from tables import ABSENT, duration, median, per_second, print_table
from workload import ignore

__all__ = ["measure_bulk"]

ITEMS = 200_000
WARM_UP_ITEMS = 1_000
CALLS = 3


@dataclass(frozen=True)
class Entry:
    """How one contestant is asked.

    Attributes:
        contestant: The library.
        asked: The call, as its user would write it.
        chunksize: None is the library's default.
        target: How many times as fast bulkhead is to be at least.
    """

    contestant: Contestant[Map]
    asked: str
    chunksize: int | None = None
    target: float | None = None


ENTRIES = (
    Entry(BULKHEAD_MAP, "disp.map(fn, iter(items))"),
    Entry(BULKHEAD_MAP_UNORDERED, "disp.map(fn, iter(items), ordered=False)"),
    Entry(POOL_MAP, "Pool(2).map(fn, items)", target=1.0),
    Entry(POOL_IMAP_UNORDERED, "Pool(2).imap_unordered(fn, items, chunksize=256)", 256, target=1.0),
    Entry(MPIRE_MAP, "WorkerPool(2, keep_alive=True).map(fn, items)", target=20.0),
    Entry(JOBLIB, "Parallel(n_jobs=2)(delayed(fn)(item) for item in items)", target=20.0),
)
BY_NAME = {entry.contestant.name: entry for entry in ENTRIES}


def measure_bulk(settings: Settings) -> Report:
    """Measure and print the table."""
    n_items = settings.scaled(ITEMS)
    found = measure_in_rounds(
        installed(entry.contestant for entry in ENTRIES),
        settings.rounds,
        lambda name: _measure(BY_NAME[name], n_items, settings.start_method),
    )
    print_table(
        f"map of {n_items:,} no-ops, {WORKERS} workers ({settings.start_method}); median of the rounds",
        ("", "asked", "seconds", "items/s", "bulkhead / this", "target"),
        [_row(entry, found, n_items) for entry in ENTRIES],
        flush_left=(0, 1),
    )
    found.print_busy()
    lines = [
        found.line(
            f"map of {n_items:,} no-ops",
            entry.contestant.name,
            float,
            duration,
            target=entry.target,
            called=_called(entry),
            of=BULKHEAD_MAP.name,
        )
        for entry in ENTRIES
        if entry.target is not None
    ]
    return Report(found.figures(), lines)


def _measure(entry: Entry, n_items: int, method: StartMethod) -> float:
    with entry.contestant.open(WORKERS, method) as mapped:
        timed(mapped, ignore, range(WARM_UP_ITEMS), entry.chunksize)
        return median(timed(mapped, ignore, range(n_items), entry.chunksize) for _ in range(CALLS))


def _row(entry: Entry, found: Rounds[float], n_items: int) -> tuple[str, ...]:
    name = entry.contestant.name
    cost = found.median(name, float)
    if cost is None:
        return (name, entry.asked, ABSENT, "", "", "")
    ratio = found.ratio(name, float, of=BULKHEAD_MAP.name)
    return (
        name,
        entry.asked,
        duration(cost),
        per_second(cost / n_items),
        "" if ratio is None else f"{ratio:.2f}",
        "" if entry.target is None else f"{entry.target:g}",
    )


def _called(entry: Entry) -> str:
    return entry.contestant.name + ("" if entry.chunksize is None else f", chunks of {entry.chunksize}")
