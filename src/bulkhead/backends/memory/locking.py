"""The lock of a store, and who may take it."""

from __future__ import annotations

import threading
from types import TracebackType

from bulkhead import forks
from bulkhead.errors import BrokerUnavailable

__all__ = ["Guard"]


class Guard:
    """A lock and its condition, which a forked copy of the process cannot take."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self._depth = forks.depth

    def __enter__(self) -> None:
        # Race: in a copy the lock may be held by a thread that the copy does not have, so it is not even tried.
        if forks.depth != self._depth:
            raise BrokerUnavailable(
                "memory:// keeps jobs in the process that has connected, and this is a forked copy of it, whose jobs "
                "nobody would see: use sqlite://, redis:// or nats://, or enqueue in the process that has the App"
            )
        self.changed.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.changed.release()
