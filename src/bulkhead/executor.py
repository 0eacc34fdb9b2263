"""`Dispatcher.executor`: one pool as a `concurrent.futures.Executor`, for code that is written against that interface.

    submit ── packed ──▶ pool.submit: accepted whatever the backlog is, in line with the callers of dispatch
    Future ◀── settled by the pool's driver, under its lock ──┘
       └─ done callbacks: one after the other in the pool's callback thread

What differs from `dispatch`: nobody waits for room, so the line of waiting jobs is bounded by nothing but memory, which
is what the interface demands. Everything else is as for any job: the pool's timeout and retry policy, statistics,
barriers; a worker that dies takes one future with it.

A thread that waits in `Future.result` drives the pool, as everybody does who waits. `concurrent.futures.wait` and
`as_completed` sleep for events of their own: then the background thread drives. No thread is made for an executor.

Lock rank: a future's own lock is acquired under the pool's, and nothing under it: callbacks run elsewhere.
"""

from __future__ import annotations

import atexit
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, InvalidStateError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED
from functools import partial
from typing import Any, NoReturn

from bulkhead import forks, validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead.engines.processes.driving import Waiter, fire
from bulkhead.engines.processes.interrupts import calm
from bulkhead.engines.processes.pool import ProcessPool
from bulkhead.errors import (
    ConfigError,
    ConfigTypeError,
    DispatcherFinalized,
    JobNotPicklable,
    NestedDispatch,
    PoolBroken,
)
from bulkhead.executor_errors import as_executors_raise
from bulkhead.job import name_of, run_each
from bulkhead.tracker import Tracker

__all__ = ["JobFuture", "PoolExecutor"]

# What the standard library says, and some programs look for.
_AFTER_SHUTDOWN = "cannot schedule new futures after shutdown"
_AT_EXIT = "cannot schedule new futures after interpreter shutdown"

_is_exiting = False


