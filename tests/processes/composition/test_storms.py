"""Random compositions of jobs that succeed, fail, crash, run late and are cancelled."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest
from calling import at_once
from composing import HERE, THERE
from watching import wait_until

from bulkhead import (
    ChainTracker,
    Dispatcher,
    DispatcherFinalized,
    Job,
    Pool,
    RetryPolicy,
    chain,
    group,
)


class Storm:
    """Random compositions of jobs that succeed, fail, crash and run late, of both pools."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def composition(self, depth: int = 0) -> Any:
        draw = self._random.random()
        if draw < (0.35 if depth else 0.0) or depth >= 3:
            return self._job(depth)
        parts = [self.composition(depth + 1) for _ in range(self._random.randint(0 if draw < 0.4 else 1, 3))]
        return group(parts) if draw < 0.65 or not parts else chain(parts)

    def _job(self, depth: int) -> Job:
        draw = self._random.random()
        job = Job(
            stormy, "fail" if draw < 0.08 else "crash" if draw < 0.11 else "late" if draw < 0.13 else "go on"
        )
        job = job.options(priority=self._random.choice([HERE, THERE]), timeout=0.05 if draw < 0.13 else None)
        if self._random.random() < 0.1:
            job = job.options(retry=RetryPolicy(2, initial=0.001))
        if self._random.random() < 0.1:
            job = job.options(delay=0.002)
        if depth < 5 and self._random.random() < 0.15:
            job = job.options(on_success=self.composition(depth + 2))
        if depth < 5 and self._random.random() < 0.3:
            job = job.options(on_failure=self._job(depth + 2))
        return job


def stormy(*given: str) -> str:
    fate = given[-1]
    if fate == "fail":
        raise ValueError("no luck")
    if fate == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "late":
        time.sleep(60)
    return fate


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_in_a_storm_every_job_settles_once_and_follows_the_rules(seed: int) -> None:
    storm = Storm(seed)
    wholes = [storm.composition() for _ in range(45)]
    with Dispatcher([Pool(HERE, 3, backlog=10), Pool(THERE, 2)]) as disp:
        handles: list[Any] = []

        def dispatch(index: int) -> None:
            for whole in wholes[index::3]:
                handle = disp.dispatch(whole) if index else next(disp.dispatch_all([whole]))
                handles.append(handle)
                if len(handles) % 17 == 0:
                    handle.cancel()

        for call in at_once(3, dispatch):
            call.value(60)
        report = disp.barrier(timeout=60, check=False)
        assert all(pool._scheduler.unsettled == 0 for pool in disp._pools.values())
        assert disp._history._reserved == {}
        for handle in handles:
            check(handle)
        known = disp.jobs()
        assert len({job.id for job in known}) == len(known)
        leaves = sum(count_of(handle) for handle in handles)
        assert leaves == len(known) == report.succeeded + report.failed_count + report.cancelled


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_in_a_storm_that_is_cancelled_every_job_settles(seed: int) -> None:
    storm = Storm(seed)
    wholes = [storm.composition() for _ in range(45)]
    disp = Dispatcher([Pool(HERE, 2, backlog=10), Pool(THERE, 2)])
    handles: list[Any] = []

    def dispatch(index: int) -> None:
        try:
            for whole in wholes[index::3]:
                handles.append(disp.dispatch(whole))
        except DispatcherFinalized:
            pass

    calls = at_once(3, dispatch)
    wait_until(lambda: len(handles) > 5 + 3 * seed % 40, "some are under way")
    disp.finalize(cancel=True)
    for call in calls:
        call.value()
    for handle in handles:
        check(handle, within=5.0)
    assert all(pool._scheduler.unsettled == 0 for pool in disp._pools.values())


def check(part: Any, within: float = 0.0) -> None:
    """Prove that what became of a part is what its jobs and its form say."""
    assert part.wait(within)
    if isinstance(part, ChainTracker):
        ends = [state_of(one) for one in part.trackers]
        first = next((at for at, end in enumerate(ends) if end != "succeeded"), len(ends))
        assert all(
            end == "cancelled"
            for one, end in zip(part.trackers[first + 1 :], ends[first + 1 :], strict=True)
            if getattr(one, "leaves", (one,))
        )
        assert state_of(part) == (ends[first] if first < len(ends) else "succeeded")
    for one in getattr(part, "trackers", ()):
        check(one, within)
    if not hasattr(part, "trackers") and part.follow_up is not None:
        check(part.follow_up, within)


def state_of(part: Any) -> str:
    return part.status().state.value


def count_of(part: Any) -> int:
    """Return how many jobs there are in a part, with all that has followed them."""
    leaves = getattr(part, "leaves", (part,))
    return len(leaves) + sum(count_of(one.follow_up) for one in leaves if one.follow_up is not None)
