"""The frozen picture of a job, and its JSON, in each state."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from typing import Any

import pytest

from bulkhead import (
    JobCancelled,
    JobState,
    JobStatus,
    JobTimeout,
    NestedDispatch,
    PoolBroken,
    RemoteError,
    Tracker,
    WorkerCrashed,
)
from bulkhead.errors import RemoteTraceback

QUEUED_AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
STARTED_AT = QUEUED_AT + timedelta(seconds=1)
FINISHED_AT = QUEUED_AT + timedelta(milliseconds=1321, microseconds=99)

STARTED = {"started_at": "2026-01-02T03:04:06.678901Z", "pid": 4711}
FINISHED = {"finished_at": "2026-01-02T03:04:07Z"}
ERROR = {"error_type": "ValueError", "error_message": "no luck", "traceback": "Traceback: there\n"}

EXPECTED: dict[JobState, dict[str, Any]] = {
    JobState.SCHEDULED: {"attempt": 0},
    JobState.QUEUED: {"attempt": 0},
    JobState.RUNNING: {"attempt": 1, **STARTED},
    JobState.RETRYING: {"attempt": 1, **STARTED, **ERROR},
    JobState.SUCCEEDED: {"attempt": 1, **STARTED, **FINISHED},
    JobState.FAILED: {"attempt": 1, **STARTED, **FINISHED, **ERROR},
    JobState.CANCELLED: {
        "attempt": 0,
        **FINISHED,
        "error_type": "JobCancelled",
        "error_message": "job 'x' was cancelled",
    },
}


class Home:
    """As much of a pool as status() needs."""

    def __init__(self, *, has_begun: bool) -> None:
        self.lock = threading.Lock()
        self._has_begun = has_begun

    def has_begun(self, job: Tracker) -> bool:
        return self._has_begun


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Named(Exception):
    """Has attributes that bulkhead's own errors have too, with another meaning."""

    type_name = 42
    stack = ("plates",)


def remote(error: Exception, text: str = "Traceback: there\n") -> Exception:
    error.__cause__ = RemoteTraceback(text)
    return error


def a_tracker(state: JobState | None, job_id: Any = "x", *, has_begun: bool = True) -> Tracker:
    job = Tracker(Home(has_begun=has_begun), b"", 3)
    job.id, job.state = job_id, state
    job.queued_at = QUEUED_AT.timestamp()
    expected = EXPECTED[state or JobState.QUEUED]
    job.attempt = expected["attempt"]
    if "pid" in expected:
        job.started_at, job.pid = STARTED_AT.timestamp(), 4711
    if "finished_at" in expected:
        job.finished_at = FINISHED_AT.timestamp()
    if state in (JobState.RETRYING, JobState.FAILED):
        job.error = remote(ValueError("no luck"))
    elif state is JobState.CANCELLED:
        job.error = JobCancelled("job 'x' was cancelled")
    return job


def failed_with(error: BaseException) -> JobStatus:
    job = a_tracker(JobState.FAILED)
    job.error = error
    return job.status()


@pytest.mark.parametrize("state", JobState)
def test_the_json_of_each_state_holds_what_is_known_and_nothing_else(state: JobState) -> None:
    status = a_tracker(state).status()
    shown = json.loads(status.to_json())
    assert shown == {
        "id": "x",
        "state": state.value,
        "priority": 3,
        "queued_at": "2026-01-02T03:04:05.678901Z",
        **EXPECTED[state],
    }
    assert json.loads(json.dumps(status.to_dict())) == shown


@pytest.mark.parametrize("state", JobState)
def test_a_status_can_be_made_again_from_its_json(state: JobState) -> None:
    status = a_tracker(state).status()
    found = json.loads(status.to_json())
    found["state"] = JobState(found["state"])
    for name in ("queued_at", "started_at", "finished_at"):
        if name in found:
            found[name] = datetime.fromisoformat(found[name])
    assert JobStatus(**found) == status


@pytest.mark.parametrize("state", JobState)
def test_a_status_is_a_frozen_value(state: JobState) -> None:
    status = a_tracker(state).status()
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.state = JobState.FAILED
    assert pickle.loads(pickle.dumps(status)) == status


def test_a_status_does_not_change_with_its_job() -> None:
    job = a_tracker(JobState.QUEUED)
    before = job.status()
    job.state, job.attempt = JobState.RUNNING, 1
    assert before.state is JobState.QUEUED
    assert before.attempt == 0


