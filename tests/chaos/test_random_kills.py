"""Whatever dies when: every job reaches one final state, once, and the counts agree (C13).

Run with -s to see the counts: `pytest tests/chaos -m "slow or not slow" -s`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import faulty_jobs
import pytest
from watching import PATIENCE, assert_whole, launcher_pid, wait_until, worker_pids

from bulkhead import Dispatcher, Job, JobState, JobTimeout, Pool, RetryPolicy, Tracker, WorkerCrashed

# So many attempts that a job would have to be hit by a fifth of all kills before it fails for good.
RETRY = RetryPolicy(40, initial=0.0, jitter=0.0, retry_on=(WorkerCrashed,))

N_WORKERS = 3

Victims = Callable[[Dispatcher], list[int]]


def workers_of(disp: Dispatcher) -> list[int]:
    return worker_pids(disp)


def processes_of(disp: Dispatcher) -> list[int]:
    """Return the pool's workers and, as often as one of them, its launcher."""
    with contextlib.suppress(Exception):  # a worker that is just gone has no parent to ask for
        return [*worker_pids(disp), launcher_pid(disp)]
    return []


class Killer(threading.Thread):
    """Kills processes of a pool at random moments, spread evenly over the jobs that settle.

    Args:
        disp: Whose pool.
        kills: How many.
        spacing: Settled jobs from one kill to the next, on average.
        victims: Gives the pids to choose from.
        draw: The source of chance.
    """

    def __init__(
        self, disp: Dispatcher, kills: int, spacing: float, victims: Victims, draw: random.Random
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self.killed = 0
        self.settled = 0
        self.is_over = False
        self._plan = disp, kills, spacing, victims, draw

    def wait_while_behind(self, dispatched: int) -> None:
        """Give the killer time to find its victims, so that the jobs are not through before the kills."""
        _, kills, spacing, _, _ = self._plan
        due = min(dispatched / spacing - 3, kills)
        wait_until(lambda: self.killed >= due)

    def run(self) -> None:
        disp, kills, spacing, victims, draw = self._plan
        while self.killed < kills and not self.is_over:
            due = (self.killed + draw.random()) * spacing
            while self.settled < due and not self.is_over:
                time.sleep(0.0005)
            pids = victims(disp)
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    self.killed += 1


@contextlib.contextmanager
def killing(killer: Killer) -> Iterator[None]:
    killer.start()
    try:
        yield
    finally:
        killer.is_over = True
        killer.join(PATIENCE)


def run_under_fire(n_jobs: int, kills: int, method: str, victims: Victims, seed: int) -> None:
    """Dispatch jobs while processes are killed; prove that each job has settled once, with its own result."""
    times_settled: Counter[Any] = Counter()
    with Dispatcher([Pool(0, N_WORKERS, retry=RETRY, start_method=method)], max_history=n_jobs) as disp:
        assert_whole(disp)
        disp.barrier(timeout=PATIENCE)
        before = disp.stats()[0]
        killer = Killer(disp, kills, 0.9 * n_jobs / kills, victims, random.Random(seed))

        def count(tracker: Tracker) -> None:
            times_settled[tracker.id] += 1
            killer.settled += 1

        began = time.monotonic()
        trackers = []
        with killing(killer):
            for number in range(n_jobs):
                killer.wait_while_behind(number)
                tracker = disp.dispatch(Job(faulty_jobs.double_at_leisure, number), timeout=PATIENCE)
                tracker.add_done_callback(count)
                trackers.append(tracker)
            report = disp.barrier(timeout=PATIENCE)
        took = time.monotonic() - began
        assert_settled_once(trackers, [2 * number for number in range(n_jobs)])
        assert_whole(disp)
        after = disp.stats()[0]
    assert set(times_settled.values()) == {1}
    assert len(times_settled) == n_jobs
    assert (report.succeeded, report.failed_count, report.cancelled) == (n_jobs, 0, 0)
    assert killer.killed == kills
    retried, restarts = after.retried - before.retried, after.restarts - before.restarts
    print(
        f"\n  {method}, {victims.__name__}: {n_jobs} jobs in {took:.1f} s, {kills} kills, {restarts} workers replaced, "
        f"{retried} attempts repeated; settled: {report.succeeded} succeeded, {report.failed_count} failed, "
        f"{report.cancelled} cancelled; each once"
    )


def assert_settled_once(trackers: list[Tracker], results: list[int]) -> None:
    assert [tracker.result(0) for tracker in trackers] == results
    assert len({tracker.id for tracker in trackers}) == len(trackers)
    assert {tracker.status().state for tracker in trackers} == {JobState.SUCCEEDED}


def test_2000_jobs_and_20_killed_workers_settle_once_each(usual_start_method: str) -> None:
    run_under_fire(2_000, 20, usual_start_method, workers_of, seed=1)


def test_2000_jobs_and_20_killed_workers_or_launchers_settle_once_each() -> None:
    run_under_fire(2_000, 20, "forkserver", processes_of, seed=2)


@pytest.mark.slow
def test_2000_jobs_and_20_killed_workers_or_launchers_settle_once_each_under_spawn() -> None:
    run_under_fire(2_000, 20, "spawn", processes_of, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_20000_jobs_and_200_killed_workers_settle_once_each(start_method: str) -> None:
    run_under_fire(20_000, 200, start_method, workers_of, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_20000_jobs_and_200_killed_workers_or_launchers_settle_once_each(seed: int) -> None:
    run_under_fire(20_000, 200, "forkserver", processes_of, seed)


def some_job(number: int, draw: random.Random) -> Job:
    """Return a job of a random kind: good, large, failing, crashing, hanging, slow."""
    kinds = [
        Job(faulty_jobs.double, number),
        Job(faulty_jobs.double, number),
        Job(faulty_jobs.zeros, 300_000),
        Job(faulty_jobs.size_of, bytes(300_000)),
        Job(faulty_jobs.take, faulty_jobs.KillsItsReader()),
        Job(faulty_jobs.exit_with, number % 3),
        Job(faulty_jobs.kill_self),
        Job(int, "no number"),
        Job(faulty_jobs.nap, 0.01),
        Job(faulty_jobs.answer_and_die),
        Job(faulty_jobs.fork_and_return_twice),
        Job(faulty_jobs.loop).options(timeout=0.05),
    ]
    job = draw.choice(kinds)
    if draw.random() < 0.3:
        job = job.options(retry=RetryPolicy(3, initial=0.001))
    if draw.random() < 0.1:
        job = job.options(delay=0.02)
    return job


def run_mixture(n_jobs: int, kills: int, seed: int) -> None:
    """Good, bad and worse jobs, cancelled at random, in two pools, while workers and launchers are killed."""
    draw = random.Random(seed)
    times_settled: Counter[Any] = Counter()
    pools = [Pool(0, 2, backlog=5), Pool(1, 2, backlog=None)]
    with Dispatcher(pools, max_history=2 * n_jobs) as disp:
        killer = Killer(disp, kills, 0.9 * n_jobs / kills, processes_of, random.Random(seed + 1))

        def count(tracker: Tracker) -> None:
            times_settled[tracker.id] += 1
            killer.settled += 1

        trackers = []
        with killing(killer):
            for number in range(n_jobs):
                tracker = disp.dispatch(some_job(number, draw).options(priority=number % 2), timeout=PATIENCE)
                tracker.add_done_callback(count)
                trackers.append(tracker)
                if draw.random() < 0.1:
                    draw.choice(trackers).cancel()
            report = disp.barrier(timeout=2 * PATIENCE, check=False)
        states = Counter(tracker.status().state for tracker in trackers)
        errors = Counter(type(tracker.exception(0)).__name__ for tracker in trackers)
        for priority in (0, 1):
            assert_whole(disp, priority)
    assert (report.succeeded, report.failed_count, report.cancelled) == tuple(
        states[state] for state in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
    )
    assert sum(states.values()) == len(times_settled) == n_jobs
    assert set(times_settled.values()) == {1}
    assert set(errors) <= {
        "NoneType",
        "ValueError",
        "JobCancelled",
        WorkerCrashed.__name__,
        JobTimeout.__name__,
    }
    print(
        f"\n  mixture, seed {seed}, {killer.killed} kills: {dict(states)}; errors: {dict(errors)}; each job once"
    )


def test_a_mixture_of_good_and_bad_jobs_settles_once_each_under_fire() -> None:
    run_mixture(300, 10, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 15))
def test_a_large_mixture_of_good_and_bad_jobs_settles_once_each_under_fire(seed: int) -> None:
    run_mixture(2_000, 60, seed)
