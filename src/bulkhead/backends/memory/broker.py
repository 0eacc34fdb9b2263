"""The broker in memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from uuid import uuid4

from bulkhead.backends.base import (
    Broker,
    Burial,
    CancelAnswer,
    Claim,
    Ending,
    Hold,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.backends.memory.jobs import Job, Queue
from bulkhead.backends.memory.keeping import Kept
from bulkhead.backends.memory.locking import Guard

__all__ = ["MemoryBroker"]


class MemoryBroker(Broker):
    """Jobs in dictionaries and heaps."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._jobs: dict[str, Job] = {}
        self._queues: defaultdict[str, Queue] = defaultdict(Queue)
        self._taken: Kept[bool] = Kept()
        self._paused: set[str] = set()

    def enqueue_many(self, messages: Sequence[Message]) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            now = time.time()
            kept = [self._enqueue(message, now) for message in messages]
            self._guard.changed.notify_all()
            return kept

    def claim(self, queue: str, n: int, lease: float, *, wait: float = 0.0) -> list[Claim]:
        """See `Broker`."""
        deadline = time.monotonic() + wait
        with self._guard:
            while True:
                claims = [] if queue in self._paused else self._claim(queue, n, lease)
                left = deadline - time.monotonic()
                if claims or left <= 0:
                    return claims
                change = self._queues[queue].next_change() if queue in self._queues else float("inf")
                # Why not 0: a clock that the wait undershoots must not make a loop that never lets go of the lock.
                self._guard.changed.wait(min(left, max(change - time.time(), 0.001)))

    def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """See `Broker`."""
        with self._guard:
            standings = [self._renew(hold, lease) for hold in holds]
            self._guard.changed.notify_all()
            return standings

    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            return [self.end(Ending(hold)) for hold in holds]

    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            given = [self._nack(back) for back in returns]
            self._guard.changed.notify_all()
            return given

    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            return [self.end(Ending(dead.hold, None, dead.reason or "", dead.error)) for dead in burials]

    def end(self, ending: Ending) -> bool:
        """End a claim; False where it was lost. Concurrency: who calls has the guard."""
        job = self._held(ending.hold)
        if job is None or ending.reason is None:
            return self._forget(job)
        self._bury(job, ending.reason, ending.error)
        return True

    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """See `Broker`."""
        with self._guard:
            now = time.time()
            return [self._jobs[id].record(now) if id in self._jobs else None for id in ids]

    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """See `Broker`."""
        with self._guard:
            now = time.time()
            names = list(self._queues) if queue is None else [queue] if queue in self._queues else []
            found = [job for name in names for job in self._queues[name].in_place(place, now)]
            if place is Place.DEAD:
                found.sort(key=lambda job: (-job.due_at, -job.arrival))
            elif place is Place.SCHEDULED:
                found.sort(key=lambda job: (job.visible_at, job.arrival))
            else:
                found.sort(key=lambda job: (-job.priority, job.due_at, job.arrival))
            return [job.record(now) for job in found[offset : offset + limit]]

    def counts(self) -> Mapping[str, QueueCounts]:
        """See `Broker`."""
        with self._guard:
            now = time.time()
            return {name: queue.counts(now) for name, queue in self._queues.items()}

    def delete(self, ids: Sequence[str], *, dead_only: bool = False) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            return [self._forget(self._dead(id) if dead_only else self._idle(id)) for id in ids]

    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """See `Broker`."""
        with self._guard:
            return [self._cancel(id) for id in ids]

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """See `Broker`."""
        with self._guard:
            revived = [self._revive(id) for id in ids]
            self._guard.changed.notify_all()
            return revived

    def pause(self, queue: str) -> None:
        """See `Broker`."""
        with self._guard:
            self._paused.add(queue)

    def resume(self, queue: str) -> None:
        """See `Broker`."""
        with self._guard:
            self._paused.discard(queue)
            self._guard.changed.notify_all()

    def paused(self) -> frozenset[str]:
        """See `Broker`."""
        with self._guard:
            return frozenset(self._paused)

    def _enqueue(self, message: Message, now: float) -> bool:
        if message.id in self._jobs or self._taken.get(message.id):
            return False
        due = now + max(message.delay, 0.0) if message.due_at is None else max(message.due_at, now)
        self._jobs[message.id] = job = Job(
            message.id, message.queue, message.body, message.priority, message.remember, now, due, due
        )
        self._queues[message.queue].put(job)
        return True

    def _claim(self, queue: str, n: int, lease: float) -> list[Claim]:
        claims: list[Claim] = []
        now = time.time()
        while len(claims) < n and queue in self._queues:
            jobs = self._queues[queue]
            job = jobs.take(now)
            if job is None:
                break
            job.token = uuid4().hex
            job.attempt += 1
            job.visible_at = now + lease
            jobs.put(job)
            hold = Hold(job.id, queue, job.token)
            claims.append(
                Claim(hold, job.body, job.priority, job.attempt, job.enqueued_at, job.due_at, job.error)
            )
        return claims

    def _held(self, hold: Hold) -> Job | None:
        job = self._jobs.get(hold.id)
        return job if job is not None and job.token == hold.token else None

    def _idle(self, id: str) -> Job | None:
        job = self._jobs.get(id)
        return None if job is None or job.place(time.time()) is Place.RUNNING else job

    def _dead(self, id: str) -> Job | None:
        job = self._jobs.get(id)
        return job if job is not None and job.is_dead else None

    def _forget(self, job: Job | None) -> bool:
        if job is None:
            return False
        del self._jobs[job.id]
        self._queues[job.queue].remove(job)
        if not self._queues[job.queue].jobs:
            del self._queues[job.queue]
        if job.remember > 0:
            self._taken.put(job.id, True, time.time() + job.remember)
        return True

    def _renew(self, hold: Hold, lease: float) -> Standing:
        job = self._held(hold)
        if job is None:
            return Standing.LOST
        job.visible_at = time.time() + lease
        self._queues[job.queue].put(job)
        return Standing.CANCELLED if job.is_cancelled else Standing.HELD

    def _nack(self, back: Return) -> bool:
        job = self._held(back.hold)
        if job is None:
            return False
        due = time.time() + max(back.delay, 0.0)
        if back.keeps_place:
            job.visible_at, job.token = due, None
        else:
            job.move(due_at=due, visible_at=due)
        job.attempt -= not back.counts
        job.error = job.error if back.error is None else back.error
        self._queues[job.queue].put(job)
        return True

    def _bury(self, job: Job, reason: str, error: bytes | None) -> None:
        job.move(due_at=time.time(), visible_at=float("inf"))
        job.is_dead, job.reason = True, reason
        job.error = job.error if error is None else error
        self._queues[job.queue].put(job)

    def _cancel(self, id: str) -> CancelAnswer:
        job = self._jobs.get(id)
        if job is None or job.is_dead:
            return CancelAnswer.UNKNOWN
        if self._forget(self._idle(id)):
            return CancelAnswer.REMOVED
        job.is_cancelled = True
        return CancelAnswer.REQUESTED

    def _revive(self, id: str) -> bool:
        job = self._jobs.get(id)
        if job is None or not job.is_dead:
            return False
        now = time.time()
        job.move(due_at=now, visible_at=now)
        job.enqueued_at, job.attempt, job.reason, job.error = now, 0, "", None
        job.is_dead = job.is_cancelled = False
        self._queues[job.queue].put(job)
        return True
