"""What a pool tells of itself: counters of one moment."""

from __future__ import annotations

from bulkhead._kernel.records import SlotState
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.config import Pool
from bulkhead.engines.processes.memory import rss_of
from bulkhead.engines.processes.staff import Staff
from bulkhead.engines.processes.worker import Worker
from bulkhead.stats import PoolStats, WorkerStats

__all__ = ["snapshot"]


def snapshot(config: Pool, scheduler: Scheduler, staff: Staff, now: float) -> PoolStats:
    """Return the counters of a pool as of `now`. Under the lock."""
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


def _worker_stats(worker: Worker, now: float) -> WorkerStats:
    state = worker.slot.state
    busy = worker.busy_seconds
    if worker.slot.job is not None:
        busy += now - worker.began
    rss = None if worker.pid is None else rss_of(worker.pid)
    return WorkerStats(worker.pid, state.value, worker.jobs, busy, rss)
