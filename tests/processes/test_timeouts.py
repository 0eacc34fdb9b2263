"""A job that runs too long is ended with all it has started, whatever it does against that (C2)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import faulty_jobs
import pytest
from watching import (
    PATIENCE,
    alive,
    assert_whole,
    is_alive,
    read_pids,
    wait_until,
    wait_until_whole,
    worker_pids,
)

from bulkhead import Dispatcher, Job, JobState, JobTimeout, Pool
from bulkhead.engines.processes import blackbox

# A timeout for what hangs anyway (seconds), and how long the ladder may take beyond a timeout.
BRIEF = 0.2
LADDER = 2.0

# A timeout before which a job has to have come so far that the test can begin: on a busy machine, too.
AMPLE = 2.0


def assert_all_are_ended_at_their_timeout(disp: Dispatcher, hangs: list[Callable[..., object]]) -> None:
    """Let all hang at once, beside a good job; the pool has a worker for each, which need not import the jobs first."""
    brief = 2 * BRIEF  # in which each has to begin to hang
    wait_until_whole(disp)
    before = worker_pids(disp)
    began = time.monotonic()
    trackers = [disp.dispatch(Job(hang).options(timeout=brief)) for hang in hangs]
    other = disp.dispatch(Job(faulty_jobs.double, 4))
    for hang, tracker in zip(hangs, trackers, strict=True):
        error = tracker.exception(PATIENCE)
        status = tracker.status()
        assert status.pid in before
        assert not is_alive(status.pid)
        assert isinstance(error, JobTimeout)
        assert (error.pid, error.timeout) == (status.pid, brief)
        assert (status.finished_at - status.started_at).total_seconds() >= brief
        assert time.monotonic() - began < brief + LADDER, hang
        for text in (error.stack, str(error), status.traceback or ""):
            assert f"in {hang.__name__}" in text
        assert status.state is JobState.FAILED
    assert other.result(PATIENCE) == 8
    assert_whole(disp)
    assert not {tracker.status().pid for tracker in trackers} & {*worker_pids(disp)}


@pytest.mark.alone
def test_jobs_that_hang_are_ended_at_their_timeout_and_fresh_workers_take_over(
    usual_start_method: str,
) -> None:
    disp = Dispatcher([Pool(0, 3, backlog=None, start_method=usual_start_method, preload=["faulty_jobs"])])
    try:
        assert_all_are_ended_at_their_timeout(disp, [faulty_jobs.loop, faulty_jobs.ignore_sigterm])
    finally:
        disp.finalize(cancel=True)


@pytest.mark.alone
@pytest.mark.parametrize(
    "hangs",
    [
        # Why apart: each uses a CPU, and all have to run before their time is up.
        [faulty_jobs.sleep_with_gil, faulty_jobs.sum_with_gil, faulty_jobs.leave_group],
        [
            faulty_jobs.sleep_in_c,
            faulty_jobs.block_sigterm,
            faulty_jobs.catch_sigterm,
            faulty_jobs.answer_sigterm,
        ],
    ],
    ids=["in C", "against SIGTERM"],
)
def test_whatever_jobs_do_they_are_ended_at_their_timeout_and_their_stacks_are_told(
    hangs: list[Callable[..., object]],
) -> None:
    disp = Dispatcher([Pool(0, len(hangs) + 1, backlog=None, preload=["faulty_jobs"])])
    try:
        assert_all_are_ended_at_their_timeout(disp, hangs)
    finally:
        disp.finalize(cancel=True)


@pytest.mark.alone
def test_the_stack_of_a_job_whose_worker_gets_no_cpu_for_a_while_is_waited_for() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        wait_until_whole(disp)
        (worker,) = worker_pids(disp)
        # Why the job itself: whoever stops its worker from here may come after the timeout.
        tracker = disp.dispatch(Job(faulty_jobs.stop_self_and_hang).options(timeout=BRIEF))
        wait_until(lambda: is_pending(worker, blackbox.DUMP), "the worker is asked for its stacks")
        # Not for a result: for longer than what an idle machine needs, and less than what the launcher gives it.
        time.sleep(0.2)
        assert not is_pending(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGCONT)
        error = tracker.exception(PATIENCE)
        assert isinstance(error, JobTimeout)
        assert "in stop_self_and_hang" in error.stack


@pytest.mark.alone
def test_a_worker_that_stays_stopped_is_ended_within_the_grace_and_half_of_it() -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        wait_until_whole(disp)
        (worker,) = worker_pids(disp)
        tracker = disp.dispatch(Job(faulty_jobs.stop_self_and_hang).options(timeout=BRIEF))
        assert isinstance(tracker.exception(BRIEF + LADDER), JobTimeout)
        assert not is_alive(worker)


def is_pending(pid: int, number: int | None) -> bool:
    """Tell whether a signal waits to be taken by the process."""
    assert number is not None
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return bool(pending >> (number - 1) & 1)


def test_a_process_that_a_job_has_started_is_gone_when_the_timeout_is_told(tmp_path: Path) -> None:
    kinds = [(stubborn, is_apart) for stubborn in (False, True) for is_apart in (False, True)]
    with Dispatcher([Pool(0, len(kinds))]) as disp:
        wait_until_whole(disp)
        trackers = [
            disp.dispatch(
                Job(
                    faulty_jobs.hang_with_child,
                    tmp_path / str(number),
                    stubborn=stubborn,
                    new_session=is_apart,
                ).options(timeout=AMPLE)
            )
            for number, (stubborn, is_apart) in enumerate(kinds)
        ]
        children = [read_pids(tmp_path / str(number))[0] for number in range(len(kinds))]
        for kind, child, tracker in zip(kinds, children, trackers, strict=True):
            error = tracker.exception(PATIENCE)
            left = alive([child, tracker.status().pid or 0])
            assert isinstance(error, JobTimeout)
            assert left == [], kind
        assert_whole(disp)


def test_a_daemon_that_a_job_has_started_is_gone_when_the_timeout_is_told(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        job = Job(faulty_jobs.hang_with_daemon, tmp_path / "pids")
        tracker = disp.dispatch(job.options(timeout=AMPLE))
        (daemon,) = read_pids(tmp_path / "pids")
        error = tracker.exception(PATIENCE)
        left = alive([daemon])
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert isinstance(error, JobTimeout)
        assert left == []


def test_a_job_that_runs_a_dispatcher_of_its_own_is_ended_with_it(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 1)]) as disp:
        tracker = disp.dispatch(Job(run_inner_dispatcher, tmp_path / "pids").options(timeout=1.5 * AMPLE))
        inner = read_pids(tmp_path / "pids", 2)
        assert isinstance(tracker.exception(PATIENCE), JobTimeout)
        wait_until(lambda: not alive(inner), within=2)


def run_inner_dispatcher(pids: Path) -> None:
    with Dispatcher([Pool(0, 2)]) as inner:
        wait_until_whole(inner)
        for pid in worker_pids(inner):
            faulty_jobs.append(pids, pid)
        inner.dispatch(Job(faulty_jobs.sum_with_gil))
        inner.barrier()


def test_a_jobs_timeout_beats_its_pools_in_both_directions() -> None:
    with Dispatcher([Pool(0, 2, timeout=BRIEF)]) as disp:
        longer = disp.dispatch(Job(faulty_jobs.nap, 3 * BRIEF).options(timeout=PATIENCE))
        pools = disp.dispatch(Job(faulty_jobs.sleep_in_c))
        error = pools.exception(PATIENCE)
        assert isinstance(error, JobTimeout)
        assert error.timeout == BRIEF
        assert longer.result(PATIENCE) == 3 * BRIEF
    with Dispatcher([Pool(0, 1, timeout=PATIENCE)]) as disp:
        shorter = disp.dispatch(Job(faulty_jobs.sleep_in_c).options(timeout=BRIEF))
        error = shorter.exception(PATIENCE)
        assert isinstance(error, JobTimeout)
        assert error.timeout == BRIEF


def test_a_timeout_counts_the_run_and_not_the_wait_for_a_worker() -> None:
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        disp.dispatch(Job(faulty_jobs.nap, 1.1 * AMPLE))
        waiting = disp.dispatch(Job(faulty_jobs.double, 4).options(timeout=AMPLE))
        assert waiting.result(PATIENCE) == 8


@pytest.mark.alone
def test_timeouts_come_true_while_nobody_waits() -> None:
    with Dispatcher([Pool(0, 2)]) as disp:
        trackers = [disp.dispatch(Job(faulty_jobs.loop).options(timeout=BRIEF)) for _ in range(2)]
        wait_until(lambda: all(tracker.done() for tracker in trackers), within=BRIEF + LADDER)
        wait_until_whole(disp)


@pytest.mark.alone
def test_timeouts_come_true_while_other_threads_wait_for_other_things() -> None:
    with Dispatcher([Pool(0, 2, backlog=None)]) as disp:
        for _ in range(2):
            disp.dispatch(Job(faulty_jobs.sleep_in_c).options(timeout=3 * BRIEF))
        waiting = threading.Thread(target=disp.barrier, kwargs={"check": False, "timeout": PATIENCE})
        waiting.start()
        late = disp.dispatch(Job(faulty_jobs.double, 4))
        assert late.result(3 * BRIEF + LADDER) == 8
        waiting.join(PATIENCE)
        assert not waiting.is_alive()


def test_one_hanging_job_after_the_other_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    with Dispatcher([Pool(0, 2, backlog=None, timeout=0.1)]) as disp:
        trackers = [
            disp.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "log", faulty_jobs.loop))
            for _ in range(10)
        ]
        report = disp.barrier(timeout=PATIENCE, check=False)
        assert report.failed_count == 10
        pids = [tracker.status().pid or 0 for tracker in trackers]
        assert len(set(pids)) == 10
        assert alive(pids) == []
        assert {type(tracker.exception()) for tracker in trackers} == {JobTimeout}


def test_a_job_that_ends_just_at_its_timeout_settles_one_way_or_the_other() -> None:
    with Dispatcher([Pool(0, 2, backlog=None)]) as disp:
        trackers = [
            disp.dispatch(Job(faulty_jobs.nap, 0.05).options(timeout=0.05 + 0.0002 * number))
            for number in range(-5, 15)
        ]
        report = disp.barrier(timeout=PATIENCE, check=False)
        assert report.succeeded + report.failed_count == len(trackers)
        for tracker in trackers:
            assert tracker.exception() is None or isinstance(tracker.exception(), JobTimeout)
        assert_whole(disp)