def test_a_job_that_its_worker_has_not_begun_to_read_is_shown_as_queued() -> None:
    status = a_tracker(JobState.RUNNING, has_begun=False).status()
    assert status == a_tracker(JobState.QUEUED).status()


def test_times_are_aware_and_in_utc() -> None:
    status = a_tracker(JobState.SUCCEEDED).status()
    assert (status.queued_at, status.started_at, status.finished_at) == (QUEUED_AT, STARTED_AT, FINISHED_AT)
    assert all(time.utcoffset() == timedelta(0) for time in (status.queued_at, status.started_at))


def test_a_time_of_another_zone_keeps_its_offset_in_the_json() -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    status = JobStatus("x", JobState.QUEUED, 0, 0, queued_at=datetime(2026, 1, 1, tzinfo=zone))
    assert status.to_dict()["queued_at"] == "2026-01-01T00:00:00+05:30"


@pytest.mark.parametrize(
    ("job_id", "shown"),
    [
        (5, 5),
        (1.5, 1.5),
        ("text", "text"),
        ("naïve 🐟", "naïve 🐟"),
        (("a", 1), "('a', 1)"),
        (b"raw", "b'raw'"),
        (Enum("Color", ["RED"]).RED, "<Color.RED: 1>"),
        (JobState.FAILED, "failed"),
    ],
    ids=repr,
)
def test_an_id_is_shown_as_what_it_is_or_by_its_repr(job_id: Any, shown: Any) -> None:
    status = a_tracker(JobState.QUEUED, job_id).status()
    assert status.id == job_id
    assert json.loads(status.to_json())["id"] == shown


@pytest.mark.parametrize("job_id", [float("nan"), float("inf")])
def test_an_id_that_json_has_no_number_for_is_shown_by_its_repr(job_id: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = a_tracker(JobState.QUEUED, job_id).status().to_json()
    assert json.loads(text, parse_constant=refuse)["id"] == repr(job_id)


# Errors


def test_the_error_of_a_job_is_told_by_type_text_and_remote_traceback() -> None:
    status = failed_with(remote(ValueError("no luck")))
    assert (status.error_type, status.error_message) == ("ValueError", "no luck")
    assert status.traceback == "Traceback: there\n"


def test_an_error_that_could_not_be_rebuilt_is_told_by_its_original_type() -> None:
    status = failed_with(remote(RemoteError("Odd: words", type_name="Odd", traceback="Traceback: there\n")))
    assert (status.error_type, status.error_message) == ("Odd", "Odd: words")


@pytest.mark.parametrize("kind", [JobTimeout, WorkerCrashed])
def test_the_stack_of_a_worker_that_was_ended_or_died_is_the_traceback(kind: type[Exception]) -> None:
    assert failed_with(kind("gone", stack="File x, line 1")).traceback == "File x, line 1"
    assert failed_with(kind("gone")).traceback is None


def test_attributes_of_a_users_exception_are_not_taken_for_facts() -> None:
    status = failed_with(Named("words"))
    assert (status.error_type, status.error_message, status.traceback) == ("Named", "words", None)


def test_an_error_without_a_remote_traceback_has_none() -> None:
    assert failed_with(PoolBroken("given up")).traceback is None


def test_an_error_that_can_give_no_text_does_not_spoil_the_status() -> None:
    status = failed_with(remote(Mute()))
    assert status.error_type == "Mute"
    assert status.error_message == "<its text could not be made>"


def test_a_text_with_lone_surrogates_survives_json() -> None:
    status = failed_with(remote(ValueError("bad \udcff name")))
    assert json.loads(status.to_json())["error_message"] == "bad \udcff name"


# Trackers


@pytest.mark.parametrize(
    ("state", "is_done"),
    [(None, False), *((state, state.value in ("succeeded", "failed", "cancelled")) for state in JobState)],
)
def test_a_tracker_is_done_when_its_job_has_settled(state: JobState | None, is_done: bool) -> None:
    assert a_tracker(state).done() is is_done


def test_a_tracker_cannot_be_sent_to_another_process() -> None:
    with pytest.raises(NestedDispatch, match="send its id or its result instead"):
        pickle.dumps(a_tracker(JobState.QUEUED))


def test_a_tracker_shows_its_id_and_its_state() -> None:
    assert repr(a_tracker(JobState.RUNNING)) == "<Tracker 'x' running>"
    assert repr(a_tracker(None)) == "<Tracker 'x' not accepted>"
