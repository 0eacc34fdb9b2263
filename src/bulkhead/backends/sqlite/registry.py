"""The registry in a file. Versions are counted over all keys of the file, so that none comes back."""

from __future__ import annotations

import sqlite3
import time
from itertools import takewhile

from bulkhead.backends.base import Entry, Registry
from bulkhead.backends.sqlite.file import File
from bulkhead.backends.sqlite.sizes import check_size

__all__ = ["SqliteRegistry"]

_KEPT = "(until IS NULL OR until > ?)"

_GET = f"SELECT key, value, version FROM entries WHERE namespace = ? AND key = ? AND {_KEPT}"

# Why not LIKE or GLOB: a prefix may have their signs in it. Keys that begin alike stand together.
_FROM = f"SELECT key, value, version FROM entries WHERE namespace = ? AND key >= ? AND {_KEPT} ORDER BY key"

_NEXT_VERSION = "UPDATE versions SET last = last + 1 RETURNING last"

_PUT = "INSERT OR REPLACE INTO entries (namespace, key, value, version, until) VALUES (?, ?, ?, ?, ?)"

_DELETE = "DELETE FROM entries WHERE namespace = ? AND key = ?"


class SqliteRegistry(Registry):
    """Entries in a table of a file."""

    def __init__(self, file: File, namespace: str) -> None:
        self._file = file
        self._namespace = namespace

    def get(self, key: str) -> Entry | None:
        """See `Registry`."""
        return self._file.look(lambda connection: self._get(connection, key))

    def put(
        self, key: str, value: bytes, *, expected: int | None = None, keep: float | None = None
    ) -> int | None:
        """See `Registry`."""
        check_size("a value of the registry", value)

        def put(connection: sqlite3.Connection) -> int | None:
            if not self._is_expected(connection, key, expected):
                return None
            version: int = connection.execute(_NEXT_VERSION).fetchall()[0][0]
            until = None if keep is None else time.time() + keep
            connection.execute(_PUT, (self._namespace, key, value, version, until))
            return version

        return self._file.change(put)

    def delete(self, key: str, *, expected: int | None = None) -> bool:
        """See `Registry`."""

        def delete(connection: sqlite3.Connection) -> bool:
            if self._get(connection, key) is None or not self._is_expected(connection, key, expected):
                return False
            connection.execute(_DELETE, (self._namespace, key))
            return True

        return self._file.change(delete)

    def entries(self, prefix: str) -> list[Entry]:
        """See `Registry`."""

        def read(connection: sqlite3.Connection) -> list[Entry]:
            rows = connection.execute(_FROM, (self._namespace, prefix, time.time()))
            return [Entry(*row) for row in takewhile(lambda row: row[0].startswith(prefix), rows)]

        return self._file.look(read)

    def _get(self, connection: sqlite3.Connection, key: str) -> Entry | None:
        row = connection.execute(_GET, (self._namespace, key, time.time())).fetchone()
        return None if row is None else Entry(*row)

    def _is_expected(self, connection: sqlite3.Connection, key: str, expected: int | None) -> bool:
        if expected is None:
            return True
        entry = self._get(connection, key)
        return expected == (0 if entry is None else entry.version)
