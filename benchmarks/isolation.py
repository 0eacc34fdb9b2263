"""How long does a job on an idle pool take while another pool of the same dispatcher is flooded?

One thread of the caller floods the wide pool through the dispatcher as fast as it is let; the main
thread sends one job at a time to the idle pool and waits for its result, with a short pause between.
Beside it: the same with nobody flooding, and with a caller thread that only runs Python code. That last
one touches no pool: what it costs is the price of sharing an interpreter lock, which no library can
undo. Two `multiprocessing.Pool` objects under the same flood, also with as many jobs in flight as there
are workers, stand for what a user would build without bulkhead.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from contestants import BULKHEAD, STDLIB_POOL, Contestant, Fn, Session
from report import Report
from settings import Settings, StartMethod
from tables import ABSENT, percentile, print_table
from watchdog import watched
from workload import burn, hold, noop

__all__ = ["measure_isolation"]

FLOODED_WORKERS = 2
SAMPLES_PER_ROUND = 200
WARM_UP_JOBS = 20
PAUSE_SECONDS = 0.002
"""Between two jobs, so that the pool is idle again when the next one comes."""


@dataclass(frozen=True)
class Pair:
    """Two pools of one library: `flood` waits for room in the first, `call` is for the second."""

    flood: Callable[[Fn], object]
    call: Callable[[Fn], object]


OpenPair = Callable[[StartMethod], AbstractContextManager[Pair]]
Disturbance = Callable[[Pair], object]
Latencies = dict[str, dict[str, list[float]]]
"""Seconds, by contestant and disturbance."""

DISTURBANCES: dict[str, Disturbance | None] = {
    "nothing else": None,
    "sleeping jobs": lambda pair: pair.flood(hold),
    "no-op jobs": lambda pair: pair.flood(noop),
    "computing jobs": lambda pair: pair.flood(burn),
    "a caller thread computes": lambda _: sum(range(1000)),
}


def measure_isolation(settings: Settings) -> Report:
    """Measure and print the table."""
    pairs = _pairs()
    found: Latencies = {c.name: {name: [] for name in DISTURBANCES} for c, _ in pairs if c.is_installed()}
    for _ in range(settings.rounds):
        for disturbance in DISTURBANCES:
            for contestant, open_pair in pairs:
                if contestant.is_installed():
                    sample = _measure(open_pair, settings.start_method, disturbance)
                    found[contestant.name][disturbance] += sample
    print_table(
        f"Latency of a job on an idle pool while another is flooded ({settings.start_method}; ms)",
        ("", "meanwhile", "p50", "p99", "longest"),
        [row for contestant, _ in pairs for row in _rows(contestant, found)],
    )
    return Report({"latency_seconds": found})


def _measure(open_pair: OpenPair, start_method: StartMethod, disturbance: str) -> list[float]:
    with watched(), open_pair(start_method) as pair:
        for _ in range(WARM_UP_JOBS):
            pair.call(noop)
            pair.flood(noop)
        with _disturbed(DISTURBANCES[disturbance], pair):
            return [_latency(pair) for _ in range(SAMPLES_PER_ROUND)]


def _latency(pair: Pair) -> float:
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    pair.call(noop)
    return time.perf_counter() - start


@contextmanager
def _disturbed(disturb: Disturbance | None, pair: Pair) -> Iterator[None]:
    if disturb is None:
        yield
        return
    stop = threading.Event()

    def keep_on() -> None:
        while not stop.is_set():
            disturb(pair)

    thread = threading.Thread(target=keep_on, name="flood")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _pairs() -> list[tuple[Contestant[Session], OpenPair]]:
    return [(BULKHEAD, _open_bulkhead), (STDLIB_POOL, _open_stdlib)]


@contextmanager
def _open_bulkhead(start_method: StartMethod) -> Iterator[Pair]:
    from bulkhead import Dispatcher, Job, Pool

    flooded = Pool(0, FLOODED_WORKERS, start_method=start_method)
    idle = Pool(1, 1, start_method=start_method)
    with Dispatcher([flooded, idle]) as dispatcher:
        yield Pair(
            lambda fn: dispatcher.dispatch(Job(fn).options(priority=0)),
            lambda fn: dispatcher.dispatch(Job(fn).options(priority=1)).result(),
        )


@contextmanager
def _open_stdlib(start_method: StartMethod) -> Iterator[Pair]:
    context = multiprocessing.get_context(start_method)
    flooded, idle = context.Pool(FLOODED_WORKERS), context.Pool(1)
    room = threading.Semaphore(FLOODED_WORKERS)

    def flood(fn: Fn) -> None:
        room.acquire()
        flooded.apply_async(fn, callback=lambda _: room.release())

    try:
        yield Pair(flood, lambda fn: idle.apply_async(fn).get())
    finally:
        for pool in (flooded, idle):
            pool.close()
            pool.join()


def _rows(contestant: Contestant[Session], found: Latencies) -> Iterator[tuple[str, ...]]:
    if contestant.name not in found:
        yield contestant.name, ABSENT, "", "", ""
        return
    for disturbance, latencies in found[contestant.name].items():
        figures = (percentile(latencies, 50), percentile(latencies, 99), max(latencies))
        yield (contestant.name, disturbance, *(f"{seconds * 1000:.3f}" for seconds in figures))
