"""Isolated pools of processes for jobs of different urgency: dispatch, barrier, finalize.

with Dispatcher([Pool(priority=0, n_workers=6), Pool(priority=1, n_workers=2)]) as disp:
disp.dispatch(job)     # job.priority picks the pool; blocks until a worker there is free
disp.barrier()         # phase over
"""

import logging
from typing import TYPE_CHECKING, Any

from bulkhead import _platform as _platform
from bulkhead._kernel.lifecycle import JobState
from bulkhead.composition import ChainTracker, CompositeStatus, GroupTracker, chain, group
from bulkhead.config import Pool
from bulkhead.dispatcher import Dispatcher
from bulkhead.engines.processes.sharing import Shared
from bulkhead.errors import (
    BarrierTimeout,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    DispatcherFinalized,
    DuplicateJobId,
    JobCancelled,
    JobNotFound,
    JobNotPicklable,
    JobsFailed,
    JobTimeout,
    MemoryLimitExceeded,
    MissingMainGuard,
    NestedDispatch,
    NoSharedMemory,
    NoWorkerState,
    PoolBroken,
    PoolFull,
    RemoteError,
    StartDeadlineExceeded,
    UnknownPriority,
    Unrecoverable,
    WaitTimeout,
    WorkerCrashed,
)
from bulkhead.job import Job
from bulkhead.prepared import worker_state
from bulkhead.retry import RetryPolicy
from bulkhead.stats import (
    BarrierReport,
    DispatcherStats,
    MapProgress,
    PoolProgress,
    PoolStats,
    Progress,
)
from bulkhead.tracker import JobStatus, Tracker

if TYPE_CHECKING:
    from bulkhead.process_pool_executor import ProcessPoolExecutor as ProcessPoolExecutor

__all__ = [
    "BarrierReport",
    "BarrierTimeout",
    "BulkheadError",
    "ChainTracker",
    "CompositeStatus",
    "ConfigError",
    "ConfigTypeError",
    "Dispatcher",
    "DispatcherFinalized",
    "DispatcherStats",
    "DuplicateJobId",
    "GroupTracker",
    "Job",
    "JobCancelled",
    "JobNotFound",
    "JobNotPicklable",
    "JobState",
    "JobStatus",
    "JobTimeout",
    "JobsFailed",
    "MapProgress",
    "MemoryLimitExceeded",
    "MissingMainGuard",
    "NestedDispatch",
    "NoSharedMemory",
    "NoWorkerState",
    "Pool",
    "PoolBroken",
    "PoolFull",
    "PoolProgress",
    "PoolStats",
    "ProcessPoolExecutor",
    "Progress",
    "RemoteError",
    "RetryPolicy",
    "Shared",
    "StartDeadlineExceeded",
    "Tracker",
    "UnknownPriority",
    "Unrecoverable",
    "WaitTimeout",
    "WorkerCrashed",
    "chain",
    "group",
    "worker_state",
]

__version__ = "0.1.0"

# Why: a library is quiet unless the user's own logging asks for its records.
logging.getLogger("bulkhead").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    # Why not above: it imports concurrent.futures.process, and every worker imports this.
    if name == "ProcessPoolExecutor":
        from bulkhead.process_pool_executor import ProcessPoolExecutor

        globals()[name] = ProcessPoolExecutor
        return ProcessPoolExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
