"""One pool of processes: carries out the kernel's instructions and reports to it what happened.

Data flow: see the package docstring. Nothing here is shared with another pool: lock, poller, threads, launcher, pipes
and workers are this pool's own.

Every change of the kernel's state happens under `driving.lock`; reading and unpickling results does not, because the
users' code that runs there may take long and may call us.

What can end this: `ruin`. Should an exception come out of the middle of a change (of a signal handler of the user's,
for want of memory, by a bug), the kernel's state cannot be trusted. Then the pool is given up loudly: every job that
has not settled fails with PoolBroken, every process is killed, nobody waits for ever.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from bulkhead._kernel import lifecycle
from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.phases import Phase
from bulkhead._kernel.records import JobRecord, Loss, Slot, SlotState, Verdict
from bulkhead._kernel.scheduler import (
    AcceptOffer,
    EndWorker,
    RefuseOffer,
    Scheduler,
    SettleJob,
    StartJob,
    StartWorker,
)
from bulkhead.chunk import Chunk
from bulkhead.config import Pool
from bulkhead.engines.base import Ledger
from bulkhead.engines.processes import deaths, main_module
from bulkhead.engines.processes.answers import Answer, Parts, decoded, recorded
from bulkhead.engines.processes.callbacks import CallbackThread, DoneCallback
from bulkhead.engines.processes.chunk_runner import ChunkOrder
from bulkhead.engines.processes.driving import Bell, Driving, Waiter, reentered
from bulkhead.engines.processes.interrupts import calm, hold, release
from bulkhead.engines.processes.launcher import Report, Says, Unsuitable
from bulkhead.engines.processes.launcher_link import LauncherLink
from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import SHARED_IS_FOR_JOBS, cannot, pack_call, pack_without_main
from bulkhead.engines.processes.poller import READABLE, WRITABLE
from bulkhead.engines.processes.segments import Borrowed, SegmentPool
from bulkhead.engines.processes.sharing import Shared
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Initializer, Kind, Setup
from bulkhead.errors import (
    DispatcherFinalized,
    JobCancelled,
    JobNotPicklable,
    MissingMainGuard,
    NestedDispatch,
    PoolBroken,
    RemoteError,
)
from bulkhead.stats import PoolStats, WorkerStats

__all__ = ["ProcessPool", "packed_setup"]

# Seconds between SIGTERM and SIGKILL for a job that is timed out or cancelled.
_GRACE = 1.0

# Seconds that an idle worker has to leave by itself when the pool stops.
_LEAVE = 1.0

# Seconds that the launcher may take to report a worker that should be gone, before more is done about it.
_REPORT = 1.0

# Seconds that stopping may take in all before the life lines are cut.
_STOP = 3.0

# Free segments for the data of jobs that a pool keeps for the next ones, together (bytes).
_KEEP_BYTES = 1 << 30

# How often a pool that holds segments sees whether they are needed (seconds).
_TIDY = 5.0

# How often deadlines are looked at while one answer follows the other (seconds).
_TICK = 0.001

# Launchers that end before they are ready, in a row, after which the pool is broken (arbitrary). More when somebody
# outside kills them.
_MAX_LAUNCHERS = 3
_MAX_KILLED_LAUNCHERS = 50


class _Push(Enum):
    """What is done about a worker that should be gone, one after the other."""

    END = 1  # tell the launcher
    CUT = 2  # cut its life line
    LAUNCHER = 3  # kill the launcher, which cannot be well


# Why: a class's attribute is looked up at each use, on the way of every job.
_JOB = Kind.JOB
_VALUE = Kind.VALUE

_Event = tuple[Callable[..., None], tuple[Any, ...]]

_log = logging.getLogger("bulkhead")

_live_pools: weakref.WeakSet[ProcessPool] = weakref.WeakSet()


def packed_setup(config: Pool, nicer_by: int) -> bytes:
    """Return what the workers of a pool are told first.

    Args:
        config: The pool.
        nicer_by: What is added to the workers' niceness when the pool names none.

    Raises:
        JobNotPicklable: The initializer cannot be sent.
    """
    is_fork = config.start_method == "fork"
    if is_fork and any(isinstance(one, Shared) for one in config.initargs):
        raise JobNotPicklable(SHARED_IS_FOR_JOBS)  # as under the other start methods, where packing finds it
    call = None
    if config.initializer is not None and not is_fork:
        packed = pack_call(config.initializer, config.initargs, {}, None, "initializer")
        assert isinstance(packed, bytes)
        call = packed
    main = None if is_fork else main_module.describe()
    return pickle.dumps(Setup(f"bulkhead-{config.label}", main, call, config.nice, nicer_by))


class ProcessPool:
    """The workers of one `Pool`, on processes of this machine.

    Args:
        config: The pool.
        setup: What `packed_setup` made of the same config.
        keep_failures: Failed jobs that a phase remembers for its barrier.
        ledger: Told of each job that is accepted or has settled.
    """

    def __init__(
        self,
        config: Pool,
        *,
        setup: bytes,
        keep_failures: int,
        ledger: Ledger,
    ) -> None:
        self.config = config
        self._method = config.start_method or "forkserver"
        # Where the large parts of jobs wait for their worker, and what workers have sent of their own.
        self.segments = SegmentPool(_KEEP_BYTES)
        self._borrowed = Borrowed()
        knows_main = self._method == "fork" or main_module.is_importable()
        self.pack = pack_call if knows_main else pack_without_main  # packs a call for this pool's workers
        self._ledger = ledger
        self._inherited: Initializer | None = (
            (config.initializer, config.initargs, {}) if config.initializer else None
        )
        self._setup = setup
        self._driving = Driving(
            f"bulkhead-{config.label}", self._work, self._next_deadline, self._is_answer_near
        )
        self.lock = self._driving.lock
        self._callbacks = CallbackThread(f"bulkhead-{config.label}-callbacks")
        # Held while the pool is stopped; rank above the pool's lock. Why an RLock: a signal handler may finalize, too.
        self._stopping = threading.RLock()
        # Owner of the rest: the lock.
        self._scheduler = Scheduler(
            config.n_workers,
            config.backlog,
            keep_failures=keep_failures,
            draw=random.random,
            on_accept=ledger.enter,
            expired=deaths.expiry,
            extended=self._extended,
        )
        self._workers: dict[int, Worker] = {}
        self._results: dict[int, Worker] = {}  # by descriptor of the result pipe
        self._blocked: dict[int, Worker] = {}  # by descriptor of the job pipe, while it takes no more
        self._overdue: dict[Worker, tuple[float, _Push]] = {}  # workers that should be gone by then
        self._tick_at = 0.0  # when to look at deadlines again
        self._tidy_at: float | None = None  # when to see whether memory can be given back
        self._workers_made = 0
        self._busy_seconds = 0.0  # of workers that are gone
        self._launchers_lost = 0
        self._dropped: deque[Chunk] = deque()  # whose consumer is gone. Why a deque: see `drop`
        self._drained: list[Waiter] = []
        self._deserted: list[Waiter] = []
        self._ruin: PoolBroken | None = None
        self._guard = _Guard(self._fall)
        self._is_copy = False  # of a pool in a process that the caller forked
        self._is_dismissed = False
        self._is_stopped = False
        self._link = self._launch()
        _live_pools.add(self)

    # What a dispatcher asks for

    def begin(self) -> None:
        """Start the threads and the workers."""
        self._driving.begin()
        with calm(), self.lock, self._guard:
            self._scheduler.begin()
            self._carry_out(time.monotonic())
            self._driving.wake()

    def dispatch(self, job: JobRecord, deadline: float | None) -> bool:
        """Have the job accepted, waiting for room until `deadline`; False when there was none in time.

        Raises:
            DispatcherFinalized: No more jobs are taken.
            PoolBroken: The pool has given up.
        """
        waiter = Waiter()
        is_held = hold()
        try:
            # Why a glance before the wait: in full swing there is an answer, and Ctrl-C is held off only once.
            is_done = self._offer(job, waiter) or self._driving.glance(waiter)
            if is_held:
                is_held = False
                release()
            if not is_done:
                self._driving.wait(waiter, deadline)
        except BaseException:
            if is_held:
                release()
            self._driving.leave(waiter)
            self._withdraw(job)
            raise
        if job.state is None:
            self._withdraw(job)
        return job.state is not None

    def _offer(self, job: JobRecord, waiter: Waiter) -> bool:
        """Offer the job; when it has to wait for room, `waiter` gets the driver's role if that is free."""
        scheduler = self._scheduler
        with self.lock:
            if scheduler.is_refusing or scheduler.broken is not None:
                self._check_open()
            if self._guard.is_active:
                raise reentered()
            self._guard.is_active = True
            try:
                now = time.monotonic()
                is_taken = scheduler.offer(job, now)
                if not is_taken:
                    job.waiters = [waiter]
                    self._driving.try_role(waiter)
                if job.due is not None or job.start_by is not None:
                    self._driving.hurry(scheduler.next_deadline)
                if scheduler.instructions:
                    self._carry_out(now)
                return is_taken
            except BaseException as error:
                self._fall(error)
                raise
            finally:
                self._guard.is_active = False

    def try_dispatch(self, job: JobRecord, waiter: Any = None) -> bool:
        """Have the job accepted if there is room at once.

        Args:
            job: The job.
            waiter: Fired once when it is worth trying again; for callers that wait for several pools.
        """
        self._refuse_copy()
        with calm(), self.lock:
            self._check_open()
            with self._guard:
                now = time.monotonic()
                taken = self._scheduler.offer(job, now, patient=waiter is not None)
                if not taken and waiter is not None:
                    job.waiters = [*(job.waiters or ()), waiter]
                if job.due is not None or job.start_by is not None:
                    self._driving.hurry(self._scheduler.next_deadline)
                self._carry_out(now)
            return taken

    def wait_until_accepted(self, job: JobRecord) -> None:
        """Wait until an offer that was left with `try_dispatch` is accepted or refused. Blocking: without limit."""
        waiter = Waiter()
        with self.lock:
            if job.waiters is None:
                return
            job.waiters.append(waiter)
        self._driving.wait(waiter)

    def withdraw(self, job: JobRecord) -> bool:
        """Take an offer back that was left with `try_dispatch`; False when it has been accepted."""
        self._withdraw(job)
        return job.state is None

    def pack_items(self, fn: Callable[..., Any], items: list[Any]) -> Parcel:
        """Pack the items of a map, as the arguments of one message.

        Raises:
            JobNotPicklable: With the reason.
        """
        packed = self.pack(fn, items, {}, self.segments, "an item of the map" if items else "the function")
        return packed if isinstance(packed, Parcel) else Parcel(packed, 0, None, [], [])

    def wait_for_bell(self, bell: Bell) -> None:
        """Wait until the bell rings, or has rung since it was silenced. Blocking: without limit."""
        self._refuse_copy()
        waiter = Waiter()
        with self.lock:
            if bell.is_rung:
                return
            bell.waiter = waiter
        self._driving.wait(waiter)

    def abandon(self, chunks: Iterable[Chunk]) -> None:
        """See to it that no more items of these chunks begin; those that run run to their end."""
        self._refuse_copy()
        with calm(), self.lock, self._guard:
            self._abandon(chunks, time.monotonic())

    def drop(self, chunks: Iterable[Chunk]) -> None:
        """As `abandon`, soon. Safe inside the garbage collector, which may run under any lock."""
        if not self._is_stopped:
            self._dropped.extend(chunks)
            self._driving.wake()

    def _abandon(self, chunks: Iterable[Chunk], now: float) -> None:
        for chunk in chunks:
            chunk.is_abandoned = True
            if chunk.state is None:
                self._scheduler.withdraw(chunk)
            elif chunk.state is JobState.RUNNING:
                worker = chunk.slot.worker if chunk.slot is not None else None
                if worker is not None:
                    worker.progress.stop(worker.message)
            else:
                self._scheduler.cancel(chunk, JobCancelled("nobody reads on in the map"), now)
        self._carry_out(now)

    def check_open(self) -> None:
        """Raise DispatcherFinalized or PoolBroken when no job is taken."""
        with self.lock:
            self._check_open()

    def call_background(self) -> None:
        """Somebody waits who cannot drive."""
        self._driving.call_background()

    def wait_for(self, job: JobRecord, deadline: float | None) -> bool:
        """Wait until the job has settled or `deadline`."""
        if job.state in lifecycle.SETTLED:
            return True
        self._refuse_copy()
        waiter = Waiter()
        if self.add_waiter(job, waiter) and not self._driving.wait(waiter, deadline):
            with self.lock:
                if job.waiters and waiter in job.waiters:
                    job.waiters.remove(waiter)
        return job.state in lifecycle.SETTLED

    def has_begun(self, job: JobRecord) -> bool:
        """Tell whether the worker that a running job was sent to has begun to read it. Under the lock."""
        worker = job.slot.worker if job.slot is not None else None
        return worker is not None and worker.has_begun()

    def add_waiter(self, job: JobRecord, waiter: Any) -> bool:
        """Have `waiter.fire()` called, under the lock, when the job settles; False when it has settled."""
        with self.lock:
            if job.state in lifecycle.SETTLED:
                return False
            if job.waiters is None:
                job.waiters = []
            job.waiters.append(waiter)
            return True

    def add_callback(self, job: JobRecord, callback: Callable[[Any], object]) -> None:
        """Have `callback(job)` called in the callback thread when the job has settled, at once if it has."""
        self._refuse_copy()
        self._callbacks.prepare()
        done = DoneCallback(self._callbacks, callback, job)
        if not self.add_waiter(job, done):
            done.fire()

    def cancel(self, job: JobRecord) -> bool:
        """Take a waiting job out, end the worker of a running one; False when it has settled otherwise."""
        self._refuse_copy()
        with calm(), self.lock, self._guard:
            now = time.monotonic()
            is_cancelled = self._scheduler.cancel(job, JobCancelled(f"job {job.id!r} was cancelled"), now)
            self._carry_out(now)
        return is_cancelled or job.state is JobState.CANCELLED

    def close_phases(self) -> list[Phase]:
        """Close the open phase; return those that a barrier called now waits for."""
        with calm(), self.lock:
            return self._scheduler.phases.close()

    def wait_for_phases(self, phases: list[Phase], deadline: float | None) -> bool:
        """Wait until every job of the phases has settled or `deadline`."""
        return all(self._wait_for_phase(phase, deadline) for phase in phases)

    def report_phases(self, phases: list[Phase]) -> list[Phase]:
        """Return those of the phases that no barrier has reported yet, and drop them."""
        with calm(), self.lock:
            return self._scheduler.phases.report(phases)

    def unsettled_in(self, phases: list[Phase]) -> list[JobRecord]:
        """Return the unsettled jobs of the phases."""
        with self.lock:
            return [job for job in self._scheduler.unsettled_jobs() if job.phase in phases]

    def stats(self) -> PoolStats:
        """Return a snapshot."""
        with self.lock:
            return self._stats(time.monotonic())

    # Ending

    def refuse(self) -> None:
        """Take no more jobs."""
        with calm(), self.lock, self._guard:
            self._scheduler.refuse()
            self._carry_out(time.monotonic())

    def drain(self, deadline: float | None) -> bool:
        """Wait until every accepted job has settled or `deadline`."""
        waiter = Waiter()
        with self.lock:
            if self._scheduler.unsettled == 0:
                return True
            self._drained.append(waiter)
        return self._driving.wait(waiter, deadline)

    def cancel_all(self) -> None:
        """Cancel every job that has not settled."""
        with calm(), self.lock, self._guard:
            now = time.monotonic()
            for job in self._scheduler.unsettled_jobs():
                self._scheduler.cancel(job, JobCancelled(f"job {job.id!r} was cancelled by finalize"), now)
            self._carry_out(now)

    def dismiss(self) -> None:
        """Send the workers home: idle ones leave by themselves, the others are ended. Does not wait."""
        with calm(), self.lock, self._guard:
            self._scheduler.stop()
            self._is_dismissed = True
            for worker in self._workers.values():
                if worker.slot.state is SlotState.IDLE:
                    worker.writer.close()
                else:
                    self._link.end(worker.number, 0.0)

    def stop(self, callback_deadline: float | None) -> None:
        """End every process and thread and close everything; `drain` and `dismiss` came before.

        Blocking: some seconds at most, and for done callbacks until `callback_deadline`.
        """
        with self._stopping:
            if not self._is_stopped:
                self._end_everything()
        # Why outside: a callback may finalize, too, and wait for the lock.
        self._callbacks.end(
            None if callback_deadline is None else max(callback_deadline - time.monotonic(), 0)
        )

    def _end_everything(self) -> None:
        self._wait_until_deserted(_LEAVE)
        with self.lock:
            for worker in self._workers.values():
                self._link.end(worker.number, 0.0)
        self._wait_until_deserted(_STOP)
        with self.lock:
            for worker in self._workers.values():
                worker.cut()
        self._driving.end_background()
        with self.lock:
            self._is_stopped = True
            for worker in list(self._workers.values()):
                self._forget(worker)
            self._link.close(_STOP)
            self._fail_rest(PoolBroken(f"{self.config.label} was stopped"))
            self.segments.close()
            self._driving.close()
        _live_pools.discard(self)

    def close_copy(self) -> None:
        """Close this process's copies of the descriptors: for a forked copy of the caller."""
        self._is_copy = True
        # Race: another thread of the caller may have held the lock when it forked.
        self.lock = self._driving.lock = threading.RLock()
        if not self._is_stopped:
            self._is_stopped = True
            for worker in self._workers.values():
                worker.close()
            self._link.abandon()
            self.segments.close()
            self._driving.close()

    def _refuse_copy(self) -> None:
        if self._is_copy:
            raise NestedDispatch(
                "this job belongs to another process, which alone can wait for it or cancel it"
            )

    # Starting

    def _launch(self, *, is_preloading: bool = True) -> LauncherLink:
        link = LauncherLink(self._method, is_preloading=is_preloading, inherited=self._inherited)
        self._driving.poller.register(link.fd, READABLE)
        return link

    def _start_worker(self, slot: Slot) -> None:
        if self._link.fd < 0:
            # The launcher is lost and not replaced; the pool is broken or ends.
            slot.state = SlotState.VACANT
            return
        self._workers_made += 1
        try:
            worker = Worker(self._workers_made, slot, self._borrowed)
        except OSError as error:  # no descriptors left, most likely; the next try may find some
            _log.warning("%s: a worker cannot be started: %s", self.config.label, error)
            failure = PoolBroken(f"{self.config.label} is given up, its workers cannot be started: {error}")
            failure.__cause__ = error
            self._scheduler.worker_gone(slot, failure, time.monotonic())
            return
        slot.worker = worker
        self._workers[worker.number] = worker
        self._link.start(worker.number, worker.give_away())
        worker.close_theirs()
        self._results[worker.reader.fd] = worker
        self._driving.poller.register(worker.reader.fd, READABLE)
        if not worker.writer.write(Kind.SETUP, 0, self._setup):
            self._block(worker)

    def _block(self, worker: Worker) -> None:
        """See to it that the rest of a message is sent when the pipe takes more."""
        fd = worker.writer.fd
        if fd not in self._blocked:
            self._blocked[fd] = worker
            self._driving.poller.register(fd, WRITABLE)
            self._driving.wake()

    # Driving: what happens at each step

    def _next_deadline(self) -> float | None:
        deadline = self._scheduler.next_deadline
        sweep = self._ledger.next_sweep()
        if sweep is not None and (deadline is None or sweep < deadline):
            deadline = sweep
        if self._overdue:
            overdue = min(instant for instant, _ in self._overdue.values())
            deadline = overdue if deadline is None else min(deadline, overdue)
        if self.segments.is_used or self._borrowed.is_used:
            tidying = self._next_tidying()
            if tidying is not None and (deadline is None or tidying < deadline):
                deadline = tidying
        # Whoever polls until then finds that something is due.
        self._tick_at = 0.0
        return deadline

    def _is_answer_near(self) -> bool:
        return self._scheduler.running > 0

    def _work(self, events: list[tuple[int, int]], polled_at: float) -> None:
        """Do what the polled events ask for, and what was due at `polled_at`."""
        is_held = hold()
        try:
            news: list[_Event] = []
            answers: list[Answer] = []
            for fd, _ in events:
                worker = self._results.get(fd)
                if worker is not None:
                    self._read_results(worker, answers, news)
                elif fd == self._link.fd:
                    self._read_launcher(answers, news)
                elif self._driving.is_alarm(fd):
                    self._driving.silence()
                elif fd in self._blocked:
                    news.append((self._resume, (fd,)))
            with self.lock:
                if self._ruin is None:
                    self._guard.is_active = True
                    try:
                        self._digest(answers, news, polled_at)
                    except BaseException as error:
                        self._fall(error)
                        raise
                    finally:
                        self._guard.is_active = False
        except BaseException as error:
            with self.lock:
                self._fall(error)
            raise
        finally:
            if is_held:
                release()

    def _digest(self, answers: list[Answer], news: list[_Event], polled_at: float) -> None:
        """Tell the kernel what was read, and do what it decides. Under the lock."""
        now = time.monotonic()
        for answer in answers:
            self._answered(*answer, now)
        self._carry_out(now)
        for handle, arguments in news:
            handle(*arguments, now)
            # Race: what the kernel has decided about a worker must be done before the next news of it.
            self._carry_out(now)
        while self._dropped:
            self._abandon([self._dropped.popleft()], now)
        if polled_at >= self._tick_at:
            # Why not now: unpickling may have taken long, and an answer that came meanwhile is not read yet.
            self._tick(polled_at)
            self._carry_out(now)
            self._tick_at = polled_at + _TICK

    def _read_results(self, worker: Worker, answers: list[Answer], news: list[_Event]) -> None:
        try:
            frames = worker.reader.read()
        except (MemoryError, OSError) as error:
            news.append((self._garbled, (worker, repr(error))))
            return
        for kind, number, body in frames:
            answers.append(decoded(worker, kind, number, body))
        if worker.reader.is_garbled:
            news.append((self._garbled, (worker, "something else was written into its pipe")))
        if worker.reader.is_at_end:
            news.append((self._hang_up, (worker,)))

    def _read_launcher(self, answers: list[Answer], news: list[_Event]) -> None:
        link = self._link
        for kind, number, body in link.read():
            if kind == Says.STARTED:
                news.append((self._started, (number, body)))
            elif kind == Says.GONE:
                self._read_last_words(number, answers)
                news.append((self._gone, (number, body)))
            elif kind == Says.READY:
                news.append((self._launcher_ready, ()))
            elif kind == Says.UNSUITABLE:
                news.append((self._launcher_unsuitable, (body,)))
        if link.reader.is_at_end:
            news.append((self._launcher_lost, (link,)))

    def _read_last_words(self, number: int, answers: list[Answer]) -> None:
        """Drain the result pipe of a worker that is gone: an answer it gave before counts."""
        worker = self._workers.get(number)
        if worker is None:
            return
        try:
            frames = worker.reader.read_rest()
        except (MemoryError, OSError):
            frames = []
        for kind, message, body in frames:
            answers.append(decoded(worker, kind, message, body))
        answers.append(recorded(worker))

    # What was read, told to the kernel (under the lock)

    def _answered(
        self,
        worker: Worker,
        kind: int,
        number: int,
        size: int,
        value: Any,
        error: BaseException | None,
        now: float,
    ) -> None:
        slot = worker.slot
        if kind == Kind.READY or kind == Kind.NOT_READY:
            self._came_up(worker, number, error, now)
            return
        if slot.worker is not worker or number != worker.message:
            return
        job = slot.job
        if kind == Kind.PART or kind == Kind.CHUNK_DONE:
            # Also from a worker that is being ended: what is done is done.
            if isinstance(job, Chunk):
                self._take_parts(job, value, size)
            if kind == Kind.PART:
                return
        if slot.state is not SlotState.BUSY:
            return
        # Race: whatever else comes under this number, perhaps in the same breath, belongs to no job any more.
        worker.message += 1
        worker.jobs += 1
        worker.busy_seconds += now - worker.began
        assert job is not None
        if isinstance(job, Chunk):
            error = self._end_of_chunk(job, error)
        else:
            job.value = value
            job.size = size
        self._scheduler.attempt_ended(slot, error, now)

    def _take_parts(self, chunk: Chunk, parts: Parts, size: int) -> None:
        chunk.size += size
        for position, values, error in parts.outcomes:
            if error is None:
                chunk.take(position, values)
            else:
                chunk.take_error(position, error)
        if parts.seconds is not None:
            chunk.seconds = parts.seconds

    def _end_of_chunk(self, chunk: Chunk, error: BaseException | None) -> BaseException | None:
        """Return what the kernel is to be told of a chunk's end; `error` is that of a worker that could not read it."""
        if error is not None:
            chunk.reject(error)
        return chunk.end_round(chunk.attempt)

    def _came_up(self, worker: Worker, pid: int, error: BaseException | None, now: float) -> None:
        if error is not None:
            worker.failure = error
        elif worker.slot.state is SlotState.STARTING:
            worker.pid = pid
            self._scheduler.worker_ready(worker.slot, now)

    def _garbled(self, worker: Worker, why: str, now: float) -> None:
        worker.failure = RemoteError(f"the worker's answer cannot be read: {why}")
        self._stop_reading(worker)
        self._link.end(worker.number, 0.0)

    def _hang_up(self, worker: Worker, now: float) -> None:
        self._stop_reading(worker)
        if worker.number in self._workers:
            self._overdue.setdefault(worker, (now + _REPORT, _Push.END))

    def _resume(self, fd: int, now: float) -> None:
        worker = self._blocked.get(fd)
        if worker is not None and worker.writer.resume():
            self._unblock(worker)

    def _started(self, number: int, pid: int, now: float) -> None:
        worker = self._workers.get(number)
        if worker is not None:
            worker.pid = pid

    def _gone(self, number: int, report: Report, now: float) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        slot = worker.slot
        job = slot.job
        if slot.state is SlotState.STARTING:
            error = self._start_failure(worker, report)
        elif job is not None and slot.verdict is Verdict.TIMEOUT:
            error = deaths.timeout(self._at(worker), job.timeout, worker.pid, report)
        elif job is not None:
            error = worker.failure or deaths.crash(worker.pid, report, f"running {self._at(worker)}")
        else:
            error = deaths.crash(worker.pid, report, "idle")
        loss = Loss.ATTEMPT if report.last_read == worker.message else Loss.UNREAD
        if job is not None:
            worker.busy_seconds += now - worker.began
            if isinstance(job, Chunk) and loss is Loss.ATTEMPT and slot.verdict is not Verdict.CANCEL:
                loss, error = self._lose_chunk(worker, job, error)
        self._forget(worker)
        was_killed = report.signal == signal.SIGKILL and worker.failure is None
        self._scheduler.worker_gone(slot, error, now, loss=loss, was_killed=was_killed)
        if isinstance(error.__cause__, MissingMainGuard):
            self._scheduler.break_down(error)

    def _at(self, worker: Worker) -> str:
        """Return what a worker's job is called in an error."""
        job = worker.slot.job
        assert job is not None
        if isinstance(job, Chunk):
            return job.describe(worker.progress.running(worker.message))
        return f"job {job.id!r}"

    def _lose_chunk(self, worker: Worker, chunk: Chunk, error: BaseException) -> tuple[Loss, BaseException]:
        """Return what the worker's death means for a chunk, and the error that may be retried."""
        if chunk.lose(worker.progress.running(worker.message), error):
            return Loss.REST, error
        failure = chunk.end_round(chunk.attempt)
        return (Loss.NOTHING, error) if failure is None else (Loss.ATTEMPT, failure)

    def _extended(self, job: JobRecord) -> float | None:
        """Return up to when a job has time whose time is up: one whose timeout counts for each of its items."""
        worker = job.slot.worker if job.slot is not None else None
        if not isinstance(job, Chunk) or worker is None:
            return None
        return job.time_left(worker.progress.running(worker.message), worker.began, time.monotonic())

    def _start_failure(self, worker: Worker, report: Report) -> BaseException:
        cause = worker.failure or deaths.crash(worker.pid, report, "getting ready")
        error = PoolBroken(f"{self.config.label} is given up, its workers do not come up: {cause}")
        error.__cause__ = cause
        return error

    def _forget(self, worker: Worker) -> None:
        del self._workers[worker.number]
        self._stop_reading(worker)
        self._unblock(worker)
        self._overdue.pop(worker, None)
        self._busy_seconds += worker.busy_seconds
        if worker.slot.worker is worker:
            worker.slot.worker = None
        worker.close()
        if not self._workers:
            _fire(self._deserted)

    def _stop_reading(self, worker: Worker) -> None:
        if self._results.pop(worker.reader.fd, None) is not None:
            self._driving.poller.unregister(worker.reader.fd)

    def _unblock(self, worker: Worker) -> None:
        if self._blocked.pop(worker.writer.fd, None) is not None:
            self._driving.poller.unregister(worker.writer.fd)

    # The launcher

    def _launcher_ready(self, now: float) -> None:
        self._launchers_lost = 0

    def _launcher_unsuitable(self, why: Unsuitable, now: float) -> None:
        if why.lacks_guard:
            cause = MissingMainGuard(why.text)
            error = PoolBroken(f"{self.config.label} cannot start workers: {why.text}")
            error.__cause__ = cause
            self._scheduler.break_down(error)
        self._relaunch()

    def _launcher_lost(self, link: LauncherLink, now: float) -> None:
        """The launcher has died. Its workers go with it: nobody could reap or end them any more."""
        if link is not self._link:
            return
        self._launchers_lost += 1
        was_staffed = [w for w in self._workers.values() if w.pid is not None]
        for worker in was_staffed:
            worker.cut()
        for worker in was_staffed:
            self._mourn(worker, now)
        limit = _MAX_KILLED_LAUNCHERS if self._link.was_killed() else _MAX_LAUNCHERS
        if self._method == "fork" or self._launchers_lost >= limit:
            self._scheduler.break_down(
                PoolBroken(f"{self.config.label} is given up: its launcher process {link.pid} ended")
            )
        self._relaunch()

    def _mourn(self, worker: Worker, now: float) -> None:
        """See the end of a worker whose life line was cut, and count what it answered before."""
        end = now + _REPORT
        answers: list[Answer] = []
        while not worker.reader.is_at_end and time.monotonic() < end:
            self._read_results(worker, answers, [])
            time.sleep(0.001)
        answers.append(recorded(worker))
        sent = worker.message
        for answer in answers:
            self._answered(*answer, now)
        self._carry_out(now)
        # A job that went to it just now was never read; of one that it had before nothing is known.
        last_read = sent if worker.message == sent else 0
        report = deaths.UNKNOWN._replace(last_read=last_read, signal=signal.SIGKILL)
        self._gone(worker.number, report, now)

    def _relaunch(self) -> None:
        """Replace the launcher and ask the new one for the workers that the old one had not started."""
        if self._link.fd >= 0:
            self._driving.poller.unregister(self._link.fd)
        self._link.close(0.2)
        unborn = list(self._workers.values())
        for worker in unborn:
            self._forget(worker)
        if self._scheduler.broken is not None or self._is_dismissed:
            for worker in unborn:
                self._scheduler.worker_gone(worker.slot, PoolBroken("not started"), time.monotonic())
            return
        self._link = self._launch(is_preloading=False)
        for worker in unborn:
            self._start_worker(worker.slot)

    # Carrying out

    def _tick(self, now: float) -> None:
        deadline = self._scheduler.next_deadline
        if deadline is not None and deadline <= now:
            self._scheduler.tick(now)
        sweep = self._ledger.next_sweep()
        if sweep is not None and sweep <= now:
            self._ledger.sweep()
        if self._tidy_at is not None and self._tidy_at <= now:
            self._tidy(now)
        for worker, (instant, push) in list(self._overdue.items()):
            if now >= instant:
                self._push(worker, push, now)

    def _next_tidying(self) -> float | None:
        is_holding = self.segments.has_files or self._borrowed.has_mapped
        if is_holding or any(worker.let_go for worker in self._workers.values()):
            self._tidy_at = self._tidy_at or time.monotonic() + _TIDY
        return self._tidy_at

    def _tidy(self, now: float) -> None:
        """Give memory back that nobody needs: what came free is told by no event."""
        self._tidy_at = None
        self.segments.trim(now)
        for worker in self._workers.values():
            if worker.let_go and worker.slot.state is SlotState.IDLE:
                notes = worker.exchange.wrap(b"", worker.message, Kind.NOTHING)
                if not worker.writer.write(Kind.NOTED, worker.message, notes):
                    self._block(worker)

    def _push(self, worker: Worker, push: _Push, now: float) -> None:
        """Do more about a worker that should have been reported gone: the launcher may be stopped or stuck."""
        if push is _Push.END:
            self._link.end(worker.number, _GRACE)
            self._overdue[worker] = now + _GRACE + _REPORT, _Push.CUT
        elif push is _Push.CUT:
            worker.cut()
            self._overdue[worker] = now + _REPORT, _Push.LAUNCHER
        else:
            del self._overdue[worker]
            self._link.kill()

    def _carry_out(self, now: float) -> None:
        """Do what the kernel has decided. Under the lock."""
        instructions = self._scheduler.instructions
        if not instructions:
            return
        for instruction in instructions:
            kind = type(instruction)
            if kind is StartJob:
                self._start_job(instruction.slot.worker, instruction.job, now)  # type: ignore[union-attr]
            elif kind is SettleJob:
                self._settled(instruction.job, instruction.phase_is_over)  # type: ignore[union-attr]
            elif kind is AcceptOffer or kind is RefuseOffer:
                _fire_waiters(instruction.job)  # type: ignore[union-attr]
            elif kind is StartWorker:
                self._start_worker(instruction.slot)  # type: ignore[union-attr]
            elif kind is EndWorker:
                self._push(instruction.slot.worker, _Push.END, now)  # type: ignore[union-attr]
        instructions.clear()

    def _start_job(self, worker: Worker, job: JobRecord, now: float) -> None:
        worker.message += 1
        worker.began = now
        job.started_at = time.time()
        job.pid = worker.pid
        if type(job.payload) is not bytes or worker.let_go:
            self._start_noted(worker, job, now)
        elif not worker.writer.write(_JOB, worker.message, job.payload):
            self._block(worker)
        if job.timeout is not None:
            self._scheduler.arm_timeout(job, now)
            self._driving.hurry(now + job.timeout)

    def _start_noted(self, worker: Worker, job: JobRecord, now: float) -> None:
        order = None
        if isinstance(job, Chunk):
            order = ChunkOrder(job.todo, job.is_star, job.timeout is not None, job.may_stop)
        try:
            body = worker.exchange.wrap(job.payload, worker.message, order)
        except OSError as error:
            failure = cannot("the job's data could not be sent in shared memory", error)
            self._scheduler.attempt_ended(worker.slot, failure, now)
            return
        if not worker.writer.write(Kind.NOTED, worker.message, body):
            self._block(worker)

    def _settled(self, job: JobRecord, phase_is_over: bool) -> None:
        job.finished_at = time.time()
        job.payload = None
        self._ledger.settle(job)
        if job.waiters is not None:
            _fire_waiters(job)
        phase = job.phase
        job.phase = None
        if phase_is_over and phase is not None and phase.waiters is not None:
            _fire(phase.waiters)
        if self._drained and self._scheduler.unsettled == 0:
            _fire(self._drained)

    def _withdraw(self, job: JobRecord) -> None:
        if job.state is None:
            with calm(), self.lock, self._guard:
                self._scheduler.withdraw(job)

    # Answers

    def _check_open(self) -> None:
        if self._scheduler.is_refusing:
            raise DispatcherFinalized("the dispatcher is finalized and takes no more jobs; make a new one")
        if self._scheduler.broken is not None:
            error = PoolBroken(str(self._scheduler.broken))
            raise error from self._scheduler.broken.__cause__

    def _wait_for_phase(self, phase: Phase, deadline: float | None) -> bool:
        waiter = Waiter()
        with self.lock:
            if phase.is_over:
                return True
            if phase.waiters is None:
                phase.waiters = []
            phase.waiters.append(waiter)
        self._driving.wait(waiter, deadline)
        return phase.is_over

    def _wait_until_deserted(self, patience: float) -> None:
        waiter = Waiter()
        with self.lock:
            if not self._workers:
                return
            self._deserted.append(waiter)
        self._driving.wait(waiter, time.monotonic() + patience)

    def _stats(self, now: float) -> PoolStats:
        scheduler = self._scheduler
        states = [slot.state for slot in scheduler.slots]
        workers = tuple(_worker_stats(worker, now) for worker in self._workers.values())
        return PoolStats(
            priority=self.config.priority,
            name=self.config.label,
            workers=len(states),
            idle=states.count(SlotState.IDLE),
            starting=states.count(SlotState.STARTING),
            waiting=scheduler.waiting,
            running=scheduler.running,
            delayed=scheduler.delayed,
            succeeded=scheduler.succeeded,
            failed=scheduler.failed,
            cancelled=scheduler.cancelled,
            retried=scheduler.retried,
            restarts=scheduler.restarts,
            busy_seconds=self._busy_seconds + sum(worker.busy_seconds for worker in workers),
            processes=workers,
        )

    # Ruin

    def _fall(self, error: BaseException) -> None:
        """Give everything up after `error` came out of the middle of a change. Under the lock."""
        if self._ruin is not None:
            return
        self._ruin = PoolBroken(
            f"{self.config.label} was hit by {error!r} in the middle of a change and is given up"
        )
        self._ruin.__cause__ = error
        for worker in list(self._workers.values()):
            self._forget(worker)  # closes the life line, so the kernel kills it
        if self._link.fd >= 0:
            self._driving.poller.unregister(self._link.fd)
        self._fail_rest(self._ruin)
        self._driving.wake()

    def _fail_rest(self, error: PoolBroken) -> None:
        """Settle what has not settled, whatever state it is in, and wake everybody. Under the lock."""
        phases = list(self._scheduler.phases.unreported)
        for job in self._ledger.live(self.config.priority):
            if job.state not in lifecycle.SETTLED:
                job.state = JobState.FAILED
                job.error = error
                self._settled(job, False)
        for job in self._scheduler.ruin(error):
            if job.waiters is not None:
                _fire_waiters(job)
        for phase in phases:
            if phase.waiters is not None:
                _fire(phase.waiters)
        _fire(self._drained)
        _fire(self._deserted)


