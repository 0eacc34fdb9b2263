"""The states of a job (B3), and the frozen picture of one with its JSON (B4)."""

import dataclasses
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from gates import Gate
from jobs import echo, fail, fail_at_first, note_and_fail
from staffing import staffed
from watching import wait_until

from bulkhead import Dispatcher, Job, JobState, JobStatus, Pool, RetryPolicy, Tracker

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(scope="module")
def disp() -> Iterator[Dispatcher]:
    with Dispatcher([Pool(0, 1, backlog=None)]) as disp:
        yield staffed(disp)


@pytest.fixture
def since() -> datetime:
    return datetime.now(UTC)


def as_json(status: JobStatus) -> dict[str, object]:
    """Return what the status is in JSON, of which every part has been checked."""
    read = json.loads(status.to_json())
    assert read == status.to_dict() == json.loads(json.dumps(status.to_dict()))
    assert None not in read.values()
    for name, value in read.items():
        if name.endswith("_at"):
            assert RFC_3339.fullmatch(value)
            assert datetime.fromisoformat(value) == getattr(status, name)
        else:
            assert value == getattr(status, name)
    absent = {field.name for field in dataclasses.fields(status)} - set(read)
    assert {getattr(status, name) for name in absent} <= {None}
    return read


def assert_in_order(*instants: datetime | None) -> None:
    assert None not in instants
    assert list(instants) == sorted(instants)  # type: ignore[type-var]
    assert all(one is not None and one.utcoffset() == timedelta(0) for one in instants)


def until(tracker: Tracker, state: JobState) -> JobStatus:
    wait_until(lambda: tracker.status().state == state, f"{state} of {tracker}")
    return tracker.status()


def test_a_scheduled_job(disp: Dispatcher, since: datetime) -> None:
    tracker = disp.dispatch(Job(echo, 1).options(delay=60.0, id="mine"))
    status = tracker.status()
    assert (status.id, status.state, status.priority, status.attempt) == ("mine", "scheduled", 0, 0)
    assert_in_order(since, status.queued_at, datetime.now(UTC))
    assert set(as_json(status)) == {"id", "state", "priority", "attempt", "queued_at"}
    tracker.cancel()


def test_queued_and_running_jobs_are_told_apart(disp: Dispatcher, gate: Gate, since: datetime) -> None:
    first, second = disp.dispatch(gate.job()), disp.dispatch(gate.job())
    gate.wait_begun(1)
    running, queued = first.status(), second.status()
    assert (running.state, running.attempt) == ("running", 1)
    assert (queued.state, queued.attempt) == ("queued", 0)
    assert running.pid == disp.stats()[0].processes[0].pid
    assert_in_order(since, running.queued_at, running.started_at, datetime.now(UTC))
    assert set(as_json(queued)) == {"id", "state", "priority", "attempt", "queued_at"}
    assert set(as_json(running)) == {
        "id",
        "state",
        "priority",
        "attempt",
        "queued_at",
        "started_at",
        "pid",
    }
    gate.open()
    assert second.result() == "job-2"
    assert_in_order(queued.queued_at, second.status().started_at, second.status().finished_at)


def test_a_retrying_job_shows_the_failure_that_it_is_retried_for(disp: Dispatcher, tmp_path: Path) -> None:
    job = Job(note_and_fail, tmp_path / "attempts").options(retry=RetryPolicy(2, initial=60.0))
    tracker = disp.dispatch(job)
    status = until(tracker, JobState.RETRYING)
    assert (status.attempt, status.error_type, status.error_message) == (1, "ValueError", "no luck")
    assert status.finished_at is None
    assert set(as_json(status)) == {
        "id",
        "state",
        "priority",
        "attempt",
        "queued_at",
        "started_at",
        "pid",
        "error_type",
        "error_message",
        "traceback",
    }
    assert not tracker.done()
    tracker.cancel()


