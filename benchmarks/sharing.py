"""How long does it take until a hundred jobs have looked at one large array?

bulkhead places it once, by `disp.share`; joblib dumps an argument of that size to a file in memory, as it does by
default, and gives its workers a `numpy.memmap` of it. The time is that of placing the array and of all jobs, from the
first call until the last result was read. The same jobs once more show what an array costs that has its place. Every
measurement takes a new array, because joblib remembers which it has dumped.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING

from array_jobs import LOOKS, Look, full
from arrays import COPY, MEGABYTE
from contestants import BULKHEAD, Contestant, installed
from mappers import JOBLIB
from report import Line, Report
from rounds import Rounds, measure_in_rounds
from settings import WORKERS, Settings, StartMethod
from tables import ABSENT, duration, print_table

if TYPE_CHECKING:
    from array_jobs import Array

__all__ = ["measure_sharing"]

SIZE = 100 * MEGABYTE
JOBS = 100
WARM_UP_SIZE = 2 * MEGABYTE
"""Large enough to go the way of large arrays in both libraries."""
TARGET = 1.0
STAGES = ("placed first", "again")

Run = Callable[[Look, int], list[int]]
"""Lets so many jobs look at the array; gives what they saw."""
Place = Callable[["Array"], Run]
Sample = dict[str, float]
"""Seconds of all jobs, by look and stage."""


def measure_sharing(settings: Settings) -> Report:
    """Measure and print the table."""
    size = settings.scaled(SIZE)
    title = f"shared array of {size / MEGABYTE:g} MB, {JOBS} jobs"
    if not COPY.is_installed():
        print(f"\n{title}: numpy {ABSENT}")
        return Report({}, [Line(title, "", "numpy", "", None)])
    found = measure_in_rounds(
        installed(CONTESTANTS.values()),
        settings.rounds,
        lambda name: _measure(CONTESTANTS[name], size, settings.start_method),
    )
    cases = [_case(look, stage) for look in LOOKS for stage in STAGES]
    print_table(
        f"{title}, {WORKERS} workers ({settings.start_method}; joblib: loky); median of the rounds",
        ("", *CONTESTANTS, "bulkhead is times as fast"),
        [_row(case, found) for case in cases],
    )
    found.print_busy()
    lines = [
        found.line(
            f"{title}, {case}",
            JOBLIB.name,
            itemgetter(case),
            duration,
            target=TARGET,
            called="joblib.Parallel (memmap)",
        )
        for case in cases
    ]
    return Report(found.figures(), lines)


def _measure(contestant: Contestant[Place], size: int, method: StartMethod) -> Sample:
    found: Sample = {}
    with contestant.open(WORKERS, method) as place:
        for name, look in LOOKS.items():
            place(full(WARM_UP_SIZE))(look, JOBS)
            array = full(size)
            expected = [look(array)] * JOBS
            gc.collect()
            start = time.perf_counter()
            run = place(array)
            first = run(look, JOBS)
            placed = time.perf_counter()
            again = run(look, JOBS)
            end = time.perf_counter()
            if not first == again == expected:
                raise RuntimeError(f"{contestant.name}: the jobs saw something else than the array")
            found |= {_case(name, STAGES[0]): placed - start, _case(name, STAGES[1]): end - placed}
    return found


@contextmanager
def _open_bulkhead(workers: int, method: StartMethod) -> Iterator[Place]:
    from bulkhead import Dispatcher, Job, Pool

    with Dispatcher([Pool(0, workers, start_method=method)]) as dispatcher:

        def place(array: Array) -> Run:
            shared = dispatcher.share(array)

            def run(look: Look, jobs: int) -> list[int]:
                trackers = [dispatcher.dispatch(Job(look, shared)) for _ in range(jobs)]
                return [tracker.result() for tracker in trackers]

            return run

        yield place


@contextmanager
def _open_joblib(workers: int, method: StartMethod) -> Iterator[Place]:
    joblib = importlib.import_module("joblib")
    # The outer context ends joblib's reusable workers, the inner one removes its files.
    with JOBLIB.open(workers, method), joblib.Parallel(n_jobs=workers) as parallel:
        yield lambda array: lambda look, jobs: parallel(joblib.delayed(look)(array) for _ in range(jobs))


def _row(case: str, found: Rounds[Sample]) -> tuple[str, ...]:
    seconds = (found.median(name, itemgetter(case)) for name in CONTESTANTS)
    ratio = found.ratio(JOBLIB.name, itemgetter(case))
    return (
        case,
        *(ABSENT if value is None else duration(value) for value in seconds),
        "" if ratio is None else f"{ratio:.2f}",
    )


def _case(look: str, stage: str) -> str:
    return f"{look}, {stage}"


CONTESTANTS: dict[str, Contestant[Place]] = {
    contestant.name: contestant
    for contestant in (BULKHEAD.used_by(_open_bulkhead), JOBLIB.used_by(_open_joblib))
}
