"""The face of the library: routes each job to the pool of its priority, and marks phases over all pools.

A dispatcher holds no lock that two pools share. What it does for a job (checking, pickling, numbering) happens in the
caller's thread; everything else is the pool's.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, cast, overload

from bulkhead import forks, validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.phases import Phase
from bulkhead.composition import Chain, ChainTracker, Group, GroupTracker
from bulkhead.config import Pool, niceness_step, pools_from
from bulkhead.engines.processes.interrupts import calm
from bulkhead.engines.processes.main_module import refuse_while_importing
from bulkhead.engines.processes.pool import ProcessPool, packed_setup
from bulkhead.engines.processes.sharing import Shared
from bulkhead.errors import (
    BarrierTimeout,
    ConfigError,
    ConfigTypeError,
    JobsFailed,
    NestedDispatch,
    PoolFull,
    RemoteError,
    UnknownPriority,
    is_of,
)
from bulkhead.feeding import Feeder
from bulkhead.history import History
from bulkhead.job import (
    FOLLOW_UPS,
    Composition,
    Job,
    Options,
    call_of,
    name_of,
    name_of_job,
    options_of,
    times_of,
)
from bulkhead.mapping import MapOptions, Results
from bulkhead.planning import Nowhere, Plan
from bulkhead.tracker import Tracker
from bulkhead.validate import shown

if TYPE_CHECKING:
    from bulkhead.executor import PoolExecutor
    from bulkhead.instrumentation.progress import Displays
    from bulkhead.instrumentation.timeline import Timeline
    from bulkhead.journal import Journal
    from bulkhead.stats import BarrierReport, DispatcherStats, MapProgress, PhaseCounts, Progress

__all__ = ["Dispatcher"]

_log = logging.getLogger("bulkhead")

_not_finalized: weakref.WeakSet[Dispatcher] = weakref.WeakSet()

# Bounds of the time that a cancelling finalize may take besides the kill ladder (seconds).
_UNWIND = 5.0

# How many barriers a timeline shows, the last ones (arbitrary).
_MAX_BARRIERS = 10_000

# Seconds that done callbacks have to end when everything is cancelled.
_LAST_CALLBACKS = 1.0


class Dispatcher:
    """Isolated pools of processes, one for each priority.

    Workers start in the background; the first job waits until one is up.

    Args:
        pools: `Pool` values or `(priority, n_workers)` pairs, each priority once.
        job_expiry: Seconds that a settled job can be found by its id.
        max_history: How many settled jobs can be found by their id; fewer when their results take more than 64 MiB. A
            tracker that you hold keeps its result however old it is.
        max_timeline: How many attempts of each pool `timeline` shows, the last ones; 100,000 take some 20 MB. 0: none.
        journal: A file in which successes of jobs with ids of their own are recorded, for as long as it exists. A job
            that is recorded there is not run again: its tracker has succeeded with the recorded result. See
            journal.py for what a kill can cost.
        progress: True draws a bar for each pool on standard error, or prints a line now and then where that is no
            terminal (needs the extra "cli"). A function is called with a `Progress` five times a second, in a thread
            of its own.

    Raises:
        ConfigError: A value cannot work; nothing was started.
        MissingMainGuard: The script has no `if __name__ == "__main__"` and a worker imports it.

    Concurrency: any thread of the process that made it; from inside a job or a forked copy it raises NestedDispatch.

    Example:
        >>> with Dispatcher([(0, 1)]) as disp:
        ...     disp.dispatch(Job(pow, 2, 10)).result()
        1024
    """

    def __init__(
        self,
        pools: Iterable[Pool | tuple[int, int]],
        *,
        job_expiry: float = 300.0,
        max_history: int = 10_000,
        max_timeline: int = 100_000,
        journal: str | os.PathLike[str] | None = None,
        progress: bool | Callable[[Progress], object] = False,
    ) -> None:
        refuse_while_importing()
        # Why here: launchers import this module with the caller's main module, and need no statistics. Why not later: a
        # signal handler that asks for some must not come upon a half of it.
        import bulkhead.stats  # noqa: F401

        configs = pools_from(pools)
        limit = validate.whole_number("max_history", max_history, at_least=0)
        self._history = History(validate.seconds("job_expiry", job_expiry), limit)
        max_attempts = validate.whole_number("max_timeline", max_timeline, at_least=0)
        self._displays: list[Displays] = []  # none or one: made when it is needed
        if progress is not False:
            _check_progress(progress)
        self._epoch = time.monotonic(), time.time()
        self._barriers: deque[tuple[Any, ...]] = deque(maxlen=_MAX_BARRIERS)  # fields of a `BarrierMark`
        self._pid = os.getpid()
        self._depth = forks.depth
        self._pools: dict[int, ProcessPool] = {}
        _warn_of_threads(configs)
        setups = [packed_setup(config, niceness_step(rank)) for rank, config in enumerate(configs)]
        # Why last of what can be refused: it is open then.
        self._journal = None if journal is None else _opened(journal)
        try:
            # Why all before any begins: a launcher that is a fork must be made before our threads are.
            for config, setup in zip(configs, setups, strict=True):
                self._pools[config.priority] = ProcessPool(
                    config,
                    setup=setup,
                    keep_failures=limit,
                    ledger=self._history,
                    max_timeline=max_attempts,
                )
            for pool in self._pools.values():
                pool.begin()
            self._nowhere = Nowhere(pool)
            if progress is not False:
                self._display().begin(progress)
            # For jobs that name no priority.
            self._default_pool = self._pools.get(0) if len(self._pools) > 1 else pool
        except BaseException:
            self._end(cancel=True, deadline=None)
            raise
        self._finalizer = weakref.finalize(
            self, _dropped, list(self._pools.values()), self._displays, self._journal, self._pid
        )
        self._finalizer.atexit = False
        _not_finalized.add(self)

    @overload
    def dispatch(self, job: Group, *, timeout: float | None = None) -> GroupTracker: ...
    @overload
    def dispatch(self, job: Chain, *, timeout: float | None = None) -> ChainTracker: ...
    @overload
    def dispatch(self, job: Any, *, timeout: float | None = None) -> Tracker: ...

    def dispatch(self, job: Any, *, timeout: float | None = None) -> Tracker | GroupTracker | ChainTracker:
        """Give a job to the pool of its priority; wait until a worker there is free.

        Args:
            job: A `Job`, or a picklable object with `run()` and `priority`. Or a `group` or `chain` of them: it is
                accepted as a whole when its first job is.
            timeout: Longest wait in seconds, at least 0; None waits without limit.

        Returns:
            The job's tracker; of a group or chain a `GroupTracker` or `ChainTracker`, with the same methods.

        Raises:
            PoolFull: No worker came free in time; nothing is queued and the job can be dispatched again.
            UnknownPriority, ConfigError, JobNotPicklable, DuplicateJobId: The job cannot be run as it is.
            PoolBroken: The pool has given up.
            DispatcherFinalized: `finalize` was called.
            NestedDispatch: Called from inside a job.

        Blocking: until a worker is free (or the pool's backlog has room) or `timeout`.
        """
        deadline = None
        if timeout is not None:
            deadline = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
        if self._journal is not None:
            found = self._recalled(job)
            if found is not None:
                return found
        pool, tracker = self._prepared(job)
        if pool is None:
            pool = self._first_pool(tracker.plan)
            # Why no lambda: it would make cells of these variables, and slow down every call.
            is_accepted, whole = _accepted(tracker, partial(pool.dispatch, tracker, deadline))
            if not is_accepted:
                pool.check_open()
                raise _full(pool, timeout)
            assert whole is not None
            return whole
        try:
            if tracker.id is not None:
                self._history.reserve(tracker.id, tracker)
            is_accepted = pool.dispatch(tracker, deadline)
            if not is_accepted:
                pool.check_open()
        finally:
            if tracker.state is None:
                self._history.release(tracker)
        if not is_accepted:
            raise _full(pool, timeout)
        return tracker

    @overload
    def try_dispatch(self, job: Group) -> GroupTracker | None: ...
    @overload
    def try_dispatch(self, job: Chain) -> ChainTracker | None: ...
    @overload
    def try_dispatch(self, job: Any) -> Tracker | None: ...

    def try_dispatch(self, job: Any) -> Tracker | GroupTracker | ChainTracker | None:
        """Give a job to the pool of its priority if a worker there is free now, else return None and queue nothing.

        Raises:
            What `dispatch` raises, but PoolFull.
        """
        if self._journal is not None:
            found = self._recalled(job)
            if found is not None:
                return found
        pool, tracker = self._prepared(job)
        if pool is None:
            pool = self._first_pool(tracker.plan)
            return _accepted(tracker, partial(pool.try_dispatch, tracker))[1]
        try:
            if tracker.id is not None:
                self._history.reserve(tracker.id, tracker)
            return tracker if pool.try_dispatch(tracker) else None
        finally:
            if tracker.state is None:
                self._history.release(tracker)

    def dispatch_all(self, jobs: Iterable[Any], *, lookahead: int = 1000) -> Iterator[Any]:
        """Dispatch jobs of mixed priorities; a full pool does not keep another pool's job from starting.

        Lazy: jobs are read and dispatched while the returned iterator is consumed. Leaving it early drops the jobs that
        were read and not yet accepted.

        Args:
            jobs: Any iterable of what `dispatch` takes, also an infinite one. An exception of its own, or of a job that
                cannot be dispatched, is raised when the jobs before it are dispatched.
            lookahead: How many jobs may be read and not yet accepted, at least 1. When so many wait for full pools,
                nothing is read until one of them is accepted.

        Returns:
            An iterator of trackers in the order of acceptance; within a pool that is the order of `jobs`.

        Blocking: each step until some job is accepted, without limit.
        """
        self._refuse_elsewhere()
        bound = validate.whole_number("lookahead", lookahead, at_least=1)
        if not isinstance(jobs, Iterable):
            raise ConfigTypeError(f"jobs must be iterable, not {jobs!r} of type {type(jobs).__name__}")
        source = iter(jobs)
        return iter(Feeder(map(self._reserved, source), bound, self._forget))

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        priority: int | None = None,
        ordered: bool = True,
        chunksize: int | Literal["auto"] = "auto",
        buffersize: int | None = None,
        timeout: float | None = None,
        progress: bool | Callable[[MapProgress], object] = False,
    ) -> Results:
        """Call `fn` with the items of the iterables in the workers of one pool, and iterate over the results.

        Lazy on both sides: items are read, sent and waited for while the returned iterator is consumed, so the
        iterables may be endless. Short items travel in chunks of some milliseconds, which count as one job each in
        statistics and barriers; long ones go alone.

        An item that fails raises in its place with its own traceback, and the next `next()` goes on with the item
        after it. A worker that dies fails the item it ran; the rest of its chunk runs elsewhere. The pool's retry
        policy applies to each item.

        Args:
            fn: Called with one item of each iterable.
            *iterables: At least one; the shortest ends the map. An exception of theirs is raised after the results of
                the items before it.
            priority: The pool; by default the only pool, else pool 0.
            ordered: Give results in the order of the items; False gives them as chunks are done.
            chunksize: Items in a chunk, at least 1; "auto" learns it from how long the items take.
            buffersize: How many items may be read and not yet given out, at least 1. By default 1,000, or some
                chunks for each worker if that is more, and nothing is read while 256 MiB of results wait.
            timeout: Longest run of one item in seconds; by default the pool's.
            progress: True draws a bar on standard error, as the dispatcher's `progress` does; a function is called with
                a `MapProgress` five times a second. From the first `next()` to the map's end.

        Returns:
            An iterator. Leaving it early, dropping it or its `close()` ends the map: no further item begins; one that
            runs runs to its end.

        Raises:
            ConfigError, UnknownPriority, JobNotPicklable: An argument cannot work; nothing was read.

        Blocking: each step until a result is there, without limit.
        Concurrency: one thread at a time.
        Not guaranteed: when a worker dies, items that had ended before the one it ran and took less than some 50
            microseconds may run again. With automatic chunks also the one that it ran, if those before it took less
            than a microsecond each; it has succeeded if it comes through then.

        Example:
            >>> with Dispatcher([(0, 2)]) as disp:
            ...     list(disp.map(pow, [2, 3, 4], [5, 2, 1]))
            [32, 9, 4]
        """
        self._refuse_elsewhere()
        options = MapOptions(ordered, chunksize, buffersize, timeout)
        pool = self._default_pool if priority is None else self._pool_of(priority)
        display = None
        if progress is not False or self._displays:
            _check_progress(progress)
            display = self._display().map(progress)
        return Results.of(pool or self._pool_of(None), fn, iterables, options, display)

    def executor(self, priority: int | None = None) -> PoolExecutor:
        """Return one pool as a `concurrent.futures.Executor`, for code that is written against that interface.

        `submit` waits for nothing: what it is given waits in line with the callers of `dispatch`, bounded by memory
        alone. The pool's timeout and retry policy apply, and barriers wait for these jobs, too.

        Args:
            priority: The pool; by default the only pool, else pool 0.

        Returns:
            A new executor. Its `shutdown` ends its own futures alone; the pool lives on.

        Raises:
            UnknownPriority: There is no such pool.

        Example:
            >>> with Dispatcher([(0, 2)]) as disp:
            ...     disp.executor().submit(pow, 2, 10).result()
            1024
        """
        from bulkhead.executor import PoolExecutor  # Why here: it imports what workers need not

        self._refuse_elsewhere()
        pool = self._default_pool if priority is None else self._pool_of(priority)
        return PoolExecutor(self, pool or self._pool_of(None))

    def share(self, obj: Any) -> Shared:
        """Place an object in shared memory once; every job that is given the handle gets the object.

        Large buffers in it (NumPy arrays, pandas and Arrow tables, anything that pickle protocol 5 passes out of band)
        are mapped by the workers, not copied, and read only there. Everything else is rebuilt for each job.

        Args:
            obj: Any picklable object. It is copied: later changes do not reach the jobs.

        Returns:
            The handle, for any argument of any job, also inside lists and dicts. Sending it takes a few hundred bytes.
            The memory is freed when the last handle is gone and no job is under way that was given it. A process that
            was forked meanwhile (by the caller, or for a pool with start method "fork") has a handle of its own.

        Raises:
            NoSharedMemory: There is no memory for it.
            JobNotPicklable: It cannot be pickled.

        Example:
            >>> with Dispatcher([(0, 2)]) as disp:
            ...     words = disp.share({"one": 1, "two": 2})
            ...     disp.dispatch(Job(sorted, words)).result()
            ['one', 'two']
        """
        self._refuse_elsewhere()
        return Shared(obj)

    def barrier(
        self, priority: int | None = None, *, timeout: float | None = None, check: bool = True
    ) -> BarrierReport:
        """Wait until every job dispatched before this call is settled.

        Jobs that other threads dispatch meanwhile are not waited for; retries of an earlier job are, and all that
        follows one in a chain or as a follow-up.

        Args:
            priority: The pool to wait for; None means all pools.
            timeout: Longest wait in seconds, at least 0; None waits without limit.
            check: Raise JobsFailed when a job of this phase failed.

        Returns:
            A frozen report: counts by final state per pool, the failed trackers in dispatch order, `elapsed` seconds.
            A phase is what was dispatched since the last barrier that returned; each failure is reported once.

        Raises:
            BarrierTimeout: Some jobs are unsettled; `pending` holds their ids. They go on running; call again.
            JobsFailed: An ExceptionGroup of this phase's failures. Every job has settled; the pools are usable.
            NestedDispatch: Called from inside a job.

        Blocking: until settled or `timeout`.
        Concurrency: any thread of the process that made the dispatcher, but not from inside a job (raises).
        Source: generation counting as in java.util.concurrent.CyclicBarrier.
        """
        from bulkhead.stats import BarrierReport

        self._refuse_elsewhere()
        began = time.monotonic()
        deadline = None if timeout is None else began + validate.seconds("timeout", timeout, zero=True)
        pools = list(self._pools.values())
        if priority is not None:
            pools = [self._pool_of(validate.whole_number("priority", priority))]
        phases = {pool: pool.close_phases() for pool in pools}
        if not all([pool.wait_for_phases(phases[pool], deadline) for pool in pools]):
            pending = [job for pool in pools for job in pool.unsettled_in(phases[pool])]
            if pending:
                _raise_pending(pending, timeout)
        done = {pool.config.priority: pool.report_phases(phases[pool]) for pool in pools}
        report = BarrierReport(
            pools={priority: _counts(ended) for priority, ended in done.items()},
            failed=_failures(done.values()),
            elapsed=time.monotonic() - began,
        )
        self._barriers.append(_mark(priority, began - self._epoch[0], report))
        if check and report.failed_count:
            _raise_failures(report)
        return report

    def finalize(self, *, timeout: float | None = None, cancel: bool = False) -> None:
        """Refuse new jobs, let accepted ones end, end all processes and threads. A second call does nothing.

        Args:
            timeout: Seconds that accepted jobs (delayed ones and retries included) have to end; then those that have
                not are cancelled. None waits without limit.
            cancel: Cancel at once what waits, end what runs.

        Blocking: until the jobs are done or `timeout`, then some seconds at most to end the processes. Done callbacks
            are waited for as well, within `timeout`; within a second after a cancellation.
        """
        self._refuse_elsewhere()
        deadline = None
        if timeout is not None:
            deadline = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
        self._end(cancel=cancel, deadline=deadline)
        self._finalizer.detach()
        _not_finalized.discard(self)

    def __enter__(self) -> Self:
        self._refuse_elsewhere()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finalize(cancel=error is not None)

    def job(self, id: Any) -> Tracker:  # noqa: A002 - the fixed public name
        """Return the tracker of a job that is live or settled not too long ago.

        Raises:
            JobNotFound: There is none; `job_id` holds the id.
        """
        return self._history.find(id)

    def jobs(self, state: JobState | str | None = None) -> list[Tracker]:
        """Return the known jobs, of one state if it is given, in the order of their dispatch.

        Raises:
            ConfigError: There is no such state.
        """
        if state is None:
            return list(self._history.jobs())
        try:
            wanted = JobState(state)
        except ValueError:
            states = [one.value for one in JobState]
            raise ConfigError(f"state must be one of {states}, not {state!r}") from None
        return [job for job in self._history.jobs() if job.status().state is wanted]

    def stats(self) -> DispatcherStats:
        """Return counters of every pool. Each pool's are of one moment; two pools' moments may differ."""
        self._refuse_elsewhere()
        from bulkhead.stats import DispatcherStats

        return DispatcherStats({priority: pool.stats() for priority, pool in self._pools.items()})

    def timeline(self) -> Timeline:
        """Return which worker ran what when, so far; also after `finalize`.

        Returns:
            Frozen data, with `save_html(path)` for a page of its own and `save_chrome_trace(path)` for Perfetto. Of
            each pool the last `max_timeline` attempts.

        Example:
            >>> with Dispatcher([(0, 2)]) as disp:
            ...     _ = disp.dispatch(Job(pow, 2, 10)).result()
            >>> [(span.function, span.outcome) for span in disp.timeline().spans]
            [('pow', 'succeeded')]
        """
        from bulkhead.instrumentation.timeline import Timeline
        from bulkhead.spans import BarrierMark

        self._refuse_elsewhere()
        marks = [BarrierMark(*fields) for fields in self._barriers.copy()]
        return Timeline.of([pool.past() for pool in self._pools.values()], marks, *self._epoch)

    def __reduce__(self) -> NoReturn:
        raise NestedDispatch(
            "a Dispatcher cannot be sent to a job: jobs cannot dispatch to the dispatcher that runs them; return what "
            "is to be done next and let the caller dispatch it"
        )

    def __repr__(self) -> str:
        return (
            f"<Dispatcher {[(pool.config.priority, pool.config.n_workers) for pool in self._pools.values()]}>"
        )

    def _prepared(self, job: Any) -> tuple[ProcessPool | None, Tracker]:
        """Check a job, pickle it and find its pool; nothing is claimed yet.

        For what others follow None is returned instead of the pool; the tracker is its first job's and has a plan.
        """
        if self._depth != forks.depth:
            self._refuse_elsewhere()
        if self._journal is not None:
            job = self._journal.with_stand_ins(job)
        if type(job) is Job:
            # Why here too: it is on the way of every job.
            (fn, args, kwargs), options = job.call, job.checked
            name = fn.__qualname__ if type(fn) is FunctionType else name_of(fn)
        elif isinstance(job, Composition):
            return None, Plan(job, self._route, self._history, self._journal).head
        else:
            (fn, args, kwargs), options = call_of(job), options_of(job)
            name = name_of(fn, args)
        if options and ("on_success" in options or "on_failure" in options):
            return None, Plan(job, self._route, self._history, self._journal).head
        pool = self._pool_of(options["priority"]) if "priority" in options else self._default_pool
        if pool is None:
            pool = self._pool_of(None)
        config = pool.config
        payload = pool.pack(fn, args, kwargs, pool.segments)
        if self._journal is None or "id" not in options:
            tracker = Tracker(pool, payload, config.priority, config.timeout, config.retry)
        else:
            rest = config.priority, config.timeout, config.retry
            tracker = self._journal.tracker(pool, payload, *rest)
        tracker.function = name
        if options:
            self._apply(options, tracker)
        return pool, tracker

    def _recalled(self, job: Any) -> Tracker | None:
        """Return the tracker of a job that has succeeded before, or None."""
        assert self._journal is not None
        if type(job) is not Job or "id" not in job.checked or not job.checked.keys().isdisjoint(FOLLOW_UPS):
            return None
        if self._depth != forks.depth:
            self._refuse_elsewhere()
        pool = self._route(job.checked)
        pool.check_open()
        is_recorded, value = self._journal.recall(job.checked["id"])
        if not is_recorded:
            return None
        tracker = Tracker(pool, None, pool.config.priority)
        tracker.function = name_of_job(job)
        tracker.state, tracker.value, tracker.finished_at = JobState.SUCCEEDED, value, time.time()
        self._history.recall(job.checked["id"], tracker)
        return tracker

    def _end(self, *, cancel: bool, deadline: float | None) -> None:
        pools = list(self._pools.values())
        _end(pools, self._displays, self._journal, cancel=cancel, deadline=deadline)

    def _first_pool(self, plan: Plan) -> ProcessPool:
        return plan.links[0].pool if plan.links else cast(ProcessPool, self._nowhere)

    def _route(self, options: Options) -> ProcessPool:
        pool = self._pool_of(options["priority"]) if "priority" in options else self._default_pool
        return pool or self._pool_of(None)

    def _reserved(self, job: Any) -> tuple[ProcessPool, Tracker]:
        pool, tracker = self._prepared(job)
        if pool is None:
            tracker.plan.reserve()
            return self._first_pool(tracker.plan), tracker
        if tracker.id is not None:
            self._history.reserve(tracker.id, tracker)
        return pool, tracker

    def _forget(self, tracker: Tracker) -> None:
        """Undo `_reserved`."""
        if tracker.plan is not None:
            tracker.plan.withdraw()
        else:
            self._history.release(tracker)

    def _apply(self, options: Options, tracker: Tracker) -> None:
        tracker.timeout = options.get("timeout", tracker.timeout)
        tracker.retry = options.get("retry", tracker.retry)
        if "delay" in options or "not_before" in options or "start_deadline" in options:
            tracker.due, tracker.start_by = times_of(options)
        tracker.id = options.get("id")

    def _display(self) -> Displays:
        from bulkhead.instrumentation.progress import Displays

        if not self._displays:
            self._displays.append(Displays(self._pools.values()))
        return self._displays[0]

    def _pool_of(self, priority: int | None) -> ProcessPool:
        if priority is None:
            priority = 0
        try:
            return self._pools[priority]
        except (KeyError, TypeError):
            known = tuple(self._pools)
            raise UnknownPriority(
                f"priority {priority!r} has no pool; this dispatcher has pools {list(known)}",
                priority=priority,
                known=known,
            ) from None

    def _refuse_elsewhere(self) -> None:
        if self._depth != forks.depth:
            raise NestedDispatch(
                "this Dispatcher belongs to another process: a job cannot dispatch, wait at a barrier or finalize; "
                "return what is to be done next and let the caller dispatch it"
            )


def _accepted(
    head: Tracker, offer: Callable[[], bool]
) -> tuple[bool, Tracker | GroupTracker | ChainTracker | None]:
    """Have all of a plan accepted if its first job is; return the handle on the whole, too."""
    plan = head.plan
    try:
        plan.reserve()
        plan.promise()
        is_accepted = offer()
    finally:
        if head.state is None:
            plan.withdraw()
    return is_accepted, plan.handed_over() if is_accepted else None


def _opened(path: str | os.PathLike[str]) -> Journal:
    from bulkhead.journal import Journal  # Why here: it imports sqlite3, and every worker imports this

    return Journal(path)


def _full(pool: ProcessPool, timeout: float | None) -> PoolFull:
    return PoolFull(f"no worker of {pool.config.label} came free within {timeout} s")


def _check_progress(option: object) -> None:
    from bulkhead.instrumentation.progress import checked

    checked(option)


def _end(
    pools: list[ProcessPool],
    displays: list[Displays],
    journal: Journal | None,
    *,
    cancel: bool,
    deadline: float | None,
) -> None:
    """Tear pools down; an interrupt on the way cancels what is left and is raised when everything is down."""
    try:
        _end_pools(pools, cancel=cancel, deadline=deadline)
    finally:
        with calm():
            for display in displays:
                display.end()
            if journal is not None:
                journal.close()


def _end_pools(pools: list[ProcessPool], *, cancel: bool, deadline: float | None) -> None:
    try:
        for pool in pools:
            pool.refuse()
        if not cancel and not all([pool.drain(deadline) for pool in pools]):
            _log.warning("finalize ran out of time and cancels the jobs that are left")
            cancel = True
        _tear_down(pools, cancel=cancel, deadline=deadline)
    except BaseException:
        _tear_down(pools, cancel=True, deadline=time.monotonic())
        raise


def _tear_down(pools: list[ProcessPool], *, cancel: bool, deadline: float | None) -> None:
    if cancel:
        for pool in pools:
            pool.cancel_all()
        unwound = time.monotonic() + _UNWIND
        for pool in pools:
            pool.drain(unwound)
        deadline = time.monotonic() + _LAST_CALLBACKS
    for pool in pools:
        pool.dismiss()
    for pool in pools:
        pool.stop(deadline)


def _dropped(pools: list[ProcessPool], displays: list[Displays], journal: Journal | None, pid: int) -> None:
    """Tear down a dispatcher that nobody refers to any more: accepted jobs end, then the processes."""
    if os.getpid() == pid:
        # Why a thread: the garbage collector may call this anywhere, under a pool's lock as well. Not a daemon, so that
        # the interpreter waits for it.
        threading.Thread(
            target=_end,
            args=(pools, displays, journal),
            kwargs={"cancel": False, "deadline": None},
            name="bulkhead-dropped",
        ).start()
        warnings.warn("a Dispatcher was dropped without finalize()", ResourceWarning, stacklevel=2)


@atexit.register
def _finalize_forgotten() -> None:
    """Finalize what the script has not, when the interpreter exits: as `with` does, cancelling after an exception."""
    has_failed = getattr(sys, "last_value", None) is not None
    for dispatcher in list(_not_finalized):
        if dispatcher._pid == os.getpid():
            dispatcher.finalize(cancel=has_failed)


def _warn_of_threads(configs: list[Pool]) -> None:
    others = [t.name for t in threading.enumerate() if not t.name.startswith("bulkhead-")][1:]
    if others and any(config.start_method == "fork" for config in configs):
        warnings.warn(
            f"start_method='fork' copies a process that has other threads ({', '.join(others)}); a lock that one of "
            "them holds stays locked in the workers for ever. Make the Dispatcher first, or use 'forkserver'",
            RuntimeWarning,
            stacklevel=3,
        )


def _counts(phases: list[Phase]) -> PhaseCounts:
    from bulkhead.stats import PhaseCounts

    return PhaseCounts(
        succeeded=sum(phase.succeeded for phase in phases),
        failed=sum(phase.failed for phase in phases),
        cancelled=sum(phase.cancelled for phase in phases),
    )


def _mark(priority: int | None, began: float, report: BarrierReport) -> tuple[Any, ...]:
    return priority, began, began + report.elapsed, report.succeeded, report.failed_count, report.cancelled


def _failures(phases_of_pools: Iterable[list[Phase]]) -> tuple[Tracker, ...]:
    failed: list[Any] = [job for phases in phases_of_pools for phase in phases for job in phase.failures]
    return tuple(sorted(failed, key=lambda job: job.queued_at))


def _raise_pending(pending: list[Any], timeout: float | None) -> NoReturn:
    # Why not all: a follow-up has no id before it is known whether it will run.
    known = [job for job in pending if job.queued_at is not None]
    ids = tuple(job.id for job in sorted(known, key=lambda job: job.queued_at))
    named = ", ".join(map(shown, ids[:10])) + (", …" if len(ids) > 10 else "")
    raise BarrierTimeout(f"{len(pending)} jobs have not settled within {timeout} s: {named}", pending=ids)


def _raise_failures(report: BarrierReport) -> NoReturn:
    ids = tuple(job.id for job in report.failed)
    named = ", ".join(map(shown, ids[:10])) + (", …" if report.failed_count > 10 else "")
    raise JobsFailed(
        f"{report.failed_count} jobs failed: {named}",
        [_groupable(job) for job in report.failed],
        job_ids=ids,
        total=report.failed_count,
    )


def _groupable(job: Tracker) -> Exception:
    error = job.error
    assert error is not None
    if is_of(error, Exception):
        assert isinstance(error, Exception)
        return error
    return RemoteError(
        f"{type(error).__qualname__}: {error}"
    )  # pragma: no cover - payload wraps these already