def test_a_succeeded_job(disp: Dispatcher, since: datetime) -> None:
    tracker = disp.dispatch(Job(echo, 1))
    tracker.wait()
    status = tracker.status()
    assert (status.state, status.attempt) == ("succeeded", 1)
    assert (status.error_type, status.error_message, status.traceback) == (None, None, None)
    assert_in_order(since, status.queued_at, status.started_at, status.finished_at, datetime.now(UTC))
    assert {"started_at", "finished_at", "pid"} < set(as_json(status))


def test_a_job_that_succeeds_after_retries_has_no_error(disp: Dispatcher, tmp_path: Path) -> None:
    policy = RetryPolicy(3, initial=0.01)
    tracker = disp.dispatch(Job(fail_at_first, tmp_path / "attempts", 2).options(retry=policy))
    tracker.wait()
    status = tracker.status()
    assert (status.state, status.attempt, status.error_type) == ("succeeded", 3, None)
    assert "error_message" not in as_json(status)


def test_a_failed_job_shows_type_message_and_remote_traceback(disp: Dispatcher) -> None:
    tracker = disp.dispatch(Job(fail, "möglich: “ \n\x00"))
    tracker.wait()
    status = tracker.status()
    assert (status.state, status.error_type, status.error_message) == (
        "failed",
        "ValueError",
        "möglich: “ \n\x00",
    )
    assert status.traceback is not None
    assert 'jobs.py", line ' in status.traceback
    assert "raise ValueError(text)" in status.traceback
    assert status.finished_at is not None
    as_json(status)


def test_cancelled_jobs(disp: Dispatcher, gate: Gate) -> None:
    running, queued = disp.dispatch(gate.job()), disp.dispatch(gate.job())
    gate.wait_begun(1)
    for tracker in (queued, running):
        tracker.cancel()
        tracker.wait()
    assert [one.status().state for one in (running, queued)] == ["cancelled", "cancelled"]
    assert {running.status().error_type, queued.status().error_type} == {"JobCancelled"}
    assert "started_at" in as_json(running.status())
    assert "started_at" not in as_json(queued.status())
    assert "finished_at" in as_json(queued.status())
    wait_until(lambda: disp.stats()[0].idle == 1)


def test_every_state_can_be_seen_in_one_dispatcher(disp: Dispatcher, gate: Gate) -> None:
    policy = RetryPolicy(2, initial=60.0)
    done, failed = disp.dispatch(Job(echo, 1)), disp.dispatch(Job(fail))
    retrying = disp.dispatch(Job(fail).options(retry=policy))
    until(retrying, JobState.RETRYING)
    running, queued, cancelled = (disp.dispatch(gate.job()) for _ in range(3))
    scheduled = disp.dispatch(gate.job(delay=60.0))
    cancelled.cancel()
    gate.wait_begun(1)

    by_state = dict(
        zip(JobState, (scheduled, queued, running, retrying, done, failed, cancelled), strict=True)
    )
    assert {state: tracker.status().state for state, tracker in by_state.items()} == {s: s for s in JobState}
    for state, tracker in by_state.items():
        assert tracker in disp.jobs(state)
        assert tracker.done() == (state in ("succeeded", "failed", "cancelled"))
        assert as_json(tracker.status())["state"] == str(state)
    retrying.cancel()
    scheduled.cancel()
    gate.open()
    disp.barrier(check=False)


def test_a_status_is_frozen_and_of_its_moment(disp: Dispatcher, gate: Gate) -> None:
    tracker = disp.dispatch(gate.job())
    gate.wait_begun(1)
    before = tracker.status()
    gate.open()
    tracker.wait()
    assert (before.state, before.finished_at) == ("running", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.state = JobState.FAILED  # type: ignore[misc]
    assert hash(before) != hash(tracker.status())


@pytest.mark.parametrize(
    ("own", "shown"), [("text", "text"), (7, 7), (("a", 1), "('a', 1)"), (b"x", "b'x'"), (2.5, 2.5)]
)
def test_any_id_has_its_place_in_json(disp: Dispatcher, own: object, shown: object) -> None:
    tracker = disp.dispatch(Job(echo, 1).options(id=own))  # type: ignore[arg-type]
    tracker.wait()
    assert json.loads(tracker.status().to_json())["id"] == shown
