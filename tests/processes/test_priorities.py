"""A larger priority is more urgent (A7): any int, and the larger share of the CPU where pools compete for it."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest
from jobs import echo, nothing, spin
from staffing import staffed
from watching import wait_until, worker_pids

from bulkhead import Dispatcher, Job, Pool, UnknownPriority


@pytest.fixture
def cpus() -> Iterator[set[int]]:
    """At most two CPUs, so that they can be filled with few processes; workers inherit the restriction."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the CPUs of a process cannot be chosen here")
    before = os.sched_getaffinity(0)
    few = set(sorted(before)[:2])
    os.sched_setaffinity(0, few)
    yield few
    os.sched_setaffinity(0, before)


def test_any_int_is_a_priority() -> None:
    priorities = [-(2**70), -1, 0, 7, 2**70]
    with Dispatcher([(priority, 1) for priority in priorities]) as disp:
        for priority in priorities:
            assert disp.dispatch(Job(echo, priority).options(priority=priority)).result(20) == priority
        assert list(disp.stats()) == sorted(priorities, reverse=True)


class Index:
    """An integer that is no int, as those of NumPy."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


def test_whatever_counts_as_an_integer_is_a_priority() -> None:
    with Dispatcher([Pool(Index(3), Index(1))]) as disp:  # type: ignore[arg-type]
        tracker = disp.dispatch(Job(echo, 1).options(priority=Index(3)))  # type: ignore[arg-type]
        assert (tracker.result(20), tracker.priority) == (1, 3)


def test_a_job_that_names_no_priority_goes_to_the_only_pool_else_to_pool_0() -> None:
    with Dispatcher([(5, 1)]) as disp:
        assert disp.dispatch(Job(nothing)).priority == 5
    with Dispatcher([(5, 1), (0, 1)]) as disp:
        assert disp.dispatch(Job(nothing)).priority == 0
    with Dispatcher([(5, 1), (6, 1)]) as disp, pytest.raises(UnknownPriority, match="priority 0 has no pool"):
        disp.dispatch(Job(nothing))


def test_pools_are_niced_by_rank_the_most_urgent_not_at_all(usual_start_method: str) -> None:
    mine = os.nice(0)
    priorities = [50, 3, 2, 0, -10, -11]
    pools = [Pool(priority, 1, start_method=usual_start_method) for priority in reversed(priorities)]
    with staffed(Dispatcher(pools)) as disp:
        found = [psutil.Process(pid).nice() for p in priorities for pid in worker_pids(disp, p)]
    assert found == [min(mine + step, 19) for step in (0, 5, 10, 15, 19, 19)]


def test_nice_overrides_the_rank() -> None:
    mine = os.nice(0)
    pools = [Pool(2, 1, nice=mine + 7), Pool(1, 1), Pool(0, 1, nice=mine + 1)]
    with staffed(Dispatcher(pools)) as disp:
        found = {p: psutil.Process(worker_pids(disp, p)[0]).nice() for p in (2, 1, 0)}
    assert found == {2: mine + 7, 1: mine + 5, 0: mine + 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise a priority")
def test_nice_may_be_below_the_callers_where_that_is_allowed() -> None:
    with staffed(Dispatcher([Pool(0, 1, nice=-3)])) as disp:
        assert psutil.Process(worker_pids(disp)[0]).nice() == -3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may raise a priority")
def test_a_niceness_that_is_not_allowed_breaks_the_pool_with_the_reason() -> None:
    from bulkhead import PoolBroken

    with Dispatcher([Pool(0, 1, nice=-3)]) as disp, pytest.raises(PoolBroken, match="PermissionError"):
        disp.dispatch(Job(nothing)).result(20)


@pytest.mark.alone
def test_of_two_pools_that_fill_all_cores_the_urgent_one_gets_the_larger_cpu_share(cpus: set[int]) -> None:
    n = 2 * len(cpus)
    with staffed(Dispatcher([(0, n), (1, n)])) as disp:
        processes = {p: [psutil.Process(pid) for pid in worker_pids(disp, p)] for p in (0, 1)}
        before = {p: _cpu_seconds(processes[p]) for p in (0, 1)}
        for _ in range(n):
            for priority in (0, 1):
                disp.dispatch(Job(spin, 60.0).options(priority=priority))
        end = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() >= end)
        used = {p: _cpu_seconds(processes[p]) - before[p] for p in (0, 1)}
        disp.finalize(cancel=True)
    print(f"CPU seconds on {len(cpus)} cores, {n} workers each: urgent {used[1]:.2f}, other {used[0]:.2f}")
    # By the weights of the scheduler five steps of niceness are a factor of three.
    assert used[1] > 1.5 * used[0] > 0


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
