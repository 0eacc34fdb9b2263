"""The counters of stats() (A13)."""

import dataclasses
import os
import signal
from pathlib import Path

import leaking_jobs
import pytest
from gates import Gate
from jobs import echo, fail, fail_at_first, nap
from staffing import staffed
from watching import wait_until, wait_until_whole, worker_pids

from bulkhead import Dispatcher, Job, Pool, PoolStats, RetryPolicy

COUNTS = ("waiting", "running", "delayed", "succeeded", "failed", "cancelled", "retried", "restarts")


def counts(stats: PoolStats) -> dict[str, int]:
    """Return the counters that are not zero."""
    return {name: getattr(stats, name) for name in COUNTS if getattr(stats, name)}


def test_a_fresh_dispatcher_has_its_workers_and_no_jobs() -> None:
    with Dispatcher([Pool(0, 3, name="wide"), (1, 2)]) as disp:
        fresh = disp.stats()
        assert {p: fresh[p].workers for p in fresh} == {1: 2, 0: 3}
        assert all(pool.idle + pool.starting == pool.workers for pool in fresh.pools.values())
        assert [counts(pool) for pool in fresh.pools.values()] == [{}, {}]
        staffed(disp)
        stats = disp.stats()
        assert [(pool.priority, pool.name) for pool in stats.pools.values()] == [(1, "pool 1"), (0, "wide")]
        assert [(pool.idle, pool.starting) for pool in stats.pools.values()] == [(2, 0), (3, 0)]
        assert [counts(pool) for pool in stats.pools.values()] == [{}, {}]
        assert [pool.busy_seconds for pool in stats.pools.values()] == [0.0, 0.0]
        for pool in stats.pools.values():
            assert len({worker.pid for worker in pool.processes}) == pool.workers
            assert {(worker.state, worker.jobs, worker.busy_seconds) for worker in pool.processes} == {
                ("idle", 0, 0.0)
            }


def test_a_busy_dispatcher_tells_running_waiting_and_delayed_jobs_apart(gate: Gate) -> None:
    with staffed(Dispatcher([Pool(0, 2, backlog=3), (1, 2)])) as disp:
        for _ in range(5):
            disp.dispatch(gate.job())
        for _ in range(4):
            disp.dispatch(Job(echo, 1).options(delay=60.0))
        disp.dispatch(gate.job(priority=1))
        gate.wait_begun(3)
        stats = disp.stats()

        assert counts(stats[0]) == {"running": 2, "waiting": 3, "delayed": 4}
        assert (stats[0].workers, stats[0].idle, stats[0].starting) == (2, 0, 0)
        assert [worker.state for worker in stats[0].processes] == ["busy", "busy"]
        assert counts(stats[1]) == {"running": 1}
        assert sorted(worker.state for worker in stats[1].processes) == ["busy", "idle"]
        assert stats[0].busy_seconds > 0
        wait_until(lambda: disp.stats()[0].busy_seconds > stats[0].busy_seconds)
        gate.open()
        disp.finalize(cancel=True)


def test_a_finished_dispatcher_has_counted_every_end(gate: Gate, tmp_path: Path) -> None:
    policy = RetryPolicy(3, initial=0.01)
    with staffed(Dispatcher([Pool(0, 1, backlog=None), (1, 1)])) as disp:
        for number in range(5):
            disp.dispatch(Job(echo, number))
        for _ in range(3):
            disp.dispatch(Job(fail))
        disp.dispatch(Job(fail_at_first, tmp_path / "attempts", 2).options(retry=policy))
        disp.dispatch(Job(nap, 0.1))
        disp.barrier(check=False)
        disp.dispatch(gate.job("running"))
        queued = disp.dispatch(gate.job("queued"))
        scheduled = disp.dispatch(gate.job("scheduled", delay=60.0))
        gate.wait_begun(1)
        assert all([queued.cancel(), scheduled.cancel()])
        gate.open()
        disp.barrier()
        expected = {"succeeded": 8, "failed": 3, "cancelled": 2, "retried": 2}
        assert counts(disp.stats()[0]) == expected

        os.kill(worker_pids(disp)[0], signal.SIGKILL)
        wait_until(lambda: disp.stats()[0].restarts == 1)
        wait_until_whole(disp)
        disp.dispatch(Job(echo, 1)).result()
    stats = disp.stats()
    assert counts(stats[0]) == {**expected, "succeeded": 9, "restarts": 1}
    assert stats[0].busy_seconds > 0.1
    assert counts(stats[1]) == {}


def test_each_worker_counts_its_jobs_and_its_busy_time() -> None:
    with staffed(Dispatcher([(0, 1)])) as disp:
        for _ in range(3):
            disp.dispatch(Job(nap, 0.05)).result()
        [worker] = disp.stats()[0].processes
        assert (worker.state, worker.jobs) == ("idle", 3)
        assert 0.15 <= worker.busy_seconds < 0.5
        assert disp.stats()[0].busy_seconds == worker.busy_seconds


def test_each_worker_tells_the_memory_of_its_own() -> None:
    with staffed(Dispatcher([(0, 1)])) as disp:
        [before] = disp.stats()[0].processes
        disp.dispatch(Job(leaking_jobs.keep, 40 * leaking_jobs.MIB)).result()
        [after] = disp.stats()[0].processes
        assert before.rss_bytes is not None
        assert after.rss_bytes is not None
        assert 40 <= (after.rss_bytes - before.rss_bytes) / leaking_jobs.MIB < 60


def test_stats_are_a_frozen_snapshot() -> None:
    with Dispatcher([(0, 1)]) as disp:
        before = disp.stats()
        disp.dispatch(Job(echo, 1)).result()
        assert before[0].succeeded == 0
        assert disp.stats()[0].succeeded == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            before[0].succeeded = 7  # type: ignore[misc]
        before.pools.clear()  # type: ignore[attr-defined]
        assert disp.stats()[0].succeeded == 1
