"""The broker in a file. `schema.py` says what the columns mean."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

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
from bulkhead.backends.sqlite import statements
from bulkhead.backends.sqlite.file import BATCH, File
from bulkhead.backends.sqlite.schema import DEAD, READY, SCHEDULED
from bulkhead.backends.sqlite.sizes import check_size

__all__ = ["SqliteBroker"]

T = TypeVar("T")
U = TypeVar("U")

# Longest sleep in seconds towards an instant of the clock, which may be set meanwhile.
_NAP = 1.0


class SqliteBroker(Broker):
    """Jobs in the tables of a file."""

    def __init__(self, file: File, namespace: str) -> None:
        self._file = file
        self._namespace = namespace

    def close(self) -> None:
        """End the connections of this broker and of the store and registry beside it."""
        self._file.close()

    def enqueue_many(self, messages: Sequence[Message]) -> list[bool]:
        """See `Broker`."""
        for message in messages:
            check_size("the body of a job", message.body)

        def enqueue(connection: sqlite3.Connection, part: Sequence[Message]) -> list[bool]:
            now = time.time()
            return [
                connection.execute(statements.ENQUEUE, self._row(message, now)).rowcount == 1
                for message in part
            ]

        return self._change(messages, enqueue, wakes=True)

    def claim(self, queue: str, n: int, lease: float, *, wait: float = 0.0) -> list[Claim]:
        """See `Broker`."""
        deadline = time.monotonic() + wait
        while True:
            seen = self._file.version()
            # Why look first: who waits for jobs must not take the lock from those who bring them.
            ready_at = self._file.look(lambda connection: self._ready_at(connection, queue))
            if ready_at <= time.time() and (claims := self._claim(queue, n, lease)):
                return claims
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            self._file.wait_changed(seen, min(left, _NAP, max(ready_at - time.time(), 0.001)))

    def renew(self, holds: Sequence[Hold], lease: float) -> list[Standing]:
        """See `Broker`."""

        def renew(connection: sqlite3.Connection, part: Sequence[Hold]) -> list[Standing]:
            until = time.time() + lease
            rows = [
                connection.execute(statements.RENEW, (until, *self._key(hold))).fetchone() for hold in part
            ]
            return [_standing(row) for row in rows]

        return self._change(holds, renew)

    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """See `Broker`."""
        return self._change([Ending(hold) for hold in holds], self.end)

    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """See `Broker`."""

        def nack(connection: sqlite3.Connection, part: Sequence[Return]) -> list[bool]:
            now = time.time()
            return [
                connection.execute(statements.NACK, self._nack_row(back, now)).rowcount == 1 for back in part
            ]

        return self._change(returns, nack, wakes=True)

    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """See `Broker`."""

        def bury(connection: sqlite3.Connection, part: Sequence[Burial]) -> list[bool]:
            now = time.time()
            return [self._bury(connection, burial, now) for burial in part]

        return self._change(burials, bury)

    def end(self, connection: sqlite3.Connection, endings: Sequence[Ending]) -> list[bool]:
        """End claims, as part of a transaction; False where one was lost."""
        now = time.time()
        return [self._end(connection, ending, now) for ending in endings]

    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """See `Broker`."""

        def find(connection: sqlite3.Connection) -> list[Record | None]:
            now = time.time()
            query = f"{statements.RECORD} WHERE namespace = ? AND id = ?"
            rows = [connection.execute(query, (self._namespace, id)).fetchone() for id in ids]
            return [None if row is None else _record(row, now) for row in rows]

        return self._file.look(find)

    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """See `Broker`."""
        condition, order = statements.PLACES[place]
        named = "" if queue is None else "AND queue = :queue"
        # Why twice in order: the inner one sorts numbers, and not bodies, of which only those of this page are read.
        query = f"""{statements.RECORD} WHERE seq IN (
            SELECT seq FROM jobs WHERE namespace = :namespace {named} AND {condition}
            ORDER BY {order} LIMIT :limit OFFSET :offset
        ) ORDER BY {order}"""
        values = {"namespace": self._namespace, "queue": queue, "limit": limit, "offset": offset}

        def read(connection: sqlite3.Connection) -> list[Record]:
            now = time.time()
            return [_record(row, now) for row in connection.execute(query, {**values, "now": now})]

        return self._file.look(read)

    def counts(self) -> Mapping[str, QueueCounts]:
        """See `Broker`."""
        return self._file.look(self._counts)

    def delete(self, ids: Sequence[str], *, dead_only: bool = False) -> list[bool]:
        """See `Broker`."""

        def delete(connection: sqlite3.Connection, part: Sequence[str]) -> list[bool]:
            now = time.time()
            if dead_only:
                key = self._namespace
                return [self._remove(connection, id, statements.REMOVE_DEAD, (key, id)) for id in part]
            return [self._remove_idle(connection, id, now, dead_too=True) for id in part]

        return self._change(ids, delete)

    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """See `Broker`."""

        def cancel(connection: sqlite3.Connection, part: Sequence[str]) -> list[CancelAnswer]:
            now = time.time()
            return [self._cancel(connection, id, now) for id in part]

        return self._change(ids, cancel)

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """See `Broker`."""

        def revive(connection: sqlite3.Connection, part: Sequence[str]) -> list[bool]:
            now = time.time()
            return [
                connection.execute(statements.REVIVE, (now, now, self._namespace, id)).rowcount == 1
                for id in part
            ]

        return self._change(ids, revive, wakes=True)

    def pause(self, queue: str) -> None:
        """See `Broker`."""
        query = "INSERT OR IGNORE INTO paused (namespace, queue) VALUES (?, ?)"
        self._file.change(lambda connection: connection.execute(query, (self._namespace, queue)))

    def resume(self, queue: str) -> None:
        """See `Broker`."""
        query = "DELETE FROM paused WHERE namespace = ? AND queue = ?"
        self._file.change(lambda connection: connection.execute(query, (self._namespace, queue)))
        self._file.tell()

    def paused(self) -> frozenset[str]:
        """See `Broker`."""
        query = "SELECT queue FROM paused WHERE namespace = ?"
        rows = self._file.look(lambda connection: connection.execute(query, (self._namespace,)).fetchall())
        return frozenset(name for (name,) in rows)

    def _change(
        self,
        things: Sequence[T],
        work: Callable[[sqlite3.Connection, Sequence[T]], list[U]],
        *,
        wakes: bool = False,
    ) -> list[U]:
        answers = self._file.change_many(things, work)
        if wakes and things:
            self._file.tell()
        return answers

    def _end(self, connection: sqlite3.Connection, ending: Ending, now: float) -> bool:
        hold, _, reason, error = ending
        if reason is None:
            return self._remove(connection, hold.id, statements.REMOVE_HELD, self._key(hold))
        return self._bury(connection, Burial(hold, reason, error), now)

    def _bury(self, connection: sqlite3.Connection, dead: Burial, now: float) -> bool:
        values = (now, dead.reason, dead.error, *self._key(dead.hold))
        return connection.execute(statements.BURY, values).rowcount == 1

    def _row(self, message: Message, now: float) -> tuple[object, ...]:
        due = now + max(message.delay, 0.0) if message.due_at is None else max(message.due_at, now)
        state, visible = (SCHEDULED, due) if due > now else (READY, None)
        values = (message.queue, state, -message.priority, due, visible, now, message.remember, message.body)
        key = (self._namespace, message.id)
        return (*key, *values, *key, now)

    def _key(self, hold: Hold) -> tuple[str, str, str]:
        return self._namespace, hold.id, hold.token

    def _nack_row(self, back: Return, now: float) -> tuple[object, ...]:
        due = now + max(back.delay, 0.0)
        state, visible = (SCHEDULED, due) if due > now else (READY, None)
        moved = None if back.keeps_place else due
        return (state, moved, visible, int(not back.counts), back.error, *self._key(back.hold))

    def _ready_at(self, connection: sqlite3.Connection, queue: str) -> float:
        """When a job can be claimed: 0 is now, infinite when nothing but a change will bring one."""
        key = (self._namespace, queue)
        if connection.execute(statements.IS_PAUSED, key).fetchone():
            return float("inf")
        if connection.execute(statements.FIRST_READY, key).fetchone():
            return 0.0
        [visible] = connection.execute(statements.NEXT_VISIBLE, key).fetchone()
        return float("inf") if visible is None else visible

    def _claim(self, queue: str, n: int, lease: float) -> list[Claim]:
        key = (self._namespace, queue)

        def make_ready(connection: sqlite3.Connection) -> bool:
            return connection.execute(statements.MAKE_READY, (*key, time.time())).rowcount < BATCH

        def take(connection: sqlite3.Connection) -> list[Claim] | None:
            if connection.execute(statements.IS_PAUSED, key).fetchone():
                return []
            if not make_ready(connection):
                return None  # many have become due at once: others get their turn before the rest
            rows = connection.execute(statements.IN_LINE, (*key, n)).fetchall()
            until = time.time() + lease
            tokens = [os.urandom(8).hex() for _ in rows]
            connection.executemany(
                statements.TAKE, [(until, token, row[0]) for row, token in zip(rows, tokens, strict=True)]
            )
            return [_claim_of(row, queue, token) for row, token in zip(rows, tokens, strict=True)]

        while (claims := self._file.change(take)) is None:
            pass
        return claims

    def _remove(
        self, connection: sqlite3.Connection, id: str, query: str, values: tuple[object, ...]
    ) -> bool:
        row = connection.execute(query, values).fetchone()
        if row is not None and row[0] > 0:
            connection.execute(statements.REMEMBER, (self._namespace, id, time.time() + row[0]))
        return row is not None

    def _remove_idle(self, connection: sqlite3.Connection, id: str, now: float, *, dead_too: bool) -> bool:
        return self._remove(connection, id, statements.REMOVE_IDLE, (self._namespace, id, now, dead_too))

    def _cancel(self, connection: sqlite3.Connection, id: str, now: float) -> CancelAnswer:
        if self._remove_idle(connection, id, now, dead_too=False):
            return CancelAnswer.REMOVED
        if connection.execute(statements.REQUEST, (self._namespace, id)).rowcount:
            return CancelAnswer.REQUESTED
        return CancelAnswer.UNKNOWN

    def _counts(self, connection: sqlite3.Connection) -> Mapping[str, QueueCounts]:
        found: defaultdict[str, QueueCounts] = defaultdict(QueueCounts)
        now = time.time()
        key = (self._namespace,)
        for rows in (
            connection.execute(statements.COUNT_READY, key),
            connection.execute(statements.COUNT_LAPSED, (*key, now)),
        ):
            for queue, n, due in rows:
                old = found[queue]
                latency = max(old.latency_seconds, now - due)
                found[queue] = replace(old, ready=old.ready + n, latency_seconds=latency)
        for queue, state, n in connection.execute(statements.COUNT_LATER, (*key, now)):
            old = found[queue]
            found[queue] = replace(old, scheduled=n) if state == SCHEDULED else replace(old, running=n)
        for queue, n in connection.execute(statements.COUNT_DEAD, key):
            found[queue] = replace(found[queue], dead=n)
        return dict(found)


def _standing(row: tuple[int] | None) -> Standing:
    if row is None:
        return Standing.LOST
    return Standing.CANCELLED if row[0] else Standing.HELD


def _claim_of(row: tuple[Any, ...], queue: str, token: str) -> Claim:
    _, id, body, rank, attempt, enqueued, due, error = row
    return Claim(Hold(id, queue, token), body, -rank, attempt + 1, enqueued, due, error)


def _record(row: tuple[Any, ...], now: float) -> Record:
    id, queue, state, body, rank, attempt, enqueued, due, visible, reason, error, is_cancelled = row
    place = Place.READY
    if state == DEAD:
        place = Place.DEAD
    elif visible is not None and visible > now:
        place = Place.SCHEDULED if state == SCHEDULED else Place.RUNNING
    leased_until = visible if place is Place.RUNNING else None
    if place is Place.SCHEDULED:
        due = visible
    return Record(
        id,
        queue,
        place,
        body,
        -rank,
        attempt,
        enqueued,
        due,
        leased_until,
        reason,
        error,
        bool(is_cancelled),
    )
