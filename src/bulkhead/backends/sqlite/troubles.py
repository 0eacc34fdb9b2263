"""What SQLite's errors mean to the caller."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from bulkhead.errors import BrokerUnavailable, BulkheadError, ConfigError

__all__ = ["is_busy", "translated"]

_ADVICE = {
    sqlite3.SQLITE_BUSY: "other processes kept it locked for all of busy_timeout: write in larger batches, raise "
    "busy_timeout in the url, or see whether a process hangs in the middle of a transaction",
    sqlite3.SQLITE_FULL: "the disk is full, and nothing of this call was kept: make room",
    sqlite3.SQLITE_READONLY: "it can only be read: give this user the right to write the file and its folder, or mount "
    "the disk for writing",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: see that its folder exists, and that this user may write the file "
    "and its folder, and that the process has descriptors left",
    sqlite3.SQLITE_PERM: "the system does not allow it: see who owns the file and its folder",
    sqlite3.SQLITE_IOERR: "the disk has failed to read or write: see that it is there, has room, and is no network "
    "file system",
    sqlite3.SQLITE_CORRUPT: "it is damaged: stop all users, keep a copy, and recover it with `sqlite3 FILE "
    ".recover`, or put another file in its place",
    sqlite3.SQLITE_PROTOCOL: "its locks do not work: a network file system is no place for it",
}
_ADVICE[sqlite3.SQLITE_LOCKED] = _ADVICE[sqlite3.SQLITE_BUSY]

# Why apart: trying again does not help, and who does so for ever holds up all others.
_REFUSED_VALUES = {
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_RANGE,
    sqlite3.SQLITE_TOOBIG,
}


def is_busy(error: sqlite3.Error) -> bool:
    """Whether trying again may help: another connection holds the lock."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def translated(error: sqlite3.Error, path: Path) -> BulkheadError:
    """Return what the caller is to see instead."""
    code = _code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigError(
            f"{path} is no SQLite database: name another file in the url, or move this one away"
        )
    if code in _REFUSED_VALUES or isinstance(error, (sqlite3.DataError, sqlite3.InterfaceError)):
        return BulkheadError(f"{path} does not take one of the values of this call: {error}")
    advice = _ADVICE.get(code, "SQLite has refused")
    return BrokerUnavailable(f"{path}: {advice} ({getattr(error, 'sqlite_errorname', 'no code')}: {error})")


def _code(error: sqlite3.Error) -> int:
    # The low byte is the kind; the rest tells cases of it apart.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
