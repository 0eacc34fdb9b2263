"""What the kernel knows of one job and of one slot: plain mutable records without behaviour."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from bulkhead._kernel.lifecycle import JobState

if TYPE_CHECKING:
    from bulkhead._kernel.phases import Phase
    from bulkhead.retry import RetryPolicy

__all__ = ["JobRecord", "Loss", "Slot", "SlotState", "Usage", "Verdict", "Wear"]


class Verdict(Enum):
    """Why a slot's worker is being ended; a cancellation overrides the others."""

    TIMEOUT = "timeout"
    CANCEL = "cancel"
    MEMORY = "memory"


class Loss(Enum):
    """What the death of its worker means for a job."""

    ATTEMPT = "attempt"  # the attempt has failed
    UNREAD = "unread"  # the worker had not begun to read it
    REST = "rest"  # a part of it is done, the rest is still to do (for jobs without a start deadline)
    NOTHING = "nothing"  # all of it is done


class Usage(NamedTuple):
    """What a worker has done and takes when it answers."""

    jobs: int
    rss_bytes: int


class Wear(NamedTuple):
    """How far a worker may be used before another takes its place; None is without limit."""

    max_jobs: int | None
    max_rss_bytes: int | None

    def is_reached(self, usage: Usage) -> bool:
        """Tell whether a worker of this usage is to be recycled."""
        return (self.max_jobs is not None and usage.jobs >= self.max_jobs) or (
            self.max_rss_bytes is not None and usage.rss_bytes > self.max_rss_bytes
        )


class JobRecord:
    """One job.

    Owner: the kernel of its pool, under the pool's lock, for every field that is not marked otherwise.
    """

    is_kept = True  # Whether it can be found by its id after it has settled.
    journal: Any = None  # Where its success is recorded. Owner: the dispatcher.
    plan: Any = None  # Of what follows it, for the first job of a composition. Owner: the dispatcher.
    goes_ahead = False  # Whether it may be sent to a worker that is still busy with another such job.

    __slots__ = (
        "attempt",
        "due",
        "error",
        "finished_at",
        "function",
        "handle",
        "id",
        "payload",
        "phase",
        "pid",
        "priority",
        "queued_at",
        "retry",
        "returns",
        "size",
        "slot",
        "stamp",
        "start_by",
        "started_at",
        "state",
        "timeout",
        "turn",
        "value",
        "waiters",
    )

    def __init__(
        self,
        payload: Any,
        priority: int,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.id: Any = None  # Owner: the dispatcher, set before the job is accepted.
        self.payload = payload  # Opaque here.
        self.priority = priority
        self.function = ""  # Name of what is called. Owner: the dispatcher.
        self.timeout = timeout
        self.retry = retry
        self.state: JobState | None = None
        self.attempt = 0
        self.due: float | None = None  # Earliest start, monotonic seconds.
        self.start_by: float | None = None  # Latest start, monotonic seconds.
        self.stamp = 0  # Number of its last start in the pool; tells stale alarms from live ones.
        self.turn = 0  # Its place in the order in which jobs became ready.
        self.handle: list[JobRecord] | None = None  # What alarms refer to; emptied when the job settles.
        self.phase: Phase | None = None
        self.slot: Slot | None = None
        self.returns = 0  # How often in a row a worker died before it had read the job.
        self.size = 0  # Bytes of the packed value. Owner: the engine.
        self.value: Any = None  # Owner: the engine, which sets it before it reports a success.
        self.error: BaseException | None = None
        self.waiters: list[Any] | None = None  # Owner: the engine.
        # Owner of the rest: the engine, POSIX seconds, for status() alone.
        self.queued_at: float | None = None
        self.started_at: float | None = None
        self.finished_at: float | None = None
        self.pid: int | None = None


class SlotState(Enum):
    """What a slot's worker is doing."""

    VACANT = "vacant"  # no process, one may be due to be started
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ENDING = "ending"  # told to end, not yet gone


class Slot:
    """The right to one worker of the pool. Workers come and go, slots stay."""

    __slots__ = (
        "ahead",
        "index",
        "is_ahead_cancelled",
        "is_ahead_sent",
        "job",
        "ready_at",
        "state",
        "verdict",
        "worker",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = SlotState.VACANT
        self.job: JobRecord | None = None
        self.ahead: JobRecord | None = None  # What its worker goes on with by itself, when it has answered.
        self.is_ahead_sent = False  # Owner: the engine, which sets it; the kernel takes it back.
        self.is_ahead_cancelled = False  # It was too late for that: to be ended when it is known to run.
        self.verdict: Verdict | None = None
        self.ready_at = 0.0  # When its worker came up, monotonic seconds.
        self.worker: Any = None  # Owner: the engine.
