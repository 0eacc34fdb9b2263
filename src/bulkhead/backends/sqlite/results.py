"""The result store in a file."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bulkhead.backends.base import Outcome, OutcomeState, ResultStore
from bulkhead.backends.sqlite.file import File
from bulkhead.backends.sqlite.sizes import check_size

__all__ = ["SqliteResultStore"]

_log = logging.getLogger("bulkhead")

_COLUMNS = "id, queue, task, state, value, error, attempt, enqueued, started, finished, keep"

_VALUES = f"(namespace, until, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

# For whom no outcome can be too late: who has the claim.
_PUT = f"INSERT OR REPLACE INTO outcomes {_VALUES}"

_NEW = ", ".join(f"{column} = excluded.{column}" for column in ["until", *_COLUMNS.split(", ")])

# The condition is `is_outdated`.
_SAVE = f"""
INSERT INTO outcomes {_VALUES} ON CONFLICT (namespace, id) DO UPDATE
SET seq = (SELECT MAX(seq) + 1 FROM outcomes), {_NEW}
WHERE excluded.enqueued <> outcomes.enqueued
OR (excluded.attempt, excluded.state <> 'running') >= (outcomes.attempt, outcomes.state <> 'running')
"""

# Why casts: SQLite keeps whatever was written into a column, and one damaged row must not spoil a whole list.
_READ = ", ".join(
    f"CAST({column} AS {kind})"
    for kind, columns in (
        ("BLOB", "id queue task state value error"),  # texts too: not all that is kept as one can be decoded
        ("INTEGER", "attempt"),
        ("REAL", "enqueued started finished keep"),
    )
    for column in columns.split()
)

_STATES = {state.value.encode(): state for state in OutcomeState}

_GET = f"SELECT {_READ} FROM outcomes WHERE namespace = ? AND id = ? AND until > ?"

_DELETE = "DELETE FROM outcomes WHERE namespace = ? AND id = ? AND until > ?"

_COUNT = "SELECT CAST(state AS BLOB), COUNT(*) FROM outcomes WHERE namespace = ? AND until > ? GROUP BY state"


class SqliteResultStore(ResultStore):
    """Outcomes in a table of a file."""

    def __init__(self, file: File, namespace: str) -> None:
        self._file = file
        self._namespace = namespace

    def save_many(self, outcomes: Sequence[Outcome]) -> None:
        """See `ResultStore`."""
        self.check_sizes(outcomes)

        def save(connection: sqlite3.Connection, part: Sequence[Outcome]) -> list[None]:
            now = time.time()
            connection.executemany(_SAVE, [self._row(outcome, now) for outcome in part])
            return []

        self._file.change_many(outcomes, save)

    def check_sizes(self, outcomes: Iterable[Outcome]) -> None:
        """Raise `MessageTooLarge` when there is no room for one of these."""
        for outcome in outcomes:
            if outcome.value is not None or outcome.error is not None:
                check_size("the result of a job", outcome.value, outcome.error)

    def put(self, connection: sqlite3.Connection, outcomes: Iterable[Outcome]) -> None:
        """Keep these, whatever there is, as part of a transaction."""
        now = time.time()
        connection.executemany(_PUT, [self._row(outcome, now) for outcome in outcomes])

    def look(self, connection: sqlite3.Connection, id: str) -> Outcome | None:
        """Return what is kept, as part of a transaction."""
        row = connection.execute(_GET, (self._namespace, id, time.time())).fetchone()
        return None if row is None else _outcome(row)

    def get_many(self, ids: Sequence[str]) -> list[Outcome | None]:
        """See `ResultStore`."""

        def get(connection: sqlite3.Connection) -> list[Outcome | None]:
            now = time.time()
            rows = [connection.execute(_GET, (self._namespace, id, now)).fetchone() for id in ids]
            return [None if row is None else _outcome(row) for row in rows]

        return self._file.look(get)

    def delete(self, ids: Sequence[str]) -> list[bool]:
        """See `ResultStore`."""

        def delete(connection: sqlite3.Connection, part: Sequence[str]) -> list[bool]:
            now = time.time()
            return [connection.execute(_DELETE, (self._namespace, id, now)).rowcount == 1 for id in part]

        return self._file.change_many(ids, delete)

    def outcomes(
        self, state: OutcomeState, *, queue: str | None = None, offset: int = 0, limit: int = 100
    ) -> list[Outcome]:
        """See `ResultStore`."""
        named = "" if queue is None else "AND queue = :queue"
        query = f"""
            SELECT {_READ} FROM outcomes
            WHERE namespace = :namespace AND state = :state AND until > :now {named}
            ORDER BY finished DESC, seq DESC LIMIT :limit OFFSET :offset
        """
        values = {
            "namespace": self._namespace,
            "state": state.value,
            "now": time.time(),
            "queue": queue,
            "limit": limit,
            "offset": offset,
        }
        return self._file.look(
            lambda connection: [
                outcome for row in connection.execute(query, values) if (outcome := _outcome(row)) is not None
            ]
        )

    def counts(self) -> Mapping[OutcomeState, int]:
        """See `ResultStore`."""
        values = (self._namespace, time.time())
        rows = self._file.look(lambda connection: connection.execute(_COUNT, values).fetchall())
        return {_STATES[state]: n for state, n in rows if state in _STATES}

    def _row(self, outcome: Outcome, now: float) -> tuple[object, ...]:
        return (
            self._namespace,
            now + outcome.keep,
            outcome.id,
            outcome.queue,
            outcome.task,
            outcome.state.value,
            outcome.value,
            outcome.error,
            outcome.attempt,
            outcome.enqueued_at,
            outcome.started_at,
            outcome.finished_at,
            outcome.keep,
        )


def _outcome(row: tuple[Any, ...]) -> Outcome | None:
    texts, rest = row[:4], row[4:]
    id, queue, task, state = (text.decode(errors="replace") for text in texts)
    if texts[3] not in _STATES:
        _log.warning("the outcome of job %r is in no state that there is, and left out: %r", id, state)
        return None
    return Outcome(id, queue, task, _STATES[texts[3]], *rest)
