"""A job's record: what is known of it, in one message that is the only authority on it.

`turn` grows whenever a job gets a new ticket, so that an old ticket is known for one. `token` names the attempt that
holds the job; without one it waits. A record that is GONE says that the job is settled or removed, and until when its
id stays taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bulkhead.backends.base import Hold, Message, Place, Record
from bulkhead.backends.nats.names import token_of
from bulkhead.backends.nats.packing import pack, unpack

__all__ = ["Job", "Stage", "is_over"]


class Stage(Enum):
    """What a record says of its job."""

    ALIVE = "a"  # waits, is scheduled or runs
    DEAD = "d"  # a dead letter
    GONE = "g"  # settled or removed


@dataclass(frozen=True, slots=True)
class Job:
    """One record.

    Attributes:
        rank: Orders those that are due at the same time: microseconds, in order of arrival.
        due: When it can be claimed; of a dead letter when it was buried; of one that is gone until when
            its id is taken.
        leased: When the lease of the attempt `token` ends.
    """

    id: str
    queue: str
    priority: int
    enqueued: float
    due: float
    remember: float = 0.0
    rank: int = 0
    stage: Stage = Stage.ALIVE
    turn: int = 0
    attempt: int = 0
    token: str = ""
    leased: float = 0.0
    is_cancelled: bool = False
    reason: str = ""
    body: bytes = b""
    error: bytes | None = None

    @classmethod
    def of(cls, message: Message, now: float, place: int) -> Job:
        """Return the record of a new job, at a place in its call."""
        due = now + max(0.0, message.delay) if message.due_at is None else max(now, message.due_at)
        return cls(
            id=message.id,
            queue=message.queue,
            priority=message.priority,
            enqueued=now,
            due=due,
            remember=message.remember,
            rank=round(now * 1e6) + place,
            body=bytes(message.body),
        )

    @classmethod
    def read(cls, data: bytes) -> Job:
        """Undo `packed`."""
        facts, (body, error) = unpack(data)
        job_id, queue, priority, enqueued, due, remember, rank, stage, *rest = facts
        turn, attempt, token, leased, is_cancelled, reason = rest
        return cls(
            job_id,
            queue,
            priority,
            enqueued,
            due,
            remember,
            rank,
            Stage(stage),
            turn,
            attempt,
            token,
            leased,
            is_cancelled,
            reason,
            body or b"",
            error,
        )

    def packed(self) -> bytes:
        """Return the record as bytes."""
        facts = [
            self.id,
            self.queue,
            self.priority,
            self.enqueued,
            self.due,
            self.remember,
            self.rank,
            self.stage.value,
            self.turn,
            self.attempt,
            self.token,
            self.leased,
            self.is_cancelled,
            self.reason,
        ]
        return pack(facts, self.body, self.error)

    @property
    def key(self) -> str:
        """The token of its id in subjects."""
        return token_of(self.id)

    @property
    def hold(self) -> Hold:
        """The claim of the attempt that holds it."""
        return Hold(self.id, self.queue, self.token)

    def is_running(self, now: float) -> bool:
        """Whether an attempt holds it and the lease has not run out."""
        return self.stage is Stage.ALIVE and bool(self.token) and self.leased > now

    def place(self, now: float) -> Place | None:
        """Return where it is, or None if it is gone."""
        if self.stage is Stage.GONE:
            return None
        if self.stage is Stage.DEAD:
            return Place.DEAD
        if self.is_running(now):
            return Place.RUNNING
        return Place.SCHEDULED if self.due > now else Place.READY

    def record(self, now: float) -> Record | None:
        """Return what the broker says of it, or None if it is gone."""
        place = self.place(now)
        if place is None:
            return None
        return Record(
            self.id,
            self.queue,
            place,
            self.body,
            self.priority,
            self.attempt,
            self.enqueued,
            self.due,
            self.leased if place is Place.RUNNING else None,
            self.reason,
            self.error,
            self.is_cancelled,
        )


def is_over(data: bytes, at: float) -> bool:
    """Whether a record says that its job is gone and its id free since `at`."""
    facts, _ = unpack(data)
    return bool(facts[7] == Stage.GONE.value and facts[4] <= at)
