"""The caller's handle on one job, and the frozen picture of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from bulkhead import validate
from bulkhead._kernel.lifecycle import SETTLED, JobState
from bulkhead._kernel.records import JobRecord
from bulkhead.errors import (
    JobTimeout,
    NestedDispatch,
    RemoteTraceback,
    WaitTimeout,
    WorkerCrashed,
    is_of,
    type_name_of,
)
from bulkhead.retry import RetryPolicy
from bulkhead.validate import shown

if TYPE_CHECKING:
    import asyncio

__all__ = ["JobStatus", "Tracker"]


# How much of what a job prints is kept (bytes).
_KEPT_OUTPUT = 64 << 10


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job at one moment. Times are aware datetimes in UTC; what does not apply (yet) is None.

    Attributes:
        attempt: Runs begun so far; 0 before the first.
        pid: The worker that ran the last attempt.
        error_type, error_message, traceback: Of the last failed attempt; the traceback is the worker's, as text.
    """

    id: Any
    state: JobState
    priority: int
    attempt: int
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    pid: int | None = None
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known in JSON's types: times in RFC 3339, absent values left out.

        An id that JSON has no type for becomes its repr.
        """
        named = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: _plain(value) for name, value in named if value is not None}

    def to_json(self) -> str:
        """Return `to_dict()` as a JSON text."""
        return json.dumps(self.to_dict())


class JobHome(Protocol):
    """What a tracker needs of the pool that its job belongs to."""

    def wait_for(self, job: JobRecord, deadline: float | None) -> bool: ...
    def add_waiter(self, job: JobRecord, waiter: Any) -> bool: ...
    def add_callback(self, job: JobRecord, callback: Callable[[Any], object]) -> None: ...
    def cancel(self, job: JobRecord) -> bool: ...
    def cancel_waiting(self, jobs: Iterable[JobRecord]) -> None: ...
    def has_begun(self, job: JobRecord) -> bool: ...
    @property
    def lock(self) -> Any: ...


class Tracker(JobRecord):
    """The caller's handle on one dispatched job. `dispatch` makes it; `id` and the methods are its public part.

    Concurrency: any thread of the process that made the dispatcher.
    """

    # Why no value from the beginning: most jobs print nothing that is captured, and all are made in a hurry.
    __slots__ = ("__weakref__", "_home", "_printed")

    def __init__(
        self,
        home: JobHome,
        payload: Any,
        priority: int,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        JobRecord.__init__(self, payload, priority, timeout, retry)
        self._home = home

    def status(self) -> JobStatus:
        """Return a frozen picture of the job."""
        with self._home.lock:
            state, attempt = self.state or JobState.QUEUED, self.attempt
            started_at, pid = _utc(self.started_at), self.pid
            if state is JobState.RUNNING and not self._home.has_begun(self):
                # Why: should its worker die now, the job goes back to the queue as if it had never been sent.
                state, attempt, started_at, pid = JobState.QUEUED, attempt - 1, None, None
            return JobStatus(
                self.id,
                state,
                self.priority,
                attempt,
                _utc(self.queued_at),
                started_at,
                _utc(self.finished_at),
                pid,
                *_described(self.error),
            )

    @property
    def output(self) -> str:
        """What the job has printed so far, at most the last 64 KiB of it, if its pool captures output; else "".

        Standard output and standard error as they came, of all attempts. What is no UTF-8 is replaced.
        """
        return getattr(self, "_printed", b"").decode("utf-8", "replace")

    @property
    def output_size(self) -> int:
        """How much of its output is kept, in bytes."""
        return len(getattr(self, "_printed", b""))

    def add_output(self, data: bytes) -> None:
        """Note what the job has printed. For the engine."""
        self._printed = (getattr(self, "_printed", b"") + data)[-_KEPT_OUTPUT:]

    def done(self) -> bool:
        """Tell whether the job has settled: succeeded, failed or cancelled."""
        return self.state in SETTLED

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the job has settled, at most `timeout` seconds; tell whether it has.

        Blocking: until settled or `timeout`; None waits without limit.
        """
        deadline = None
        if timeout is not None:
            deadline = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
        if self.state in SETTLED:
            return True
        return self._home.wait_for(self, deadline)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return what it returned.

        Raises:
            WaitTimeout: It has not settled within `timeout` seconds; it goes on.
            JobCancelled: It was cancelled.
            Exception: What the job raised, with the worker's traceback as its cause; or JobTimeout, WorkerCrashed,
                StartDeadlineExceeded, PoolBroken, RemoteError for a job that failed otherwise.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the job and return what it failed with (JobCancelled for a cancelled one), or None.

        Raises:
            WaitTimeout: It has not settled within `timeout` seconds; it goes on.
        """
        if not self.wait(timeout):
            raise WaitTimeout(f"job {shown(self.id)} has not settled within {timeout} s; it is {self.state}")
        return self.error

    def cancel(self) -> bool:
        """Take the job out if it waits, end its worker if it runs; False when it has succeeded or failed.

        A running job is cancelled when its process has ended, which may take a second; `wait` for that.
        """
        return self._home.cancel(self)

    def withdraw(self) -> None:
        """Cancel the job if it waits; one that was sent to a worker goes on. For the service."""
        self._home.cancel_waiting([self])

    def add_done_callback(self, fn: Callable[[Tracker], object]) -> None:
        """Have `fn(tracker)` called in this process when the job has settled, at once if it has.

        Callbacks of a pool run one after the other in a thread of their own, in the order in which jobs settle; one
        that raises is logged to the logger "bulkhead" and holds nothing up. `finalize` waits for them.
        """
        self._home.add_callback(self, validate.function("fn", fn))

    @property
    def follow_up(self) -> Any:
        """The tracker of what this job's end has set going: `on_success` or `on_failure` of its options.

        None as long as the job has not settled, and when nothing follows.
        """
        return None

    def settling(self) -> Generator[Any, None, None]:
        """Wait in asyncio until the job has settled; for `yield from`."""
        if self.state not in SETTLED:
            import asyncio  # Why here: half of the package's import time, and workers import it too

            waiter = _AsyncWaiter(asyncio.get_running_loop())
            if self._home.add_waiter(self, waiter):
                yield from waiter.settled.__await__()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait in asyncio and give what `result()` gives. Cancelling the wait leaves the job alone."""
        yield from self.settling()
        return self.result(0)

    def __reduce__(self) -> NoReturn:
        raise NestedDispatch("a Tracker cannot be sent to another process; send its id or its result instead")

    def __repr__(self) -> str:
        return f"<Tracker {shown(self.id)} {self.state or 'not accepted'}>"


class _AsyncWaiter:
    """Settles a future of an event loop from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.settled: asyncio.Future[None] = loop.create_future()

    def fire(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _settle(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)


def _utc(posix: float | None) -> datetime | None:
    return None if posix is None else datetime.fromtimestamp(posix, UTC)


def _described(error: BaseException | None) -> tuple[str | None, str | None, str | None]:
    if error is None:
        return None, None, None
    cause = error.__cause__
    trace = cause.text if type(cause) is RemoteTraceback else None
    if is_of(error, JobTimeout, WorkerCrashed):
        assert isinstance(error, (JobTimeout, WorkerCrashed))
        trace = error.stack or None
    return type_name_of(error), _text(error), trace


def _text(error: BaseException) -> str:
    try:
        return "".join((str(error),))
    except Exception:  # a __str__ of the user's that raises
        return "<its text could not be made>"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, JobState):
        return value.value
    is_plain = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_plain else repr(value)
