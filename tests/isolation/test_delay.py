"""Whatever happens in one pool, a job of another starts as if nothing had (A2), in both directions.

Run with -s to see the figures: `pytest tests/isolation -v -s`.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import faulty_jobs
import pytest
from watching import PATIENCE, wait_until, wait_until_whole, worker_pids

from bulkhead import BulkheadError, Dispatcher, Job, Pool

# The promise: the median time from the call of dispatch to the start of the job in its worker (seconds).
PROMISE = 0.050
DISPATCHES = 30

# Between two dispatches, so that thirty of them see more than one moment of the other pool (seconds).
PAUSE = 0.005

LARGE = 500 * faulty_jobs.MEGABYTE

URGENT, OTHER = 1, 0
DIRECTIONS = pytest.mark.parametrize(
    ("disturbed", "watched"), [(OTHER, URGENT), (URGENT, OTHER)], ids=["urgent watched", "urgent disturbed"]
)

Disturbance = Callable[[Dispatcher, int], object]


@contextmanager
def two_pools(**options: object) -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(OTHER, 2, **options), Pool(URGENT, 2, **options)])
    try:
        wait_until_whole(disp, OTHER)
        wait_until_whole(disp, URGENT)
        yield disp
    finally:
        disp.finalize(cancel=True)


@contextmanager
def repeating(step: Callable[[], object]) -> Iterator[list[object]]:
    """Do one thing again and again in another thread; give the list that grows by what each turn returned."""
    is_over = threading.Event()
    turns: list[object] = []

    def repeat() -> None:
        while not is_over.is_set():
            try:
                turns.append(step())
            except BulkheadError as error:
                turns.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield turns
    finally:
        is_over.set()
        thread.join(PATIENCE)


def delays(disp: Dispatcher, priority: int, until: Callable[[], bool] = lambda: True) -> list[float]:
    """Measure thirty dispatches, and go on until `until()`."""
    job = Job(faulty_jobs.instant_of_start).options(priority=priority)
    found: list[float] = []
    while len(found) < DISPATCHES or not until():
        called = time.monotonic()
        found.append(disp.dispatch(job, timeout=PATIENCE).result(PATIENCE) - called)
        time.sleep(PAUSE)
    return found


def show(what: str, disturbed: int, found: list[float]) -> float:
    """Print the figures of a run; return the median."""
    ms = sorted(1000 * delay for delay in found)
    median = statistics.median(ms)
    print(
        f"\n  pool {disturbed} {what}: a job of the other pool starts after {median:.2f} ms "
        f"(median of {len(ms)}; 90 % within {ms[int(0.9 * len(ms))]:.2f} ms, longest {ms[-1]:.2f} ms)"
    )
    return median / 1000


@DIRECTIONS
def test_an_idle_pool_delays_no_other(disturbed: int, watched: int) -> None:
    with two_pools() as disp:
        assert show("idle", disturbed, delays(disp, watched)) < PROMISE


@DIRECTIONS
def test_a_full_pool_delays_no_other(disturbed: int, watched: int) -> None:
    with two_pools(backlog=10) as disp, ExitStack() as stack:
        for _ in range(12):
            disp.dispatch(Job(faulty_jobs.sleep_in_c).options(priority=disturbed))
        one_more = Job(faulty_jobs.sleep_in_c).options(priority=disturbed)
        assert disp.try_dispatch(one_more) is None
        turns = [
            stack.enter_context(repeating(lambda: disp.dispatch(one_more, timeout=0.1))) for _ in range(4)
        ]
        found = delays(disp, watched, until=lambda: all(turns))
    assert show("full, four callers waiting for it,", disturbed, found) < PROMISE


@DIRECTIONS
def test_a_pool_that_crashes_in_a_loop_delays_no_other(disturbed: int, watched: int) -> None:
    job = Job(faulty_jobs.kill_self).options(priority=disturbed)
    with two_pools() as disp, repeating(lambda: disp.dispatch(job).wait()) as turns:
        found = delays(disp, watched, until=lambda: len(turns) > 5)
    assert show(f"crashing, {len(turns)} times so far,", disturbed, found) < PROMISE


@DIRECTIONS
@pytest.mark.parametrize("hang", [faulty_jobs.loop, faulty_jobs.sum_with_gil, faulty_jobs.stop_self])
def test_a_pool_that_hangs_delays_no_other(disturbed: int, watched: int, hang: Callable[..., object]) -> None:
    with two_pools() as disp:
        for _ in range(2):
            disp.dispatch(Job(hang).options(priority=disturbed))
        with repeating(lambda: disp.dispatch(Job(hang).options(priority=disturbed), timeout=0.1)):
            found = delays(disp, watched)
        for pid in worker_pids(disp, disturbed):
            os.kill(
                pid, signal.SIGCONT
            )  # or the pool's end has to wait until it may kill what does not answer
    assert show(f"hanging in {hang.__name__}", disturbed, found) < PROMISE


@DIRECTIONS
def test_a_pool_whose_jobs_are_timed_out_again_and_again_delays_no_other(
    disturbed: int, watched: int
) -> None:
    job = Job(faulty_jobs.loop).options(priority=disturbed, timeout=0.1)
    with two_pools() as disp, repeating(lambda: disp.dispatch(job).wait()) as turns:
        found = delays(disp, watched, until=lambda: len(turns) > 3)
    assert show(f"timed out, {len(turns)} times so far,", disturbed, found) < PROMISE


@DIRECTIONS
def test_a_pool_that_returns_500_mb_again_and_again_delays_no_other(disturbed: int, watched: int) -> None:
    job = Job(faulty_jobs.zeros, LARGE).options(priority=disturbed)
    with two_pools() as disp, repeating(lambda: len(disp.dispatch(job).result())) as turns:
        found = delays(disp, watched, until=lambda: len(turns) >= 1)
        assert set(turns) == {LARGE}
    assert show(f"returning 500 MB, {len(turns)} times so far,", disturbed, found) < PROMISE


@pytest.mark.slow
@DIRECTIONS
def test_a_pool_that_is_sent_500_mb_again_and_again_delays_no_other(disturbed: int, watched: int) -> None:
    data = bytes(LARGE)
    with two_pools() as disp:
        job = Job(faulty_jobs.size_of, data).options(priority=disturbed)
        with repeating(lambda: disp.dispatch(job).result()) as turns:
            found = delays(disp, watched, until=lambda: len(turns) >= 1)
        assert set(turns) == {LARGE}
    assert show(f"sent 500 MB, {len(turns)} times so far,", disturbed, found) < PROMISE


@DIRECTIONS
def test_a_pool_that_is_flooded_with_small_jobs_delays_no_other(disturbed: int, watched: int) -> None:
    job = Job(faulty_jobs.double, 1).options(priority=disturbed)
    with two_pools() as disp, repeating(lambda: disp.dispatch(job)) as turns:
        found = delays(disp, watched)
    assert show(f"flooded with {len(turns)} jobs", disturbed, found) < PROMISE


@DIRECTIONS
def test_a_pool_whose_callback_hangs_delays_no_other(disturbed: int, watched: int) -> None:
    release = threading.Event()
    with two_pools() as disp:
        tracker = disp.dispatch(Job(faulty_jobs.double, 4).options(priority=disturbed))
        entered = threading.Event()
        tracker.add_done_callback(lambda _: (entered.set(), release.wait()))
        wait_until(entered.is_set)
        try:
            found = delays(disp, watched)
        finally:
            release.set()
    assert show("in a callback that hangs", disturbed, found) < PROMISE
