"""The jobs a dispatcher knows by id: all live ones, and settled ones within bounds of age and number.

Concurrency: no lock, because pools must not share one. Every step is a single operation of a dict or deque, which
CPython makes atomic; what two threads may do twice is written so that twice does no harm.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Any

from bulkhead._kernel.lifecycle import SETTLED
from bulkhead.errors import DuplicateJobId, JobNotFound
from bulkhead.tracker import Tracker
from bulkhead.validate import shown

__all__ = ["History"]

# Results that are kept for those who ask by id take this much together at most, the last one apart (bytes, pickled).
# Why: jobs that return some MiB each would fill the memory long before their number or age is a bound.
_MAX_BYTES = 64 << 20

# Smaller results are not counted: 10,000 of them are no more than the above.
_COUNTED_FROM = 4096

# Settled jobs are dropped when they are this much older than the expiry, as a share of it, even if nothing happens.
_SLACK = 0.1


class History:
    """Jobs by id.

    Args:
        expiry: Seconds that a settled job is remembered.
        limit: How many settled jobs are remembered.
    """

    def __init__(self, expiry: float, limit: int) -> None:
        self.limit = limit
        self._expiry = expiry
        self._jobs: dict[Any, Tracker] = {}
        self._reserved: dict[Any, Tracker] = {}  # own ids of jobs that are not accepted yet
        self._settled: deque[tuple[float, Tracker]] = deque()
        self._numbers = count()
        # Bytes that a thread has added less those it has dropped; their sum is kept. Why by thread: an addition is
        # no atomic step, and so each counter has one writer.
        self._bytes: dict[int, int] = {}

    def reserve(self, job_id: Hashable, job: Tracker) -> None:
        """Give `job` an id of the user's; raises DuplicateJobId when a live job has it."""
        job.id = job_id  # Why first: `release` finds by it what a Ctrl-C may leave here
        if self._reserved.setdefault(job_id, job) is not job:
            raise DuplicateJobId(f"a job with id {shown(job_id)} is being dispatched already")
        # Race: whoever held the reservation before has been entered by now, so it is found here.
        holder = self._jobs.get(job_id)
        if holder is not None and holder.state not in SETTLED:
            del self._reserved[job_id]
            raise DuplicateJobId(f"a job with id {shown(job_id)} is still live")

    def number(self, job: Tracker) -> None:
        """Reserve the next number for a job that is about to be accepted and has no id."""
        while job.id is None:
            number = next(self._numbers)
            if self._reserved.setdefault(number, job) is not job:
                continue
            if number in self._jobs:
                del self._reserved[number]
            else:
                job.id = number

    def release(self, job: Tracker) -> None:
        """Forget a job that was not accepted."""
        if self._reserved.get(job.id) is job:
            del self._reserved[job.id]

    def enter(self, job: Any) -> None:
        """Note the acceptance of a job; one without an id of its own gets the next number."""
        job.queued_at = time.time()
        if job.id is not None:
            self._jobs.pop(job.id, None)  # a settled one of the same id
            self._jobs[job.id] = job
            del self._reserved[job.id]
            return
        while job.id is None:
            number = next(self._numbers)
            if self._jobs.setdefault(number, job) is not job:
                continue
            # Race: `reserve` looks the other way round, so that one of the two sees the other.
            if number in self._reserved:
                del self._jobs[number]
            else:
                job.id = number

    def recall(self, job_id: Hashable, job: Tracker) -> None:
        """Note a job that has succeeded before this dispatcher was made.

        Raises:
            DuplicateJobId: A live job has its id.
        """
        self.reserve(job_id, job)
        self.enter(job)
        self.settle(job)

    def settle(self, job: Any) -> None:
        """Note that a job has settled, and drop what is too old or too much."""
        if not job.is_kept:
            self._jobs.pop(job.id, None)
            return
        now = time.monotonic()
        settled = self._settled
        settled.append((now, job))
        if job.size >= _COUNTED_FROM:
            self._count(job.size)
            while len(settled) > 1 and sum(list(self._bytes.values())) > _MAX_BYTES:
                self._drop_first()
        horizon = now - self._expiry
        try:
            while len(settled) > self.limit or settled[0][0] <= horizon:
                self._drop_first()
        except IndexError:  # Race: another pool's thread has dropped the last one
            pass

    def next_sweep(self) -> float | None:
        """Return when `sweep` should be called next, in monotonic seconds."""
        try:
            return self._settled[0][0] + (1 + _SLACK) * self._expiry
        except IndexError:
            return None

    def sweep(self) -> None:
        """Drop what is too old."""
        horizon = time.monotonic() - self._expiry
        try:
            while self._settled[0][0] <= horizon:
                self._drop_first()
        except IndexError:  # Race: another pool's thread has dropped the last one
            pass

    def find(self, job_id: Any) -> Tracker:
        """Return a known job; raises JobNotFound."""
        self.sweep()
        try:
            job = self._jobs[job_id]
        except (KeyError, TypeError):
            job = None
        if job is None:
            raise JobNotFound(
                f"no job {shown(job_id)} is known: it was never dispatched, or it has expired", job_id=job_id
            )
        return job

    def jobs(self) -> Iterator[Tracker]:
        """Return all known jobs in the order of their acceptance."""
        self.sweep()
        return iter(list(self._jobs.values()))

    def live(self, priority: int) -> list[Tracker]:
        """Return the jobs of a pool that are accepted and not settled, or settled while somebody waits to be told."""
        known = [job for job in list(self._jobs.values()) if job.priority == priority]
        # Race: one without a state was entered when an exception struck, out of a signal handler of the user's.
        return [job for job in known if job.state not in SETTLED or job.waiters is not None]

    def _drop_first(self) -> None:
        try:
            _, job = self._settled.popleft()
        except IndexError:
            return
        if job.size >= _COUNTED_FROM:
            self._count(-job.size)
        if self._jobs.get(job.id) is job:
            self._jobs.pop(job.id, None)

    def _count(self, size: int) -> None:
        me = threading.get_ident()
        self._bytes[me] = self._bytes.get(me, 0) + size