class _Guard:
    """Around a change of the kernel's state, inside the lock: an exception that comes out of it ruins the pool.

    Why not the lock as well: a Ctrl-C between its acquisition in `__enter__` and the block would leave it locked.
    """

    def __init__(self, fall: Callable[[BaseException], None]) -> None:
        self.is_active = False
        self._fall = fall

    def __enter__(self) -> None:
        if self.is_active:
            raise reentered()
        self.is_active = True

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self._fall(error)
        finally:
            self.is_active = False


def _worker_stats(worker: Worker, now: float) -> WorkerStats:
    state = worker.slot.state
    busy = worker.busy_seconds
    if worker.slot.job is not None:
        busy += now - worker.began
    return WorkerStats(worker.pid, state.value, worker.jobs, busy)


def _fire(waiters: list[Any]) -> None:
    """Wake everybody on the list, and empty it."""
    while waiters:
        waiters.pop().fire()


def _fire_waiters(job: JobRecord) -> None:
    waiters, job.waiters = job.waiters, None
    for waiter in waiters or ():
        waiter.fire()


def _close_copies() -> None:
    for pool in list(_live_pools):
        pool.close_copy()


# Why: a process that the caller forks must not hold the ends of pipes whose closing tells that the caller is gone.
os.register_at_fork(after_in_child=_close_copies)
