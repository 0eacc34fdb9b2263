"""What a pool tells of itself: counters of one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bulkhead._kernel.records import SlotState
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.config import Pool
from bulkhead.engines.processes.memory import rss_of
from bulkhead.engines.processes.staff import Staff
from bulkhead.engines.processes.worker import Worker
from bulkhead.tally import Tally

if TYPE_CHECKING:
    from bulkhead.stats import PoolStats, WorkerStats

__all__ = ["Counts", "counts", "snapshot"]


def snapshot(config: Pool, scheduler: Scheduler, staff: Staff, now: float) -> PoolStats:
    """Return the counters of a pool as of `now`. Under the lock."""
    from bulkhead.stats import PoolStats

    states = [slot.state for slot in scheduler.slots]
    workers = tuple(_worker_stats(worker, now) for worker in staff.workers.values())
    return PoolStats(
        priority=config.priority,
        name=config.label,
        workers=len(states),
        idle=states.count(SlotState.IDLE),
        starting=states.count(SlotState.STARTING),
        waiting=scheduler.waiting,
        running=scheduler.running,
        delayed=scheduler.delayed,
        succeeded=scheduler.succeeded,
        failed=scheduler.failed,
        cancelled=scheduler.cancelled,
        retried=scheduler.retried,
        restarts=scheduler.restarts,
        recycled=scheduler.recycled,
        busy_seconds=staff.busy_seconds + sum(worker.busy_seconds for worker in workers),
        processes=workers,
    )


class Counts(NamedTuple):
    """How far a pool is: what has ended, items of maps one by one, and what has not."""

    succeeded: int
    failed: int
    cancelled: int
    running: int
    waiting: int


def counts(scheduler: Scheduler, tally: Tally) -> Counts:
    """Return how far the pool is. Under the lock."""
    return Counts(
        scheduler.succeeded - tally.chunks_succeeded + tally.succeeded,
        scheduler.failed - tally.chunks_failed + tally.failed,
        scheduler.cancelled - tally.chunks_cancelled,
        scheduler.running,
        scheduler.waiting + scheduler.delayed,
    )


def _worker_stats(worker: Worker, now: float) -> WorkerStats:
    from bulkhead.stats import WorkerStats

    state = worker.slot.state
    busy = worker.busy_seconds
    if worker.slot.job is not None:
        busy += now - worker.began
    rss = None if worker.pid is None else rss_of(worker.pid)
    return WorkerStats(worker.pid, state.value, worker.jobs, busy, rss)
