"""Everything bulkhead raises, each named for what happened.

All derive from `BulkheadError` and, where one fits, from the builtin that callers already catch. All survive pickling:
the message is the only positional argument, every other fact is an attribute.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Self

__all__ = [
    "BadMessage",
    "BarrierTimeout",
    "BrokerUnavailable",
    "BulkheadError",
    "ConfigError",
    "ConfigTypeError",
    "DispatcherFinalized",
    "DuplicateJobId",
    "JobCancelled",
    "JobDiscarded",
    "JobNotFound",
    "JobNotPicklable",
    "JobTimeout",
    "JobsFailed",
    "MemoryLimitExceeded",
    "MessageTooLarge",
    "MissingExtra",
    "MissingMainGuard",
    "NestedDispatch",
    "NoSharedMemory",
    "NoWorkerState",
    "PoolBroken",
    "PoolFull",
    "RemoteError",
    "RemoteTraceback",
    "ResultNotFound",
    "ScheduleNotFound",
    "Snooze",
    "StartDeadlineExceeded",
    "UnknownPriority",
    "UnknownQueue",
    "UnknownTask",
    "Unrecoverable",
    "WaitTimeout",
    "WorkerCrashed",
]


# Why not the attribute: a metaclass of the user's may have one of its own.
_qualname_of: Callable[[type], str] = vars(type)["__qualname__"].__get__


class BulkheadError(Exception):
    """Base of every error that bulkhead raises of its own."""

    def __init__(self, message: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.__dict__.update(facts)


class ConfigError(BulkheadError, ValueError):
    """An option has a value that cannot work; the message names the option and the value. Nothing was started."""


class ConfigTypeError(ConfigError, TypeError):
    """An option has a value of the wrong type; the message names the option and the value. Nothing was started."""


class UnknownPriority(BulkheadError, LookupError):
    """No pool of the dispatcher has this priority. Nothing was queued.

    Attributes:
        priority: What was asked for.
        known: The priorities of the dispatcher's pools.
    """

    priority: int
    known: tuple[int, ...] = ()


class DuplicateJobId(BulkheadError, ValueError):
    """A job with this id is still live. Nothing was queued."""


class JobNotPicklable(BulkheadError, TypeError, pickle.PicklingError):
    """The job cannot be sent to another process. Nothing was queued, no worker was touched."""


class PoolFull(BulkheadError, TimeoutError):
    """No worker of the pool came free in time. Nothing was queued; the job object can be dispatched again."""


class PoolBroken(BulkheadError):
    """The pool has given up, for instance because its workers die at every start; `__cause__` says why.

    Other pools of the dispatcher are not affected.
    """


class NoSharedMemory(BulkheadError, MemoryError):
    """There is no memory, or no file descriptor, for a shared object. Nothing was kept."""


class MissingMainGuard(BulkheadError, RuntimeError):
    """The script makes a Dispatcher while a worker imports it: it needs `if __name__ == "__main__":`."""


class DispatcherFinalized(BulkheadError, RuntimeError):
    """The dispatcher takes no more jobs. Nothing was queued."""


class NestedDispatch(BulkheadError, RuntimeError):
    """A dispatcher was used from inside a job, or in a forked copy of its process, where it has no workers."""


class JobNotFound(BulkheadError, LookupError):
    """No job with this id is known: it never existed, or it ended longer ago than the history reaches.

    Attributes:
        job_id: What was asked for.
    """

    job_id: Any


class JobTimeout(BulkheadError, TimeoutError):
    """The job ran longer than its timeout; its process and all it had started are ended.

    Attributes:
        timeout: Seconds it was allowed.
        pid: The worker that ran it.
        stack: Python stacks of the worker when it was told to end, or "".
    """

    timeout: float = 0.0
    pid: int | None = None
    stack: str = ""


class WaitTimeout(BulkheadError, TimeoutError):
    """The job has not settled within the time the caller was ready to wait. It goes on."""


class WorkerCrashed(BulkheadError):
    """The worker process ended without an answer.

    Attributes:
        pid: The process that died.
        signal: Name of the signal that ended it, such as "SIGSEGV", or None.
        exit_code: Its exit code when no signal ended it, or None; both None means that it could not be learned.
        stack: The Python stacks at death where the interpreter could still write them, or "".
        peak_rss_bytes: The largest resident set it ever had, or None.
        out_of_memory: True when the kernel's out-of-memory killer is the likely cause.
        output: The last lines the job had printed (Python level), or "".
    """

    pid: int | None = None
    signal: str | None = None
    exit_code: int | None = None
    stack: str = ""
    peak_rss_bytes: int | None = None
    out_of_memory: bool = False
    output: str = ""


class MemoryLimitExceeded(WorkerCrashed, MemoryError):
    """The job took more memory than its pool's `hard_memory_limit`; its process and all it had started are ended.

    A retry policy that names `WorkerCrashed` or `MemoryError` covers it.

    Attributes:
        rss_bytes: What the worker and the processes that the job had started took: resident memory of their own.
        limit_bytes: What they were allowed.
    """

    rss_bytes: int = 0
    limit_bytes: int = 0


class NoWorkerState(BulkheadError, LookupError):
    """`worker_state()` was called where there is none: outside of a worker, or in a pool without initializer."""


class JobCancelled(BulkheadError):
    """The job was cancelled before it ended."""


class StartDeadlineExceeded(BulkheadError, TimeoutError):
    """The job did not start in time and was not run."""


class BarrierTimeout(BulkheadError, TimeoutError):
    """Some jobs of the phase are unsettled. They go on; call the barrier again.

    Attributes:
        pending: Ids of the unsettled jobs, in dispatch order.
    """

    pending: tuple[Any, ...] = ()


class RemoteError(BulkheadError):
    """What a job raised, or an answer of it, that could not be brought into the caller's process.

    Attributes:
        type_name: Qualified name of the original exception type.
        traceback: The remote traceback as text.
        original: The exception itself where it could be rebuilt: one that is no `Exception`, such as SystemExit, or
            what the pickling of a result has raised.
        is_unreadable: What arrived (a job in the worker, a result in the caller) could not be unpickled there.
    """

    type_name: str = ""
    traceback: str = ""
    original: BaseException | None = None
    is_unreadable: bool = False


class Unrecoverable(BulkheadError):
    """Raise this in a job (or derive from it) to say that trying again is useless: no retry policy applies."""


class Snooze(BulkheadError):
    """Raise this in a task to have its job put back, to run again after `delay` seconds; that is no failed attempt.

    Attributes:
        delay: Seconds, at least 0.
    """

    delay: float = 0.0

    def __init__(self, delay: float = 0.0, **facts: Any) -> None:
        checked = _delay(delay)
        super().__init__(f"snoozed for {checked:g} s", **{**facts, "delay": checked})

    def __reduce__(self) -> tuple[Any, ...]:
        # Why not as the others: the only argument is the delay and not the message.
        return type(self), (self.delay,), self.__dict__


class JobDiscarded(BulkheadError):
    """Raise this in a task, or in `handle` of a middleware, to drop its job: no attempt follows, and no dead letter.

    The job has failed then, with the message as the reason.
    """


class BrokerUnavailable(BulkheadError, ConnectionError):
    """The server or file that keeps the jobs cannot be reached. What was asked for may or may not have been done.

    Asking again is safe: a job that has an id is not doubled.
    """


class MessageTooLarge(BulkheadError, ValueError):
    """A job's arguments, or a result, are larger than the server takes. Nothing was kept.

    Attributes:
        size_bytes: How large it is.
        limit_bytes: How large it may be.
    """

    size_bytes: int = 0
    limit_bytes: int = 0


class BadMessage(BulkheadError, ValueError):
    """What lies in the queue is no job of this application: it cannot be decoded, or its signature is wrong."""


class MissingExtra(BulkheadError, ImportError):
    """A package that this needs is not installed; the message has the command that installs it."""


class UnknownTask(BulkheadError, LookupError):
    """The application has no task of this name. Nothing was enqueued."""


class UnknownQueue(BulkheadError, LookupError):
    """The application has no queue of this name. Nothing was changed."""


class ResultNotFound(BulkheadError, LookupError):
    """The job is known, but there is no result: it has not ended, or it left none, or that was deleted."""


class ScheduleNotFound(BulkheadError, LookupError):
    """There is no schedule of this name."""


class RemoteTraceback(Exception):
    """The `__cause__` of an exception that came from a job: prints the worker's traceback.

    Source: the shape of concurrent.futures.process._RemoteTraceback, so that tools show it alike.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    @property
    def tb(self) -> str:
        """The text, under the name that it has in the standard library."""
        return self.text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class JobsFailed(BulkheadError, ExceptionGroup[Exception]):
    """Jobs of a phase failed. All jobs of the phase have settled and the pools are usable.

    Attributes:
        job_ids: Ids of the failed jobs, one for each exception of the group, in the same order.
        total: Number of failed jobs; more than the exceptions held when the phase had more than the history keeps.
    """

    job_ids: tuple[Any, ...] = ()
    total: int = 0

    def __new__(cls, message: str, exceptions: Sequence[Exception], **facts: Any) -> Self:
        """Make the group without the facts, which ExceptionGroup does not know."""
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], **facts: Any) -> None:
        self.__dict__.update(facts)

    def derive(self, excs: Sequence[Exception]) -> JobsFailed:  # type: ignore[override]
        """Make a part of the group, as `except*` and `split` do, with the ids that belong to it."""
        ids: dict[int, Any] = {}
        for job_id, error in zip(self.job_ids, self.exceptions, strict=False):
            ids.update(dict.fromkeys(map(id, _leaves(error)), job_id))
        # Why by leaves: a job's error that is a group itself is taken apart and made anew.
        found = tuple(next((ids[id(leaf)] for leaf in _leaves(e) if id(leaf) in ids), None) for e in excs)
        return JobsFailed(self.message, excs, job_ids=found, total=len(excs))


def _delay(value: float) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ConfigError(f"delay must be a finite number of seconds, at least 0, not {value!r}")
    return float(value)


def is_of(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Tell whether `except kinds` would catch the error. Runs no code of the error's class, as `isinstance` may."""
    return any(type.__subclasscheck__(kind, type(error)) for kind in kinds)


def type_name_of(error: BaseException) -> str:
    """Return the qualified name of an error's type, or of the type that a RemoteError stands for. As `is_of`."""
    if is_of(error, RemoteError):
        assert isinstance(error, RemoteError)
        if error.type_name:
            return error.type_name
    return _qualname_of(type(error))


def _leaves(error: BaseException) -> list[BaseException]:
    if not is_of(error, BaseExceptionGroup):
        return [error]
    assert isinstance(error, BaseExceptionGroup)
    return [leaf for part in error.exceptions for leaf in _leaves(part)]
