"""`App`: an application's tasks and queues, what can be asked of them, and the worker that runs them.

    app = App("sqlite:///jobs.db")

    @app.task(queue="thumbnails", concurrency=4, timeout=60)
    def thumbnail(path): ...

    thumbnail.enqueue("a.jpg")     # in any process
    app.run()                      # in a worker: `bulkhead worker module:app`

Making an App connects to nothing: worker processes import the module that makes it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from bulkhead import backends, forks, validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead.backends.base import Backend, CancelAnswer, QueueCounts
from bulkhead.errors import (
    BrokerUnavailable,
    ConfigError,
    ConfigTypeError,
    DuplicateJobId,
    JobNotFound,
    WaitTimeout,
)
from bulkhead.retry import Backoff
from bulkhead.service import context
from bulkhead.service.asking import Asking
from bulkhead.service.catalog import Catalog
from bulkhead.service.dead_letters import KEEP_DEAD, MAX_DEAD
from bulkhead.service.envelope import CodecName, Sealer
from bulkhead.service.groups import KEEP, Groups, GroupStatus
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.heartbeat import ConsumerInfo, consumers
from bulkhead.service.schedules import Schedule, Schedules
from bulkhead.service.status import QueuedJob, from_outcome
from bulkhead.service.submitting import Submitting
from bulkhead.service.task import DEFAULT_BACKOFF, Call, Callback, Task, TaskOptions, job_id
from bulkhead.service.telling import last_outcome
from bulkhead.service.timing import Missed

if TYPE_CHECKING:
    from bulkhead.service.consumer import Consumer

__all__ = ["App"]

P = ParamSpec("P")
R = TypeVar("R")

# A round trip carries so many jobs.
_PER_CALL = 1000

# How often a wait for a job looks (seconds): first, and at most.
_FIRST_LOOK = 0.005
_LAST_LOOK = 0.1

# For how long an id stays taken after the job that had it is settled, where somebody may use it again (seconds).
_REMEMBER = 86400.0

# Bounds of a lease (seconds). What is longer than 30 days is meant in other units.
_SHORTEST_LEASE = 0.1
_LONGEST_LEASE = 30 * 86400.0


class App:
    """An application: its tasks by name, its queues, and where their jobs are kept.

    Args:
        url: Where jobs are kept: `sqlite:///jobs.db`, `redis://host:6379/0`, `nats://host:4222`, `memory://`; see
            `bulkhead.backends`.
        results: Where outcomes are kept, if elsewhere.
        namespace: Applications of different namespaces do not see each other's jobs.
        codec: How arguments and results are written: "msgpack", "json", or "pickle", which needs a key.
        key: A secret of at least 16 bytes that producers and workers share. Messages are signed with it, and those
            that are not are never read: they become dead letters.
        lease: For how many seconds a worker's right to a job holds unless it renews it, which it does all the time:
            after so long without a sign of life its jobs run elsewhere. From 0.1 s to 30 days.
        max_dead: So many dead letters are kept at most, over all queues; None keeps all. Workers delete the oldest
            beyond that once a minute.
        keep_dead: For so many seconds each is kept, half a year by default; None is for ever.
        middlewares: Around what is enqueued, dequeued and run; the first is outermost.

    Raises:
        ConfigError: A value cannot work. Nothing was connected.

    Concurrency: any thread, and any process that imports or forks it.
    """

    def __init__(
        self,
        url: str,
        *,
        results: str | None = None,
        namespace: str = "bulkhead",
        codec: CodecName = "msgpack",
        key: bytes | str | None = None,
        lease: float = 30.0,
        max_dead: int | None = MAX_DEAD,
        keep_dead: float | None = KEEP_DEAD,
        middlewares: Sequence[Middleware] = (),
    ) -> None:
        backends.check(url, namespace)
        if results is not None:
            try:
                backends.check(results, namespace)
            except ConfigError as error:
                raise type(error)(f"results: {error}") from None
        self.url = url
        self.results_url = results
        self.namespace = namespace
        self.sealer = Sealer(namespace, key, codec)
        self.lease = validate.seconds("lease", lease)
        if not _SHORTEST_LEASE <= self.lease <= _LONGEST_LEASE:
            raise ConfigError(f"lease must be {_SHORTEST_LEASE} s to {_LONGEST_LEASE:.0f} s, not {lease!r}")
        self.max_dead = None if max_dead is None else validate.whole_number("max_dead", max_dead, at_least=0)
        self.keep_dead = None if keep_dead is None else validate.seconds("keep_dead", keep_dead)
        self.middlewares = _middlewares(middlewares)
        self.catalog = Catalog()
        self.submitting = Submitting(self)
        self._asking = Asking(self)
        self._connected: tuple[int, Backend] | None = None  # with the number of forks before it
        self._locks: dict[int, threading.Lock] = {}
        self._schedules = Schedules(self)
        self._groups = Groups(self)
        for middleware in self.middlewares:
            _claim_middleware(middleware, self)
            middleware.attach(self)
        self._consumers: dict[Consumer, None] = {}  # those that run

    # Tasks and queues

    @overload
    def task(self, fn: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        fn: None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        concurrency: int | None = None,
        priority: int = 0,
        max_retries: int = 3,
        timeout: float | None = None,
        backoff: Backoff | None = None,
        keep_result: float = 86400.0,
        on_processing: Callback | None = None,
        on_success: Callback | None = None,
        on_retry: Callback | None = None,
        on_failure: Callback | None = None,
    ) -> Callable[[Callable[P, R]], Task[P, R]]: ...
    def task(
        self,
        fn: Any = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        concurrency: int | None = None,
        priority: int = 0,
        max_retries: int = 3,
        timeout: float | None = None,
        backoff: Backoff | None = None,
        keep_result: float = 86400.0,
        on_processing: Callback | None = None,
        on_success: Callback | None = None,
        on_retry: Callback | None = None,
        on_failure: Callback | None = None,
    ) -> Any:
        """Make a function a task: `@app.task` or `@app.task(queue="slow", timeout=60)`.

        Args:
            fn: The function, at the top level of an importable module.
            name: By which jobs refer to it; the function's own by default.
            queue: Where its jobs wait. All tasks of a queue share one pool of workers.
            concurrency: How many jobs of the queue a worker runs at once, see `queue`; said once for each queue, or
                always the same.
            priority: Within the queue, -100 to 100; larger ones start first.
            max_retries: How many attempts may follow the first one. A dead letter remains after the last.
            timeout: Longest run of one attempt in seconds; then its process is ended.
            backoff: Pauses between attempts; by default 1 s x 1.6 ± 20 % up to an hour.
            keep_result: Seconds for which the outcome is kept; 0 keeps none.
            on_processing: Called in the worker's main process as `on_processing(job)` when an attempt is given out.
            on_success: Called as `on_success(job)` after it has succeeded.
            on_retry: Called as `on_retry(job, failure)` after an attempt that will be followed by another.
            on_failure: Called as `on_failure(job, failure)` after the last one. Callbacks hold up their queue as long
                as they run; one that raises is logged.

        Raises:
            ConfigError: A value cannot work, the name is taken, or the queue has another concurrency.
        """
        options = TaskOptions(
            queue=queue,
            priority=priority,
            max_retries=max_retries,
            timeout=timeout,
            backoff=DEFAULT_BACKOFF if backoff is None else backoff,
            keep_result=keep_result,
            on_processing=on_processing,
            on_success=on_success,
            on_retry=on_retry,
            on_failure=on_failure,
        )
        add = partial(self.catalog.add_task, self, given=name, concurrency=concurrency, options=options)
        return add if fn is None else add(fn)

    def queue(self, queue: str, *, concurrency: int | None = None, **pool: Any) -> None:
        """Say how a queue's jobs are run: by how many processes, and what else `Pool` knows.

        Args:
            queue: Its name.
            concurrency: Number of worker processes, so of jobs that run at once; one for each CPU by default.
            **pool: Options of `Pool` such as max_jobs_per_worker, hard_memory_limit, initializer, start_method.

        Raises:
            ConfigError: A value cannot work, or the queue was given other values before.
        """
        self.catalog.add_queue(queue, pool if concurrency is None else {**pool, "concurrency": concurrency})

    def tasks(self) -> dict[str, Task[..., Any]]:
        """Return the tasks by name."""
        return dict(self.catalog.tasks)

    def call(self, task: str, /, *args: Any, **kwargs: Any) -> Call:
        """Return a job of the task with this name, as `task.call` does.

        Raises:
            UnknownTask: There is none.
        """
        return self.find_task(task).call(*args, **kwargs)

    def find_task(self, task: str) -> Task[..., Any]:
        """Return the task with this name.

        Raises:
            UnknownTask: There is none.
        """
        return self.catalog.find_task(task)

    # Enqueueing

    def enqueue(self, call: Call) -> str:
        """Enqueue a job and return its id.

        Raises:
            DuplicateJobId: Its id is taken, or a middleware found a job that stands for it; that job's id is in
                `job_ids`. Nothing was enqueued.
            ConfigTypeError: Its arguments cannot be encoded.
            MessageTooLarge: They are larger than the server takes.
            BrokerUnavailable: The server cannot be reached.
        """
        return self.enqueue_many([call])[0]

    def enqueue_many(
        self, calls: Iterable[Call], *, existing: Literal["refuse", "keep"] = "refuse"
    ) -> list[str]:
        """Enqueue jobs, a round trip for each 1000, and return their ids in order.

        Args:
            calls: The jobs. All of them are checked and encoded before the first is enqueued.
            existing: What happens with a job whose id is taken, or for which another stands: "keep" gives the id of
                that one, "refuse" raises when the others are enqueued.

        Raises:
            DuplicateJobId: See `existing`; `job_ids` has the ids that were taken. The others are enqueued.
            ConfigTypeError, MessageTooLarge, BrokerUnavailable: See `enqueue`.
        """
        if existing not in ("refuse", "keep"):
            raise ConfigError(f"existing must be 'refuse' or 'keep', not {existing!r}")
        submissions = [self.submitting.submission(call) for call in validate.several("calls", calls)]
        if not submissions:
            return []
        self.submitting.submit(submissions)
        taken = [one.duplicate_of for one in submissions if one.duplicate_of is not None]
        if taken and existing == "refuse":
            raise DuplicateJobId(
                f"{len(taken)} of {len(submissions)} jobs exist already and were not enqueued again, "
                f"the first of them as {taken[0]!r}",
                job_ids=tuple(taken),
            )
        return [one.id if one.duplicate_of is None else one.duplicate_of for one in submissions]

    # Asking

    def job(self, id: str) -> QueuedJob:  # noqa: A002 - as of Dispatcher.job
        """Return what is known of a job.

        Raises:
            JobNotFound: Nothing is: it never existed, or its outcome is no longer kept.
        """
        return self.find_jobs([id])[0] or _raise_unknown(id)

    def find_jobs(self, ids: Sequence[str]) -> list[QueuedJob | None]:
        """Return what is known of several jobs, in order; None for one of which nothing is."""
        return self._asking.find(ids)

    def jobs(
        self, state: JobState | str, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[QueuedJob]:
        """Return jobs in a state.

        Args:
            state: "queued" (in the order in which they will start), "scheduled" (by due time; also those that wait
                for another attempt), "running", "succeeded", "failed" or "cancelled" (the last one first).
            queue: Of this queue alone.
            offset: How many to leave out, at least 0.
            limit: How many at most, 1 to 10,000.

        Raises:
            ConfigError: A value cannot work.
        """
        return self._asking.page(state, queue, offset, limit)

    def queues(self) -> dict[str, QueueCounts]:
        """Return the counts of each queue: those of this application, and others that hold jobs."""
        counts = dict(self.backend.broker.counts())
        return {queue: counts.get(queue, QueueCounts()) for queue in sorted({*counts, *self.queue_names()})}

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state, over all queues."""
        return self._asking.counts()

    def result(self, id: str, *, timeout: float = 0.0) -> Any:  # noqa: A002 - as above
        """Return what a job has returned, or saved by `current_job().save()`.

        Args:
            id: The job.
            timeout: Seconds to wait for its end.

        Raises:
            RemoteError: It has failed; with the type, text and traceback of what it raised.
            JobCancelled: It was cancelled.
            ResultNotFound: It has not ended, and saved nothing yet.
            JobNotFound: Nothing is known of it: it never existed, or its outcome is no longer kept.
            BadMessage: What is kept cannot be read, or is not signed with the application's key.

        Blocking: up to `timeout`; by default not.
        """
        if timeout:
            self.wait(id, timeout=timeout)
        return self._asking.result(id)

    def wait(self, id: str, *, timeout: float) -> QueuedJob:  # noqa: A002 - as above
        """Wait until a job has succeeded, failed or was cancelled, and return what is known of it.

        Raises:
            WaitTimeout: It has not within `timeout` seconds.
            JobNotFound: Nothing is known of it.

        Blocking: up to `timeout`; it looks every 5 to 100 ms.
        """
        deadline = time.monotonic() + validate.seconds("timeout", timeout, zero=True)
        pause = _FIRST_LOOK
        while not (job := self.job(id)).is_settled:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"job {id!r} has not settled within {timeout} s; it is {job.state}")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LAST_LOOK)
        return job

    def delete_result(self, id: str) -> bool:  # noqa: A002 - as above
        """Forget a job's outcome; False if none is kept."""
        return self.backend.results.delete([job_id(id)])[0]

    # Changing

    def cancel(self, id: str) -> bool:  # noqa: A002 - as above
        """Cancel a job, from any process. A running one is ended within about a second, its process with it.

        Returns:
            False when it has ended already.

        Raises:
            JobNotFound: Nothing is known of it.
        """
        job = self.job(id)
        answer = self.backend.broker.cancel([id])[0]
        if answer is CancelAnswer.REMOVED and job.keep_result:
            self.backend.results.save_many([job.cancelled()])
        return answer is not CancelAnswer.UNKNOWN

    def pause(self, queue: str) -> None:
        """Let no job of a queue start, in any worker, until `resume`; also over restarts. Running ones go on."""
        self.backend.broker.pause(self.catalog.known_queue(queue))

    def resume(self, queue: str) -> None:
        """Undo `pause`."""
        self.backend.broker.resume(self.catalog.known_queue(queue))

    def paused(self) -> frozenset[str]:
        """Return the names of the queues that are paused."""
        return self.backend.broker.paused()

    def consumers(self) -> list[ConsumerInfo]:
        """Return the workers that live, if they have the middleware `Heartbeat`: where they are and what they do."""
        return consumers(self)

    def dead(self, *, queue: str | None = None, offset: int = 0, limit: int = 100) -> list[QueuedJob]:
        """Return dead letters, the last one first; `reason` says why. Messages that cannot be read are among them.

        Raises:
            ConfigError: A value cannot work.
        """
        return self._asking.dead_page(queue, offset, limit)

    def retry_dead(self, id: str) -> None:  # noqa: A002 - as above
        """Enqueue a dead letter anew, with all its attempts.

        Raises:
            JobNotFound: There is no dead letter with this id.
        """
        if not self._asking.revive([job_id(id)])[0]:
            raise JobNotFound(f"there is no dead letter {id!r}", job_id=id)

    def retry_all_dead(self, *, queue: str | None = None) -> int:
        """Enqueue all dead letters anew, of one queue or of all; return how many."""
        return self._asking.each_dead(queue, self._asking.revive)

    def delete_dead(self, id: str) -> None:  # noqa: A002 - as above
        """Delete a dead letter.

        Raises:
            JobNotFound: There is no dead letter with this id.
        """
        if not self.backend.broker.delete([job_id(id)], dead_only=True)[0]:
            raise JobNotFound(f"there is no dead letter {id!r}", job_id=id)

    def delete_all_dead(self, *, queue: str | None = None) -> int:
        """Delete all dead letters, of one queue or of all; return how many."""
        return self._asking.each_dead(queue, partial(self.backend.broker.delete, dead_only=True))

    # Groups and chains

    def enqueue_group(
        self,
        calls: Iterable[Call],
        *,
        id: str | None = None,  # noqa: A002 - as of Job.options
        keep: float = KEEP,
    ) -> str:
        """Enqueue jobs that are asked for together, all or none, and return the group's id.

        They wait as one message in the queue of the first of them until a worker has taken it apart; that is the next
        thing it does. Their ids are `<id>.0`, `<id>.1` and so on; delays count from then.

        Args:
            calls: The jobs, of any queues; none to 100,000, without ids of their own.
            id: Own id, up to 180 characters, instead of a random one. It may not end with "." and digits, as those of
                jobs of groups do.
            keep: For how many seconds from then the group is known, and its jobs' outcomes are kept at least:
                choose it longer than they take. Later the group is JobNotFound, and its jobs are as any others.

        Raises:
            DuplicateJobId: Its id is taken. Nothing was enqueued.
            ConfigError: A value cannot work. Nothing was enqueued.
            MessageTooLarge: All jobs together are larger than one message of the server may be. Nothing was enqueued.
            BrokerUnavailable: The server cannot be reached. All or nothing was enqueued; with an own id, ask or repeat.
        """
        return self._groups.enqueue_group(calls, id, keep)

    def enqueue_chain(
        self,
        calls: Iterable[Call],
        *,
        id: str | None = None,  # noqa: A002 - as above
        keep: float = KEEP,
    ) -> str:
        """Enqueue jobs that run one after the other, and return the chain's id.

        Each gets the result of the one before, None too, as its first argument and as `current_job().previous`. When
        one fails for good or is cancelled, those after it do not run: the chain has failed or is cancelled. A dead
        letter of it that is retried and succeeds goes on with the chain.

        Args:
            calls: 1 to 100 jobs, of any queues, without ids of their own; what else follows them follows, too.
            id: See `enqueue_group`; so for `keep`, and for what is raised.
            keep: See there.
        """
        return self._groups.enqueue_chain(calls, id, keep)

    def group_status(self, id: str) -> GroupStatus:  # noqa: A002 - as above
        """Return what has become of a group or chain, worked out from its jobs: two round trips for each 1000.

        A job that was removed by hand, or its outcome, counts as cancelled.

        Raises:
            JobNotFound: It never existed, or its time is over; see `keep`.
        """
        return self._groups.status(id)

    def wait_group(self, id: str, *, timeout: float) -> GroupStatus:  # noqa: A002 - as above
        """Wait until all jobs of a group or chain have settled.

        Raises:
            WaitTimeout: They have not within `timeout` seconds.
            JobNotFound: See `group_status`.

        Blocking: up to `timeout`.
        """
        return self._groups.wait(id, timeout)

    def group_results(self, id: str, *, timeout: float = 0.0) -> list[Any]:  # noqa: A002 - as above
        """Return what the jobs of a group or chain have returned, in order; of a chain the last is its result.

        Args:
            id: The group or chain.
            timeout: Seconds to wait for its end.

        Raises:
            JobsFailed: Jobs have failed or were cancelled; `exceptions` has up to 100 of them, `job_ids` theirs.
            ResultNotFound: It has not ended.
            WaitTimeout: Nor within `timeout` seconds.
            JobNotFound: See `group_status`.
        """
        return self._groups.results(id, timeout)

    def cancel_group(self, id: str) -> bool:  # noqa: A002 - as above
        """Cancel the jobs of a group or chain that have not ended; False when all have.

        Raises:
            JobNotFound: See `group_status`.

        Blocking: for a chain until its running job has ended, 10 seconds at most.
        """
        return self._groups.cancel(id)

    # Schedules

    def schedule(
        self, name: str, when: str, call: Call, *, tz: str | tzinfo = "UTC", missed: Missed = "once"
    ) -> None:
        """Declare a job that comes again and again. Nothing is connected: a worker keeps it when it starts.

        A declaration that was changed takes the place of the old one when a worker starts; the schedule goes on where
        it was if its times are the same, and a paused one stays paused. One that is taken out of the code goes on until
        `cancel_schedule`; one that is cancelled while it is in the code is back when the next worker starts. Runs are
        enqueued by workers that have the task.

        Args:
            name: Of the schedule, up to 150 characters.
            when: Five cron fields ("30 2 * * mon-fri"), "@hourly", "@daily", "@midnight", "@weekly", "@monthly",
                "@yearly", or "@every" with a duration of at least a second, such as "@every 1h30m": the first run
                is so long after the schedule was first kept, and the others follow at whole multiples.
            call: The job. Each run has the id `schedule:<name>:<due in POSIX milliseconds>`.
            tz: In which cron fields are meant: "Europe/Berlin" or a ZoneInfo. A time that a day does not have comes
                when the gap ends; one that it has twice comes the first time, unless the minute or the hour begins
                with "*".
            missed: What becomes of runs that no worker enqueued before the next one was due, or within 30 seconds:
                "once" enqueues the last of them, "skip" none, "all" each of them, at most the last 1000.

        Raises:
            ConfigError: A value cannot work, or there is another schedule of this name in the code.
        """
        self._schedules.declare(name, when, call, tz, missed)

    def add_schedule(
        self, name: str, when: str, call: Call, *, tz: str | tzinfo = "UTC", missed: Missed = "once"
    ) -> None:
        """Keep a schedule now, from any process, in the place of one with this name; see `schedule`.

        Raises:
            ConfigError: A value cannot work.
            BrokerUnavailable: The server cannot be reached.
        """
        self._schedules.add(name, when, call, tz, missed)

    def put_schedules(self) -> None:
        """Keep the declared schedules, as a worker does when it starts."""
        self._schedules.put_declared()

    def schedules(self) -> list[Schedule]:
        """Return all schedules that are kept, by name."""
        return self._schedules.all()

    def pause_schedule(self, name: str) -> None:
        """Let a schedule enqueue nothing until `resume_schedule`; also over restarts.

        Raises:
            ScheduleNotFound: There is none of this name.
        """
        self._schedules.pause(name)

    def resume_schedule(self, name: str) -> None:
        """Undo `pause_schedule`. Times that came meanwhile are not caught up with.

        Raises:
            ScheduleNotFound: There is none of this name.
        """
        self._schedules.resume(name)

    def cancel_schedule(self, name: str) -> None:
        """Forget a schedule. Jobs that it has enqueued stay.

        Raises:
            ScheduleNotFound: There is none of this name.
        """
        self._schedules.cancel(name)

    # Running

    def run(self, queues: Iterable[str] | None = None, *, grace: float = 30.0) -> None:
        """Be a worker: run the jobs of these queues until SIGTERM, SIGINT, SIGHUP or `stop`.

        At the first signal nothing further begins; jobs that run have `grace` seconds to end and are given back
        otherwise, their processes ended. A second signal gives them back at once.

        Args:
            queues: Their names; all of the application's by default.
            grace: Seconds, at least 0.

        Raises:
            UnknownQueue: There is no such queue.
            ConfigError: A task cannot be found by worker processes: it is no function at the top level of a module.
            BrokerUnavailable: The server cannot be reached at the start. Later that is waited for.
            PoolBroken: The worker processes of a queue do not come up. What was claimed is given back.

        Blocking: until a signal or `stop`. Signals are handled when this is the main thread.
        Concurrency: several calls in several threads are workers of their own.
        """
        grace = validate.seconds("grace", grace, zero=True)
        consumer = self._consumer(self.catalog.chosen(queues))
        self._consumers[consumer] = None
        try:
            consumer.run(grace=grace)
        finally:
            del self._consumers[consumer]

    def stop(self) -> None:
        """Let each `run` that has begun, in other threads, end as at a signal. Where none has, nothing happens."""
        for consumer in list(self._consumers):
            consumer.stop()

    def run_once(self, queue: str = "default") -> QueuedJob | None:
        """Run the next job of a queue, if one is due, and return what has become of it (it may have to be retried).

        Raises:
            UnknownQueue: There is no such queue.

        Blocking: as long as the job runs.
        """
        done = self._consumer(self.catalog.chosen([queue]), 1).run_once()
        return None if done is None else self.find_jobs([done.id])[0] or from_outcome(last_outcome(done))

    def _consumer(self, queues: Sequence[str], n_workers: int | None = None) -> Consumer:
        # Why here: neither who only enqueues needs it, nor worker processes, which import this module, too.
        from bulkhead.service.consumer import Consumer

        return Consumer(self, queues, n_workers)

    def close(self) -> None:
        """End the connections. The next call connects anew."""
        with self._lock:
            held, self._connected = self._connected, None
        if held is not None and held[0] == forks.depth:
            held[1].close()

    @property
    def backend(self) -> Backend:
        """Where jobs are kept; connected when it is asked for.

        Raises:
            MissingExtra, BrokerUnavailable: See `bulkhead.backends.connect`.
        """
        held = self._connected
        if held is not None and held[0] == forks.depth:
            return held[1]
        with self._lock:
            if self._connected is None or self._connected[0] != forks.depth:
                self._connected = forks.depth, self._connect()
            return self._connected[1]

    @property
    def _lock(self) -> threading.Lock:
        """Guards connecting. Race: a forked copy makes its own, as a thread that it does not have may hold this one."""
        return self._locks.setdefault(forks.depth, threading.Lock())

    def __repr__(self) -> str:
        # Why not the URL: it may hold a password.
        return f"<App {self.namespace}: {len(self.catalog.tasks)} tasks in {len(self.queue_names())} queues>"

    def queue_names(self) -> list[str]:
        """Return the names of the application's own queues."""
        return self.catalog.queue_names()

    def _connect(self) -> Backend:
        if context.running is not None and "memory://" in (self.url[:9], (self.results_url or "")[:9]):
            raise BrokerUnavailable(
                "memory:// keeps jobs in the process that made them, and this is one of its workers, whose jobs nobody "
                "would see: for tasks that use their application take sqlite://, redis:// or nats://"
            )
        jobs = backends.connect(self.url, self.namespace)
        if self.results_url in (None, self.url):
            return jobs
        try:
            elsewhere = backends.connect(self.results_url, self.namespace)
        except BaseException:
            jobs.close()
            raise
        return Backend(jobs.broker, elsewhere.results, jobs.registry, (jobs, elsewhere))


def _middlewares(given: Sequence[Middleware]) -> tuple[Middleware, ...]:
    made = tuple(validate.several("middlewares", given))
    for one in made:
        if not isinstance(one, Middleware):
            raise ConfigTypeError(f"middlewares must be instances of Middleware, not {one!r}")
    if len(set(map(id, made))) < len(made):
        raise ConfigError("middlewares must be different objects, and one of them is there twice")
    return made


def _claim_middleware(one: Middleware, app: App) -> None:
    """Check that no other application has this middleware: it keeps what it knows of one."""
    known = one.__dict__.get("_used_by")
    other = None if known is None else known()
    if other is not None:
        raise ConfigError(f"middlewares must be made for each application, and {one!r} is used by {other!r}")
    object.__setattr__(one, "_used_by", weakref.ref(app))  # Why so: it may be a frozen dataclass


def _raise_unknown(id: str) -> Any:  # noqa: A002
    raise JobNotFound(
        f"there is no job {id!r}: it never existed, or its outcome is no longer kept", job_id=id
    )
