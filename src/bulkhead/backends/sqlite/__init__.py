"""Jobs in a file, for the processes of one machine: `sqlite:///jobs.db` (relative) or `sqlite:////var/lib/jobs.db`.

The file is made when it is not there; its folder has to be. Options of the URL:

- `synchronous=normal` (if nothing is said) or `full`. With either, a process that is killed loses nothing that a call
  has returned for. When the machine itself stops (power, kernel), `normal` may lose the last transactions, never the
  file; `full` loses nothing and waits for the disk once in each call that changes something.
- `busy_timeout=5`: seconds after which a call gives up with `BrokerUnavailable` because other processes write.

Not on a network file system: SQLite's locks and its shared memory need one machine, whose clock is the server's clock.

| file | what it holds |
|---|---|
| file.py | the connections to one file: transactions, waiting for who else writes, forks |
| schema.py | the tables, and whether a file is ours |
| statements.py | what the broker asks of SQLite |
| watching.py | waiting until anybody has changed the file |
| troubles.py | what SQLite's errors mean to the caller |
| broker.py, results.py, registry.py, settling.py | the contracts |
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from bulkhead.backends.base import Backend
from bulkhead.backends.sqlite.broker import SqliteBroker
from bulkhead.backends.sqlite.file import File
from bulkhead.backends.sqlite.registry import SqliteRegistry
from bulkhead.backends.sqlite.results import SqliteResultStore
from bulkhead.backends.sqlite.settling import SqliteSettler
from bulkhead.backends.url_options import Reader, one_of, read_options, seconds
from bulkhead.errors import ConfigError

__all__ = ["connect"]

_OPTIONS: dict[str, Reader] = {
    "synchronous": one_of("normal", "full"),
    "busy_timeout": seconds(0.001, 3600),
}


def connect(url: str, namespace: str) -> Backend:
    """Return the backend of a file.

    Raises:
        ConfigError: The URL has no path, an unknown option or a bad value; the folder does not exist; the file is no
            SQLite database, or one of another application or of a later version of bulkhead.
        BrokerUnavailable: The file cannot be opened or written.
    """
    path = _path(url)
    options = read_options(urlsplit(url).query, _OPTIONS)
    is_full = options.get("synchronous") == "full"
    file = File(path, is_full=is_full, busy_seconds=options.get("busy_timeout", 5.0))
    file.open()
    broker, results = SqliteBroker(file, namespace), SqliteResultStore(file, namespace)
    registry, settler = SqliteRegistry(file, namespace), SqliteSettler(file, broker, results)
    return Backend(broker, results, registry, settler=settler)


def _path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc or parts.fragment:
        raise ConfigError(
            f"url {url!r} must be sqlite:///relative.db or sqlite:////absolute.db: what follows two slashes is a host"
        )
    name = os.fsdecode(unquote_to_bytes(parts.path))[1:]  # a name need not be UTF-8
    if not name or name.endswith("/") or "\0" in name:
        raise ConfigError(f"url {url!r} must name a file: sqlite:///relative.db or sqlite:////absolute.db")
    if name == ":memory:":
        raise ConfigError(f"url {url!r} names no file; memory:// keeps jobs in memory")
    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"url {url!r}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise ConfigError(f"url {url!r}: {path} is a folder; name a file in it")
    return path
