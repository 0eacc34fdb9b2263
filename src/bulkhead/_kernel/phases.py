"""Barrier generations: which jobs a barrier waits for, and what became of them.

Every accepted job belongs to the phase that is open at that moment. A barrier closes the open phase and waits until it
and all before it have no unsettled job; jobs dispatched meanwhile belong to the next phase and are not waited for. A
retry keeps its job unsettled, so it is waited for. So is a job that follows others of its phase: it belongs to the
phase that is open when they are dispatched, from before the first of them is accepted. Cost per job: two additions.

Source: generation counting as in java.util.concurrent.CyclicBarrier.
"""

from __future__ import annotations

from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.records import JobRecord

__all__ = ["Phase", "Phases"]


# Why: Python 3.11 takes 70 ns to find a member in its enum, on the way of every job.
_SUCCEEDED = JobState.SUCCEEDED


class Phase:
    """The jobs accepted between two barriers. Owner: the kernel of its pool, under the pool's lock."""

    __slots__ = ("cancelled", "failed", "failures", "succeeded", "unsettled", "waiters")

    def __init__(self) -> None:
        self.unsettled = 0
        self.succeeded = 0
        self.failed = 0
        self.cancelled = 0
        self.failures: list[JobRecord] = []  # The first ones, bounded by the history's size.
        self.waiters: list[object] | None = None  # Owner: the engine.

    @property
    def is_over(self) -> bool:
        """Tell whether every job of the phase has settled."""
        return self.unsettled == 0


class Phases:
    """The phases of one pool that no barrier has reported yet, oldest first.

    Attributes:
        unreported: All of them.
        open: The last one, to which new jobs belong.
    """

    def __init__(self, keep_failures: int) -> None:
        self._keep = keep_failures
        self.open = Phase()
        self.unreported = [self.open]

    def join(self, job: JobRecord) -> None:
        """Count a job in; the kernel does it itself where it is on the way of every job."""
        job.phase = self.open
        self.open.unsettled += 1

    def retract(self, job: JobRecord) -> Phase:
        """Count a job out that will never be accepted, and return its phase, which forgets it."""
        phase = job.phase
        assert phase is not None
        job.phase = None
        phase.unsettled -= 1
        return phase

    def leave(self, job: JobRecord) -> Phase:
        """Count a settled job out and return its phase."""
        phase = job.phase
        assert phase is not None
        phase.unsettled -= 1
        if job.state is _SUCCEEDED:
            phase.succeeded += 1
        elif job.state is JobState.CANCELLED:
            phase.cancelled += 1
        else:
            phase.failed += 1
            if len(phase.failures) < self._keep:
                phase.failures.append(job)
        return phase

    def close(self) -> list[Phase]:
        """Close the open phase and return all that a barrier called now has to wait for."""
        closed = list(self.unreported)
        self.open = Phase()
        self.unreported.append(self.open)
        return closed

    def report(self, phases: list[Phase]) -> list[Phase]:
        """Return those of `phases` that no other barrier has reported, and drop them: each is reported once."""
        mine = [phase for phase in phases if phase in self.unreported]
        self.unreported = [phase for phase in self.unreported if phase not in mine]
        return mine
