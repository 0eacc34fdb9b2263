"""Looking at the memory of workers while jobs run, for pools with a hard limit.

Why from outside: a job may hold the interpreter lock, or be in C code that takes all there is. Why by polling: nothing
tells when a process has grown; see memory.py for what the system could limit instead. Whoever drives the pool looks, as
it does for deadlines; a pool without running jobs is not looked at.

What a process can take between two looks is what it can take too much. So the next look is due when a worker could have
come to the limit if it had done nothing but fill fresh pages since the last one.
"""

from __future__ import annotations

import time

from bulkhead._kernel.records import SlotState
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.engines.processes import deaths
from bulkhead.engines.processes.memory import descendants_of, private_bytes_of, rss_of
from bulkhead.engines.processes.staff import Staff
from bulkhead.engines.processes.worker import Worker

__all__ = ["MemoryWatch"]

# Between two looks (seconds): at least, and at most.
_SOONEST = 0.01
_LATEST = 0.1

# Bytes that a process can fill in a second (about what zeroing fresh pages allows; several threads may be faster).
_FASTEST = 4 << 30

# What looking may take of the time in which this pool does nothing else (a share; arbitrary). Only a job with large
# copies of itself comes near it.
_SHARE = 0.1

# How often it is found out which processes a worker's job has started (seconds).
_FAMILY_EVERY = 0.1


class MemoryWatch:
    """The looks at one pool's workers. Owner: the pool's lock.

    Args:
        limit: What a worker may take together with the processes that its job has started (bytes).
        scheduler: Told of a worker that takes more.
        staff: The workers.

    Attributes:
        due: When to look next, in monotonic seconds; None while no worker has anything to do.
    """

    def __init__(self, limit: int, scheduler: Scheduler, staff: Staff) -> None:
        self._limit = limit
        self._scheduler = scheduler
        self._staff = staff
        self._families: dict[Worker, list[int]] = {}
        self._families_due = 0.0
        self.due: float | None = None

    def begin(self, now: float) -> float:
        """Return when to look next: a job starts now."""
        if self.due is None:
            self.due = now + _SOONEST
        return self.due

    def plan(self) -> float | None:
        """Return when to look next."""
        if not any(map(_is_at_work, self._staff.workers.values())):
            self.due = None
            self._families.clear()
            return None
        return self.begin(time.monotonic())

    def look(self, now: float) -> None:
        """See what each worker takes, and have those ended that take too much."""
        began = time.monotonic()
        watched = [worker for worker in self._staff.workers.values() if _is_at_work(worker)]
        if now >= self._families_due:
            self._families = {one: descendants_of(one.pid) for one in watched if one.pid is not None}
            self._families_due = now + _FAMILY_EVERY
        most = 0
        for worker in watched:
            taken = self._taken_by(worker)
            if taken > self._limit:
                self._end(worker, taken, now)
            else:
                most = max(most, taken)
        pause = min(max((self._limit - most) / _FASTEST, _SOONEST), _LATEST)
        self.due = now + max(pause, (time.monotonic() - began) / _SHARE)

    def _taken_by(self, worker: Worker) -> int:
        if worker.pid is None:
            return 0
        family = self._families.get(worker, ())
        own = rss_of(worker.pid)
        others = sum(map(rss_of, family))
        if others and own + others > self._limit:
            # What they share with each other, since the fork, is no additional memory.
            others = sum(map(private_bytes_of, family))
        return own + others

    def _end(self, worker: Worker, taken: int, now: float) -> None:
        worker.excess = taken, self._limit
        if worker.slot.state is SlotState.STARTING:
            worker.failure = deaths.excess("a worker, before its first job,", worker, deaths.UNKNOWN)
            self._staff.end(worker, now)
        else:
            self._scheduler.memory_exceeded(worker.slot, now)


def _is_at_work(worker: Worker) -> bool:
    is_busy = worker.slot.state is SlotState.BUSY or worker.slot.state is SlotState.STARTING
    return is_busy and worker.excess is None
