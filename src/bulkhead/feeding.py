"""Feeding jobs to their pools from an iterable, for `dispatch_all` and `map`.

Jobs are left with their pools, which accept them as workers come free, also while nobody looks. One whose pool has
enough of them waits here, in the order of its pool, while later jobs of other pools pass it: a full pool never keeps
another pool's job from starting. What is held here is bounded by the look-ahead of whoever feeds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from bulkhead.errors import BulkheadError
from bulkhead.tracker import Tracker

__all__ = ["Feeder", "Offers"]


class Feedable(Protocol):
    """What the feeder needs of a pool."""

    def dispatch(self, job: Tracker, deadline: float | None) -> bool: ...
    def try_dispatch(self, job: Tracker, waiter: object = None) -> bool: ...
    def withdraw(self, job: Tracker) -> bool: ...
    def check_open(self) -> None: ...
    def wait_until_accepted(self, job: Tracker) -> None: ...
    def call_background(self) -> None: ...


class Offers:
    """Jobs left with their pools: each pool's in order, so many at once, the others in line here. Owner: one thread.

    Args:
        forget: Called with a job that was added but will not be dispatched.
        depth: How many jobs may be offered to one pool at once.
    """

    def __init__(self, forget: Callable[[Tracker], None], depth: int = 1) -> None:
        self._forget = forget
        self._depth = depth
        self._lines: dict[Feedable, deque[Tracker]] = {}
        self._offered: dict[Feedable, deque[Tracker]] = {}  # what each pool has not accepted yet
        self._bell = _Bell()
        self.n_held = 0

    def add(self, pool: Feedable, job: Tracker) -> None:
        """Leave the job with its pool, which accepts it at once or when there is room.

        Raises:
            DispatcherFinalized, PoolBroken: The pool takes no jobs.
        """
        offered = self._offered.get(pool)
        if offered is not None:
            self._drop_accepted(offered)
        self.n_held += 1
        if offered is not None and len(offered) >= self._depth:
            self._lines.setdefault(pool, deque()).append(job)
        else:
            self._offer(pool, job)

    def accepted(self) -> Iterator[Tracker]:
        """Yield the jobs that pools have accepted meanwhile, and offer the next of their lines.

        Raises:
            DispatcherFinalized, PoolBroken: A pool takes no more jobs; raised when all that is accepted is given out.
        """
        self._bell.clear()
        refusal: BulkheadError | None = None
        is_more = True
        # Why one job of each pool in turn: a pool that accepts at once would keep the others waiting. Why until a pass
        # finds nothing: a job that is accepted at once rings no bell.
        while is_more:
            is_more = False
            for pool, offered in self._offered.items():
                if not offered:
                    continue
                is_accepted = offered[0].state is not None
                job = offered[0]
                try:
                    if is_accepted:
                        is_more = True
                        self._move_on(pool, offered)
                    else:
                        pool.check_open()
                except BulkheadError as error:
                    refusal = error
                if is_accepted:
                    yield job
        if refusal is not None:
            raise refusal

    def _move_on(self, pool: Feedable, offered: deque[Tracker]) -> None:
        offered.popleft()
        self.n_held -= 1
        line = self._lines.get(pool)
        if line:
            self._offer(pool, line.popleft())

    def wait(self) -> None:
        """Wait until some pool has accepted a job. Blocking: without limit, as dispatch does."""
        waiting = [(pool, offered[0]) for pool, offered in self._offered.items() if offered]
        if len(waiting) == 1:
            [(pool, job)] = waiting
            pool.wait_until_accepted(job)
            return
        for pool, _ in waiting:
            pool.call_background()
        self._bell.wait()

    def take_back(self) -> None:
        """Withdraw what is not accepted."""
        for pool, offered in self._offered.items():
            for job in offered:
                if pool.withdraw(job):
                    self._forget(job)
        for line in self._lines.values():
            for job in line:
                self._forget(job)

    def _offer(self, pool: Feedable, job: Tracker) -> None:
        # Race: Ctrl-C is let through when the offer is made, so it has to be known here before.
        offered = self._offered.setdefault(pool, deque())
        offered.append(job)
        try:
            if job.plan is not None:
                job.plan.promise()
            pool.try_dispatch(job, self._bell)
        except BaseException:
            offered.pop()
            self.n_held -= 1
            if pool.withdraw(job):
                self._forget(job)
            raise

    def _drop_accepted(self, offered: deque[Tracker]) -> None:
        if len(offered) < self._depth or self._depth == 1:
            return
        # Why not from the front alone: one that was sent ahead is accepted when its worker has got so far.
        waiting = [job for job in offered if job.state is None]
        self.n_held -= len(offered) - len(waiting)
        offered.clear()
        offered.extend(waiting)


class Feeder:
    """Dispatches an iterable of jobs and yields their trackers as they are accepted. Owner: one thread.

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
        self._offers = Offers(forget)
        self._failure: BaseException | None = None
        self._is_exhausted = False

    def __iter__(self) -> Iterator[Any]:
        offers = self._offers
        try:
            while True:
                for job in offers.accepted():
                    yield job if job.plan is None else job.plan.handed_over()
                if offers.n_held and (self._is_exhausted or offers.n_held >= self._lookahead):
                    offers.wait()
                elif not self._is_exhausted:
                    self._read_one()
                else:
                    break
        finally:
            offers.take_back()
        if self._failure is not None:
            raise self._failure

    def _read_one(self) -> None:
        try:
            pool, job = next(self._jobs)
        except StopIteration:
            self._is_exhausted = True
        except Exception as error:
            self._failure, self._is_exhausted = error, True
        else:
            self._offers.add(pool, job)


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
