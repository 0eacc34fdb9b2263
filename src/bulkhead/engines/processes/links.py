"""Jobs of one pool that follow others: they are promised first, then kept, then fed.

    promise ──▶ keep ──▶ feed ──▶ as any accepted job that has become due
       └──▶ retract        └─────▶ call_off

Promised: barriers and finalize wait for the job, nobody else knows of it. Kept: accepted, with an id, scheduled. Fed:
it has all it needs. Each step may be asked for twice, late, or in a pool that has been given up meanwhile: a kept job
always settles. A job that is fed needs no room, as one that comes due: it was accepted with those before it. So
whoever feeds is never held up.

Who does that when the job before has ended: this pool's thread for follow-ups, made with the first promise. Why a
thread: jobs end under the lock of their pool, where nobody may pickle, take another pool's lock or wait. Why the
following pool's and not the ending one's: what takes long is the pickling of what the job is fed, and that is the
following pool's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bulkhead._kernel.records import JobRecord
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.engines.processes.acting import Acting
from bulkhead.engines.processes.callbacks import CallbackThread
from bulkhead.engines.processes.interrupts import calm
from bulkhead.engines.processes.settling import Settling
from bulkhead.errors import JobCancelled
from bulkhead.validate import shown

__all__ = ["Links"]


class Links:
    """One pool's jobs that follow others. Concurrency: any thread that holds no pool's lock, but for `submit`.

    Args:
        label: Of the pool.
        scheduler: Its kernel.
        acting: Carries out what the kernel decides.
        settling: Tells who waits.
        check_open: Raises when the pool takes no more jobs; called under the lock.
    """

    def __init__(
        self,
        label: str,
        scheduler: Scheduler,
        *,
        acting: Acting,
        settling: Settling,
        check_open: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._acting = acting
        self._driving = acting.driving
        self._guard = acting.guard
        self._settling = settling
        self._check_open = check_open
        self._thread = CallbackThread(f"bulkhead-{label}-links", "the follow-up")
        self.submit = self._thread.submit  # has `callback(subject)` called in the thread; under any lock
        self.end = self._thread.end

    def promise(self, job: JobRecord) -> None:
        """Count a job in that may have to run when others have ended.

        Raises:
            DispatcherFinalized, PoolBroken: The pool takes no jobs.
        """
        self._thread.prepare()
        with calm(), self._driving.lock:
            self._check_open()
            with self._guard:
                self._scheduler.promise(job)

    def retract(self, job: JobRecord) -> None:
        """Forget a promised job."""
        with calm(), self._driving.lock, self._guard:
            self._settling.retract(job)

    def keep(self, job: JobRecord) -> None:
        """Accept a promised job, which waits to be fed."""
        with calm(), self._driving.lock, self._guard:
            self._keep(job)
            self._acting.carry_out(time.monotonic())

    def feed(self, job: JobRecord, payload: Any, due: float | None, start_by: float | None) -> None:
        """Let a job become ready, at `due` if that is an instant to come; both instants in monotonic seconds."""
        with calm(), self._driving.lock, self._guard:
            now = time.monotonic()
            self._keep(job)
            if self._scheduler.is_unfed(job):
                job.payload, job.due, job.start_by = payload, due, start_by
                self._scheduler.feed(job, now)
                if due is not None or start_by is not None:
                    self._driving.hurry(self._scheduler.next_deadline)
            self._acting.carry_out(now)

    def fail(self, job: JobRecord, error: Exception) -> None:
        """Let a job fail that cannot be fed."""
        with calm(), self._driving.lock, self._guard:
            now = time.monotonic()
            self._keep(job)
            if self._scheduler.is_unfed(job):
                self._scheduler.feed(job, now, error)
            self._acting.carry_out(now)

    def call_off(self, job: JobRecord, error: JobCancelled) -> None:
        """Cancel a job that will not be fed."""
        with calm(), self._driving.lock, self._guard:
            now = time.monotonic()
            self._keep(job)
            if self._scheduler.is_unfed(job):
                self._scheduler.cancel(job, error, now)
            self._acting.carry_out(now)

    def _keep(self, job: JobRecord) -> None:
        self._scheduler.keep(job, JobCancelled(f"job {shown(job.id)} was cancelled by finalize"))
