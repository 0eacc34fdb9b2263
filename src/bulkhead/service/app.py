"""`App`: an application's tasks and queues, what can be asked of them, and the worker that runs them.

    app = App("sqlite:///jobs.db")

    @app.task(queue="thumbnails", concurrency=4, timeout=60)
    def thumbnail(path): ...

    thumbnail.enqueue("a.jpg")     # in any process
    app.run()                      # in a worker: `bulkhead worker module:app`

Making an App connects to nothing: worker processes import the module that makes it.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import tzinfo
from typing import Any, Literal, ParamSpec, TypeVar, overload

import msgspec

from bulkhead import backends, forks, validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead.backends.base import Backend, CancelAnswer, Message, OutcomeState, Place, QueueCounts
from bulkhead.config import Pool
from bulkhead.errors import (
    BrokerUnavailable,
    BulkheadError,
    ConfigError,
    ConfigTypeError,
    DuplicateJobId,
    JobCancelled,
    JobNotFound,
    RemoteError,
    ResultNotFound,
    UnknownQueue,
    UnknownTask,
    WaitTimeout,
)
from bulkhead.retry import Backoff
from bulkhead.service import context
from bulkhead.service.consumer import Consumer
from bulkhead.service.envelope import CodecName, Envelope, Failure, Follow, Sealer, encoded, failure
from bulkhead.service.groups import KEEP, Groups, GroupStatus
from bulkhead.service.middleware.base import Middleware, Submission
from bulkhead.service.middleware.heartbeat import ConsumerInfo, consumers
from bulkhead.service.schedules import Schedule, Schedules
from bulkhead.service.status import QueuedJob, from_outcome, from_record
from bulkhead.service.task import DEFAULT_BACKOFF, Call, Callback, Task, TaskOptions, job_id, name
from bulkhead.service.timing import Missed

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

_SHORTEST_LEASE = 0.1


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
            after so long without a sign of life its jobs run elsewhere. At least 0.1.
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
        middlewares: Sequence[Middleware] = (),
    ) -> None:
        backends.check(url, namespace)
        if results is not None:
            backends.check(results, namespace)
        self.url = url
        self.results_url = results
        self.namespace = namespace
        self.sealer = Sealer(namespace, key, codec)
        self.lease = validate.seconds("lease", lease)
        if self.lease < _SHORTEST_LEASE:
            raise ConfigError(f"lease must be at least {_SHORTEST_LEASE} s, not {lease!r}")
        self.middlewares = _middlewares(middlewares)
        self._tasks: dict[str, Task[..., Any]] = {}
        self._queues: dict[str, Mapping[str, Any]] = {}
        self._ids = _Ids()
        self._connected: tuple[int, Backend] | None = None  # with the number of forks before it
        self._locks: dict[int, threading.Lock] = {}
        self._schedules = Schedules(self)
        self._groups = Groups(self)
        for middleware in self.middlewares:
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
        if fn is None:
            return lambda fn: self._add_task(fn, name, concurrency, options)
        return self._add_task(fn, name, concurrency, options)

    def queue(self, queue: str, *, concurrency: int | None = None, **pool: Any) -> None:
        """Say how a queue's jobs are run: by how many processes, and what else `Pool` knows.

        Args:
            queue: Its name.
            concurrency: Number of worker processes, so of jobs that run at once; one for each CPU by default.
            **pool: Options of `Pool` such as max_jobs_per_worker, hard_memory_limit, initializer, start_method.

        Raises:
            ConfigError: A value cannot work, or the queue was given other values before.
        """
        queue = _name("queue", queue)
        refused = pool.keys() & {"priority", "n_workers", "backlog", "timeout", "retry", "name"}
        if refused:
            raise ConfigError(f"{min(refused)} is no option of a queue; say it of the tasks")
        given = dict(pool) if concurrency is None else {**pool, "concurrency": concurrency}
        known = self._queues.get(queue, {})
        for option, value in given.items():
            if option in known and known[option] != value:
                raise ConfigError(
                    f"queue {queue!r} has {option}={known[option]!r} already and cannot have {value!r}, too"
                )
        merged = {**known, **given}
        self._pool(0, queue, merged)  # so that a bad value is refused here
        self._queues[queue] = merged

    def tasks(self) -> dict[str, Task[..., Any]]:
        """Return the tasks by name."""
        return dict(self._tasks)

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
        found = self._tasks.get(task)
        if found is None:
            known = ", ".join(sorted(self._tasks)) or "none"
            raise UnknownTask(f"there is no task {task!r}; known are: {known}")
        return found

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
        submissions = [self.submission(call) for call in calls]
        if not submissions:
            return []
        self.submit(submissions)
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
        ids = [job_id(one) for one in ids]
        found: list[QueuedJob | None] = []
        for part in _parts(ids):
            records = self.backend.broker.find(part)
            # Race: a job's outcome is saved before its broker forgets it, so who asks in this order misses none.
            settled = [one for one, record in zip(part, records, strict=True) if record is None]
            outcomes = (
                dict(zip(settled, self.backend.results.get_many(settled), strict=True)) if settled else {}
            )
            for one, record in zip(part, records, strict=True):
                if record is not None:
                    found.append(from_record(record, self.sealer, self.backend.registry))
                else:
                    outcome = outcomes[one]
                    is_known = outcome is not None and outcome.state is not OutcomeState.RUNNING
                    found.append(from_outcome(outcome) if outcome is not None and is_known else None)
        return found

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
        offset = validate.whole_number("offset", offset, at_least=0)
        limit = validate.whole_number("limit", limit, at_least=1, at_most=10_000)
        place, outcome = _STATES[_state(state)]
        backend = self.backend
        if place is not None:
            records = backend.broker.records(place, queue=queue, offset=offset, limit=limit)
            return [from_record(one, self.sealer, backend.registry) for one in records]
        assert outcome is not None
        found = backend.results.outcomes(outcome, queue=queue, offset=offset, limit=limit)
        return [from_outcome(one) for one in found]

    def queues(self) -> dict[str, QueueCounts]:
        """Return the counts of each queue: those of this application, and others that hold jobs."""
        counts = dict(self.backend.broker.counts())
        return {queue: counts.get(queue, QueueCounts()) for queue in sorted({*counts, *self._queues})}

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state, over all queues."""
        queues = self.backend.broker.counts().values()
        outcomes = self.backend.results.counts()
        return {
            JobState.QUEUED: sum(one.ready for one in queues),
            JobState.SCHEDULED: sum(one.scheduled for one in queues),
            JobState.RUNNING: sum(one.running for one in queues),
            JobState.SUCCEEDED: outcomes.get(OutcomeState.SUCCEEDED, 0),
            JobState.FAILED: outcomes.get(OutcomeState.FAILED, 0),
            JobState.CANCELLED: outcomes.get(OutcomeState.CANCELLED, 0),
        }

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
        (outcome,) = self.backend.results.get_many([job_id(id)])
        if outcome is None:
            raise self._no_outcome(self.job(id))
        told = failure(outcome.error)
        if outcome.state is OutcomeState.CANCELLED:
            raise JobCancelled(f"job {id!r} was cancelled")
        if outcome.state is OutcomeState.FAILED:
            raise _remote_error(id, told or Failure("unknown", ""))
        if outcome.value is None:
            why = "" if told is None else f": {told.message}"
            raise ResultNotFound(f"job {id!r} has left no result{why}")
        return self.sealer.open_value(id, outcome.value)

    def _no_outcome(self, job: QueuedJob) -> BulkheadError:
        # Of a dead letter no outcome is kept if its message cannot be read, or its task keeps none.
        if job.state is JobState.FAILED:
            told = Failure(job.error_type or "unknown", job.error_message or job.reason, job.traceback or "")
            return _remote_error(job.id, told)
        return ResultNotFound(f"job {job.id!r} is {job.state} and has left no result")

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
        self.backend.broker.pause(self._known_queue(queue))

    def resume(self, queue: str) -> None:
        """Undo `pause`."""
        self.backend.broker.resume(self._known_queue(queue))

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
        offset = validate.whole_number("offset", offset, at_least=0)
        limit = validate.whole_number("limit", limit, at_least=1, at_most=10_000)
        backend = self.backend
        records = backend.broker.records(Place.DEAD, queue=queue, offset=offset, limit=limit)
        return [from_record(one, self.sealer, backend.registry) for one in records]

    def retry_dead(self, id: str) -> None:  # noqa: A002 - as above
        """Enqueue a dead letter anew, with all its attempts.

        Raises:
            JobNotFound: There is no dead letter with this id.
        """
        if not self._revive([job_id(id)])[0]:
            raise JobNotFound(f"there is no dead letter {id!r}", job_id=id)

    def retry_all_dead(self, *, queue: str | None = None) -> int:
        """Enqueue all dead letters anew, of one queue or of all; return how many."""
        return self._each_dead(queue, self._revive)

    def delete_dead(self, id: str) -> None:  # noqa: A002 - as above
        """Delete a dead letter.

        Raises:
            JobNotFound: There is no dead letter with this id.
        """
        (record,) = self.backend.broker.find([job_id(id)])
        if record is None or record.place is not Place.DEAD or not self.backend.broker.delete([id])[0]:
            raise JobNotFound(f"there is no dead letter {id!r}", job_id=id)

    def delete_all_dead(self, *, queue: str | None = None) -> int:
        """Delete all dead letters, of one queue or of all; return how many."""
        return self._each_dead(queue, self.backend.broker.delete)

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
            id: Own id, up to 180 characters, instead of a random one.
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
        """Be a worker: run the jobs of these queues until SIGTERM, SIGINT or `stop`.

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
        consumer = self._make_consumer(queues)
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
        done = self._make_consumer([queue], n_workers=1).run_once()
        if done is None:
            return None
        return self.find_jobs([done])[0]

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
        return f"<App {self.namespace}: {len(self._tasks)} tasks in {len(self._queues)} queues>"

    # For consumers, groups and schedules

    def next_id(self) -> str:
        """Return an id that nobody else has."""
        return self._ids.next()

    def submission(self, call: Call) -> Submission:
        """Return a job as it enters the middlewares.

        Raises:
            ConfigError: It is no job of this application, or its arguments cannot be encoded.
            UnknownQueue: There is no such queue.
        """
        if not isinstance(call, Call):
            raise ConfigTypeError(f"jobs are made by task.call(...); this is {validate.shown(call)}")
        queue = self._queue_of(call)
        return Submission(call.id or self.next_id(), call.id is not None, call, queue, self.envelope(call))

    def submit(
        self,
        submissions: Sequence[Submission],
        forward: Callable[[Sequence[Submission]], None] | None = None,
    ) -> None:
        """Pass jobs through the middlewares, and what comes through on to `forward`, by default the broker."""
        put = self._enqueue if forward is None else forward
        for middleware in reversed(self.middlewares):
            put = _around(middleware, put)
        put(submissions)

    def envelope(self, call: Call, *, takes: bool = False) -> Envelope:
        """Return a job as it travels.

        Raises:
            ConfigTypeError: Its arguments cannot be encoded.
        """
        options = call.task.options
        codec = self.sealer.codec
        backoff = call.backoff or options.backoff
        return Envelope(
            call.task.name,
            _arguments(call, codec),
            codec,
            options.timeout if call.timeout is None else call.timeout,
            options.max_retries if call.max_retries is None else call.max_retries,
            (backoff.initial, backoff.factor, backoff.jitter, backoff.maximum),
            options.keep_result if call.keep_result is None else call.keep_result,
            tuple(self.follow(one) for kind, one in call.follows if kind == "on_success"),
            tuple(self.follow(one) for kind, one in call.follows if kind == "on_error"),
            None,
            takes,
            dict(call.headers or {}),
        )

    def follow(self, call: Call, *, takes: bool = True) -> Follow:
        """Return a job that is enqueued when another has ended.

        Raises:
            UnknownQueue, ConfigTypeError, ConfigError: It could not be enqueued.
        """
        options = call.task.options
        return Follow(
            call.id or self.next_id(),
            self._queue_of(call),
            options.priority if call.priority is None else call.priority,
            call.delay,
            call.due_at,
            self.envelope(call, takes=takes),
        )

    def message(self, follow: Follow, envelope: Envelope) -> Message:
        """Return a follow-up job as the broker keeps it."""
        body = self.sealer.seal(follow.id, follow.queue, envelope)
        return Message(
            follow.id, follow.queue, body, follow.priority, follow.delay, follow.due_at, remember=_REMEMBER
        )

    def pools(self, queues: Sequence[str], n_workers: int | None = None) -> list[Pool]:
        """Return the pools of these queues; their priorities are their positions."""
        made = []
        for position, queue in enumerate(queues):
            options = dict(self._queues[queue])
            if n_workers is not None:
                options["concurrency"] = n_workers
            made.append(self._pool(position, queue, options))
        return made

    def queue_names(self) -> list[str]:
        """Return the names of the application's own queues."""
        return list(self._queues)

    # Inner

    def _add_task(
        self, fn: Callable[..., Any], given: str | None, concurrency: int | None, options: TaskOptions
    ) -> Task[..., Any]:
        validate.function("a task", fn)
        if isinstance(fn, Task):
            raise ConfigTypeError(f"{fn.name!r} is a task already")
        own = given if given is not None else getattr(fn, "__name__", None)
        task_name = _name("name", own)
        if task_name in self._tasks:
            raise ConfigError(f"there is a task {task_name!r} already; give one of them name=")
        self.queue(options.queue, concurrency=concurrency)
        made: Task[..., Any] = Task(self, fn, task_name, options)
        self._tasks[task_name] = made
        return made

    def _pool(self, priority: int, queue: str, options: Mapping[str, Any]) -> Pool:
        rest = {option: value for option, value in options.items() if option != "concurrency"}
        n_workers = options.get("concurrency", os.cpu_count() or 1)
        # Why no bound here: the consumer claims no more than it has room for.
        try:
            return Pool(priority, n_workers, backlog=None, name=queue, **{"nice": 0, **rest})
        except ConfigError as error:
            raise type(error)(str(error).replace("n_workers", "concurrency")) from None
        except TypeError as error:
            raise ConfigTypeError(f"queue {queue!r}: {error}") from None

    def _enqueue(self, submissions: Sequence[Submission]) -> None:
        for part in _parts(submissions):
            messages = [self._message(one) for one in part]
            for one, is_new in zip(part, self.backend.broker.enqueue_many(messages), strict=True):
                # Race: a call that is repeated after a lost connection finds the job of its own first try. Nobody else
                # can have made an id that is not the caller's own.
                if not is_new and one.is_own_id:
                    one.duplicate_of = one.id

    def _message(self, one: Submission) -> Message:
        call, options = one.call, one.call.task.options
        envelope = one.envelope
        if one.headers:
            envelope = msgspec.structs.replace(envelope, headers={**envelope.headers, **one.headers})
        return Message(
            one.id,
            one.queue,
            self.sealer.seal(one.id, one.queue, envelope),
            options.priority if call.priority is None else call.priority,
            call.delay,
            call.due_at,
            _REMEMBER if one.is_own_id else 0.0,
        )

    def _queue_of(self, call: Call) -> str:
        if call.task.app is not self:
            raise ConfigError(f"task {call.task.name!r} belongs to another application")
        return self._known_queue(call.queue or call.task.options.queue)

    def _known_queue(self, queue: str) -> str:
        if queue not in self._queues:
            raise UnknownQueue(f"there is no queue {queue!r}; known are: {', '.join(sorted(self._queues))}")
        return queue

    def _connect(self) -> Backend:
        if context.running is not None and "memory://" in (self.url[:9], (self.results_url or "")[:9]):
            raise BrokerUnavailable(
                "memory:// keeps jobs in the process that made them, and this is one of its workers, whose jobs nobody "
                "would see: for tasks that use their application take sqlite://, redis:// or nats://"
            )
        jobs = backends.connect(self.url, self.namespace)
        if self.results_url is None:
            return jobs
        try:
            elsewhere = backends.connect(self.results_url, self.namespace)
        except BaseException:
            jobs.close()
            raise
        return Backend(jobs.broker, elsewhere.results, jobs.registry, (jobs, elsewhere))

    def _revive(self, ids: Sequence[str]) -> list[bool]:
        # Why before: what has become of it the last time must not be taken for what becomes of it now.
        records = self.backend.broker.find(ids)
        dead = [one.id for one in records if one is not None and one.place is Place.DEAD]
        if dead:
            self.backend.results.delete(dead)
        return self.backend.broker.revive(ids)

    def _each_dead(self, queue: str | None, act: Callable[[Sequence[str]], list[bool]]) -> int:
        # Why all are looked up first: a job that is enqueued anew may be a dead letter again in a moment.
        found: dict[str, None] = {}
        while records := self.backend.broker.records(
            Place.DEAD, queue=queue, offset=len(found), limit=_PER_CALL
        ):
            known = len(found)
            found.update((one.id, None) for one in records)
            if len(found) == known:
                break
        return sum(sum(act(part)) for part in _parts(list(found)))

    def _make_consumer(self, queues: Iterable[str] | None, n_workers: int | None = None) -> Consumer:
        chosen = (
            list(self._queues)
            if queues is None
            else [self._known_queue(one) for one in dict.fromkeys(queues)]
        )
        if not chosen:
            raise ConfigError("the application has no queue: give it a task first")
        return Consumer(self, chosen, n_workers)


