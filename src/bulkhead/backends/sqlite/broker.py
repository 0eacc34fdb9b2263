"""The broker in a file. `schema.py` says what the columns mean."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from bulkhead.backends.base import (
    Broker,
    Burial,
    CancelAnswer,
    Claim,
    Hold,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.backends.sqlite.file import File
from bulkhead.backends.sqlite.schema import DEAD, READY, RUNNING, SCHEDULED
from bulkhead.backends.sqlite.sizes import check_size

__all__ = ["SqliteBroker"]

T = TypeVar("T")
U = TypeVar("U")

# How many things one transaction takes, so that others get their turn.
_BATCH = 1000

# Longest sleep in seconds towards an instant of the clock, which may be set meanwhile.
_NAP = 1.0

_ENQUEUE = """
INSERT INTO jobs (namespace, id, queue, state, rank, due, visible, enqueued, remember, body)
SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10
WHERE NOT EXISTS (SELECT 1 FROM taken WHERE namespace = ?1 AND id = ?2 AND until > ?8)
ON CONFLICT (namespace, id) DO NOTHING
"""

_IS_PAUSED = "SELECT 1 FROM paused WHERE namespace = ? AND queue = ?"

_FIRST_READY = f"SELECT 1 FROM jobs WHERE namespace = ? AND queue = ? AND state = {READY} LIMIT 1"

_NEXT_VISIBLE = "SELECT MIN(visible) FROM jobs WHERE namespace = ? AND queue = ? AND visible IS NOT NULL"

_MAKE_READY = f"""
UPDATE jobs SET state = {READY}, visible = NULL WHERE seq IN (
    SELECT seq FROM jobs WHERE namespace = ? AND queue = ? AND visible <= ? ORDER BY visible LIMIT {_BATCH}
)
"""

_IN_LINE = f"""
SELECT seq, id, body, rank, attempt, enqueued, due, error FROM jobs
WHERE namespace = ? AND queue = ? AND state = {READY} ORDER BY rank, due, seq LIMIT ?
"""

_TAKE = f"UPDATE jobs SET state = {RUNNING}, visible = ?, token = ?, attempt = attempt + 1 WHERE seq = ?"

# Why by token alone: a job whose lease ran out, be it READY by now, has its token until somebody claims it.
_HELD = "namespace = ? AND id = ? AND token = ?"

_RENEW = f"UPDATE jobs SET state = {RUNNING}, visible = ? WHERE {_HELD} RETURNING is_cancelled"

_NACK = f"""
UPDATE jobs SET state = ?, due = ?, visible = ?, token = NULL, attempt = attempt - ?, error = ifnull(?, error)
WHERE {_HELD}
"""

_BURY = f"""
UPDATE jobs SET state = {DEAD}, due = ?, visible = NULL, token = NULL, reason = ?, error = ifnull(?, error)
WHERE {_HELD}
"""

_REMOVE_HELD = f"DELETE FROM jobs WHERE {_HELD} RETURNING remember"

_REMOVE_IDLE = f"""
DELETE FROM jobs WHERE namespace = ? AND id = ? AND (state <> {RUNNING} OR visible <= ?) AND (state <> {DEAD} OR ?)
RETURNING remember
"""

_REQUEST = f"UPDATE jobs SET is_cancelled = 1 WHERE namespace = ? AND id = ? AND state = {RUNNING}"

_REMEMBER = "INSERT OR REPLACE INTO taken (namespace, id, until) VALUES (?, ?, ?)"

_REVIVE = f"""
UPDATE jobs SET seq = (SELECT MAX(seq) + 1 FROM jobs), state = {READY}, due = ?1, enqueued = ?1, attempt = 0, reason = '', is_cancelled = 0
WHERE namespace = ?2 AND id = ?3 AND state = {DEAD}
"""

_RECORD = """
SELECT id, queue, state, body, rank, attempt, enqueued, due, visible, reason, error, is_cancelled FROM jobs
"""

# Of each place: which jobs are in it, and their order. :now is the time.
_PLACES = {
    Place.READY: (f"(state = {READY} OR visible <= :now)", "rank, due, seq"),
    Place.SCHEDULED: (f"visible > :now AND state = {SCHEDULED}", "visible, seq"),
    Place.RUNNING: (f"visible > :now AND state = {RUNNING}", "rank, due, seq"),
    Place.DEAD: (f"state = {DEAD}", "due DESC, seq DESC"),
}

_COUNT_READY = f"""
SELECT queue, COUNT(*), MIN(due) FROM jobs INDEXED BY jobs_ready
WHERE namespace = ? AND state = {READY} GROUP BY queue
"""
_COUNT_LAPSED = (
    "SELECT queue, COUNT(*), MIN(due) FROM jobs WHERE namespace = ? AND visible <= ? GROUP BY queue"
)
_COUNT_LATER = """
SELECT queue, state, COUNT(*) FROM jobs INDEXED BY jobs_later
WHERE namespace = ? AND visible > ? GROUP BY queue, state
"""
_COUNT_DEAD = f"""
SELECT queue, COUNT(*) FROM jobs INDEXED BY jobs_dead WHERE namespace = ? AND state = {DEAD} GROUP BY queue
"""


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
            return [connection.execute(_ENQUEUE, self._row(message, now)).rowcount == 1 for message in part]

        return self._in_batches(messages, enqueue, wakes=True)

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
            rows = [connection.execute(_RENEW, (until, *self._key(hold))).fetchone() for hold in part]
            return [_standing(row) for row in rows]

        return self._in_batches(holds, renew, wakes=True)

    def ack(self, holds: Sequence[Hold]) -> list[bool]:
        """See `Broker`."""

        def ack(connection: sqlite3.Connection, part: Sequence[Hold]) -> list[bool]:
            return [self._remove(connection, hold.id, _REMOVE_HELD, self._key(hold)) for hold in part]

        return self._in_batches(holds, ack)

    def nack(self, returns: Sequence[Return]) -> list[bool]:
        """See `Broker`."""

        def nack(connection: sqlite3.Connection, part: Sequence[Return]) -> list[bool]:
            now = time.time()
            return [connection.execute(_NACK, self._nack_row(back, now)).rowcount == 1 for back in part]

        return self._in_batches(returns, nack, wakes=True)

    def bury(self, burials: Sequence[Burial]) -> list[bool]:
        """See `Broker`."""

        def bury(connection: sqlite3.Connection, part: Sequence[Burial]) -> list[bool]:
            now = time.time()
            return [
                connection.execute(_BURY, (now, dead.reason, dead.error, *self._key(dead.hold))).rowcount == 1
                for dead in part
            ]

        return self._in_batches(burials, bury)

    def find(self, ids: Sequence[str]) -> list[Record | None]:
        """See `Broker`."""

        def find(connection: sqlite3.Connection) -> list[Record | None]:
            now = time.time()
            query = f"{_RECORD} WHERE namespace = ? AND id = ?"
            rows = [connection.execute(query, (self._namespace, id)).fetchone() for id in ids]
            return [None if row is None else _record(row, now) for row in rows]

        return self._file.look(find)

    def records(
        self, place: Place, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Record]:
        """See `Broker`."""
        condition, order = _PLACES[place]
        named = "" if queue is None else "AND queue = :queue"
        # Why twice in order: the inner one sorts numbers, and not bodies, of which only those of this page are read.
        query = f"""{_RECORD} WHERE seq IN (
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

    def delete(self, ids: Sequence[str]) -> list[bool]:
        """See `Broker`."""

        def delete(connection: sqlite3.Connection, part: Sequence[str]) -> list[bool]:
            now = time.time()
            return [self._remove_idle(connection, id, now, dead_too=True) for id in part]

        return self._in_batches(ids, delete)

    def cancel(self, ids: Sequence[str]) -> list[CancelAnswer]:
        """See `Broker`."""

        def cancel(connection: sqlite3.Connection, part: Sequence[str]) -> list[CancelAnswer]:
            now = time.time()
            return [self._cancel(connection, id, now) for id in part]

        return self._in_batches(ids, cancel)

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """See `Broker`."""

        def revive(connection: sqlite3.Connection, part: Sequence[str]) -> list[bool]:
            now = time.time()
            return [connection.execute(_REVIVE, (now, self._namespace, id)).rowcount == 1 for id in part]

        return self._in_batches(ids, revive, wakes=True)

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

    def _in_batches(
        self,
        things: Sequence[T],
        work: Callable[[sqlite3.Connection, Sequence[T]], list[U]],
        *,
        wakes: bool = False,
    ) -> list[U]:
        answers: list[U] = []
        for part in _parts(things):
            answers += self._file.change(lambda connection, part=part: work(connection, part))
            if wakes:
                self._file.tell()
        return answers

    def _row(self, message: Message, now: float) -> tuple[object, ...]:
        due = now + max(message.delay, 0.0) if message.due_at is None else max(message.due_at, now)
        state, visible = (SCHEDULED, due) if due > now else (READY, None)
        rank = -message.priority
        body = message.body
        return (
            self._namespace,
            message.id,
            message.queue,
            state,
            rank,
            due,
            visible,
            now,
            message.remember,
            body,
        )

    def _key(self, hold: Hold) -> tuple[str, str, str]:
        return self._namespace, hold.id, hold.token

    def _nack_row(self, back: Return, now: float) -> tuple[object, ...]:
        due = now + max(back.delay, 0.0)
        state, visible = (SCHEDULED, due) if due > now else (READY, None)
        return (state, due, visible, int(not back.counts), back.error, *self._key(back.hold))

    def _ready_at(self, connection: sqlite3.Connection, queue: str) -> float:
        """When a job can be claimed: 0 is now, infinite when nothing but a change will bring one."""
        key = (self._namespace, queue)
        if connection.execute(_IS_PAUSED, key).fetchone():
            return float("inf")
        if connection.execute(_FIRST_READY, key).fetchone():
            return 0.0
        [visible] = connection.execute(_NEXT_VISIBLE, key).fetchone()
        return float("inf") if visible is None else visible

    def _claim(self, queue: str, n: int, lease: float) -> list[Claim]:
        key = (self._namespace, queue)

        def make_ready(connection: sqlite3.Connection) -> bool:
            return connection.execute(_MAKE_READY, (*key, time.time())).rowcount < _BATCH

        def take(connection: sqlite3.Connection) -> list[Claim] | None:
            if connection.execute(_IS_PAUSED, key).fetchone():
                return []
            if not make_ready(connection):
                return None  # many have become due at once: others get their turn before the rest
            rows = connection.execute(_IN_LINE, (*key, n)).fetchall()
            until = time.time() + lease
            tokens = [os.urandom(8).hex() for _ in rows]
            connection.executemany(
                _TAKE, [(until, token, row[0]) for row, token in zip(rows, tokens, strict=True)]
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
            connection.execute(_REMEMBER, (self._namespace, id, time.time() + row[0]))
        return row is not None

    def _remove_idle(self, connection: sqlite3.Connection, id: str, now: float, *, dead_too: bool) -> bool:
        return self._remove(connection, id, _REMOVE_IDLE, (self._namespace, id, now, dead_too))

    def _cancel(self, connection: sqlite3.Connection, id: str, now: float) -> CancelAnswer:
        if self._remove_idle(connection, id, now, dead_too=False):
            return CancelAnswer.REMOVED
        if connection.execute(_REQUEST, (self._namespace, id)).rowcount:
            return CancelAnswer.REQUESTED
        return CancelAnswer.UNKNOWN

    def _counts(self, connection: sqlite3.Connection) -> Mapping[str, QueueCounts]:
        found: defaultdict[str, QueueCounts] = defaultdict(QueueCounts)
        now = time.time()
        key = (self._namespace,)
        for rows in (
            connection.execute(_COUNT_READY, key),
            connection.execute(_COUNT_LAPSED, (*key, now)),
        ):
            for queue, n, due in rows:
                old = found[queue]
                latency = max(old.latency_seconds, now - due)
                found[queue] = replace(old, ready=old.ready + n, latency_seconds=latency)
        for queue, state, n in connection.execute(_COUNT_LATER, (*key, now)):
            old = found[queue]
            found[queue] = replace(old, scheduled=n) if state == SCHEDULED else replace(old, running=n)
        for queue, n in connection.execute(_COUNT_DEAD, key):
            found[queue] = replace(found[queue], dead=n)
        return dict(found)


def _parts(things: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), _BATCH):
        yield things[start : start + _BATCH]


def _standing(row: tuple[int] | None) -> Standing:
    if row is None:
        return Standing.LOST
    return Standing.CANCELLED if row[0] else Standing.HELD


def _claim_of(row: tuple, queue: str, token: str) -> Claim:
    _, id, body, rank, attempt, enqueued, due, error = row
    return Claim(Hold(id, queue, token), body, -rank, attempt + 1, enqueued, due, error)


def _record(row: tuple, now: float) -> Record:
    id, queue, state, body, rank, attempt, enqueued, due, visible, reason, error, is_cancelled = row
    place = Place.READY
    if state == DEAD:
        place = Place.DEAD
    elif visible is not None and visible > now:
        place = Place.SCHEDULED if state == SCHEDULED else Place.RUNNING
    leased_until = visible if place is Place.RUNNING else None
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