class PoolExecutor(Executor):
    """One pool of a dispatcher, as an executor. `Dispatcher.executor` makes it.

    Any number of them may be made for one pool; each knows its own futures alone. The pool belongs to the dispatcher
    and lives on when an executor is shut down.

    Concurrency: any thread of the process that made the dispatcher.

    Args:
        owner: Kept alive as long as this.
        pool: The pool.
    """

    def __init__(self, owner: object, pool: ProcessPool) -> None:
        self._owner = owner
        self._pool = pool
        self._book = _Book()
        self._depth = forks.depth
        self._max_workers = pool.config.n_workers  # a name that other libraries look for

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> JobFuture:
        """Have `fn(*args, **kwargs)` called in a worker of the pool; wait for nothing.

        Returns:
            Its future. What cannot be pickled is the future's error, as are WorkerCrashed, JobTimeout and whatever else
            a job of the pool may fail with. Errors that mean a lost worker or a broken pool are also
            `concurrent.futures.process.BrokenProcessPool`; unlike there, the executor stays usable after a crash.

        Raises:
            RuntimeError: The executor is shut down, or the interpreter is about to exit.
            DispatcherFinalized: So is the dispatcher; it is a RuntimeError as well.
            PoolBroken: The pool has given up; it is a BrokenProcessPool as well.
            NestedDispatch: Called from inside a job.
        """
        if self._depth != forks.depth:
            _refuse_elsewhere()
        pool, book = self._pool, self._book
        if not callable(fn):
            validate.function("fn", fn)
        future = JobFuture(pool)
        # Race: first of all, so that a `shutdown` that does not see it is seen here.
        book.open[future] = None
        try:
            if book.is_shut or _is_exiting:
                raise RuntimeError(_AFTER_SHUTDOWN if book.is_shut else _AT_EXIT)
            job = _packed(pool, fn, args, kwargs)
            job.waiters = [_Delivery(future, job, book)]
            future._job = job
            pool.submit(job)
        except JobNotPicklable as error:
            future.set_exception(error)
            self._strike(future)
        except DispatcherFinalized as error:
            self._strike(future)
            raise DispatcherFinalized(f"{_AFTER_SHUTDOWN}: {error}") from None
        except PoolBroken as error:
            self._strike(future)
            raise as_executors_raise(error) from error.__cause__
        except BaseException:
            self._strike(future)
            raise
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Call `fn` with the items of the iterables, and iterate over the results in their order.

        As in Python 3.14: all items are read and submitted at once, unless a `buffersize` is given. `Dispatcher.map` is
        lazy, learns the size of chunks and goes on after an error.

        Args:
            fn: Called with one item of each iterable.
            *iterables: The shortest ends the map.
            timeout: Seconds from this call for all results.
            chunksize: Items that travel together, at least 1. One that fails fails its chunk.
            buffersize: Bounds how many chunks are submitted and not yet given out; the next is read when a result is
                taken. None for no bound.

        Returns:
            An iterator. It ends with the first error; futures that have not begun are cancelled then, as they are when
            it is closed.

        Raises:
            TimeoutError: By the iterator: a result is not there within `timeout`.
            Exception: By the iterator: what `fn` has raised.
        """
        size = validate.whole_number("chunksize", chunksize)
        if size < 1:
            raise ConfigError(f"chunksize must be >= 1, not {size}")
        if buffersize is not None:
            if isinstance(buffersize, bool) or not isinstance(buffersize, int):
                raise ConfigTypeError(f"buffersize must be an integer or None, not {buffersize!r}")
            if buffersize < 1:
                raise ConfigError(f"buffersize must be None or > 0, not {buffersize}")
        deadline = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables, strict=False)
        if size == 1:
            calls = (partial(self.submit, fn, *args) for args in items)
        else:
            calls = (partial(self.submit, run_each, fn, chunk) for chunk in _batched(items, size))
        futures = deque(call() for call in itertools.islice(calls, buffersize))
        return _results(futures, calls, deadline, is_chunked=size > 1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. The pool lives on. A second call may wait for what the first did not.

        Args:
            wait: Return when all futures of this executor are done and their callbacks have run.
            cancel_futures: Cancel the futures whose calls have not begun, but for those that are the next for a worker
                which is still coming up.
        """
        if self._depth != forks.depth:
            _refuse_elsewhere()
        book, pool = self._book, self._pool
        book.is_shut = True
        if cancel_futures:
            jobs = [future._job for future in list(book.open)]
            pool.cancel_waiting([job for job in jobs if job is not None], but_promised=True)
        if wait:
            waiter = Waiter()
            with pool.lock:
                if book.open:
                    book.waiters.append(waiter)
                else:
                    waiter.is_done = True
            pool.wait_as(waiter)
            pool.wait_for_callbacks()

    @property
    def is_shut(self) -> bool:
        """Tell whether this takes no more calls."""
        return self._book.is_shut

    def cancel_all(self) -> None:
        """Take no more calls, cancel those that have not begun, end the workers of those that run. The pool lives on.

        Not among them is one that another thread submits meanwhile and has not made a job yet.
        """
        if self._depth != forks.depth:
            _refuse_elsewhere()
        book, pool = self._book, self._pool
        book.is_shut = True
        jobs = [job for future in list(book.open) if (job := future._job) is not None]
        # Why these first: else each worker that is freed would begin the next of them.
        pool.cancel_waiting(jobs)
        for job in jobs:
            if job.state is JobState.RUNNING:
                pool.cancel(job)

    def __reduce__(self) -> NoReturn:
        raise NestedDispatch("an executor cannot be sent to another process")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._pool.config.label}>"

    def _strike(self, future: JobFuture) -> None:
        """Forget a future that did not become a job."""
        with calm(), self._pool.lock:
            # Race: a second Ctrl-C may come out of `submit` when the job is accepted.
            if future._job is None or future._job.state is None:
                future._job = None
                self._book.strike(future)


class JobFuture(Future[Any]):
    """The future of a job. `result` and `exception` drive the pool while they wait.

    A future whose job waits (also for another attempt) can be cancelled, one whose job runs cannot.
    """

    def __init__(self, pool: ProcessPool) -> None:
        super().__init__()
        self._pool = pool
        self._job: Tracker | None = (
            None  # Owner: the pool's lock, once the job is accepted; None when it has settled.
        )

    def cancel(self) -> bool:
        """Take the job out if it waits, and tell whether it is cancelled."""
        job = self._job
        if job is not None:
            self._pool.cancel_waiting([job])
        # Whoever is told of the job's end has cancelled this by now.
        return self.cancelled()

    def running(self) -> bool:
        """Tell whether the job has been sent to a worker and has not settled."""
        job = self._job
        return job is not None and job.state is JobState.RUNNING

    def result(self, timeout: float | None = None) -> Any:
        """Return what the call has returned, or raise what it has raised, waiting for it.

        Raises:
            TimeoutError: It is not done within `timeout` seconds.
            concurrent.futures.CancelledError: It was cancelled.
        """
        if self._job is not None:
            self._wait(timeout)
            return super().result(0)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call has raised, or None, waiting for it.

        Raises:
            TimeoutError: It is not done within `timeout` seconds.
            concurrent.futures.CancelledError: It was cancelled.
        """
        if self._job is not None:
            self._wait(timeout)
            return super().exception(0)
        return super().exception(timeout)

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Have `fn(future)` called when it is done, at once if it is.

        Callbacks of a pool run one after the other in a thread of their own; one that raises is logged.
        """
        if not self.done():
            fn = self._pool.deferred(fn)
        super().add_done_callback(fn)

    def _wait(self, timeout: float | None) -> None:
        job = self._job
        if job is not None:
            self._pool.wait_until_told(job, None if timeout is None else time.monotonic() + timeout)


