"""Isolated pools of processes for jobs of different urgency: dispatch, barrier, finalize.

with Dispatcher([Pool(priority=0, n_workers=6), Pool(priority=1, n_workers=2)]) as disp:
disp.dispatch(job)     # job.priority picks the pool; blocks until a worker there is free
disp.barrier()         # phase over
"""

import importlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from bulkhead import _platform as _platform
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
from bulkhead.prepared import worker_state

if TYPE_CHECKING:
    from bulkhead._kernel.lifecycle import JobState
    from bulkhead.composition import ChainTracker, CompositeStatus, GroupTracker, chain, group
    from bulkhead.config import Pool
    from bulkhead.dispatcher import Dispatcher
    from bulkhead.engines.processes.sharing import Shared
    from bulkhead.job import Job
    from bulkhead.process_pool_executor import ProcessPoolExecutor
    from bulkhead.retry import Backoff, RetryPolicy
    from bulkhead.service.app import App
    from bulkhead.service.context import current_job
    from bulkhead.service.middleware.base import Middleware
    from bulkhead.stats import (
        BarrierReport,
        DispatcherStats,
        MapProgress,
        PoolProgress,
        PoolStats,
        Progress,
    )
    from bulkhead.tracker import JobStatus, Tracker

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


# Where the other public names are. Why not imported: launchers and workers import this package, and need none of them.
_HOMES = {
    "_kernel.lifecycle": "JobState",
    "composition": "ChainTracker CompositeStatus GroupTracker chain group",
    "config": "Pool",
    "dispatcher": "Dispatcher",
    "engines.processes.sharing": "Shared",
    "job": "Job",
    "process_pool_executor": "ProcessPoolExecutor",
    "retry": "Backoff RetryPolicy",
    "service.app": "App",
    "service.context": "current_job",
    "service.middleware.base": "Middleware",
    "stats": "BarrierReport DispatcherStats MapProgress PoolProgress PoolStats Progress",
    "tracker": "JobStatus Tracker",
}
_HOME_OF = {name: f"bulkhead.{module}" for module, names in _HOMES.items() for name in names.split()}

# Held while a module is imported for a name of it, and around each fork: the copy would wait for ever for an import
# that a thread of the parent goes on with. Nothing but locks of imports is acquired under it. Why reentrant: see
# `_found_at`.
_finding = threading.RLock()
_is_finding = False  # guarded by `_finding`
os.register_at_fork(
    before=_finding.acquire, after_in_parent=_finding.release, after_in_child=_finding.release
)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with _finding:
            found = globals()[name] = _found_at(_HOME_OF[name], name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bulkhead"):
            raise
        raise MissingExtra(
            f"bulkhead.{name} needs the package {error.name}, which is missing: pip install 'bulkhead-pool[queue]'",
            name=error.name,
        ) from error
    return found


def _found_at(home: str, name: str) -> Any:
    global _is_finding
    if (found := getattr(sys.modules.get(home), name, None)) is not None:
        return found
    # Race: a signal handler, or the garbage collector, may ask while this very thread imports. What it asks for is
    # not there before it returns, and Python 3.11 could wait for it for ever.
    if _is_finding:
        raise AttributeError(
            f"bulkhead.{name} is just being imported by what this code has interrupted: import it before"
        )
    try:
        _is_finding = True
        return getattr(importlib.import_module(home), name)
    finally:
        _is_finding = False


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
