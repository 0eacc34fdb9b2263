"""The jobs of one queue in memory: which are ready, and when the others will be."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

from bulkhead.backends.base import Place, QueueCounts, Record

__all__ = ["Job", "Queue"]

_arrivals = itertools.count()

# Of (order or instant, arrival, stamp, job); arrival is unique, so that jobs are never compared.
_Entries = list[tuple[float, float, int, int, "Job"]]


@dataclass(slots=True, eq=False)
class Job:
    """A job that is not settled. Owner: the broker, under its lock.

    Attributes:
        token: Of the claim, or None while nobody has one.
        visible_at: When it becomes ready: when it is due, or its lease ends. Infinite for a dead letter.
        stamp: Grows with each change of these, so that entries in heaps can be told to be stale.
    """

    id: str
    queue: str
    body: bytes
    priority: int
    remember: float
    enqueued_at: float
    due_at: float
    visible_at: float
    arrival: int = field(default_factory=lambda: next(_arrivals))
    stamp: int = 0
    attempt: int = 0
    token: str | None = None
    error: bytes | None = None
    reason: str = ""
    is_dead: bool = False
    is_cancelled: bool = False

    def move(self, *, due_at: float, visible_at: float) -> None:
        """Let it be due and visible at other times; among those due together it is the last."""
        self.due_at, self.visible_at = due_at, visible_at
        self.arrival = next(_arrivals)
        self.token = None

    def place(self, now: float) -> Place:
        """Where it is."""
        if self.is_dead:
            return Place.DEAD
        if self.visible_at <= now:
            return Place.READY
        return Place.SCHEDULED if self.token is None else Place.RUNNING

    def record(self, now: float) -> Record:
        """What is told of it."""
        place = self.place(now)
        return Record(
            self.id,
            self.queue,
            place,
            self.body,
            self.priority,
            self.attempt,
            self.enqueued_at,
            self.visible_at if place is Place.SCHEDULED else self.due_at,
            self.visible_at if place is Place.RUNNING else None,
            self.reason,
            self.error,
            self.is_cancelled,
        )


class Queue:
    """The jobs of one queue.

    Invariant: each job of it that is no dead letter has one valid entry, with its stamp, in `_ready` or `_later`.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self._ready: _Entries = []
        self._later: _Entries = []

    def put(self, job: Job) -> None:
        """Add a job, or take note that one has changed."""
        self.jobs[job.id] = job
        job.stamp += 1
        if not job.is_dead:
            self._note(job)
        self._tidy()

    def remove(self, job: Job) -> None:
        """Forget a job."""
        del self.jobs[job.id]
        job.stamp += 1
        self._tidy()

    def next_change(self) -> float:
        """When the next job becomes ready, POSIX seconds or infinite."""
        while self._later and not self._is_valid(self._later[0]):
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else float("inf")

    def take(self, now: float) -> Job | None:
        """Return the job to be claimed next; the caller changes it and puts it again."""
        while self.next_change() <= now:
            job = heapq.heappop(self._later)[-1]
            heapq.heappush(self._ready, self._ready_entry(job))
        while self._ready:
            entry = heapq.heappop(self._ready)
            if self._is_valid(entry):
                return entry[-1]
        return None

    def in_place(self, place: Place, now: float) -> list[Job]:
        """Return its jobs in a place, in no order."""
        return [job for job in self.jobs.values() if job.place(now) is place]

    def counts(self, now: float) -> QueueCounts:
        """Count its jobs."""
        places = [job.place(now) for job in self.jobs.values()]
        dues = [job.due_at for job in self.jobs.values() if job.place(now) is Place.READY]
        return QueueCounts(
            ready=places.count(Place.READY),
            scheduled=places.count(Place.SCHEDULED),
            running=places.count(Place.RUNNING),
            dead=places.count(Place.DEAD),
            latency_seconds=max(0.0, now - min(dues, default=now)),
        )

    def _note(self, job: Job) -> None:
        heapq.heappush(self._later, (job.visible_at, 0.0, job.arrival, job.stamp, job))

    def _ready_entry(self, job: Job) -> tuple[float, float, int, int, Job]:
        return (-job.priority, job.due_at, job.arrival, job.stamp, job)

    def _is_valid(self, entry: tuple[float, float, int, int, Job]) -> bool:
        return entry[3] == entry[4].stamp

    def _tidy(self) -> None:
        # Why: a job that is renewed or removed leaves its old entry behind, which may be due in a year.
        if len(self._ready) + len(self._later) > 2 * len(self.jobs) + 64:
            self._ready = [entry for entry in self._ready if self._is_valid(entry)]
            self._later = [entry for entry in self._later if self._is_valid(entry)]
            heapq.heapify(self._ready)
            heapq.heapify(self._later)
