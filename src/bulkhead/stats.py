"""Frozen snapshots: what a dispatcher and a barrier can tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bulkhead.tracker import Tracker

__all__ = [
    "BarrierReport",
    "DispatcherStats",
    "MapProgress",
    "PhaseCounts",
    "PoolProgress",
    "PoolStats",
    "Progress",
    "WorkerStats",
]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker process.

    Attributes:
        pid: None until it is started.
        state: "starting", "idle", "busy" or "ending".
        jobs: Attempts it has answered.
        busy_seconds: Time it had a job.
        rss_bytes: Resident memory of its own at this moment, without mapped files and shared memory; what the limits of
            its pool count. None until it is started.
    """

    pid: int | None
    state: str
    jobs: int
    busy_seconds: float
    rss_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool at one moment; counts of jobs since the dispatcher was made.

    Attributes:
        workers: Slots, staffed or not.
        idle: Workers that wait for a job.
        starting: Workers that are coming up.
        waiting: Accepted jobs that wait for a worker.
        running: Jobs that a worker has.
        delayed: Accepted jobs that wait for an instant (a delayed start, the next attempt) or for the job before them.
        retried: Attempts that were followed by another.
        restarts: Workers that were started to replace another.
        recycled: Workers that were sent home after so many jobs or for the memory they took.
        busy_seconds: Time workers had jobs, those that are gone included.
        processes: The workers of the moment.
    """

    priority: int
    name: str
    workers: int
    idle: int
    starting: int
    waiting: int
    running: int
    delayed: int
    succeeded: int
    failed: int
    cancelled: int
    retried: int
    restarts: int
    recycled: int
    busy_seconds: float
    processes: tuple[WorkerStats, ...]


@dataclass(frozen=True, slots=True)
class DispatcherStats:
    """All pools of a dispatcher, by priority, the most urgent first. `stats[priority]` is one of them."""

    pools: Mapping[int, PoolStats]

    def __getitem__(self, priority: int) -> PoolStats:
        return self.pools[priority]

    def __iter__(self) -> Iterator[int]:
        return iter(self.pools)

    def __len__(self) -> int:
        return len(self.pools)


@dataclass(frozen=True, slots=True)
class PhaseCounts:
    """How many jobs of a phase ended in which way."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class BarrierReport:
    """What became of the jobs of a phase.

    Attributes:
        pools: Counts for each pool that was waited for, by priority.
        failed: Trackers of the failed jobs in the order of their dispatch, at most as many as the history keeps.
        elapsed: Seconds that the barrier waited.
    """

    pools: Mapping[int, PhaseCounts]
    failed: tuple[Tracker, ...] = field(repr=False)
    elapsed: float

    @property
    def succeeded(self) -> int:
        """Succeeded jobs of all pools."""
        return sum(counts.succeeded for counts in self.pools.values())

    @property
    def failed_count(self) -> int:
        """Failed jobs of all pools; may exceed `len(failed)`."""
        return sum(counts.failed for counts in self.pools.values())

    @property
    def cancelled(self) -> int:
        """Cancelled jobs of all pools."""
        return sum(counts.cancelled for counts in self.pools.values())


@dataclass(frozen=True, slots=True)
class PoolProgress:
    """How far a pool is. Items of maps are counted one by one, once they have ended.

    Attributes:
        priority, name, workers: As of the `Pool`.
        succeeded, failed, cancelled: Jobs and items so far.
        running: Jobs that a worker has; a chunk of a map is one.
        waiting: Accepted jobs that wait for a worker or for an instant; a chunk of a map is one.
        rate: Ends per second over the last ten seconds.
        eta: Seconds until what is accepted so far will have ended at that rate; None where that cannot be told.
    """

    priority: int
    name: str
    workers: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    waiting: int
    rate: float
    eta: float | None

    @property
    def done(self) -> int:
        """What has ended, in whatever way."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def total(self) -> int:
        """What is accepted so far."""
        return self.done + self.running + self.waiting


@dataclass(frozen=True, slots=True)
class MapProgress:
    """How far a map is.

    Attributes:
        name: Of its function.
        priority: Of its pool.
        succeeded, failed: Items that have ended.
        under_way: Items that are read and have not ended.
        total: How many there are; None when an iterable has no length.
        rate: Ends per second over the last ten seconds.
        eta: Seconds until all items will have ended at that rate; None where that cannot be told.
    """

    name: str
    priority: int
    succeeded: int
    failed: int
    under_way: int
    total: int | None
    rate: float
    eta: float | None

    @property
    def done(self) -> int:
        """Items that have ended."""
        return self.succeeded + self.failed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a dispatcher is.

    Attributes:
        elapsed: Seconds since it was made.
        pools: The most urgent first.
        maps: Maps that are under way.
        is_final: There will be no other.
    """

    elapsed: float
    pools: tuple[PoolProgress, ...]
    maps: tuple[MapProgress, ...]
    is_final: bool
