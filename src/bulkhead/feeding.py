"""Dispatching an iterable of jobs of mixed priorities: a full pool never keeps another pool's job from starting.

Jobs are read ahead while some pool has a use for them; one whose pool is full waits here, in the order of its pool,
while later jobs of other pools pass it. What is held here is bounded by the look-ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from bulkhead.tracker import Tracker

__all__ = ["Feeder"]


class Feedable(Protocol):
    """What the feeder needs of a pool."""

    def dispatch(self, job: Tracker, deadline: float | None) -> bool: ...
    def try_dispatch(self, job: Tracker, waiter: object = None) -> bool: ...
    def withdraw(self, job: Tracker) -> bool: ...
    def check_open(self) -> None: ...
    def wait_until_accepted(self, job: Tracker) -> None: ...
    def call_background(self) -> None: ...


class Feeder:
    """Feeds jobs to their pools and yields their trackers as they are accepted. Owner: one thread.

    Args:
        jobs: The trackers to be, each with its pool; what it raises is raised when all read before are dispatched.
        lookahead: How many jobs may be read and not yet accepted.
        forget: Called with a job that was read but will not be dispatched.
    """

    def __init__(
        self,
        jobs: Iterator[tuple[Feedable, Tracker]],
        lookahead: int,
        forget: Callable[[Tracker], None],
    ) -> None:
        self._jobs = jobs
        self._lookahead = lookahead
        self._forget = forget
        self._held = 0
        self._lines: dict[Feedable, deque[Tracker]] = {}
        self._offered: dict[Feedable, Tracker] = {}  # the head of each line, left with its pool
        self._failure: BaseException | None = None
        self._is_exhausted = False
        self._bell = _Bell()

    def __iter__(self) -> Iterator[Tracker]:
        try:
            while True:
                yield from self._accepted()
                if self._held and (self._is_exhausted or self._held >= self._lookahead):
                    self._wait()
                elif not self._is_exhausted:
                    yield from self._read_one()
                else:
                    break
        finally:
            self._take_back()
        if self._failure is not None:
            raise self._failure

    def _read_one(self) -> Iterator[Tracker]:
        try:
            pool, job = next(self._jobs)
        except StopIteration:
            self._is_exhausted = True
            return
        except Exception as error:
            self._failure, self._is_exhausted = error, True
            return
        self._held += 1
        if pool in self._offered:
            self._lines.setdefault(pool, deque()).append(job)
        else:
            self._offered[pool] = job
            self._offer(pool, job)
            yield from self._accepted()

    def _offer(self, pool: Feedable, job: Tracker) -> None:
        """Leave the job with its pool, which accepts it at once or when there is room."""
        try:
            pool.try_dispatch(job, self._bell)
        except BaseException:
            del self._offered[pool]
            self._forget(job)
            raise

    def _accepted(self) -> Iterator[Tracker]:
        """Yield the jobs that pools have accepted meanwhile, and offer the next of their lines."""
        self._bell.clear()
        for pool in list(self._offered):
            while (job := self._offered.get(pool)) is not None:
                if job.state is None:
                    pool.check_open()
                    break
                del self._offered[pool]
                self._held -= 1
                yield job
                self._offer_next(pool)

    def _offer_next(self, pool: Feedable) -> None:
        line = self._lines.get(pool)
        if line:
            job = line.popleft()
            self._offered[pool] = job
            self._offer(pool, job)

    def _wait(self) -> None:
        """Wait until some pool has accepted a job. Blocking: without limit, as dispatch does."""
        if len(self._offered) == 1:
            [(pool, job)] = self._offered.items()
            pool.wait_until_accepted(job)
            return
        for pool in self._offered:
            pool.call_background()
        self._bell.wait()

    def _take_back(self) -> None:
        for pool, job in self._offered.items():
            if pool.withdraw(job):
                self._forget(job)
        for line in self._lines.values():
            for job in line:
                self._forget(job)


class _Bell:
    """Rung by pools, each under its own lock; waited for by the feeding thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def fire(self) -> None:
        self._event.set()

    def wait(self) -> None:
        """Wait until it rings. Blocking: without limit."""
        self._event.wait()

    def clear(self) -> None:
        self._event.clear()
