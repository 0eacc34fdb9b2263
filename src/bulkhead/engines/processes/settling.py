"""Who is told when a job has settled: whoever waits for it, for its phase, or for the pool to run dry.

Nobody is forgotten, wherever an exception strikes (out of a signal handler of the user's): who is to be told stays on
the list until told, and then the pool is given up (`fail_rest`), which tells all who are on a list. So a waiter may be
told twice, and each kind of waiter bears that.

Owner: the pool's lock, for all of this.
"""

from __future__ import annotations

import time

from bulkhead._kernel import lifecycle
from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.records import JobRecord
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.engines.base import Ledger
from bulkhead.engines.processes.driving import Waiter, fire
from bulkhead.errors import PoolBroken

__all__ = ["Settling", "fire_waiters"]


class Settling:
    """The ends of one pool's jobs.

    Args:
        scheduler: The pool's.
        ledger: Told of each job that has settled.
        priority: Of the pool.

    Attributes:
        drained: Who waits until no job is unsettled.
    """

    def __init__(self, scheduler: Scheduler, ledger: Ledger, priority: int) -> None:
        self._scheduler = scheduler
        self._ledger = ledger
        self._priority = priority
        self.drained: list[Waiter] = []

    def settle(self, job: JobRecord, phase_is_over: bool) -> None:
        """Wake everybody who waits for a job that the kernel has settled."""
        job.finished_at = time.time()
        job.payload = None
        self._ledger.settle(job)
        if job.waiters is not None:
            fire_waiters(job)
        phase = job.phase
        job.phase = None
        if phase_is_over and phase is not None and phase.waiters is not None:
            fire(phase.waiters)
        if self.drained and self._scheduler.unsettled == 0:
            fire(self.drained)

    def retract(self, job: JobRecord) -> None:
        """Take the promise of a job back, if it is not kept, and wake who waits for no more than that."""
        phase = self._scheduler.retract(job)
        if phase is None:
            return
        if phase.is_over and phase.waiters is not None:
            fire(phase.waiters)
        if self.drained and self._scheduler.unsettled == 0:
            fire(self.drained)

    def fail_rest(self, error: PoolBroken) -> None:
        """Settle what has not settled, whatever state it is in, and wake everybody; the kernel forgets all.

        Invariant: what an exception breaks off here is found again when this is called again.
        """
        phases = list(self._scheduler.phases.unreported)
        for job in self._scheduler.untold():
            if job.state in lifecycle.SETTLED:
                self.settle(job, False)
            else:
                fire_waiters(job)
        for job in self._ledger.live(self._priority):
            if job.state not in lifecycle.SETTLED:
                job.state = JobState.FAILED
                job.error = error
            self.settle(job, False)
        self._scheduler.ruin(error)
        for phase in phases:
            if phase.waiters is not None:
                fire(phase.waiters)
        fire(self.drained)


def fire_waiters(job: JobRecord) -> None:
    """Tell everybody who waits for the job, and forget them, but for those who ask to be told again."""
    waiters = job.waiters
    if waiters is None:
        return
    # Race: an exception may strike after each step; whoever is on the list then is told (again) by `fail_rest`.
    for waiter in tuple(waiters):
        if not waiter.fire():
            waiters.remove(waiter)
    if not waiters:
        job.waiters = None
