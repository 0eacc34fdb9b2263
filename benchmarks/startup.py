"""How long until a new pool gives its first result, and until an idle one has ended?

Each measurement is a fresh interpreter (`probe.py live`): from the constructor to the first result, then
all workers are put to use, then the orderly end. The second life in the same interpreter finds what the
first one left, such as a running fork server. The numbers include what the library imports lazily, as
they do for its users.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from multiprocessing import get_all_start_methods

from contestants import BULKHEAD, EXECUTOR, STDLIB_POOL
from probing import ask
from report import Report
from settings import Settings, StartMethod
from tables import ABSENT, median, print_table

__all__ = ["measure_startup"]

MOST_ROUNDS = 3
"""More would take minutes: a round is 18 interpreters with up to 16 workers, twice."""
WORKERS = (2, 16)
START_METHODS: tuple[StartMethod, ...] = ("forkserver", "fork", "spawn")

Life = dict[str, float]
Lives = dict[str, Life]
Case = tuple[str, int, StartMethod]


def measure_startup(settings: Settings) -> Report:
    """Measure and print the table.

    Takes all start methods, whatever the settings say.
    """
    samples: dict[Case, list[Lives]] = {case: [] for case in _cases()}
    for _ in range(min(settings.rounds, MOST_ROUNDS)):
        for case, lives in samples.items():
            lives.append(ask("live", *case))
    rows = [_row(case, lives) for case, lives in samples.items()]
    if not BULKHEAD.is_installed():
        rows.insert(0, (BULKHEAD.name, "", "", ABSENT, "", "", ""))
    print_table(
        "Time to the first result, and to end an idle pool (ms); median of the rounds",
        ("", "workers", "method", "first result", "end", "second pool: first result", "end"),
        rows,
    )
    return Report({"samples": [{"case": case, "lives": lives} for case, lives in samples.items()]})


def _cases() -> Iterator[Case]:
    names = [contestant.name for contestant in (BULKHEAD, STDLIB_POOL, EXECUTOR) if contestant.is_installed()]
    methods = [method for method in START_METHODS if method in get_all_start_methods()]
    for workers, method, name in product(WORKERS, methods, names):
        yield name, workers, method


def _row(case: Case, lives: list[Lives]) -> tuple[str, ...]:
    name, workers, method = case
    figures = (
        f"{median(life[which][what] for life in lives) * 1000:.0f}"
        for which in ("first", "again")
        for what in ("first_result_seconds", "finalize_seconds")
    )
    return (name, str(workers), method, *figures)
