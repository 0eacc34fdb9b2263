"""Isolated pools of processes for jobs of different urgency: dispatch, barrier, finalize.

with Dispatcher([Pool(priority=0, n_workers=6), Pool(priority=1, n_workers=2)]) as disp:
disp.dispatch(job)     # job.priority picks the pool; blocks until a worker there is free
disp.barrier()         # phase over
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from bulkhead import _platform as _platform
from bulkhead._kernel.lifecycle import JobState
from bulkhead.composition import ChainTracker, CompositeStatus, GroupTracker, chain, group
from bulkhead.config import Pool
from bulkhead.dispatcher import Dispatcher
from bulkhead.engines.processes.sharing import Shared
from bulkhead.errors import (
    BadMessage,
    BarrierTimeout,
    BrokerUnavailable,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    DispatcherFinalized,
    DuplicateJobId,
    JobCancelled,
    JobDiscarded,
    JobNotFound,
    JobNotPicklable,
    JobsFailed,
    JobTimeout,
    MemoryLimitExceeded,
    MessageTooLarge,
    MissingExtra,
    MissingMainGuard,
    NestedDispatch,
    NoSharedMemory,
    NoWorkerState,
    PoolBroken,
    PoolFull,
    RemoteError,
    ResultNotFound,
    ScheduleNotFound,
    Snooze,
    StartDeadlineExceeded,
    UnknownPriority,
    UnknownQueue,
    UnknownTask,
    Unrecoverable,
    WaitTimeout,
    WorkerCrashed,
)
from bulkhead.job import Job
from bulkhead.prepared import worker_state
from bulkhead.retry import Backoff, RetryPolicy
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
    from bulkhead.service.app import App as App
    from bulkhead.service.context import current_job as current_job
    from bulkhead.service.middleware.base import Middleware as Middleware

__all__ = [
    "App",
    "Backoff",
    "BadMessage",
    "BarrierReport",
    "BarrierTimeout",
    "BrokerUnavailable",
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
    "JobDiscarded",
    "JobNotFound",
    "JobNotPicklable",
    "JobState",
    "JobStatus",
    "JobTimeout",
    "JobsFailed",
    "MapProgress",
    "MemoryLimitExceeded",
    "MessageTooLarge",
    "Middleware",
    "MissingExtra",
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
    "ResultNotFound",
    "RetryPolicy",
    "ScheduleNotFound",
    "Shared",
    "Snooze",
    "StartDeadlineExceeded",
    "Tracker",
    "UnknownPriority",
    "UnknownQueue",
    "UnknownTask",
    "Unrecoverable",
    "WaitTimeout",
    "WorkerCrashed",
    "chain",
    "current_job",
    "group",
    "worker_state",
]

__version__ = "0.1.0"

# Why: a library is quiet unless the user's own logging asks for its records.
logging.getLogger("bulkhead").addHandler(logging.NullHandler())


# Why not above: they import concurrent.futures.process, or what the extra queue brings, and every worker imports this.
_LATER = {
    "App": "bulkhead.service.app",
    "Middleware": "bulkhead.service.middleware.base",
    "ProcessPoolExecutor": "bulkhead.process_pool_executor",
    "current_job": "bulkhead.service.context",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bulkhead"):
            raise
        raise MissingExtra(
            f"bulkhead.{name} needs the package {error.name}, which is missing: pip install 'bulkhead-pool[queue]'",
            name=error.name,
        ) from error
    globals()[name] = found
    return found
