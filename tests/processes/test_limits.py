"""Limits for each worker: jobs, memory, CPUs. A leaking job takes its worker along, nobody else notices (C5, C6)."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import leaking_jobs
import psutil
import pytest
from calling import Call, at_once
from gates import Gate
from jobs import echo, fail, fail_at_first, lines, nap, nothing, pid
from leaking_jobs import MIB
from staffing import staffed
from watching import PATIENCE, assert_whole, is_alive, read_pids, wait_until, wait_until_whole, worker_pids

from bulkhead import (
    ConfigError,
    Dispatcher,
    Job,
    JobState,
    MemoryLimitExceeded,
    Pool,
    PoolBroken,
    PoolStats,
    RetryPolicy,
    WorkerCrashed,
)
from bulkhead.engines.processes import memory_watch, staff


@pytest.fixture
def fresh(start_method: str) -> int:
    """What a worker takes that has done next to nothing. A fork has a good deal of what this process has right now."""
    return _bytes_of_a_worker(start_method)


@pytest.fixture(scope="module")
def usual() -> int:
    """The same with the usual start method."""
    return _bytes_of_a_worker(None)


def _bytes_of_a_worker(method: Any) -> int:
    with Dispatcher([Pool(0, 1, start_method=method)]) as disp:
        return disp.dispatch(Job(leaking_jobs.own_bytes)).result(PATIENCE)


def without_restarts(stats: PoolStats) -> int:
    """Return how many workers were recycled; prove that none was replaced for another reason, and no job failed."""
    assert stats.restarts == stats.recycled
    assert (stats.failed, stats.cancelled, stats.retried) == (0, 0, 0)
    return stats.recycled


# After so many jobs


def test_a_worker_is_replaced_after_so_many_jobs_and_no_job_notices(start_method: str) -> None:
    with Dispatcher([Pool(0, 2, max_jobs_per_worker=5, start_method=start_method), (1, 1)]) as disp:
        trackers = [disp.dispatch(Job(pid), timeout=PATIENCE) for _ in range(30)]
        assert disp.barrier(timeout=PATIENCE).succeeded == 30
        done = Counter(tracker.result() for tracker in trackers)
        assert max(done.values()) == 5
        assert {tracker.status().attempt for tracker in trackers} == {1}
        assert without_restarts(disp.stats()[0]) == list(done.values()).count(5)
        assert_whole(disp)
        assert disp.stats()[1].restarts == 0
        wait_until(
            lambda: not any(map(is_alive, done.keys() - worker_pids(disp))), "those sent home have left"
        )


def test_never_more_jobs_run_at_once_than_there_are_workers_while_each_job_has_a_worker_of_its_own() -> None:
    with Dispatcher([Pool(0, 2, max_jobs_per_worker=1, backlog=None)]) as disp:
        spans = [tracker.result(PATIENCE) for tracker in [disp.dispatch(Job(nap, 0.01)) for _ in range(20)]]
        disp.barrier(timeout=PATIENCE)
        assert without_restarts(disp.stats()[0]) == 20
    steps = sorted((instant, step) for began, ended in spans for instant, step in ((began, 1), (ended, -1)))
    assert max(itertools.accumulate(step for _, step in steps)) <= 2


def test_attempts_count_not_jobs_and_failed_ones_as_well(tmp_path: Path) -> None:
    policy = RetryPolicy(3, initial=0.01)
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=2)]) as disp:
        assert disp.dispatch(Job(fail_at_first, tmp_path / "log", 2).options(retry=policy)).result(20) == 3
        assert disp.stats()[0].recycled == 1
        assert isinstance(disp.dispatch(Job(fail)).exception(PATIENCE), ValueError)
        assert disp.stats()[0].recycled == 2
        assert_whole(disp)


@pytest.mark.parametrize("options", [{}, {"chunksize": 50}, {"ordered": False}, {"chunksize": 1}], ids=str)
def test_in_a_map_each_item_counts_and_the_rest_of_a_chunk_runs_elsewhere(options: dict[str, Any]) -> None:
    with Dispatcher([Pool(0, 2, max_jobs_per_worker=40)]) as disp:
        found = list(disp.map(leaking_jobs.leak_and_tell, range(400), itertools.repeat(1), **options))
        assert sorted(number for number, _ in found) == list(range(400))
        if options.get("ordered", True):
            assert [number for number, _ in found] == list(range(400))
        done = Counter(pid for _, pid in found)
        assert max(done.values()) <= 40
        assert without_restarts(disp.stats()[0]) >= 9
        assert_whole(disp)


def test_failing_items_of_a_map_are_retried_across_generations(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 2, max_jobs_per_worker=3, retry=RetryPolicy(2, initial=0.0))]) as disp:
        paths = [tmp_path / str(number) for number in range(12)]
        results = list(disp.map(fail_at_first, paths, itertools.repeat(1), chunksize=5))
        assert results == [2] * 12
        assert [len(lines(path)) for path in paths] == [2] * 12


def test_eight_threads_that_dispatch_lose_and_double_nothing_while_workers_are_replaced(
    usual_start_method: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    each = 20 if usual_start_method == "spawn" else 60

    with Dispatcher([Pool(0, 2, max_jobs_per_worker=7, start_method=usual_start_method)]) as disp:

        def dispatch(thread: int) -> list[Any]:
            numbers = range(thread * each, (thread + 1) * each)
            return [disp.dispatch(Job(leaking_jobs.note_number, log, n), timeout=60) for n in numbers]

        trackers = [tracker for call in at_once(8, dispatch) for tracker in call.value(60)]
        assert [tracker.result(PATIENCE) for tracker in trackers] == list(range(8 * each))
        disp.barrier(timeout=PATIENCE)
        assert without_restarts(disp.stats()[0]) >= 8 * each // 7 - 2
    assert sorted(map(int, lines(log))) == list(range(8 * each))


def test_a_worker_that_is_killed_while_it_leaves_costs_nothing() -> None:
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=1)]) as disp:
        leaving = disp.dispatch(Job(leaking_jobs.linger_at_exit)).result(PATIENCE)
        wait_until(lambda: leaving in [one.pid for one in disp.stats()[0].processes if one.state == "ending"])
        assert disp.dispatch(Job(echo, 1)).result(PATIENCE) == 1  # it holds nobody up
        os.kill(leaving, signal.SIGKILL)
        wait_until(lambda: leaving not in [one.pid for one in disp.stats()[0].processes])
        assert without_restarts(disp.stats()[0]) == 2
        assert_whole(disp)


def test_a_worker_that_is_killed_in_the_place_of_a_recycled_one_is_replaced_and_the_job_waits(
    tmp_path: Path,
) -> None:
    block = tmp_path / "block"
    pool = Pool(
        0,
        1,
        max_jobs_per_worker=1,
        backlog=1,
        initializer=leaking_jobs.wait_while_there,
        initargs=(block,),
    )
    with staffed(Dispatcher([pool])) as disp:
        block.touch()
        assert disp.dispatch(Job(echo, 1)).result(PATIENCE) == 1
        waiting = disp.dispatch(Job(pid))

        def starting() -> list[int]:
            return [one.pid for one in disp.stats()[0].processes if one.state == "starting" and one.pid]

        wait_until(starting)
        (young,) = starting()
        os.kill(young, signal.SIGKILL)
        block.unlink()
        assert waiting.result(PATIENCE) not in (young, None)
        assert waiting.status().attempt == 1
        wait_until(lambda: disp.stats()[0].recycled == 2)
        assert disp.stats()[0].restarts == 3


def test_a_worker_that_does_not_leave_when_it_is_sent_home_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "_LEAVE", 0.2)
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=1)]) as disp:
        leaving = disp.dispatch(Job(leaking_jobs.linger_at_exit)).result(PATIENCE)
        wait_until(lambda: not is_alive(leaving))
        assert_whole(disp)
        without_restarts(disp.stats()[0])


@pytest.mark.parametrize("cancel", [False, True], ids=["in peace", "cancelling"])
def test_finalize_ends_a_pool_whose_workers_are_being_replaced(usual_start_method: str, cancel: bool) -> None:
    for n_done in (1, 4):
        with Dispatcher(
            [Pool(0, 2, max_jobs_per_worker=1, backlog=None, start_method=usual_start_method)]
        ) as disp:
            trackers = [disp.dispatch(Job(echo, number)) for number in range(6)]
            for tracker in trackers[:n_done]:
                tracker.wait(PATIENCE)
            disp.finalize(cancel=cancel)
            assert all(tracker.done() for tracker in trackers)
            ends = {tracker.status().state for tracker in trackers}
            assert (
                ends <= {JobState.SUCCEEDED, JobState.CANCELLED} if cancel else ends == {JobState.SUCCEEDED}
            )


def test_finalize_lets_a_worker_that_was_sent_home_run_its_exit_handlers(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=1)]) as disp:
        disp.dispatch(Job(leaking_jobs.note_at_exit, str(tmp_path / "log"))).result(PATIENCE)
    assert lines(tmp_path / "log") == ["left"]


def test_finalize_does_not_wait_for_a_worker_that_was_sent_home_and_lingers() -> None:
    with Dispatcher([Pool(0, 1, max_jobs_per_worker=1)]) as disp:
        leaving = disp.dispatch(Job(leaking_jobs.linger_at_exit)).result(PATIENCE)
        Call(disp.finalize).value(10)
        assert not is_alive(leaving)


def test_an_initializer_that_fails_in_the_second_generation_fails_the_pools_jobs_with_its_error(
    start_method: str, tmp_path: Path, gate: Gate
) -> None:
    expired = tmp_path / "expired"
    pool = Pool(
        0,
        2,
        max_jobs_per_worker=2,
        backlog=None,
        initializer=leaking_jobs.fail_if_there,
        initargs=(str(expired),),
        start_method=start_method,
    )
    with staffed(Dispatcher([pool, (1, 1)])) as disp:
        running = disp.dispatch(gate.job(priority=0))
        gate.wait_begun(1)
        expired.touch()
        trackers = [disp.dispatch(Job(echo, n).options(priority=0)) for n in range(5)]
        errors = [tracker.exception(PATIENCE) for tracker in trackers]
        assert errors[:2] == [None, None]  # by the worker of the first generation
        for error in errors[2:]:
            assert isinstance(error, PoolBroken)
            assert "the licence has expired" in str(error)
            assert isinstance(error.__cause__, RuntimeError)
        with pytest.raises(PoolBroken, match="the licence has expired"):
            disp.dispatch(Job(echo, 1).options(priority=0))
        gate.open()
        assert running.result(PATIENCE)  # what runs ends as it would have
        wait_until(lambda: not disp.stats()[0].starting)
        assert 5 <= len(lines(f"{expired}.calls")) <= 8  # two of the first generation; bounded from then on
        assert_whole(disp, 1)


# Memory when a job is over


def test_a_leaking_worker_is_replaced_when_its_job_is_over_and_no_job_notices(
    start_method: str, fresh: int
) -> None:
    limit = fresh + 50 * MIB
    pool = Pool(0, 1, max_memory_per_worker=limit, start_method=start_method)
    with Dispatcher([pool]) as disp:
        trackers = [disp.dispatch(Job(leaking_jobs.keep, 20 * MIB), timeout=PATIENCE) for _ in range(12)]
        assert disp.barrier(timeout=PATIENCE).succeeded == 12
        done = Counter(tracker.result() for tracker in trackers)
        assert max(done.values()) == 3
        assert without_restarts(disp.stats()[0]) == list(done.values()).count(3)
        wait_until_whole(disp)
        (one,) = [one for one in disp.stats()[0].processes if one.state == "idle"]
        assert one.rss_bytes is not None
        assert one.rss_bytes < limit
        print(f"{start_method}: limit {limit / MIB:.0f} MiB, jobs of 20 MiB by worker: {list(done.values())}")


@pytest.mark.parametrize("options", [{}, {"chunksize": 100}, {"chunksize": 100, "ordered": False}], ids=str)
def test_a_leaking_worker_is_replaced_between_the_items_of_a_map(usual: int, options: dict[str, Any]) -> None:
    limit = usual + 40 * MIB
    with Dispatcher([Pool(0, 1, max_memory_per_worker=limit)]) as disp:
        found = list(disp.map(leaking_jobs.leak_and_tell, range(120), itertools.repeat(MIB), **options))
        assert sorted(number for number, _ in found) == list(range(120))
        done = Counter(pid for _, pid in found)
        # A look a millisecond: what leaks in between is the excess.
        assert max(done.values()) <= 60
        assert without_restarts(disp.stats()[0]) >= 2


def test_a_limit_that_each_job_exceeds_is_warned_of_once(
    usual: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Dispatcher([Pool(0, 1, max_memory_per_worker=usual + 10 * MIB, name="small")]) as disp:
        for _ in range(3):
            disp.dispatch(Job(leaking_jobs.keep, 20 * MIB)).result(PATIENCE)
        assert without_restarts(disp.stats()[0]) == 3
    [record] = caplog.records
    assert (record.name, record.levelname) == ("bulkhead", "WARNING")
    for part in ("small", "after its first job", f"limit of {(usual + 10 * MIB) / MIB:.1f} MiB", "raise"):
        assert part in record.getMessage()


def test_what_a_job_returns_frees_or_was_given_is_not_held_against_its_worker(usual: int) -> None:
    numpy = pytest.importorskip("numpy")
    with Dispatcher([Pool(0, 1, max_memory_per_worker=usual + 30 * MIB)]) as disp:
        first, data = disp.dispatch(Job(leaking_jobs.make_large, 60 * MIB)).result(PATIENCE)
        assert len(data) == 60 * MIB
        shared = disp.share(numpy.ones(8 * MIB))
        results = [
            disp.dispatch(Job(leaking_jobs.make_garbage, 60 * MIB)).result(PATIENCE),
            disp.dispatch(Job(_sum_and_pid, numpy.ones(8 * MIB))).result(PATIENCE)[1],
            disp.dispatch(Job(_sum_and_pid, shared)).result(PATIENCE)[1],
            disp.dispatch(Job(_ones_and_pid, 8 * MIB)).result(PATIENCE)[1],
            disp.dispatch(Job(pid)).result(PATIENCE),
        ]
        assert set(results) == {first}
        assert disp.stats()[0].recycled == 0


def _sum_and_pid(array: Any) -> tuple[float, int]:
    return float(array.sum()), os.getpid()


def _ones_and_pid(n: int) -> tuple[Any, int]:
    import numpy as np

    return np.ones(n), os.getpid()


@pytest.mark.parametrize("option", ["max_memory_per_worker", "hard_memory_limit"])
def test_a_limit_below_what_a_fresh_worker_takes_breaks_the_pool_with_the_figures(option: str) -> None:
    sick = Pool(0, 1, backlog=None, **{option: MIB})
    with Dispatcher([sick, (1, 1)]) as disp:
        with pytest.raises(PoolBroken, match=rf"{option}=1048576 \(1\.0 MiB\)") as caught:
            disp.dispatch(Job(nothing).options(priority=0)).result(PATIENCE)
        # The second by who looks from outside, should that be faster.
        assert isinstance(caught.value.__cause__, ConfigError | MemoryLimitExceeded)
        assert len(re.findall(r"\d+\.\d MiB", str(caught.value))) == 2
        assert disp.stats()[0].restarts <= 4
        assert_whole(disp, 1)


# Memory while a job runs


def test_a_job_that_grows_beyond_the_hard_limit_is_ended_with_the_figures_and_the_next_ones_run(
    start_method: str, fresh: int, tmp_path: Path
) -> None:
    limit = fresh + 100 * MIB
    pool = Pool(0, 2, hard_memory_limit=limit, start_method=start_method, backlog=None)
    with Dispatcher([pool]) as disp:
        growing = disp.dispatch(Job(leaking_jobs.grow, tmp_path / "pid"))
        others = [disp.dispatch(Job(echo, number)) for number in range(20)]
        error = growing.exception(PATIENCE)
        assert isinstance(error, MemoryLimitExceeded)
        assert isinstance(error, WorkerCrashed)
        assert isinstance(error, MemoryError)
        assert (error.limit_bytes, [error.pid]) == (limit, read_pids(tmp_path / "pid"))
        assert error.rss_bytes > limit
        for part in (
            "job 0",
            f"{limit}",
            f"{error.rss_bytes / MIB:.1f} MiB",
            "raise the limit",
            "max_memory_per",
        ):
            assert part in str(error)
        assert "grow" in error.stack
        assert error.pid is not None
        assert not is_alive(error.pid)
        assert [tracker.result(PATIENCE) for tracker in others] == list(range(20))
        assert_whole(disp)
        print(
            f"{start_method}: limit {limit / MIB:.0f} MiB, seen at {error.rss_bytes / MIB:.0f} MiB, "
            f"ended at {(error.peak_rss_bytes or 0) / MIB:.0f} MiB"
        )


def test_a_job_that_holds_the_interpreter_lock_is_ended_as_well(usual: int) -> None:
    with Dispatcher([Pool(0, 1, hard_memory_limit=usual + 100 * MIB)]) as disp:
        error = disp.dispatch(Job(leaking_jobs.grow_holding_the_lock)).exception(PATIENCE)
        assert isinstance(error, MemoryLimitExceeded)
        assert_whole(disp)


def test_it_is_found_out_whoever_waits_and_also_when_nobody_does(usual: int, tmp_path: Path) -> None:
    with staffed(Dispatcher([Pool(0, 1, hard_memory_limit=usual + 60 * MIB), (1, 1)])) as disp:
        wait_until(_all_threads_sleep)
        found = disp.try_dispatch(Job(leaking_jobs.grow, tmp_path / "a").options(priority=0))
        assert found is not None
        tracker = found
        wait_until(tracker.done)  # which drives nothing
        assert isinstance(tracker.exception(0), MemoryLimitExceeded)
        tracker = disp.dispatch(Job(leaking_jobs.grow, tmp_path / "b").options(priority=0))
        assert disp.barrier(check=False, timeout=PATIENCE).failed_count == 2
        assert isinstance(tracker.exception(0), MemoryLimitExceeded)
        tracker = disp.dispatch(Job(leaking_jobs.grow, tmp_path / "c").options(priority=0))
        disp.dispatch(Job(nothing).options(priority=0), timeout=PATIENCE)  # waits for the slot
        assert isinstance(tracker.exception(0), MemoryLimitExceeded)


def test_the_processes_that_a_job_starts_count_and_are_ended_with_it(usual: int, tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1, hard_memory_limit=usual + 60 * MIB)]) as disp:
        job = Job(leaking_jobs.start_a_large_process, tmp_path / "pid", 200 * MIB)
        error = disp.dispatch(job).exception(PATIENCE)
        assert isinstance(error, MemoryLimitExceeded)
        assert error.rss_bytes > error.limit_bytes
        (child,) = read_pids(tmp_path / "pid")
        assert not is_alive(child)
        assert_whole(disp)


def test_memory_that_forked_copies_have_in_common_counts_once(usual: int) -> None:
    with Dispatcher([Pool(0, 1, hard_memory_limit=usual + 100 * MIB)]) as disp:
        job = Job(leaking_jobs.fork_and_share, 60 * MIB, 4, 0.5)
        assert disp.dispatch(job).result(PATIENCE) == 60 * MIB


def test_a_job_that_took_too_much_is_retried_as_the_policy_says(usual: int, tmp_path: Path) -> None:
    limit = usual + 60 * MIB
    with Dispatcher([Pool(0, 1, hard_memory_limit=limit)]) as disp:
        for number, named in enumerate((MemoryLimitExceeded, WorkerCrashed, MemoryError)):
            policy = RetryPolicy(2, initial=0.0, retry_on=(named,))
            job = Job(leaking_jobs.grow_at_first, str(tmp_path / str(number))).options(retry=policy)
            assert disp.dispatch(job).result(PATIENCE) == 2
        job = Job(leaking_jobs.grow_at_first, str(tmp_path / "x"))
        policy = RetryPolicy(2, initial=0.0, retry_on=(ValueError,))
        assert isinstance(disp.dispatch(job.options(retry=policy)).exception(PATIENCE), MemoryLimitExceeded)


@pytest.mark.parametrize("chunksize", [1, 10, "auto"])
def test_an_item_of_a_map_that_grows_fails_alone(usual: int, chunksize: Any) -> None:
    with Dispatcher([Pool(0, 2, hard_memory_limit=usual + 60 * MIB)]) as disp:
        answers = disp.map(leaking_jobs.grow_if, range(30), itertools.repeat(17), chunksize=chunksize)
        found: list[Any] = []
        while len(found) < 30:
            try:
                found.append(next(answers))
            except MemoryLimitExceeded as error:
                found.append(str(error).partition(" took")[0])
        assert found == [*range(17), "item 17 of a map", *range(18, 30)]
        assert list(answers) == []
        assert disp.stats()[0].restarts == 1


def test_a_job_that_is_done_before_anybody_looks_has_succeeded_and_its_worker_is_replaced(
    usual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "_SOONEST", 60.0)
    with Dispatcher([Pool(0, 1, hard_memory_limit=usual + 60 * MIB)]) as disp:
        first = disp.dispatch(Job(leaking_jobs.keep, 100 * MIB)).result(PATIENCE)
        assert disp.dispatch(Job(pid)).result(PATIENCE) != first
        assert without_restarts(disp.stats()[0]) == 1


def test_an_initializer_that_grows_beyond_the_hard_limit_breaks_the_pool(usual: int) -> None:
    pool = Pool(
        0,
        1,
        hard_memory_limit=usual + 60 * MIB,
        initializer=leaking_jobs.grow,
    )
    with Dispatcher([pool]) as disp:
        with pytest.raises(PoolBroken, match="hard_memory_limit") as caught:
            disp.dispatch(Job(nothing)).result(PATIENCE)
        assert isinstance(caught.value.__cause__, MemoryLimitExceeded)


def test_nobody_looks_while_no_job_runs_and_each_pool_looks_for_itself(
    usual: int, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: Counter[int] = Counter()
    look = memory_watch.MemoryWatch.look

    def counted(watch: Any, now: float) -> None:
        looks[watch._limit] += 1
        look(watch, now)

    monkeypatch.setattr(memory_watch.MemoryWatch, "look", counted)
    limits = [usual + 1000 * MIB, usual + 1001 * MIB]
    pools = [Pool(0, 1, hard_memory_limit=limits[0]), Pool(1, 1, hard_memory_limit=limits[1])]
    with staffed(Dispatcher(pools)) as disp:
        disp.dispatch(gate.job(priority=1))
        looks.clear()
        wait_until(lambda: looks[limits[1]] >= 3, "the pool with a job is looked at")
        assert looks[limits[0]] == 0
        gate.open()
        disp.barrier()
        wait_until(_all_threads_sleep, "no thread of a pool wakes up")
        looks.clear()
        assert _all_threads_sleep()
        assert not looks


def _all_threads_sleep() -> bool:
    """Tell whether no other thread of this process does anything for three of the longest pauses between two looks."""
    before = _sleeps_of_threads()
    time.sleep(3 * memory_watch._LATEST)
    return _sleeps_of_threads() == before


def _sleeps_of_threads() -> dict[int, str]:
    """Return for each other thread of this process how often it has gone to sleep so far."""
    others = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    return {
        one: Path(f"/proc/self/task/{one}/status").read_text().split("voluntary_ctxt_switches:")[1].split()[0]
        for one in others
        if one is not None
    }


# CPUs


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the CPUs of a process cannot be chosen here"
)
def test_cpus_pins_the_workers_of_a_pool_and_what_they_start_and_nobody_else(usual_start_method: str) -> None:
    mine = os.sched_getaffinity(0)
    chosen = {min(mine)}
    pools = [Pool(0, 2, cpus=chosen, max_jobs_per_worker=1, start_method=usual_start_method), Pool(1, 1)]
    with staffed(Dispatcher(pools)) as disp:
        for _ in range(3):  # also in the workers that take the place of others
            assert disp.dispatch(Job(leaking_jobs.allowed_cpus).options(priority=0)).result(20) == (
                chosen,
                chosen,
            )
        assert disp.dispatch(Job(leaking_jobs.allowed_cpus).options(priority=1)).result(20) == (mine, mine)
        assert os.sched_getaffinity(0) == mine
        wait_until_whole(disp)
        assert {tuple(psutil.Process(pid).cpu_affinity()) for pid in worker_pids(disp)} == {tuple(chosen)}
