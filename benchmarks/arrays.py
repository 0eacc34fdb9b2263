"""How long does a job take that is given a large array, or gives one back?

One job at a time through a warm pool, from the call until its answer was looked at. Beside the other pool stands the
floor: in one process, `numpy.copyto` into a warm array once for each direction, and the same looks. A job that looks
at one element shows the way alone; one that reads every page also pays for pages whose mapping was put off.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from operator import itemgetter
from typing import TYPE_CHECKING

from array_jobs import LOOKS, Look, full, give, give_back, look_at
from contestants import BULKHEAD, STDLIB_POOL, Contestant, Session, installed
from report import Line, Report
from rounds import Rounds, measure_in_rounds
from settings import WORKERS, Settings, StartMethod
from tables import ABSENT, duration, median, print_table

if TYPE_CHECKING:
    from array_jobs import Array

__all__ = ["MEGABYTE", "measure_arrays"]

MEGABYTE = 1_000_000
SIZES = (1 * MEGABYTE, 10 * MEGABYTE, 100 * MEGABYTE)
"""In bytes. The targets are about the largest: with the smaller ones the dispatch itself counts."""
WARM_UP_JOBS, WARM_UP_BYTES = 2, 100 * MEGABYTE
"""Before each measurement, both at least. Why so many bytes: bulkhead's history keeps results of 64 MiB, whose segments
come back only when later results push them out."""
LEAST_JOBS, MOST_JOBS = 3, 30
ENOUGH_SECONDS = 0.1
"""A measurement is the median of several jobs: until so much time has been spent, within these bounds."""
MOST_ROUNDS = 3
"""More would take minutes: with multiprocessing.Pool 100 MB there and back take a second."""
POOL_TARGET = 5.0
"""How many times as fast as multiprocessing.Pool."""
COPY_TARGET = 0.5
"""How much of a plain copy's speed."""

Way = Callable[[Look, "Array"], int]
"""One job. It takes how to look at the array, and the array or one like it; it gives what was seen."""
Ways = dict[str, Way]
WAYS = ("argument", "result", "both")

Case = tuple[str, str, int]
"""Way, look, bytes."""
Sample = dict[str, float]
"""Seconds of a job, by case."""


def measure_arrays(settings: Settings) -> Report:
    """Measure and print the table."""
    cases = {
        _worded(way, look, size): (way, look, size)
        for size, way, look in product(map(settings.scaled, SIZES), WAYS, LOOKS)
    }
    if not COPY.is_installed():
        print(f"\nLarge arrays: numpy {ABSENT}")
        return Report({}, [Line("large arrays", "", "numpy", "", None)])
    found = measure_in_rounds(
        installed(CONTESTANTS),
        min(settings.rounds, MOST_ROUNDS),
        lambda name: _measure(BY_NAME[name], cases, settings.start_method),
    )
    print_table(
        f"A job with a large array, one at a time, {WORKERS} workers ({settings.start_method}); median of the rounds",
        ("array, way, look", *BY_NAME, "times as fast as the pool", "as the copy"),
        [_row(case, found) for case in cases],
    )
    found.print_busy()
    largest = max(map(settings.scaled, SIZES))
    return Report(
        found.figures(),
        [
            found.line(f"array {case}", peer.name, itemgetter(case), duration, target=target, called=called)
            for peer, target, called in TARGETS
            for case, (_, _, size) in cases.items()
            if size == largest
        ],
    )


def _measure(contestant: Contestant[Ways], cases: dict[str, Case], method: StartMethod) -> Sample:
    found = {}
    with contestant.open(WORKERS, method) as ways:
        for case, (way, look, size) in cases.items():
            array = full(size)
            once = partial(_seconds, ways[way], LOOKS[look], array)
            for _ in range(max(WARM_UP_JOBS, WARM_UP_BYTES // size)):
                once()
            gc.collect()
            found[case] = _typical(once)
    return found


def _typical(once: Callable[[], float]) -> float:
    seconds = [once() for _ in range(LEAST_JOBS)]
    while sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_JOBS:
        seconds.append(once())
    return median(seconds)


def _seconds(way: Way, look: Look, array: Array) -> float:
    start = time.perf_counter()
    seen = way(look, array)
    elapsed = time.perf_counter() - start
    if seen != look(array):
        raise RuntimeError(f"{seen} was seen of an array that holds {look(array)}")
    return elapsed


def _through_pool(session: Session) -> Ways:
    return {
        "argument": lambda look, array: session.call(look_at, look, array),
        "result": lambda look, array: look(session.call(give, array.nbytes)),
        "both": lambda look, array: look(session.call(give_back, look, array)),
    }


@contextmanager
def _open_pool(contestant: Contestant[Session], workers: int, method: StartMethod) -> Iterator[Ways]:
    with contestant.open(workers, method) as session:
        yield _through_pool(session)


@contextmanager
def _open_copy(workers: int, method: StartMethod) -> Iterator[Ways]:
    del workers, method
    import numpy as np

    warm: dict[int, Array] = {}

    def one_way(look: Look, array: Array) -> int:
        target = warm.get(array.nbytes)
        if target is None:
            target = warm[array.nbytes] = full(array.nbytes)
        np.copyto(target, array)
        return look(target)

    def there_and_back(look: Look, array: Array) -> int:
        one_way(look, array)
        return one_way(look, array)

    yield {"argument": one_way, "result": one_way, "both": there_and_back}


def _row(case: str, found: Rounds[Sample]) -> tuple[str, ...]:
    cost = itemgetter(case)
    seconds = (found.median(name, cost) for name in BY_NAME)
    ratios = (found.ratio(peer.name, cost) for peer, _, _ in TARGETS)
    return (
        case,
        *(ABSENT if value is None else duration(value) for value in seconds),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
    )


def _worded(way: str, look: str, size: int) -> str:
    return f"{size / MEGABYTE:g} MB as {way}, {look}".replace("as both", "there and back")


COPY = Contestant("numpy.copyto", "numpy", "numpy", _open_copy)
CONTESTANTS = (
    *(contestant.used_by(partial(_open_pool, contestant)) for contestant in (BULKHEAD, STDLIB_POOL)),
    COPY,
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
TARGETS = (
    (STDLIB_POOL, POOL_TARGET, "multiprocessing.Pool.apply_async"),
    (COPY, COPY_TARGET, "numpy.copyto in one process"),
)