def _around(
    middleware: Middleware, forward: Callable[[Sequence[Submission]], None]
) -> Callable[[Sequence[Submission]], None]:
    if type(middleware).enqueue is Middleware.enqueue:
        return forward
    return lambda submissions: middleware.enqueue(submissions, forward)


def _middlewares(given: Sequence[Middleware]) -> tuple[Middleware, ...]:
    made = tuple(given)
    for one in made:
        if not isinstance(one, Middleware):
            raise ConfigTypeError(f"middlewares must be instances of Middleware, not {one!r}")
    return made


def _arguments(call: Call, codec: str) -> bytes:
    try:
        return encoded(codec, (call.args, dict(call.kwargs)))
    except Exception as error:
        raise ConfigTypeError(
            f"the arguments of task {call.task.name!r} cannot be encoded in {codec}: {error}; pass plain values, or "
            'make the application with codec="pickle" and a key'
        ) from error


def _parts(things: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (things[at : at + _PER_CALL] for at in range(0, len(things), _PER_CALL))


def _state(state: JobState | str) -> JobState:
    try:
        return JobState(state)
    except ValueError:
        raise ConfigError(
            f"state must be one of {', '.join(one.value for one in _STATES)}, not {state!r}"
        ) from None


def _remote_error(id: str, told: Failure) -> RemoteError:  # noqa: A002
    return RemoteError(
        f"job {id!r} failed: {told.type}: {told.message}", type_name=told.type, traceback=told.traceback
    )


def _raise_unknown(id: str) -> Any:  # noqa: A002
    raise JobNotFound(
        f"there is no job {id!r}: it never existed, or its outcome is no longer kept", job_id=id
    )


_name = name

# Where the jobs of a state are looked for.
_STATES: dict[JobState, tuple[Place | None, OutcomeState | None]] = {
    JobState.QUEUED: (Place.READY, None),
    JobState.SCHEDULED: (Place.SCHEDULED, None),
    JobState.RETRYING: (Place.SCHEDULED, None),
    JobState.RUNNING: (Place.RUNNING, None),
    JobState.SUCCEEDED: (None, OutcomeState.SUCCEEDED),
    JobState.FAILED: (None, OutcomeState.FAILED),
    JobState.CANCELLED: (None, OutcomeState.CANCELLED),
}


class _Ids:
    """Ids that are nowhere else: random for each process, then counted. Why not random ones: they cost 2 µs each."""

    def __init__(self) -> None:
        self._depth = -1
        self._prefix = ""
        self._numbers = itertools.count()

    def next(self) -> str:
        if self._depth != forks.depth:
            self._prefix = secrets.token_hex(8)
            self._depth = forks.depth
        return f"{self._prefix}-{next(self._numbers):x}"
