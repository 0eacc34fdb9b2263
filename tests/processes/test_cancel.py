"""`cancel` takes a waiting job out and ends a running one with all it has started (C3)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_jobs
import pytest
from calling import Call
from watching import PATIENCE, alive, assert_whole, is_alive, read_pids, wait_until, wait_until_whole

from bulkhead import Dispatcher, Job, JobCancelled, JobState, Pool, RetryPolicy, Tracker

# How long it may take until a running job is cancelled: the grace of the kill ladder and then some (seconds).
LADDER = 2.0


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    disp = Dispatcher([Pool(0, 1, backlog=None)])
    wait_until_whole(disp)
    yield disp
    disp.finalize(cancel=True)


@pytest.fixture(autouse=True)
def _phase_is_reported(disp: Dispatcher) -> Iterator[None]:
    yield
    disp.barrier(timeout=PATIENCE, check=False)
    assert_whole(disp)


def assert_cancelled(tracker: Tracker) -> None:
    assert tracker.done()
    assert tracker.status().state is JobState.CANCELLED
    assert tracker.status().finished_at is not None
    assert isinstance(tracker.exception(0), JobCancelled)
    with pytest.raises(JobCancelled, match=repr(tracker.id)):
        tracker.result(0)


def test_a_waiting_job_that_is_cancelled_never_runs(disp: Dispatcher, tmp_path: Path) -> None:
    running = disp.dispatch(Job(faulty_jobs.wait_for_file, tmp_path / "go"))
    waiting = [disp.dispatch(Job(faulty_jobs.note, tmp_path / "ran")) for _ in range(3)]
    assert waiting[1].cancel() is True
    assert_cancelled(waiting[1])
    (tmp_path / "go").touch()
    assert running.result(PATIENCE)
    assert [waiting[0].result(PATIENCE), waiting[2].result(PATIENCE)] == [1, 2]
    report = disp.barrier(timeout=PATIENCE)
    assert (report.succeeded, report.failed_count, report.cancelled) == (3, 0, 1)


@pytest.mark.parametrize(
    "hang",
    [faulty_jobs.loop, faulty_jobs.sum_with_gil, faulty_jobs.ignore_sigterm, faulty_jobs.stop_self],
    ids=["loop", "holds the GIL", "ignores SIGTERM", "stopped"],
)
def test_a_running_job_that_is_cancelled_is_ended_whatever_it_does(
    disp: Dispatcher, hang: Callable[..., object], tmp_path: Path
) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "began", hang))
    wait_until((tmp_path / "began").exists)
    assert tracker.cancel() is True
    assert tracker.wait(LADDER)
    assert not is_alive(tracker.status().pid or 0)
    assert_cancelled(tracker)


def test_what_a_running_job_has_started_is_gone_when_it_is_cancelled(
    disp: Dispatcher, tmp_path: Path
) -> None:
    job = Job(faulty_jobs.hang_with_child, tmp_path / "pids", stubborn=True, new_session=True)
    tracker = disp.dispatch(job)
    (child,) = read_pids(tmp_path / "pids")
    tracker.cancel()
    assert tracker.wait(LADDER)
    assert alive([child, tracker.status().pid or 0]) == []
    assert_cancelled(tracker)


def test_a_job_that_answers_the_cancellation_with_a_result_is_cancelled_all_the_same(
    disp: Dispatcher, tmp_path: Path
) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "began", faulty_jobs.answer_sigterm))
    wait_until((tmp_path / "began").exists)
    tracker.cancel()
    assert tracker.wait(LADDER)
    assert_cancelled(tracker)


def test_a_delayed_job_can_be_cancelled(disp: Dispatcher, tmp_path: Path) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.note, tmp_path / "ran").options(delay=0.3))
    assert tracker.cancel() is True
    assert_cancelled(tracker)
    later = disp.dispatch(Job(faulty_jobs.double, 4).options(delay=0.4))
    assert later.result(PATIENCE) == 8
    assert not (tmp_path / "ran").exists()


def test_a_job_that_waits_for_its_next_attempt_can_be_cancelled(disp: Dispatcher, tmp_path: Path) -> None:
    job = Job(faulty_jobs.fail_with, tmp_path / "log", ValueError("no"))
    tracker = disp.dispatch(job.options(retry=RetryPolicy(5, initial=0.3, jitter=0)))
    wait_until(lambda: tracker.status().state is JobState.RETRYING)
    assert tracker.cancel() is True
    assert_cancelled(tracker)
    assert disp.dispatch(Job(faulty_jobs.double, 4).options(delay=0.4)).result(PATIENCE) == 8
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_cancelled_job_is_not_tried_again(disp: Dispatcher, tmp_path: Path) -> None:
    job = Job(faulty_jobs.note_and_call, tmp_path / "log", faulty_jobs.loop)
    tracker = disp.dispatch(job.options(retry=RetryPolicy(5, initial=0)))
    wait_until((tmp_path / "log").exists)
    tracker.cancel()
    assert tracker.wait(LADDER)
    assert_cancelled(tracker)
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_cancel_is_false_for_a_job_that_has_ended_and_changes_nothing(
    disp: Dispatcher, tmp_path: Path
) -> None:
    done = disp.dispatch(Job(faulty_jobs.double, 4))
    failed = disp.dispatch(Job(faulty_jobs.fail_with, tmp_path / "log", ValueError("no")))
    assert done.wait(PATIENCE)
    assert failed.wait(PATIENCE)
    assert done.cancel() is False
    assert failed.cancel() is False
    assert done.result() == 8
    assert isinstance(failed.exception(), ValueError)


def test_everybody_who_waits_for_a_cancelled_job_wakes(disp: Dispatcher, tmp_path: Path) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "began", faulty_jobs.sleep_in_c))
    waits = [
        Call(tracker.exception, PATIENCE),
        Call(tracker.wait, PATIENCE),
        Call(disp.barrier, timeout=PATIENCE),
    ]
    wait_until((tmp_path / "began").exists)
    for wait in waits:
        wait.until_waiting()
    began = time.monotonic()
    tracker.cancel()
    assert isinstance(waits[0].value(), JobCancelled)
    assert waits[1].value() is True
    assert waits[2].value().cancelled == 1
    assert time.monotonic() - began < LADDER


def test_a_worker_that_crashes_while_its_job_is_being_cancelled_leaves_the_job_cancelled(
    disp: Dispatcher, tmp_path: Path
) -> None:
    tracker = disp.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "began", faulty_jobs.ignore_sigterm))
    wait_until((tmp_path / "began").exists)
    tracker.cancel()
    os.kill(tracker.status().pid or 0, signal.SIGKILL)
    assert tracker.wait(LADDER)
    assert_cancelled(tracker)


def test_waiting_and_running_jobs_can_be_cancelled_under_every_start_method(
    start_method: str, tmp_path: Path
) -> None:
    with Dispatcher([Pool(0, 1, backlog=None, start_method=start_method)]) as other:
        running = other.dispatch(Job(faulty_jobs.note_and_call, tmp_path / "began", faulty_jobs.sum_with_gil))
        waiting = other.dispatch(Job(faulty_jobs.note, tmp_path / "ran"))
        wait_until((tmp_path / "began").exists)
        assert waiting.cancel()
        assert_cancelled(waiting)
        assert running.cancel()
        assert running.wait(LADDER)
        assert_cancelled(running)
        assert not is_alive(running.status().pid or 0)
        assert_whole(other)
        assert not (tmp_path / "ran").exists()
