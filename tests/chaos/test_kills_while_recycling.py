"""Workers that are replaced all the time, and killed at random: each job settles once, with its own result (C5)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import leaking_jobs
import pytest
from calling import at_once
from watching import PATIENCE, assert_whole

from bulkhead import Dispatcher, Job, Pool, RetryPolicy, WorkerCrashed

# So many attempts that a job would have to be hit by a fifth of all kills before it fails for good.
RETRY = RetryPolicy(40, initial=0.0, jitter=0.0, retry_on=(WorkerCrashed,))


class Killer(threading.Thread):
    """Kills workers of the pool at random, in whatever state: starting, at work, or sent home and leaving."""

    def __init__(self, disp: Dispatcher, draw: random.Random, pause: float) -> None:
        super().__init__(name="killer", daemon=True)
        self._plan = disp, draw, pause
        self.states: Counter[str] = Counter()
        self.is_over = False

    def run(self) -> None:
        disp, draw, pause = self._plan
        while not self.is_over:
            found = [one for one in disp.stats()[0].processes if one.pid]
            if found:
                one = draw.choice(found)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid or 0, signal.SIGKILL)
                    self.states[one.state] += 1
            time.sleep(pause * draw.random())


@contextlib.contextmanager
def killing(killer: Killer) -> Iterator[None]:
    killer.start()
    try:
        yield
    finally:
        killer.is_over = True
        killer.join(PATIENCE)


def run_under_fire(method: str, n_threads: int, each: int, pause: float, seed: int) -> None:
    settled: Counter[Any] = Counter()
    pool = Pool(0, 3, max_jobs_per_worker=4, retry=RETRY, start_method=method)
    with Dispatcher([pool], max_history=n_threads * each) as disp:
        assert_whole(disp)
        disp.barrier(timeout=PATIENCE)
        killer = Killer(disp, random.Random(seed), pause)

        def dispatch(thread: int) -> list[Any]:
            trackers = []
            for number in range(thread * each, (thread + 1) * each):
                tracker = disp.dispatch(Job(leaking_jobs.leak_and_tell, number, 1000), timeout=60)
                tracker.add_done_callback(lambda one: settled.update([one.id]))
                trackers.append(tracker)
            return trackers

        with killing(killer):
            calls = at_once(n_threads, dispatch)
            trackers = [tracker for call in calls for tracker in call.value(90)]
            report = disp.barrier(timeout=60)
        results = [tracker.result(0) for tracker in trackers]
        assert [number for number, _ in results] == list(range(n_threads * each))
        assert max(Counter(pid for _, pid in results).values()) <= 4
        assert (report.succeeded, report.failed_count, report.cancelled) == (n_threads * each, 0, 0)
        assert_whole(disp)
        stats = disp.stats()[0]
        assert stats.restarts >= stats.recycled > 0
        print(f"{method}: {len(results)} jobs, killed {dict(killer.states)}, recycled {stats.recycled}")
    assert set(settled.values()) == {1}
    assert len(settled) == n_threads * each


def test_no_job_is_lost_or_doubled_when_workers_are_killed_that_are_being_replaced() -> None:
    run_under_fire("forkserver", 4, 60, 0.08, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_nor_in_a_storm(start_method: str, seed: int) -> None:
    # More kills than starts in the same time would leave no worker alive.
    each, pause = (40, 1.0) if start_method == "spawn" else (200, 0.05)
    run_under_fire(start_method, 8, each, pause, seed)


def test_a_map_gives_each_result_once_and_in_order_when_workers_are_killed_that_are_being_replaced() -> None:
    pool = Pool(0, 3, max_jobs_per_worker=50, retry=RETRY)
    with Dispatcher([pool]) as disp:
        assert_whole(disp)
        killer = Killer(disp, random.Random(2), 0.08)
        with killing(killer):
            found = list(disp.map(leaking_jobs.leak_and_tell, range(2000), [10] * 2000))
        assert [number for number, _ in found] == list(range(2000))
        assert_whole(disp)
        assert disp.stats()[0].recycled > 10
        print(f"killed {dict(killer.states)}, recycled {disp.stats()[0].recycled}")
