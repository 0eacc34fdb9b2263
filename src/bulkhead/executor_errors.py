"""What a job fails with, as code expects it that is written against `concurrent.futures.ProcessPoolExecutor`.

There a lost worker breaks the pool, and such code catches BrokenProcessPool; here it fails one job, and the pool goes
on. So the errors that stand for a lost worker, a pool that has given up, or something that could not be unpickled are
both what they are and a BrokenProcessPool. What a job has raised is given as it is, be it a SystemExit.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

from bulkhead.errors import BulkheadError, PoolBroken, RemoteError, WorkerCrashed, is_of

__all__ = ["BrokenPool", "CrashedWorker", "Unreadable", "as_executors_raise"]


class CrashedWorker(WorkerCrashed, BrokenProcessPool):
    """The worker process ended without an answer. The executor stays usable."""


class BrokenPool(PoolBroken, BrokenProcessPool):
    """The pool has given up."""


class Unreadable(RemoteError, BrokenProcessPool):
    """The call could not be unpickled in the worker, or its result in the caller. The executor stays usable."""


def as_executors_raise(error: BaseException) -> BaseException:
    """Return what a future is given for the error of its job."""
    kind = type(error)
    if kind is WorkerCrashed:
        return _as(CrashedWorker, error)
    if kind is PoolBroken:
        return _as(BrokenPool, error)
    if is_of(error, RemoteError):
        assert isinstance(error, RemoteError)
        if error.is_unreadable:
            return _as(Unreadable, error)
        if error.original is not None:
            error.original.__cause__ = error.__cause__
            return error.original
    return error


def _as(kind: type[BulkheadError], error: BaseException) -> BulkheadError:
    made = kind(str(error), **vars(error))
    made.__cause__ = error.__cause__
    return made
