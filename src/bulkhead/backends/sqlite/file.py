"""The connections of this process to one file, and how its threads and other processes take turns.

Two connections: one that writes, under a lock, and one that reads, under another, so that a long list holds up no
claim. Why not one for each thread: SQLite lets one connection write at a time, and those that find it taken can only
sleep and try again; threads that wait for a lock are woken the moment it is free.

Guarantees:

- A change is one transaction that has the write lock from its start (BEGIN IMMEDIATE), so that what it reads stays
  true and no statement in it finds the file locked.
- Who finds the file locked by another process tries again for `busy_seconds`, with no lock of this process held, and
  then raises `BrokerUnavailable`.
- Whatever ends a process ends its transaction: the next one to open the file undoes it.
- No connection lives through a fork. Why: SQLite keeps for each file what this process has locked, and a copy of the
  process has that knowledge, but not the locks. Both sides connect anew.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from bulkhead.backends.sqlite.schema import in_transaction, prepare
from bulkhead.backends.sqlite.troubles import is_busy, translated
from bulkhead.backends.sqlite.watching import Changes
from bulkhead.errors import BrokerUnavailable

__all__ = ["BATCH", "File"]

T = TypeVar("T")
U = TypeVar("U")

# How many things one transaction takes.
BATCH = 1000

# Longest pause in seconds between two attempts to get the write lock; the shortest is a tenth of it.
_PAUSE = 0.005

# Seconds between two removals of what has expired, and how many rows of a table go at once.
_TIDY_EVERY = 1.0
_TIDY_ROWS = 500

# Bytes to which the log is cut back when it has been longer and is begun anew; and those beyond which that is forced.
_LOG_LIMIT = 16 * 2**20

# Seconds that a fork waits for a transaction of another thread to end.
_FORK_PATIENCE = 5.0

_all: weakref.WeakSet[File] = weakref.WeakSet()


@dataclass(slots=True)
class _Link:
    """One connection and the lock that its users take."""

    lock: threading.Lock
    connection: sqlite3.Connection | None = None
    inode: int = 0

    def drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class File:
    """A file with jobs. Every method may be called from any thread and in a forked copy of the process."""

    def __init__(self, path: Path, *, is_full: bool, busy_seconds: float) -> None:
        self._path = path
        self._is_full = is_full
        self._busy_seconds = busy_seconds
        self._writer = _Link(threading.Lock())
        self._reader = _Link(threading.Lock())
        self._log = path.with_name(path.name + "-wal")
        self._changes = Changes(self._log)
        self._is_closed = False
        # Owner: who holds the lock of the writer.
        self._next_tidy = 0.0
        # Grows with each connection of the reader, whose version numbers mean nothing to the next. Owner: its lock.
        self._reader_number = 0
        # A fork has struck in the middle of a transaction: a copy of this process cannot use this.
        self._is_torn = False
        _all.add(self)

    def open(self) -> None:
        """Connect, make the tables where there are none, and see that the file can be written."""
        self.change(lambda _: None)

    def close(self) -> None:
        """End the connections; a claim that waits is woken."""
        self._is_closed = True
        self._changes.close()
        for link in (self._writer, self._reader):
            with link.lock:
                link.drop()

    def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction that may write. It may be run several times, but counts once."""

        def transact(connection: sqlite3.Connection) -> T:
            is_tidy_due = time.time() >= self._next_tidy
            with in_transaction(connection, "BEGIN IMMEDIATE"):
                result = work(connection)
                if is_tidy_due:
                    self._remove_expired(connection)
            if is_tidy_due:
                self._cut_log(connection)
            return result

        return self._patiently(self._writer, transact)

    def change_many(
        self, things: Sequence[T], work: Callable[[sqlite3.Connection, Sequence[T]], list[U]]
    ) -> list[U]:
        """Run `work` for all of these in transactions of up to 1,000, so that others get their turn between them."""
        answers: list[U] = []
        for start in range(0, len(things), BATCH):
            answers += self.change(partial(_swapped, work, things[start : start + BATCH]))
        return answers

    def look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in a transaction that only reads."""

        def transact(connection: sqlite3.Connection) -> T:
            with in_transaction(connection, "BEGIN"):
                return work(connection)

        return self._patiently(self._reader, transact)

    def version(self) -> tuple[int, int, int]:
        """Return what differs from before when anybody has changed anything meanwhile."""

        def read(connection: sqlite3.Connection) -> tuple[int, int, int]:
            told = self._changes.told
            [version] = connection.execute("PRAGMA data_version").fetchone()
            return told, self._reader_number, version

        return self._patiently(self._reader, read)

    def tell(self) -> None:
        """Wake the threads of this process that wait for a change."""
        self._changes.tell()

    def wait_changed(self, seen: tuple[int, int, int], timeout: float) -> None:
        """Wait until the version is no longer `seen`, at most `timeout` seconds."""
        self._changes.wait(self.version, seen, timeout)

    def _patiently(self, link: _Link, work: Callable[[sqlite3.Connection], T]) -> T:
        deadline = time.monotonic() + self._busy_seconds
        while True:
            try:
                with self._held(link, deadline) as connection:
                    return work(connection)
            except sqlite3.Error as error:
                if not is_busy(error) or time.monotonic() >= deadline:
                    raise translated(error, self._path) from error
            time.sleep(random.uniform(_PAUSE / 10, _PAUSE))

    @contextlib.contextmanager
    def _held(self, link: _Link, deadline: float) -> Iterator[sqlite3.Connection]:
        self._check_usable()
        if not link.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise BrokerUnavailable(
                f"{self._path}: other threads of this process kept it busy for all of busy_timeout"
            )
        try:
            self._check_usable()
            yield self._connected(link)
        except sqlite3.Error as error:
            if not is_busy(error):
                link.drop()  # the next call connects anew
            raise
        finally:
            link.lock.release()

    def _check_usable(self) -> None:
        if self._is_closed:
            raise BrokerUnavailable(f"{self._path}: this connection was closed; connect anew")
        if self._is_torn:
            raise BrokerUnavailable(
                f"{self._path} was in use by another thread when this process was forked: connect anew"
            )

    def _connected(self, link: _Link) -> sqlite3.Connection:
        self._drop_if_replaced(link)
        if link.connection is None:
            link.connection = self._connect()
            link.inode = self._path.stat().st_ino
            self._reader_number += link is self._reader
        return link.connection

    def _drop_if_replaced(self, link: _Link) -> None:
        # Why: who deletes the file under us would otherwise have us write to what nobody can open any more.
        try:
            inode = self._path.stat().st_ino
        except OSError:
            inode = 0
        if inode != link.inode:
            link.drop()

    def _connect(self) -> sqlite3.Connection:
        # Why 0: waiting is done in `_patiently`, with shorter pauses and no lock of this process held.
        connection = sqlite3.connect(self._path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._is_full else 'NORMAL'}")
            connection.execute(f"PRAGMA journal_size_limit = {_LOG_LIMIT}")
            prepare(connection, self._path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _remove_expired(self, connection: sqlite3.Connection) -> None:
        now = time.time()
        gone = [
            connection.execute(
                f"DELETE FROM {table} WHERE ({key}) IN "
                f"(SELECT {key} FROM {table} WHERE until <= ? ORDER BY until LIMIT {_TIDY_ROWS})",
                (now,),
            ).rowcount
            for table, key in (("taken", "namespace, id"), ("outcomes", "seq"), ("entries", "rowid"))
        ]
        self._next_tidy = now if max(gone) == _TIDY_ROWS else now + _TIDY_EVERY

    def _cut_log(self, connection: sqlite3.Connection) -> None:
        # Why: SQLite begins the log anew only in a moment without readers, which many that poll may not grant.
        with contextlib.suppress(OSError, sqlite3.OperationalError):
            if self._log.stat().st_size > 2 * _LOG_LIMIT:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _swapped(
    work: Callable[[sqlite3.Connection, Sequence[T]], list[U]],
    things: Sequence[T],
    connection: sqlite3.Connection,
) -> list[U]:
    return work(connection, things)


# One fork at a time, so that two do not wait for each other's locks.
_forking = threading.RLock()

# Owner: the thread that forks, which has `_forking`.
_held_for_fork: list[_Link] = []

# What must not be closed in a copy that a fork has made in the middle of its use.
_torn: list[sqlite3.Connection | None] = []


def _before_fork() -> None:
    _forking.acquire()
    deadline = time.monotonic() + _FORK_PATIENCE
    for file in list(_all):
        for link in (file._writer, file._reader):
            if link.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                _held_for_fork.append(link)
                link.drop()
            else:
                file._is_torn = True


def _release() -> None:
    while _held_for_fork:
        _held_for_fork.pop().lock.release()


def _in_parent() -> None:
    for file in list(_all):
        file._is_torn = False
    _release()
    _forking.release()


def _in_child() -> None:
    global _forking
    _forking = threading.RLock()
    _release()
    for file in list(_all):
        file._changes.forget_in_copy()
        if file._is_torn:
            _torn.extend(link.connection for link in (file._writer, file._reader))


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
