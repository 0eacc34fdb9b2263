"""Jobs in the memory of this process: `memory://`, for tests and for what may be gone when the process is.

`memory://` and each `memory://name` are stores of their own. All connections of a process to one store and namespace
share what is there, and it stays when they are closed. Nothing is written anywhere, and no other process sees it: a
forked copy that uses an inherited connection is told so by `BrokerUnavailable`, as its jobs would be lost; one that
connects anew has an empty store of its own.

One lock for each store and namespace guards everything in it; one condition of it wakes the claimers that wait.
"""

from __future__ import annotations

import os
import threading
from urllib.parse import urlsplit

from bulkhead import forks
from bulkhead.backends.base import Backend
from bulkhead.backends.memory.broker import MemoryBroker
from bulkhead.backends.memory.keeping import MemoryRegistry, MemoryResultStore
from bulkhead.backends.memory.locking import Guard
from bulkhead.backends.memory.settling import MemorySettler
from bulkhead.errors import ConfigError

__all__ = ["connect"]

# Key: depth of forks, name, namespace. Guarded by `_making`.
_places: dict[tuple[int, str, str], Backend] = {}
_making = threading.Lock()


def connect(url: str, namespace: str) -> Backend:
    """Return the store of this name and namespace.

    Raises:
        ConfigError: The URL has more than a name.
    """
    parts = urlsplit(url)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(
            f"url must be memory:// or memory://name, without path and options, and not {url!r}"
        )
    key = (forks.depth, parts.netloc, namespace)
    with _making:
        if key not in _places:
            guard = Guard()
            broker, results = MemoryBroker(guard), MemoryResultStore(guard)
            settler = MemorySettler(guard, broker, results)
            _places[key] = Backend(broker, results, MemoryRegistry(guard), settler=settler)
        return _places[key]


def _in_child() -> None:
    # Race: another thread of the parent may have held the lock when it forked.
    global _making
    _making = threading.Lock()
    _places.clear()


os.register_at_fork(after_in_child=_in_child)
