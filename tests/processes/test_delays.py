"""Jobs that must not start before an instant (A11), or not after one (A12)."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from gates import Gate
from jobs import Greeting, echo, instant, lines, note
from staffing import staffed
from watching import wait_until

from bulkhead import ConfigError, Dispatcher, Job, JobState, Pool, StartDeadlineExceeded, Tracker


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with staffed(Dispatcher([Pool(0, 1, backlog=2), Pool(1, 10)])) as disp:
        # Why: the thread of callbacks is made when the first is added, and stays until the end.
        disp.dispatch(Job(instant)).add_done_callback(repr)
        yield disp


def test_ten_delayed_jobs_start_together_and_hold_up_no_other(disp: Dispatcher) -> None:
    began = time.monotonic()
    delayed = [disp.dispatch(Job(instant).options(priority=1, delay=0.05)) for _ in range(10)]
    accepted = time.monotonic()
    other = disp.dispatch(Job(instant).options(priority=1)).result()
    starts = [tracker.result() for tracker in delayed]

    print(f"delays of 50 ms: first {min(starts) - began:.4f} s, last {max(starts) - accepted:.4f} s")
    assert other < accepted + 0.25
    assert all(start >= began + 0.05 for start in starts)
    # One after the other they would take half a second.
    assert max(starts) < accepted + 0.05 + 0.25


def test_delayed_jobs_take_no_worker_and_no_room(disp: Dispatcher) -> None:
    delayed = [disp.dispatch(Job(instant).options(delay=60.0), timeout=0) for _ in range(50)]
    stats = disp.stats()[0]
    assert (stats.delayed, stats.running, stats.waiting, stats.idle) == (50, 0, 0, 1)
    assert disp.dispatch(Job(echo, 1), timeout=0).result() == 1
    assert all(tracker.cancel() for tracker in delayed)
    assert disp.stats()[0].delayed == 0
    disp.barrier()


def test_a_delayed_job_starts_when_nobody_waits_for_anything(disp: Dispatcher) -> None:
    for _ in range(3):
        began = time.monotonic()
        tracker = disp.dispatch(Job(instant).options(delay=0.05))
        wait_until(tracker.done)
        assert began + 0.05 <= tracker.result() < began + 0.5


def test_a_shorter_delay_overtakes_a_longer_one_that_is_waited_for(disp: Dispatcher, tmp_path: Path) -> None:
    order = tmp_path / "order"
    late = disp.dispatch(Job(note, order, "late").options(delay=0.3))
    early = disp.dispatch(Job(note, order, "early").options(delay=0.1))
    late.result()
    assert early.done()
    assert lines(order) == ["early", "late"]


def test_due_jobs_start_in_the_order_in_which_they_became_due(disp: Dispatcher, tmp_path: Path) -> None:
    order = tmp_path / "order"
    for number in (3, 1, 2):
        disp.dispatch(Job(note, order, number).options(delay=number * 0.02))
    disp.barrier()
    assert lines(order) == ["1", "2", "3"]


def test_a_job_does_not_start_before_the_instant_it_names(disp: Dispatcher) -> None:
    at = datetime.now(UTC) + timedelta(seconds=0.2)
    trackers = [
        disp.dispatch(Job(time.time).options(not_before=not_before, priority=1))
        for not_before in (at, at.timestamp())
    ]
    assert [tracker.status().state for tracker in trackers] == [JobState.SCHEDULED] * 2
    assert all(at.timestamp() <= tracker.result() < at.timestamp() + 0.3 for tracker in trackers)


def test_an_instant_that_has_passed_means_at_once(disp: Dispatcher) -> None:
    for not_before in (datetime.now(UTC) - timedelta(days=1), 1.0):
        assert disp.dispatch(Job(echo, "now").options(not_before=not_before)).result(1) == "now"


def test_delay_and_not_before_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"delay=1.*not_before="):
        Job(instant).options(delay=1, not_before=datetime.now(UTC))


def test_a_job_object_may_ask_for_a_delay(disp: Dispatcher) -> None:
    began = time.monotonic()
    tracker = disp.dispatch(Greeting("you", delay=0.1))
    assert tracker.result().startswith("hello you")
    assert time.monotonic() - began >= 0.1


def test_barrier_and_finalize_wait_for_delayed_jobs(tmp_path: Path) -> None:
    with Dispatcher([(0, 1)]) as disp:
        first = disp.dispatch(Job(echo, 1).options(delay=0.1))
        disp.barrier()
        assert first.done()
        second = disp.dispatch(Job(echo, 2).options(delay=0.1))
    assert second.result(0) == 2


# Start deadlines


def _expired(tracker: Tracker) -> None:
    wait_until(tracker.done)
    with pytest.raises(StartDeadlineExceeded, match=f"job {tracker.id!r} did not start before its deadline"):
        tracker.result()
    status = tracker.status()
    assert (status.state, status.attempt, status.started_at, status.pid) == ("failed", 0, None, None)


def test_a_job_that_is_not_started_in_time_fails_once_and_never_runs(disp: Dispatcher, gate: Gate) -> None:
    disp.barrier()
    held = disp.dispatch(gate.job("held"))
    gate.wait_begun(1)
    began = time.monotonic()
    late = disp.dispatch(gate.job("late", start_deadline=0.1))
    called: list[Tracker] = []
    late.add_done_callback(called.append)

    _expired(late)
    assert 0.1 <= time.monotonic() - began < 0.6
    gate.open()
    assert held.result() == "held"
    report = disp.barrier(check=False)
    assert (report.succeeded, report.failed) == (1, (late,))
    assert disp.dispatch(Job(echo, "next")).result() == "next"
    wait_until(lambda: called)
    disp.barrier()
    assert called == [late]
    assert gate.begun == ["held"]


def test_a_caller_that_waits_for_room_gets_the_failed_job_at_its_start_deadline(
    disp: Dispatcher, gate: Gate
) -> None:
    for name in ("running", "first", "second"):
        disp.dispatch(gate.job(name))
    began = time.monotonic()
    late = disp.dispatch(gate.job("late", start_deadline=0.1))
    assert 0.1 <= time.monotonic() - began < 0.6
    _expired(late)
    gate.open()
    assert disp.barrier(check=False).failed_count == 1
    assert gate.begun == ["running", "first", "second"]


def test_a_delayed_job_may_miss_its_start_deadline_too(disp: Dispatcher) -> None:
    _expired(disp.dispatch(Job(instant).options(delay=60.0, start_deadline=0.05)))
    assert disp.stats()[0].delayed == 0
    disp.barrier(check=False)


def test_a_start_deadline_may_be_an_instant(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(gate.job())
    gate.wait_begun(1)
    at = datetime.now(UTC) + timedelta(seconds=0.1)
    late = disp.dispatch(Job(instant).options(start_deadline=at))
    _expired(late)
    finished = late.status().finished_at
    assert finished is not None
    assert at <= finished < at + timedelta(seconds=0.5)
    gate.open()
    disp.barrier(check=False)


def test_a_start_deadline_that_has_passed_fails_the_job_also_on_an_idle_pool(disp: Dispatcher) -> None:
    _expired(disp.dispatch(Job(instant).options(start_deadline=datetime.now(UTC) - timedelta(seconds=1))))
    disp.barrier(check=False)


def test_a_job_that_started_in_time_may_run_beyond_its_start_deadline(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job("in time", start_deadline=0.1))
    gate.wait_begun(1)
    end = time.monotonic() + 0.2
    wait_until(lambda: time.monotonic() > end)
    assert tracker.status().state == JobState.RUNNING
    gate.open()
    assert tracker.result() == "in time"


def test_other_jobs_are_not_touched_when_one_misses_its_start_deadline(disp: Dispatcher, gate: Gate) -> None:
    disp.dispatch(gate.job("held"))
    gate.wait_begun(1)
    late = disp.dispatch(gate.job("late", start_deadline=0.05))
    patient = disp.dispatch(gate.job("patient"))
    _expired(late)
    assert patient.status().state == JobState.QUEUED
    # Its place in the backlog is free again.
    another = disp.dispatch(gate.job("another"), timeout=0)
    gate.open()
    assert (patient.result(), another.result()) == ("patient", "another")
    disp.barrier(check=False)
