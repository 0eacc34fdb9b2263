"""Giving memory back that nobody needs any more. What came free is told by no event, so somebody has to look."""

from __future__ import annotations

import time

from bulkhead._kernel.records import SlotState
from bulkhead.engines.processes.segments import Borrowed, SegmentPool
from bulkhead.engines.processes.staff import Staff
from bulkhead.engines.processes.worker_main import Kind

__all__ = ["Tidying"]

# How often a pool that holds segments sees whether they are needed (seconds).
_TIDY = 5.0


class Tidying:
    """The looks at one pool's shared memory. Owner: the pool's lock.

    Args:
        segments: What the pool has filled.
        borrowed: What it has mapped.
        staff: Its workers, who have lent it that.

    Attributes:
        due: When to look next, in monotonic seconds; None while there is nothing to see.
    """

    def __init__(self, segments: SegmentPool, borrowed: Borrowed, staff: Staff) -> None:
        self._segments = segments
        self._borrowed = borrowed
        self._staff = staff
        self.due: float | None = None

    def plan(self) -> float | None:
        """Return when to look next."""
        is_holding = self._segments.has_files or self._borrowed.has_mapped
        if is_holding or any(worker.let_go for worker in self._staff.workers.values()):
            self.due = self.due or time.monotonic() + _TIDY
        return self.due

    def tidy(self, now: float) -> None:
        """Give back what came free: to the system, and to idle workers, who hear of it with the next job otherwise."""
        self.due = None
        self._segments.trim(now)
        for worker in self._staff.workers.values():
            # Race: one that is sent home is idle until it is reported gone.
            if worker.let_go and worker.slot.state is SlotState.IDLE and worker.writer.fd >= 0:
                notes = worker.exchange.wrap(b"", worker.message, Kind.NOTHING)
                if not worker.writer.write(Kind.NOTED, worker.message, notes):
                    self._staff.block(worker)
