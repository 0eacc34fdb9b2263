"""One pool of processes: what a dispatcher asks of it, how callers wait, and how it ends.

Data flow: see the package docstring. Nothing here is shared with another pool: lock, poller, threads, launcher, pipes
and workers are this pool's own.

A request that changes the kernel's state does so under the lock and inside the guard, and sees to it that what the
kernel decides is done at once (see acting.py).
"""

from __future__ import annotations

import os
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bulkhead._kernel import lifecycle
from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.phases import Phase
from bulkhead._kernel.records import JobRecord, Slot, Wear
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.chunk import Chunk
from bulkhead.config import Pool
from bulkhead.engines.base import Ledger
from bulkhead.engines.processes import deaths, log_records, main_module
from bulkhead.engines.processes.acting import Acting
from bulkhead.engines.processes.callbacks import CallbackThread, DoneCallback, once
from bulkhead.engines.processes.chronicle import Chronicle, Page
from bulkhead.engines.processes.chunks import extended
from bulkhead.engines.processes.driving import Bell, Driving, Waiter, reentered
from bulkhead.engines.processes.heritage import Heritage, collecting
from bulkhead.engines.processes.interrupts import calm, hold, release
from bulkhead.engines.processes.links import Links
from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import (
    SHARED_IS_FOR_JOBS,
    pack_call,
    pack_initializer,
    pack_without_main,
)
from bulkhead.engines.processes.segments import SegmentPool
from bulkhead.engines.processes.settling import Settling
from bulkhead.engines.processes.sharing import Shared
from bulkhead.engines.processes.snapshot import Counts, counts, snapshot
from bulkhead.engines.processes.use import UseLimits
from bulkhead.engines.processes.worker_main import Setup
from bulkhead.errors import DispatcherFinalized, JobCancelled, JobNotPicklable, NestedDispatch, PoolBroken
from bulkhead.tally import Tally
from bulkhead.validate import shown

if TYPE_CHECKING:
    from bulkhead.stats import PoolStats

__all__ = ["ProcessPool", "packed_setup"]

# Seconds that an idle worker has to leave by itself when the pool stops.
_LEAVE = 1.0

# Seconds that stopping may take in all before the life lines are cut.
_STOP = 3.0

# Free segments for the data of jobs that a pool keeps for the next ones, together (bytes).
_KEEP_BYTES = 1 << 30

_live_pools: weakref.WeakSet[ProcessPool] = weakref.WeakSet()


class PackedSetup(NamedTuple):
    """What the workers of a pool are told first, and the descriptors that go with it."""

    body: bytes
    heritage: Heritage


def packed_setup(config: Pool, nicer_by: int) -> PackedSetup:
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
    heritage = Heritage()
    if config.initializer is not None and not is_fork:
        with collecting(heritage):
            call = pack_initializer(config.initializer, config.initargs)
    main = None if is_fork else main_module.describe()
    levels = log_records.current_levels() if config.forward_logging else None
    limits = _use_limits(config)
    cpus = None if config.cpus is None else tuple(config.cpus)
    name, n_fds = f"bulkhead-{config.label}", len(heritage.fds)
    setup = Setup(name, main, call, config.nice, nicer_by, cpus, limits, n_fds, levels)
    return PackedSetup(pickle.dumps(setup), heritage)