class _Work(Tracker):
    """The job of a future: what becomes of it is the future's to keep, not the history's."""

    is_kept = False

    __slots__ = ()


class _Book:
    """The futures of one executor that are not done. Owner: the pool's lock, but for `is_shut` and additions.

    Attributes:
        open: Those, oldest first.
        waiters: Who waits until there are none.
    """

    def __init__(self) -> None:
        self.open: dict[JobFuture, None] = {}
        self.waiters: list[Waiter] = []
        self.is_shut = False

    def strike(self, future: JobFuture) -> None:
        self.open.pop(future, None)
        if self.waiters and not self.open:
            fire(self.waiters)


class _Delivery:
    """Settles a future when the pool tells that its job has settled."""

    __slots__ = ("_book", "_future", "_has_begun", "_job")

    def __init__(self, future: JobFuture, job: Tracker, book: _Book) -> None:
        self._has_begun = False
        self._future = future
        self._job = job
        self._book = book

    def fire(self) -> None:
        """The job has settled. Under the pool's lock."""
        future, job = self._future, self._job
        is_again, self._has_begun = self._has_begun, True
        if is_again and future.done():
            _tell_again(future)
        else:
            self._settle(future, job)
        future._job = None
        self._book.strike(future)

    def _settle(self, future: JobFuture, job: Tracker) -> None:
        try:
            if job.state is JobState.SUCCEEDED:
                future.set_result(job.value)
            elif job.state is JobState.CANCELLED:
                if not future.done() and Future.cancel(future):
                    future.set_running_or_notify_cancel()
            else:
                assert job.error is not None
                future.set_exception(as_executors_raise(job.error))
        except InvalidStateError:
            pass  # somebody has settled the future in his own way


def _tell_again(future: JobFuture) -> None:
    """Finish what an exception has broken off that struck while the future was being settled."""
    with future._condition:
        if future.cancelled():
            future._state = CANCELLED_AND_NOTIFIED
        for waiter in future._waiters:  # those of wait() and as_completed()
            if future not in waiter.finished_futures:
                waiter.add_result(future)
        future._condition.notify_all()
    future._invoke_callbacks()  # type: ignore[attr-defined]  # each runs once, see `add_done_callback`


def _packed(
    pool: ProcessPool, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Work:
    config = pool.config
    payload = pool.pack(fn, args, kwargs, pool.segments)
    job = _Work(pool, payload, config.priority, config.timeout, config.retry)
    # Of a chunk of `map` that of the function which it calls with each.
    job.function = name_of(args[0] if fn is run_each else fn)
    return job


def _batched(items: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _results(
    futures: deque[JobFuture],
    calls: Iterator[Callable[[], JobFuture]],
    deadline: float | None,
    *,
    is_chunked: bool,
) -> Iterator[Any]:
    """Give out the results of the futures and of those that the other calls will make. Keeps none of them alive."""
    try:
        while futures:
            call = next(calls, None)
            if call is not None:
                futures.append(call())
            if is_chunked:
                values = _result_or_cancel(futures.popleft(), deadline)
                values.reverse()
                while values:
                    yield values.pop()
            else:
                yield _result_or_cancel(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel()


def _result_or_cancel(future: JobFuture, deadline: float | None) -> Any:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    finally:
        future.cancel()
        del future


def _refuse_elsewhere() -> NoReturn:
    raise NestedDispatch(
        "this executor belongs to another process: a job cannot submit to the pools that run it; return what is to be "
        "done next and let the caller submit it"
    )


@atexit.register
def _note_exit() -> None:
    # The dispatchers are finalized just after this: the handlers of exit run in reverse order of registration.
    global _is_exiting
    _is_exiting = True
