"""SQLite files for the tests of that backend."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from bulkhead import backends
from bulkhead.backends.base import Backend

__all__ = ["OPENING", "connected", "rows"]

# How a script begins that uses the backend of `url`.
OPENING = """
import json, os, sys, time
from bulkhead import backends
from bulkhead.backends.base import *

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

backend = backends.connect({url!r})
broker, results = backend.broker, backend.results
say("ready")
"""


@contextlib.contextmanager
def connected(path: Path, options: str = "", *, quoted: str | None = None) -> Iterator[Backend]:
    """A backend of this file, which is closed in the end."""
    place = path.with_name(quoted or path.name)
    backend = backends.connect(f"sqlite:///{place}" + (f"?{options}" if options else ""))
    try:
        yield backend
    finally:
        backend.close()


def rows(path: Path, table: str) -> int:
    """How many rows a table of the file has."""
    reader = sqlite3.connect(path)
    try:
        return int(reader.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
    finally:
        reader.close()