class ProcessPool:
    """The workers of one `Pool`, on processes of this machine.

    Args:
        config: The pool.
        setup: What `packed_setup` made of the same config.
        keep_failures: Failed jobs that a phase remembers for its barrier.
        ledger: Told of each job that is accepted or has settled.
        max_timeline: How many attempts are remembered.
    """

    def __init__(
        self,
        config: Pool,
        *,
        setup: PackedSetup,
        keep_failures: int,
        ledger: Ledger,
        max_timeline: int,
    ) -> None:
        self.config = config
        method = config.start_method or "forkserver"
        # Where the large parts of jobs wait for their worker.
        self.segments = SegmentPool(_KEEP_BYTES)
        knows_main = method == "fork" or main_module.is_importable()
        self.pack = pack_call if knows_main else pack_without_main  # packs a call for this pool's workers
        self._heritage = setup.heritage
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
            extended=extended,
            wear=_wear(config),
            recall=_recall if _goes_ahead(config) else None,
        )
        self._settling = Settling(self._scheduler, ledger, config.priority)
        self._chronicle = Chronicle(max_timeline)
        self.tally = Tally()
        self._acting = Acting(
            config,
            self._scheduler,
            setup=setup.body,
            heritage=setup.heritage,
            ledger=ledger,
            settling=self._settling,
            segments=self.segments,
            chronicle=self._chronicle,
        )
        # Why names of their own: they are on the way of every job.
        self._carry_out = self._acting.carry_out
        self._guard = self._acting.guard
        self._driving = self._acting.driving
        self._staff = self._acting.staff
        self.lock = self._driving.lock
        self.links = Links(
            config.label,
            self._scheduler,
            acting=self._acting,
            settling=self._settling,
            check_open=self._check_open,
        )
        self._is_copy = False  # of a pool in a process that the caller forked
        self._is_stopped = False
        _live_pools.add(self)

    # What a dispatcher asks for

    def begin(self) -> None:
        """Start the threads and the workers."""
        self._driving.begin()
        if self._acting.output is not None:
            self._acting.output.begin()
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
        waiter = _Offer(self._scheduler, self._driving, job)
        is_held = hold()
        try:
            # Why a glance before the offer: in full swing there is an answer, and so a worker, and the job is spared
            # the line of those that wait.
            is_done = (
                not self._scheduler.has_room() and self._driving.glance(waiter, waiter.take_up)
            ) or self._offer(job, waiter)
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
                    job.waiters = [waiter] if job.waiters is None else [*job.waiters, waiter]
                    self._driving.try_role(waiter)
                _hurry(self._driving, scheduler, job)
                self._carry_out(now)
                if is_taken:
                    self._driving.resign(waiter)
                return is_taken
            except BaseException as error:
                self._acting.ruin(error)
                raise
            finally:
                self._guard.is_active = False

    def submit(self, job: JobRecord) -> None:
        """Have the job accepted whatever the backlog is; wait for nothing.

        Raises:
            DispatcherFinalized: No more jobs are taken.
            PoolBroken: The pool has given up.
        """
        visitor = Waiter()
        is_held = hold()
        try:
            # Why a glance: who submits many in a row keeps the workers busy meanwhile. The background thread gets the
            # interpreter only every few milliseconds as long as callers compute.
            if not self._scheduler.has_room():
                self._driving.glance(visitor, partial(self._enlist, job, visitor))
            if not visitor.is_done:
                with self.lock:
                    self._check_open()
                    with self._guard:
                        now = time.monotonic()
                        self._enlist(job, visitor, now)
                        self._carry_out(now)
                    self._driving.crowd_in(self._scheduler.waiting)
        except BaseException:
            self._driving.leave(visitor)
            raise
        finally:
            if is_held:
                release()

    def _enlist(self, job: JobRecord, visitor: Waiter, now: float) -> None:
        """Accept the job. Under the lock, inside the guard."""
        scheduler = self._scheduler
        if not scheduler.is_refusing and scheduler.broken is None:
            scheduler.submit(job, now)
            visitor.is_done = True
            self._driving.resign(visitor)

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
                _hurry(self._driving, self._scheduler, job)
                if job.goes_ahead:
                    self._scheduler.send_ahead()
                self._carry_out(now)
            return taken

    def wait_until_accepted(self, job: JobRecord) -> None:
        """Wait until an offer that was left with `try_dispatch` is accepted or refused. Blocking: without limit."""
        waiter = Waiter()
        with self.lock:
            if job.waiters is None or job.state is not None:
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
            self._acting.abandon(chunks, time.monotonic())

    def drop(self, chunks: Iterable[Chunk]) -> None:
        """As `abandon`, soon. Safe inside the garbage collector, which may run under any lock."""
        if not self._is_stopped:
            self._acting.drop(chunks)

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
        return self.wait_until_told(job, deadline)

    def wait_until_told(self, job: JobRecord, deadline: float | None) -> bool:
        """As `wait_for`, and until those are told who have waited for it before."""
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

    def deferred(self, callback: Callable[[Any], object]) -> Callable[[Any], None]:
        """Return a function that has `callback` called in the callback thread, once however often it is called."""
        self._callbacks.prepare()
        return partial(self._callbacks.submit, once(callback))

    def wait_for_callbacks(self) -> None:
        """Wait until the callbacks of what has settled have run; not in a callback."""
        self._callbacks.wait_until_run()

    def wait_as(self, waiter: Waiter) -> None:
        """Wait until somebody has fired the waiter. Blocking: without limit."""
        self._refuse_copy()
        self._driving.wait(waiter)

    def cancel(self, job: JobRecord) -> bool:
        """Take a waiting job out, end the worker of a running one; False when it has settled otherwise."""
        self._refuse_copy()
        with calm(), self.lock, self._guard:
            now = time.monotonic()
            is_cancelled = self._scheduler.cancel(
                job, JobCancelled(f"job {shown(job.id)} was cancelled"), now
            )
            self._carry_out(now)
        return is_cancelled or job.state is JobState.CANCELLED

    def cancel_waiting(self, jobs: Iterable[JobRecord], *, but_promised: bool = False) -> None:
        """Take those of the jobs out that wait; those that run go on.

        Args:
            jobs: Any jobs of the pool.
            but_promised: Spare those that wait for nothing but for their worker to come up.
        """
        self._refuse_copy()
        with calm(), self.lock, self._guard:
            now = time.monotonic()
            spared = self._scheduler.next_for_absent() if but_promised else ()
            for job in jobs:
                if job.state not in (None, JobState.RUNNING) and job not in spared:
                    self._scheduler.cancel(job, JobCancelled(f"job {shown(job.id)} was cancelled"), now)
            self._carry_out(now)

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
            unsettled = [*self._scheduler.unsettled_jobs(), *self._scheduler.promised_jobs()]
            return [job for job in unsettled if job.phase in phases]

    def stats(self) -> PoolStats:
        """Return a snapshot."""
        with self.lock:
            return snapshot(self.config, self._scheduler, self._staff, time.monotonic())

    def counts(self) -> Counts:
        """Return how far the pool is; also when it has ended."""
        with self.lock:
            return counts(self._scheduler, self.tally)

    def past(self) -> Page:
        """Return a copy of what is remembered of attempts and workers; also when the pool has ended."""
        scheduler = self._scheduler
        with self.lock:
            n_ended = scheduler.succeeded + scheduler.failed + scheduler.cancelled + scheduler.retried
            return self._chronicle.copy(
                self.config, scheduler.slots, self._staff.workers.values(), n_ended, time.monotonic()
            )

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
            self._settling.drained.append(waiter)
        return self._driving.wait(waiter, deadline)

    def cancel_all(self) -> None:
        """Cancel every job that has not settled."""
        with calm(), self.lock, self._guard:
            now = time.monotonic()
            for job in self._scheduler.promised_jobs():
                self._settling.retract(job)
            if self._acting.output is not None:
                self._acting.output.hasten()
            for job in self._scheduler.unsettled_jobs():
                self._scheduler.cancel(
                    job, JobCancelled(f"job {shown(job.id)} was cancelled by finalize"), now
                )
            self._carry_out(now)

    def dismiss(self) -> None:
        """Send the workers home: idle ones leave by themselves, the others are ended. Does not wait."""
        with calm(), self.lock, self._guard:
            self._scheduler.stop()
            self._staff.dismiss()

    def stop(self, callback_deadline: float | None) -> None:
        """End every process and thread and close everything; `drain` and `dismiss` came before.

        Blocking: some seconds at most, and for done callbacks until `callback_deadline`.
        """
        with self._stopping:
            if not self._is_stopped:
                self._end_everything()
        # Why outside: a callback may finalize, too, and wait for the lock.
        for thread in (self.links, self._callbacks):
            thread.end(None if callback_deadline is None else max(callback_deadline - time.monotonic(), 0))

    def _end_everything(self) -> None:
        self._staff.wait_until_gone(_LEAVE)
        with self.lock:
            self._staff.end_all()
        self._staff.wait_until_gone(_STOP)
        with self.lock:
            self._staff.cut_all()
        self._driving.end_background()
        with self.lock:
            self._is_stopped = True
            self._staff.close(_STOP)
            self._settling.fail_rest(PoolBroken(f"{self.config.label} was stopped"))
            self.segments.close()
            self._heritage.close()
            self._driving.close()
        if self._acting.output is not None:
            self._acting.output.end()
            # Why: the locks and queues among them would live as long as this, which the garbage collector decides.
            self.config = replace(self.config, initializer=None, initargs=())
        _live_pools.discard(self)

    def close_copy(self) -> None:
        """Close this process's copies of the descriptors: for a forked copy of the caller."""
        self._is_copy = True
        # Race: another thread of the caller may have held the lock when it forked.
        self.lock = self._driving.lock = threading.RLock()
        if not self._is_stopped:
            self._is_stopped = True
            self._staff.close_copy()
            self.segments.close()
            self._heritage.close()
            self._driving.close()

    def _refuse_copy(self) -> None:
        if self._is_copy:
            raise NestedDispatch(
                "this job belongs to another process, which alone can wait for it or cancel it"
            )

    def _withdraw(self, job: JobRecord) -> None:
        if job.state is None:
            with calm(), self.lock, self._guard:
                self._scheduler.withdraw(job)
                self._carry_out(time.monotonic())

    def _check_open(self) -> None:
        if self._scheduler.is_refusing:
            raise DispatcherFinalized("the dispatcher is finalized and takes no more jobs; make a new one")
        if self._scheduler.broken is not None:
            # Why no variable: it would keep the callers' frames alive, and all in them, in a cycle.
            raise PoolBroken(str(self._scheduler.broken)) from self._scheduler.broken.__cause__

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


