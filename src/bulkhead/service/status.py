"""What is known of a durable job, from whichever place knows it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from bulkhead._kernel.lifecycle import SETTLED, JobState
from bulkhead.backends.base import Entry, Outcome, OutcomeState, Place, Record, Registry
from bulkhead.errors import BadMessage
from bulkhead.service.envelope import Failure, Sealer, failure

__all__ = ["JobProgress", "QueuedJob", "from_outcome", "from_record", "group_key", "progress_key"]


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job has said that it is, in units of its own."""

    done: float
    total: float | None
    message: str


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A durable job at one moment. Times are aware datetimes in UTC; what does not apply (yet) is None.

    Attributes:
        task: Its name; "" of a group, and of a message that cannot be read.
        state: Of a dead letter FAILED. RETRYING is a scheduled one that has failed before.
        attempt: Runs begun so far.
        due_at: Before which it does not start.
        reason: Of a dead letter: why it is one.
        error_type, error_message, traceback: Of the last failed attempt.
        progress: What a running job has told last.
    """

    id: str
    queue: str
    task: str
    state: JobState
    attempt: int
    priority: int = 0
    enqueued_at: datetime | None = None
    due_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    reason: str = ""
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    progress: JobProgress | None = None
    keep_result: float = 86400.0

    @property
    def is_settled(self) -> bool:
        """Tell whether it has succeeded, failed for good or was cancelled."""
        return self.state in SETTLED

    def cancelled(self) -> Outcome:
        """Return the outcome of a job that is cancelled before it runs."""
        now = time.time()
        enqueued_at = now if self.enqueued_at is None else self.enqueued_at.timestamp()
        return Outcome(
            self.id,
            self.queue,
            self.task,
            OutcomeState.CANCELLED,
            attempt=self.attempt,
            enqueued_at=enqueued_at,
            finished_at=now,
            keep=self.keep_result,
        )


# POSIX seconds of the last day that a datetime takes, in any time zone.
_LAST_INSTANT = datetime(9999, 12, 30, tzinfo=UTC).timestamp()


def progress_key(job_id: str) -> str:
    """Return the registry's key of a job's progress."""
    return f"progress/{job_id}"


def group_key(group: str) -> str:
    """Return the registry's key of a group or chain that was opened, or is to be cancelled."""
    return f"groups/{group}"


def from_record(record: Record, sealer: Sealer, registry: Registry) -> QueuedJob:
    """Return a job that its broker knows."""
    task, keep = "", 86400.0
    try:
        envelope = sealer.open(record.id, record.queue, record.body)
        task, keep = envelope.task, envelope.keep
    except BadMessage:
        pass  # the reason of the dead letter says so
    state = _PLACES[record.place]
    if state is JobState.SCHEDULED and record.attempt > 0:
        state = JobState.RETRYING
    told = failure(record.error)
    is_dead = record.place is Place.DEAD
    progress = None
    if record.place is Place.RUNNING:
        progress = _progress(registry.get(progress_key(record.id)))
    return QueuedJob(
        record.id,
        record.queue,
        task,
        state,
        record.attempt,
        record.priority,
        _utc(record.enqueued_at),
        None if is_dead else _utc(record.due_at),
        None,
        _utc(record.due_at) if is_dead else None,
        record.reason,
        *_described(told),
        progress=progress,
        keep_result=keep,
    )


def from_outcome(outcome: Outcome) -> QueuedJob:
    """Return a job that is settled."""
    told = failure(outcome.error)
    return QueuedJob(
        outcome.id,
        outcome.queue,
        outcome.task,
        JobState(outcome.state.value),
        outcome.attempt,
        0,
        _utc(outcome.enqueued_at),
        None,
        _utc(outcome.started_at) if outcome.started_at else None,
        _utc(outcome.finished_at),
        "",
        *_described(told),
        keep_result=outcome.keep,
    )


_read_progress = msgspec.msgpack.Decoder(tuple[int | float, int | float | None, str]).decode

_PLACES = {
    Place.READY: JobState.QUEUED,
    Place.SCHEDULED: JobState.SCHEDULED,
    Place.RUNNING: JobState.RUNNING,
    Place.DEAD: JobState.FAILED,
}


def _progress(entry: Entry | None) -> JobProgress | None:
    try:
        return None if entry is None else JobProgress(*_read_progress(entry.value))
    except msgspec.MsgspecError:  # not ours
        return None


def _described(told: Failure | None) -> tuple[str | None, str | None, str | None]:
    return (None, None, None) if told is None else (told.type, told.message, told.traceback)


def _utc(posix: float) -> datetime:
    # Why a bound: a delay may be longer than a datetime goes, and one such job must not spoil a whole list.
    return datetime.fromtimestamp(min(max(posix, 0.0), _LAST_INSTANT), UTC)
