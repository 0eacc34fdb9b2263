"""The tables, and whether a file is ours.

A job's `state` says which of the indexes it is in, and `visible` when that changes by itself:

    READY      visible NULL         can be claimed, unless its queue is paused
    SCHEDULED  visible = due time   is to be READY at `visible`; `due` is earlier where it keeps its place in line
    RUNNING    visible = lease end  is to be READY at `visible`; the token stays, so that a late ack still counts
    DEAD       visible NULL

A claim makes ready what has become visible before it looks for the first in line; whoever only reads takes a job whose
`visible` is past for ready. `rank` is the negative priority, so that one index has the order of claims, and `seq` is
the order of arrival. Instants are POSIX seconds.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from bulkhead.errors import BrokerUnavailable, ConfigError

__all__ = ["DEAD", "READY", "RUNNING", "SCHEDULED", "in_transaction", "prepare"]

READY, SCHEDULED, RUNNING, DEAD = range(4)

# Grows with each change of the tables.
_VERSION = 1

# "Bulk" in ASCII; says in the file's header whose it is.
_APPLICATION = 0x42756C6B

# The first SQLite that has RETURNING.
_OLDEST = (3, 35)

_TABLES = f"""
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    queue TEXT NOT NULL,
    state INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    due REAL NOT NULL,
    visible REAL,
    token TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    enqueued REAL NOT NULL,
    remember REAL NOT NULL,
    is_cancelled INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    error BLOB,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX jobs_id ON jobs (namespace, id);
CREATE INDEX jobs_ready ON jobs (namespace, queue, rank, due) WHERE state = {READY};
CREATE INDEX jobs_later ON jobs (namespace, queue, visible, state) WHERE visible IS NOT NULL;
CREATE INDEX jobs_dead ON jobs (namespace, queue, due) WHERE state = {DEAD};

CREATE TABLE taken (
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    until REAL NOT NULL,
    PRIMARY KEY (namespace, id)
) WITHOUT ROWID;
CREATE INDEX taken_until ON taken (until);

CREATE TABLE paused (
    namespace TEXT NOT NULL,
    queue TEXT NOT NULL,
    PRIMARY KEY (namespace, queue)
) WITHOUT ROWID;

CREATE TABLE outcomes (
    seq INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    queue TEXT NOT NULL,
    task TEXT NOT NULL,
    state TEXT NOT NULL,
    value BLOB,
    error BLOB,
    attempt INTEGER NOT NULL,
    enqueued REAL NOT NULL,
    started REAL NOT NULL,
    finished REAL NOT NULL,
    keep REAL NOT NULL,
    until REAL NOT NULL
);
CREATE UNIQUE INDEX outcomes_id ON outcomes (namespace, id);
CREATE INDEX outcomes_finished ON outcomes (namespace, state, finished, queue, until);
CREATE INDEX outcomes_until ON outcomes (until);

CREATE TABLE entries (
    namespace TEXT NOT NULL,
    key TEXT NOT NULL,
    value BLOB NOT NULL,
    version INTEGER NOT NULL,
    until REAL,
    PRIMARY KEY (namespace, key)
);
CREATE INDEX entries_until ON entries (until) WHERE until IS NOT NULL;

CREATE TABLE versions (last INTEGER NOT NULL);
INSERT INTO versions VALUES (0);

PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables unless they are there. A file that is not ours is left as it is.

    Raises:
        ConfigError: The file is another application's, or was made by a later version of bulkhead.
        BrokerUnavailable: SQLite is too old, or the place of the file has no shared memory.
    """
    if sqlite3.sqlite_version_info < _OLDEST:
        raise BrokerUnavailable(
            f"sqlite:// needs SQLite {'.'.join(map(str, _OLDEST))} or later, this Python has {sqlite3.sqlite_version}"
        )
    # Race: another process may be making them at this moment; in one transaction all or none of that is seen.
    with in_transaction(connection, "BEGIN"):
        is_made = _is_made(connection, path)
    [mode] = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise BrokerUnavailable(
            f"{path}: its file system has no shared memory for SQLite's log; put it on a local disk"
        )
    if not is_made:
        _make(connection, path)


@contextlib.contextmanager
def in_transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    """Begin a transaction; commit it in the end, or roll it back when an error leaves the block."""
    # Race: a Ctrl-C may have struck where the last one was to be rolled back.
    if connection.in_transaction:
        connection.execute("ROLLBACK")
    try:
        connection.execute(begin)
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _make(connection: sqlite3.Connection, path: Path) -> None:
    # Race: another process may have begun as well; who has the lock second finds them made.
    with in_transaction(connection, "BEGIN IMMEDIATE"):
        if not _is_made(connection, path):
            for statement in _TABLES.split(";"):
                connection.execute(statement)


def _is_made(connection: sqlite3.Connection, path: Path) -> bool:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    [application] = connection.execute("PRAGMA application_id").fetchone()
    if application != _APPLICATION:
        if version or application or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ConfigError(
                f"{path} is the database of another application: name another file in the url, bulkhead makes it"
            )
        return False
    if version > _VERSION:
        raise ConfigError(
            f"{path} was made by a later version of bulkhead (tables of version {version}, this one knows {_VERSION}): "
            "install that version, or name another file in the url"
        )
    return True