class _Offer(Waiter):
    """The wish of a caller whose job needs room."""

    __slots__ = ("_driving", "_job", "_scheduler")

    def __init__(self, scheduler: Scheduler, driving: Driving, job: JobRecord) -> None:
        # Why not by the base class: it is on the way of every job.
        self.is_done = False
        self.polls_with = self._bed = None
        self._scheduler = scheduler
        self._driving = driving
        self._job = job

    def take_up(self, now: float) -> None:
        """Have the job accepted if there is room, and leave. Under the lock, inside the guard."""
        scheduler, job = self._scheduler, self._job
        if scheduler.is_refusing or scheduler.broken is not None:
            return
        if scheduler.offer(job, now, patient=False):
            _hurry(self._driving, scheduler, job)
            self.is_done = True
            self._driving.resign(self)


def _hurry(driving: Driving, scheduler: Scheduler, job: JobRecord) -> None:
    """See to it that who polls knows the instants that a job has brought."""
    if job.due is not None or job.start_by is not None:
        driving.hurry(scheduler.next_deadline)


def _use_limits(config: Pool) -> UseLimits | None:
    limits = UseLimits(config.max_jobs_per_worker, config.max_memory_per_worker, config.hard_memory_limit)
    return None if all(limit is None for limit in limits) else limits


def _wear(config: Pool) -> Wear | None:
    limits = _use_limits(config)
    return None if limits is None else Wear(limits.max_jobs, limits.max_bytes)


def _goes_ahead(config: Pool) -> bool:
    """Tell whether workers may have a chunk more than they run.

    Why not with limits: who has reached one gets nothing more. Why not with output: it has to be out before the answer.
    """
    is_plain = not config.capture_output and not config.forward_logging
    return is_plain and _use_limits(config) is None


def _recall(slot: Slot) -> bool:
    return slot.worker is not None and slot.worker.take_back()


def _close_copies() -> None:
    for pool in list(_live_pools):
        pool.close_copy()


# Why: a process that the caller forks must not hold the ends of pipes whose closing tells that the caller is gone.
os.register_at_fork(after_in_child=_close_copies)
